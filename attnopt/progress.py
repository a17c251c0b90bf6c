"""What long work reports while it runs. The command line renders it; libraries pass their own or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Reporter(Protocol):
    """Receiver of progress. `start` opens a bar and returns its handle; talk is one line of text."""

    def start(self, title: str, total: int, unit: str) -> int: ...

    def advance(self, handle: int, amount: int = 1) -> None: ...

    def finish(self, handle: int) -> None: ...

    def say(self, line: str) -> None: ...

    def warn(self, line: str) -> None: ...


class Silent:
    """A Reporter that drops everything."""

    def start(self, title: str, total: int, unit: str) -> int:
        return 0

    def advance(self, handle: int, amount: int = 1) -> None: ...

    def finish(self, handle: int) -> None: ...

    def say(self, line: str) -> None: ...

    def warn(self, line: str) -> None: ...


@contextmanager
def bar(reporter: Reporter, title: str, total: int, unit: str) -> Iterator[int]:
    """Open a progress bar for the length of a block; yields the handle for `reporter.advance`."""
    handle = reporter.start(title, total, unit)
    try:
        yield handle
    finally:
        reporter.finish(handle)
