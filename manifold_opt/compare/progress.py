"""What a terminal shows while runs go on; where output is not a terminal, a line now and then."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

EVERY = 20.0  # seconds between lines


class Bar:
    """A progress bar with what is running and how long is left."""

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

    def begin(self, total: int) -> None:
        """There are so many steps to make."""
        self._task = self._progress.add_task("", total=total)

    def now(self, text: str) -> None:
        """What is running."""
        self._progress.update(self._task, description=text)

    def made(self, steps: int) -> None:
        """So many more steps have been made."""
        self._progress.advance(self._task, steps)


class Lines:
    """The same as plain lines, for files and pipes."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._total = self._made = 0
        self._text = ""
        self._said = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, total: int) -> None:
        """There are so many steps to make."""
        self._total = total

    def now(self, text: str) -> None:
        """What is running."""
        self._text = text

    def made(self, steps: int) -> None:
        """So many more steps have been made."""
        self._made += steps
        if time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            self._console.print(f"{100 * self._made // max(self._total, 1)} %  {self._text}", highlight=False)
