"""What models make of a page of text, side by side: which bytes they delete, where their words begin.

    python -m scripts.show_bytes --checkpoint runs/quickstart/base --file README.md --out runs/quickstart/deletions.html
    python -m scripts.show_bytes --checkpoint runs/bytes/mrt5_50/params runs/bytes/h-net/params --splitter hat

Coloured in the terminal, and as one page of HTML that needs nothing else: point at a character and every column tells its
value there. Deleted bytes are pale and struck through, words begin with a bar, so that the picture does not rest on colour.
"""

import dataclasses
import html
import pathlib

import jax
import numpy as np
from flax import nnx

from scripts import bytes_models, reading, state
from scripts.bytes_views import Rule, View, characters, splitter, views
from scripts.refusals import refusals


@dataclasses.dataclass
class Flags:
    """What to show."""

    checkpoint: tuple[pathlib.Path, ...] = ()
    """Orbax checkpoints of parameters; model.json lies beside each. One column each."""
    splitter: tuple[Rule, ...] = ()
    """Rules that need no model; one column each."""
    out: pathlib.Path = pathlib.Path("runs/quickstart/deletions.html")
    file: pathlib.Path | None = None
    """The page. Without one: the beginnings of what was held out of each domain that the first checkpoint was trained on."""
    bytes: int = 4096
    """How much of the page to read."""
    inputs: int = 128
    """Bytes that a model reads at once, as in training."""
    patch: float = 4.5
    """Bytes in a patch, where a plain byte decoder's entropies make BLT's."""


def show(flags: Flags) -> tuple[bytes, list[View]]:
    """Write the HTML; return the text and the columns."""
    if not flags.checkpoint and not flags.splitter:
        raise ValueError("show_bytes: nothing to show; name a --checkpoint or a --splitter.")
    if flags.file is not None and not flags.file.is_file():
        raise ValueError(f"show_bytes: there is no file {flags.file}.")
    if flags.file is None:
        beside = flags.checkpoint[0].parent / "data.json" if flags.checkpoint else None
        corpora = reading.load(beside).corpora() if beside and beside.exists() else reading.corpora(())
        text = b"\n\n".join(c.heldout[: flags.bytes // len(corpora)].tobytes() for c in corpora.values())
    else:
        text = flags.file.read_bytes()[: flags.bytes]
    columns = [splitter(text, rule) for rule in flags.splitter]
    for path in flags.checkpoint:
        columns += views(name_of(path), load(path), text, inputs=flags.inputs, patch=flags.patch)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    title = flags.file.name if flags.file is not None else "Held-out text"
    flags.out.write_text(page(text, columns, title), encoding="utf-8")
    return text, columns


def load(path: pathlib.Path) -> nnx.Module:
    """The model of a checkpoint."""
    config = bytes_models.load_config(path.parent / "model.json")
    make = lambda: bytes_models.build(config, nnx.Rngs(0))
    params = state.load(path, state.make_mesh(1, len(jax.devices())), jax.eval_shape(lambda: state.to_tree(make())))
    return state.filled(nnx.eval_shape(make), params)


def name_of(path: pathlib.Path) -> str:
    return path.parent.name if path.name == "params" else path.name


STYLE = """
body { margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; background: #fff; color: #111 }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem }
h2 { font-size: 1rem; margin: 0 } h2 + p { margin: 0; color: #555; font-size: .9rem; min-height: 1.5em }
pre { font: 14px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 }
.d { color: #8a5a00; background: #fbe8c8; text-decoration: line-through; text-decoration-thickness: 1px; opacity: .75 }
.b { border-left: 2px solid #0072b2; padding-left: 1px } .o { background: #e3f0f9 }
.here { outline: 2px solid #d55e00 }
"""
SCRIPT = """
const spans = i => document.querySelectorAll(`pre > :nth-child(${i + 1})`);
const tell = (span, on) => {
  const i = [...span.parentNode.children].indexOf(span);
  spans(i).forEach(s => {
    s.classList.toggle('here', on);
    const told = s.closest('section').querySelector('p');
    told.dataset.summary ??= told.textContent;
    told.textContent = on ? s.parentNode.dataset.unit + ' ' + s.dataset.v : told.dataset.summary;
  });
};
for (const [event, on] of [['mouseover', true], ['mouseout', false]])
  document.addEventListener(event, e => e.target.matches('pre > span') && tell(e.target, on));
"""


def page(text: bytes, columns: list[View], title: str) -> str:
    """The picture as one HTML file that needs nothing else."""
    sections = "\n".join(section(text, view) for view in columns)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>Struck through: <span class="d">deleted</span>. A bar: <span class="b">a</span> <span class="b o">word</span> begins.
Point at a character for its value in every column.</p>
<main>
{sections}
</main>
<script>{SCRIPT}</script>
</body></html>
"""


def section(text: bytes, view: View) -> str:
    """One column."""
    spans, odd = [], False
    for char, marked, value in characters(text, view):
        odd ^= marked and view.kind == "words"
        kinds = ("d",) * marked if view.kind == "deletion" else ("b",) * marked + ("o",) * odd
        label = f' class="{" ".join(kinds)}"' if kinds else ""
        shown = "↵\n" if char == "\n" else html.escape(char)
        told = "none" if np.isnan(value) else f"{value:.2f}"
        spans.append(f'<span{label} data-v="{told}">{shown}</span>')
    head = f"<h2>{html.escape(view.title)}</h2><p>{html.escape(view.summary)}</p>"
    return f'<section>{head}<pre data-unit="{html.escape(view.unit)}">{"".join(spans)}</pre></section>'


GONE = "⟦⟧"
"""What stands around deleted characters where nothing can be struck through."""


def coloured(text: bytes, view: View, limit: int = 1200, *, strikes: bool = True):
    """The first characters as rich text for the terminal, or for a file or a pipe, which cannot strike anything through."""
    from rich.text import Text

    out, odd, before = Text(), False, False
    for char, marked, _ in characters(text, view)[:limit]:
        if view.kind == "deletion":
            out.append("" if strikes or marked == before else GONE[before])
            out.append(char, style="strike dim yellow" if marked else "bold")
            before = marked
            continue
        odd ^= marked
        out.append(f"|{char}" if marked else char, style="cyan" if odd else "")
    return out.append(GONE[1] if before and not strikes else "")


def main(flags: Flags) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    text, columns = show(flags)
    console = Console()
    beside = max(console.width // 40, 1)
    for i in range(0, len(columns), beside):
        table = Table(box=box.SIMPLE, expand=True)
        for view in columns[i : i + beside]:
            table.add_column(f"{view.title}\n{view.summary}", ratio=1, overflow="fold")
        table.add_row(*(coloured(text, view, strikes=console.is_terminal) for view in columns[i : i + beside]))
        console.print(table)
    gone = "Struck through" if console.is_terminal else f"Within {GONE}"
    console.print(f"{gone}: deleted; after a bar: a new word. All of it: {flags.out}", highlight=False)


if __name__ == "__main__":
    import tyro

    with refusals():
        main(tyro.cli(Flags, prog=f"python -m {__spec__.name}", description=__doc__))
