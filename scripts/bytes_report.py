"""What `scripts.compare_bytes` found, as tables (rich and markdown) and pictures."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table of strings: the first column names, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def rich(self):
        from rich import box
        from rich.table import Table

        out = Table(title=self.title, box=box.SIMPLE)
        for i, column in enumerate(self.columns):
            out.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            out.add_row(*row)
        return out

    def markdown(self) -> str:
        lines = [self.columns, ("---", *("---:",) * (len(self.columns) - 1)), *self.rows]
        return f"{self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def tables(report: dict[str, Any]) -> list[Sheet]:
    """One for each task that has rows, and one by language where sentences are aligned."""
    rows = {row["name"]: row for row in report["rows"]}
    spans = [row for row in rows.values() if row["task"] == "hidden spans" and row["start"]]
    decoders = [row for row in rows.values() if row["task"] == "next byte"]
    out = []
    if spans:
        out.append(_spans(spans, rows.get("ByT5")))
    if decoders:
        out.append(_decoders(decoders, rows.get("plain")))
    if spans and all(d["sentences"] for d in report["domains"].values()):
        out.append(_languages(spans, report["domains"]))
    return out


def mean_and_error(bits: dict[str, list[float]]) -> tuple[float, float]:
    """The mean over domains of their windows' means, and its standard error."""
    parts = [np.asarray(b) for b in bits.values()]
    error = np.sqrt(sum(p.var(ddof=1) / len(p) for p in parts)) / len(parts)
    return float(np.mean([p.mean() for p in parts])), float(error)


def difference(row: Row, base: Row) -> tuple[float, float]:
    """How many bits more than `base`, and the standard error of that, window by window."""
    return mean_and_error({d: list(np.asarray(b) - base["bits"][d]) for d, b in row["bits"].items()})


def deleted(row: Row) -> float:
    return 1 - float(np.mean(list(row["kept"].values())))


def _against(row: Row, base: Row | None) -> tuple[str, str]:
    if base is None or row is base:
        return "", ""
    more, error = difference(row, base)
    return f"{more:+.3f} ± {error:.3f}", f"{more / mean_and_error(base['bits'])[0]:+.1%}"


def _ms(row: Row, what: str) -> str:
    return f"{row['ms'][what]:.1f}" if "ms" in row else ""


def _spans(rows: list[Row], base: Row | None) -> Sheet:
    out = []
    for row in rows:
        bits, error = mean_and_error(row["bits"])
        soft = f"{np.mean(list(row['soft'].values())):.3f}" if row["soft"] else ""
        asked = f"{row['deletion']:.0%}" if row["deletion"] else ""
        gone = f"{deleted(row):.1%}" if row["deletion"] else ""
        cost = row["flops"]["forward"]
        share = f"{cost / base['flops']['forward']:.2f}" if base else ""
        width = f"{row['width']}, {row['fullest']}"
        out.append(
            (row["name"], asked, gone, f"{bits:.3f} ± {error:.3f}", *_against(row, base), soft, width,
             f"{cost / 1e6:.1f}", share, _ms(row, "forward"), _ms(row, "step"))
        )  # fmt: skip
    columns = (
        "", "asked", "deleted", "bits per byte", "more than ByT5", "in %", "soft", "width, fullest", "MFLOP", "of ByT5's",
        "ms", "step, ms",
    )  # fmt: skip
    return Sheet("Hidden spans: held-out bits per hidden byte, deletion hard", columns, out)


def _decoders(rows: list[Row], base: Row | None) -> Sheet:
    out = []
    for row in rows:
        bits, error = mean_and_error(row["bits"])
        each = 1 / max(1 - deleted(row), 1e-9)
        out.append(
            (row["name"], f"{bits:.3f} ± {error:.3f}", *_against(row, base), f"{each:.2f}", f"{row['parameters']:,}",
             f"{row['flops']['step'] / 1e6:.1f}", f"{row['flops']['xla_step'] / 1e6:.1f}", _ms(row, "forward"),
             _ms(row, "step"))
        )  # fmt: skip
    columns = (
        "", "bits per byte", "more than plain", "in %", "bytes per position", "parameters", "MFLOP", "XLA's", "ms", "step, ms"
    )  # fmt: skip
    return Sheet("Next byte: held-out bits per byte", columns, out)


def _languages(rows: list[Row], domains: dict[str, dict[str, int]]) -> Sheet:
    gated = [row for row in rows if row["deletion"]]
    columns = ("", "bytes a sentence", *(row["name"] for row in rows), *(f"{r['name']}, deleted" for r in gated))
    columns = (*columns, *(f"{row['name']}, kept a sentence" for row in gated if not row["at_random"]))
    out = []
    for name, d in domains.items():
        size = d["heldout"] / d["sentences"]
        bits = [f"{np.mean(row['bits'][name]):.3f}" for row in rows]
        gone = [f"{1 - row['kept'][name]:.1%}" for row in gated]
        kept = [f"{size * row['kept'][name]:.0f}" for row in gated if not row["at_random"]]
        out.append((name, f"{size:.0f}", *bits, *gone, *kept))
    mean = [f"{mean_and_error(row['bits'])[0]:.3f}" for row in rows]
    out.append(("mean", "", *mean, *(f"{deleted(row):.1%}" for row in gated), *("" for r in gated if not r["at_random"])))
    return Sheet("By language, on the held-out parallel sentences: bits per hidden byte", columns, out)


def write(report: dict[str, Any], out: pathlib.Path) -> None:
    """OUT/bytes.md and OUT/bytes.png."""
    (out / "bytes.md").write_text("\n".join(sheet.markdown() for sheet in tables(report)), encoding="utf-8")
    picture(report["rows"], out / "bytes.png")


COLOURS = ("#444444", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito


def picture(rows: list[Row], path: pathlib.Path) -> None:
    """Held-out bits per byte against bytes seen, a panel for each task; and against the share of bytes that is deleted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    gated = any(row["deletion"] for row in rows)
    figure = Figure(figsize=(4.2 * (len(tasks) + gated), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.ravel(figure.subplots(1, len(tasks) + gated))
    for axis, task in zip(axes, tasks, strict=False):
        curves(axis, [row for row in rows if row["task"] == task])
        axis.set(title=task, xlabel="million bytes seen", ylabel="held-out bits per byte")
    if gated:
        deletion(axes[-1], rows)
        axes[-1].set(title="deletion", xlabel="bytes deleted, %", ylabel="held-out bits per hidden byte")
    for axis in axes:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def curves(axis: Any, rows: list[Row]) -> None:
    """A line for each row, from where the row that it continues ends."""
    named = {row["name"]: row for row in rows}
    for row, colour in zip(rows, COLOURS * 2, strict=False):
        before = named[row["start"]]["curve"][-1:] if row["start"] in named else []
        seen = before[0]["bytes"] if before else 0
        x = [*(p["bytes"] / 1e6 for p in before), *((seen + p["bytes"]) / 1e6 for p in row["curve"])]
        y = [p["bits"] for p in [*before, *row["curve"]]]
        axis.plot(x, y, "--" if row["at_random"] else "-", color=colour, marker=".", linewidth=1, label=row["name"])


def deletion(axis: Any, rows: list[Row]) -> None:
    """MrT5, chance, and ByT5 which deletes none."""
    kinds = {"MrT5": [r for r in rows if r["deletion"] and not r["at_random"]], "random": [r for r in rows if r["at_random"]]}
    for (name, line), colour in zip(kinds.items(), COLOURS[1:], strict=False):
        if points := sorted((deleted(r), *mean_and_error(r["bits"])) for r in line):
            x, y, e = zip(*points, strict=True)
            axis.errorbar([100 * v for v in x], y, e, color=colour, marker=".", linewidth=1, capsize=2, label=name)
    if base := next((r for r in rows if r["name"] == "ByT5"), None):
        axis.axhline(mean_and_error(base["bits"])[0], color="black", linestyle=":", label="ByT5")
