"""A bar on the terminal: how far a merge is."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 0.1
"""Between two looks at a merge; it tells of every block."""


@contextlib.contextmanager
def bar(description: str) -> Iterator[Callable[..., None]]:
    """What is to be told of progress, show(p, of=""), while the bar is there; nothing is shown where nobody looks."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from jaxmerge.checkpoint._budget import show_size

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task, last = shown.add_task(description, total=None, figures=""), -1.0

        def show(p: Any, of: str = "") -> None:
            nonlocal last
            if not console.is_terminal or last <= p.seconds < last + SECONDS:  # seconds begin anew with every document
                return
            last = p.seconds
            figures = f"{p.rate / 1e9:.2f} GB/s, {p.left:.0f} s left, peak {show_size(p.peak_bytes)}"
            shown.update(task, description=f"{of}pass {p.stage}/{p.stages}", completed=p.done, total=p.total, figures=figures)

        yield show
