"""Progress output: a bar on a terminal, otherwise a line every 20 seconds."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

EVERY = 20.0  # seconds between lines


class Bar:
    """Progress bar with the current run and the remaining time."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, speed_estimate_period=120)
        self._task: Any = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, total: int) -> None:
        """Start, with the total number of steps."""
        self._task = self._progress.add_task("", total=total)

    def describe(self, text: str) -> None:
        """Describe the current run."""
        self._progress.update(self._task, description=text)

    def advance(self, steps: int) -> None:
        """Add a number of finished steps."""
        self._progress.advance(self._task, steps)


class Lines:
    """Progress as plain lines, for files and pipes."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._total = self._done = 0
        self._text = ""
        self._printed = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, total: int) -> None:
        """Start, with the total number of steps."""
        self._total = total

    def describe(self, text: str) -> None:
        """Describe the current run."""
        self._text = text

    def advance(self, steps: int) -> None:
        """Add a number of finished steps."""
        self._done += steps
        if time.monotonic() - self._printed >= EVERY:
            self._printed = time.monotonic()
            self._console.print(f"{100 * self._done // max(self._total, 1)} %  {self._text}", highlight=False)
