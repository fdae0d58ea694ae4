"""Which bytes a model deletes from a page of text: coloured in the terminal, and as a page of HTML with every gate's value.

    python -m scripts.show_bytes --checkpoint runs/quickstart/base --file README.md --out runs/quickstart/deletions.html

Kept bytes are plain; deleted ones are pale and struck through, so that the picture does not rest on colour.
"""

import dataclasses
import html
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import words
from models import mrt5
from scripts import data, state


@dataclasses.dataclass
class Flags:
    """What to show."""

    checkpoint: pathlib.Path
    """An Orbax checkpoint of parameters; model.json lies beside it."""
    out: pathlib.Path = pathlib.Path("runs/quickstart/deletions.html")
    file: pathlib.Path | None = None
    """The page. Without one: the beginnings of held-out prose and of held-out code."""
    bytes: int = 4096
    """How much of the page to read."""
    inputs: int = 128
    """Bytes that the encoder reads at once, as in training."""


def gates(config: mrt5.MrT5Config, params: state.Params, text: bytes, inputs: int) -> np.ndarray:
    """The gate of every byte; the text is read in pieces of `inputs`."""
    pieces = max(-(-len(text) // inputs), 1)
    ids = np.zeros(pieces * inputs, np.int32)
    ids[: len(text)] = words.to_ids(text)

    def one(ids: jax.Array) -> jax.Array:
        return state.to_model(config, params).encode(ids).gate

    return np.asarray(jax.jit(one)(jnp.asarray(ids.reshape(pieces, inputs)))).reshape(-1)[: len(text)]


def characters(text: bytes, gate: np.ndarray) -> list[tuple[str, float]]:
    """Characters with the highest gate of their bytes: a character is gone when all its bytes are."""
    out, at = [], 0
    for char in text.decode("utf-8", "replace"):
        width = 1 if char == "\ufffd" and text[at : at + 3] != b"\xef\xbf\xbd" else len(char.encode())
        out.append((char, float(gate[at : at + width].max(initial=-np.inf))))
        at += width
    return out


def page(chars: list[tuple[str, float]], threshold: float, title: str) -> str:
    """The picture as one HTML file that needs nothing else."""
    deleted = np.mean([g <= threshold for _, g in chars]) if chars else 0.0
    spans = []
    for char, gate in chars:
        shown = "↵\n" if char == "\n" else html.escape(char)
        kind = "d" if gate <= threshold else "k"
        spans.append(f'<span class="{kind}" title="gate {gate:.1f}">{shown}</span>')
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; background: #fff }}
pre {{ font: 15px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
.k {{ color: #111 }}
.d {{ color: #8a5a00; background: #fbe8c8; text-decoration: line-through; text-decoration-thickness: 1px; opacity: .75 }}
span:hover {{ outline: 2px solid #0072b2 }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<p><span class="k">Plain</span>: kept. <span class="d">Struck through</span>: deleted, {deleted:.1%} of the characters.
Hover for the gate: 0 stays, {2 * threshold:g} is gone, {threshold:g} is the threshold.</p>
<pre>{"".join(spans)}</pre>
</body></html>
"""


def show(flags: Flags) -> tuple[list[tuple[str, float]], float]:
    """Write the HTML; return the characters with their gates, and the threshold."""
    if flags.file is not None and not flags.file.is_file():
        raise ValueError(f"show_bytes: there is no file {flags.file}.")
    config = state.load_config(flags.checkpoint.parent / "model.json")
    params = state.load_params(flags.checkpoint, state.make_mesh(1, len(jax.devices())), config)
    if flags.file is None:
        half = flags.bytes // 2
        text = b"\n\n".join(data.load(domain).heldout[:half].tobytes() for domain in data.DOMAINS)
    else:
        text = flags.file.read_bytes()[: flags.bytes]
    chars = characters(text, gates(config, params, text, flags.inputs))
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(page(chars, config.threshold, f"Bytes that {flags.checkpoint.name} deletes"), encoding="utf-8")
    return chars, config.threshold


def coloured(chars: list[tuple[str, float]], threshold: float, limit: int = 1200):
    """The first characters as rich text for the terminal."""
    from rich.text import Text

    out = Text()
    for char, gate in chars[:limit]:
        out.append(char, style="strike dim yellow" if gate <= threshold else "bold")
    return out


def main(flags: Flags) -> None:
    from rich.console import Console

    chars, threshold = show(flags)
    console = Console()
    console.print(coloured(chars, threshold))
    deleted = sum(g <= threshold for _, g in chars) / max(len(chars), 1)
    console.print(
        f"\nStruck through: deleted, {deleted:.1%} of {len(chars)} characters. All of it: {flags.out}", highlight=False
    )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Flags, description=__doc__))
