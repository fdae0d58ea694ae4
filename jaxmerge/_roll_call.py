"""Who takes part in a run of several processes: each names itself to the first over one TCP port, before JAX waits for anybody.

`jax.distributed.initialize` waits until everybody is there, and then says no more than that somebody was not.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import NamedTuple

COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "TPU_PROCESS_COUNT")
"""Where launchers say how many processes there are, should JAX not look."""
LINE = 1024
"""Bytes that one may say of itself, at most."""


class Party(NamedTuple):
    """Who is expected.

    Attributes:
      address: host:port of the first process.
      processes: how many there are.
      rank: which of them this is.
    """

    address: str
    processes: int
    rank: int


class Roll(NamedTuple):
    """Who came.

    Attributes:
      processes: how many were expected.
      present: {rank: host}; empty where the first one was not found.
      twice: (rank, host) of those who came under a rank that was taken.
    """

    processes: int
    present: Mapping[int, str]
    twice: tuple[tuple[int, str], ...] = ()

    @property
    def missing(self) -> list[int]:
        return [rank for rank in range(self.processes) if rank not in self.present]

    def __str__(self) -> str:
        """One line: who came, who is missing, what to do.

        Example:
          >>> print(Roll(4, {0: "a", 1: "b", 3: "d"}))
          3 of 4 hosts arrived (0 a, 1 b, 3 d); missing 2: start the same command there too, or look at why it ended
        """
        if not self.present:
            return "host 0 is not found: start the same command there too, and open its port to the others"
        came = ", ".join(f"{rank} {host}" for rank, host in sorted(self.present.items()))
        said = f"{len(self.present)} of {self.processes} hosts arrived ({came})"
        if self.missing:
            named = ", ".join(map(str, self.missing))
            said += f"; missing {named}: start the same command there too, or look at why it ended"
        for rank, host in self.twice:
            said += f"; {host} says that it is {rank}, too: each needs a rank of its own (JAX_PROCESS_ID)"
        return said


def party(environment: Mapping[str, str] = os.environ) -> Party | None:
    """What the environment says of who takes part; None if it speaks of one process.

    JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, or else what JAX finds out by itself: on Cloud TPU, under
    Slurm, Open MPI and Kubernetes.

    Raises:
      ValueError: it says half of it; or JAX would have to be asked, and this version does not say.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = (environment.get(name) for name in names)
    if any(numbers) and not (address and all(n is not None and n.isdigit() for n in numbers)):
        raise ValueError(f"several processes need all of {', '.join(names)}; got {address}, {numbers[0]} and {numbers[1]}.")
    if all(numbers):
        found = Party(str(address), *(int(str(n)) for n in numbers))
    else:
        try:
            where, processes, rank = _found_by_jax(address)
        except (ImportError, AttributeError, TypeError, ValueError) as e:
            several = next((f"{n}={c}" for n in COUNTS if (c := environment.get(n, "")).isdigit() and int(c) > 1), None)
            if not (said := f"{names[0]}={address}" if address else several):
                return None
            why = f"{said} speaks of several processes, and this version of JAX does not tell which of them this is ({e})"
            raise ValueError(f"{why}; set {', '.join(names)} in each.") from None
        if where is None or processes is None or rank is None:
            return None
        found = Party(where, processes, rank)
    if found.processes > 1 and not (0 <= found.rank < found.processes and ":" in found.address):
        raise ValueError(f"{found.rank} is no rank among {found.processes} processes, or {found.address} no host:port.")
    return found if found.processes > 1 else None


def _found_by_jax(address: str | None) -> tuple[str | None, int | None, int | None]:
    """(address, processes, rank) as JAX finds them; None each where it finds none.

    Of its public functions `jax.distributed.initialize` alone looks for them, and waits for everybody. So its own detection is
    asked, which is private and may be gone or changed in another version.
    """
    from jax._src.clusters import ClusterEnv

    where, processes, rank, _ = ClusterEnv.auto_detect_unset_distributed_params(address, None, None, None, None, 60)
    return where, processes, rank


def roll_call(party: Party, seconds: float = 60.0) -> Roll:
    """Find out who is there; all processes call it, and all learn the same. The port is free again afterwards.

    Args:
      party: who is expected.
      seconds: how long to wait.

    Raises:
      OSError: the port of the first process is taken.

    Example:
      >>> import concurrent.futures, socket
      >>> with socket.create_server(("localhost", 0)) as free:
      ...     port = free.getsockname()[1]
      >>> with concurrent.futures.ThreadPoolExecutor() as hosts:
      ...     rolls = hosts.map(lambda rank: roll_call(Party(f"localhost:{port}", 3, rank), 10.0), range(3))
      >>> [len(roll.present) for roll in rolls]
      [3, 3, 3]
    """
    host, _, port = party.address.rpartition(":")
    mine, until = (party.rank, socket.gethostname()), time.monotonic() + seconds
    if party.rank:
        return _arrive(party, (host.strip("[]"), int(port)), mine, until)
    present, twice, open_lines = dict([mine]), [], []
    both = socket.has_dualstack_ipv6()
    try:
        listening = socket.create_server(
            ("", int(port)),
            family=socket.AF_INET6 if both else socket.AF_INET,
            backlog=party.processes,
            dualstack_ipv6=both,
        )
    except OSError as e:
        raise OSError(
            f"port {port} of this host is taken ({e.strerror}); end what runs there, or choose another port."
        ) from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(listening)
        while len(present) < party.processes and (left := until - time.monotonic()) > 0:
            listening.settimeout(left)
            with contextlib.suppress(TimeoutError):
                line = stack.enter_context(listening.accept()[0])
                line.settimeout(min(left, 5.0))
                rank, host = _heard(line, party.processes)
                if rank in present:
                    twice.append((rank, host))
                elif rank is not None:
                    present[rank] = host
                open_lines.append(line)
        told = json.dumps([list(present.items()), twice]).encode() + b"\n"
        for line in open_lines:
            with contextlib.suppress(OSError):
                line.sendall(told)
                line.shutdown(socket.SHUT_WR)
                line.recv(1)  # they hang up first, which leaves the port free
    return Roll(party.processes, present, tuple(twice))


def join(seconds: float = 300.0) -> Party | None:
    """Make this process one of several, if the environment speaks of them: the roll is called, then JAX initialized.

    Returns:
      Who takes part; None where this process is alone.

    Raises:
      OSError: somebody is missing, and who. ValueError: the environment says half of it.
    """
    import jax

    mine = party()
    if mine is not None:
        roll = roll_call(mine, seconds)
        if roll.missing or roll.twice:
            raise OSError(f"{roll}.")
        jax.distributed.initialize(mine.address, mine.processes, mine.rank)
    return mine


def _arrive(party: Party, address: tuple[str, int], mine: tuple[int, str], until: float) -> Roll:
    """Call the first process until it answers; it answers when all are there, or when it has waited long enough."""
    while (left := until - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=left) as line:
                line.sendall(json.dumps(mine).encode() + b"\n")
                line.settimeout(left + 5.0)
                present, twice = json.loads(line.makefile().readline())
                return Roll(party.processes, {int(r): str(h) for r, h in present}, tuple((int(r), str(h)) for r, h in twice))
        except (OSError, ValueError):  # it is not there yet, or something else still listens there
            time.sleep(0.1)
    return Roll(party.processes, {})


def _heard(line: socket.socket, processes: int) -> tuple[int | None, str]:
    """The rank and the host that somebody says it is; None from strangers."""
    try:
        rank, host = json.loads(line.makefile().readline(LINE))
        return (rank, str(host)) if isinstance(rank, int) and 0 < rank < processes else (None, "")
    except (OSError, ValueError, TypeError):
        return None, ""
