"""A progress bar for jobs that report (what is done, how many are finished, how many there are)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, one line a job elsewhere; gives the function to report to."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(job: str, done: int, total: int) -> None:
            if job not in tasks:
                tasks[job] = progress.add_task(job, total=total)
            progress.update(tasks[job], completed=done, total=total)

        yield report
