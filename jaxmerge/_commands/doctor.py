"""`jaxmerge doctor [CHECKPOINT ...] [--out PLACE ...]`: the device and its kernels, the hosts, what can be read and written."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, Any

ABOUT = """The device, and of each operation which implementation can run, why not, and which would be chosen.

Of checkpoints that are named: whether they can be listed, their headers and a range of a tensor read. Of places to write to
(--out): whether an object can be created, read back and removed. What fails is said with what helps. Where the environment
speaks of several processes (JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID; Cloud TPU, Slurm, Open MPI,
Kubernetes): run it in all of them, and it says who arrived and who is missing."""


@dataclasses.dataclass(frozen=True)
class Options:
    out: tuple[str, ...] = ()
    """Places where merges are to appear: directories, gs://, s3://."""
    wait: float = 60.0
    """Seconds to wait for the other hosts."""


def main(argv: Sequence[str]) -> int:
    """Run it; 0 if all is well, 1 if something was found, 2 when the arguments or the environment mean nothing."""
    checkpoints, options = tuple(argv), Options()
    if any(word.startswith("-") for word in argv):
        import tyro

        named = (
            "checkpoints",
            Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[CHECKPOINT ...]")],
            dataclasses.field(default=()),
        )
        command = dataclasses.make_dataclass("Command", [named, ("options", Options, dataclasses.field(default=options))])
        config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
        try:
            parsed: Any = tyro.cli(command, prog="jaxmerge doctor", description=ABOUT, args=list(argv), config=config)
        except SystemExit as e:
            return e.code if isinstance(e.code, int) else 2
        checkpoints, options = parsed.checkpoints, parsed.options
    try:
        well = _hosts(options.wait)
    except (OSError, ValueError) as e:
        print(f"jaxmerge: error: {e}", file=sys.stderr)
        return 2
    _machine()
    return 0 if well & _places(checkpoints, options.out) else 1


def _hosts(seconds: float) -> bool:
    """Whether all are there; said before JAX is asked anything, since it waits for those who are not."""
    from jaxmerge._roll_call import party, roll_call

    expected = party()
    if expected is None:
        return True
    print(f"hosts: {expected.processes} are expected at {expected.address}, this is {expected.rank}", flush=True)
    roll = roll_call(expected, seconds)
    print(f"hosts: {roll}", flush=True)
    return not roll.missing and not roll.twice


def _machine() -> None:
    """What runs here: versions, devices, kernels; and as whom the Hub is asked."""
    from rich.console import Console
    from rich.table import Table

    from jaxmerge._kernels import _doctor as doctor
    from jaxmerge.checkpoint import _access

    console = Console()
    asked = "not asked (HF_HUB_OFFLINE)" if _access.offline() else "with a token" if _access.token() else "without a token"
    hub = {"the Hub": f"{_access.endpoint()}, {asked}; cache {_access.cache()}"}
    for name, value in (doctor.machine() | hub).items():
        console.print(f"{name}: {value}", highlight=False)
    table = Table("operation", "implementation", "usable", "chosen at", title="bfloat16, a batch of 8 on one device")
    for row in doctor.rows():
        usable = "no: " + "; ".join(row.why) if row.why else "yes"
        table.add_row(row.op, row.implementation, usable, "all" if len(row.chosen) == row.of else ", ".join(row.chosen) or "-")
    console.print(table)
    console.print(
        "Kernels run on one device, inside of jax.shard_map, and on meshes of Explicit axes. On a mesh of Auto axes XLA runs, "
        "because a traced array does not tell its layout there.",
        highlight=False,
    )


def _places(checkpoints: Sequence[str], outputs: Sequence[str]) -> bool:
    """Whether everything that is named can be read, or written to."""
    if not checkpoints and not outputs:
        return True
    from jaxmerge.checkpoint import _probe

    well = True
    for place, probe in [*((c, _probe.read) for c in checkpoints), *((o, _probe.write) for o in outputs)]:
        for step, found, works in probe(place):
            print(f"{place}: {step}: {'' if works else 'NO: '}{found}")
            well &= works
    return well
