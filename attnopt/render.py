"""How results and progress look in a terminal. Results go to stdout, everything else to stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import TaskID


class RateColumn(ProgressColumn):
    """What a bar gets done per second. For bars over layers that is calibration tokens through the whole model."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def render(self, task: Task) -> Text:
        unit = str(task.fields.get("unit", ""))
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        if unit.startswith("layer") and self.tokens and task.total:
            speed, unit = speed * self.tokens / task.total, "tokens"
        return Text(f"{speed:,.0f} {unit}/s" if speed >= 10 else f"{speed:.1f} {unit}/s", style="dim")


class TerminalReporter:
    """Progress for people: bars while stderr is a terminal, plain lines where it is not, nothing if quiet.

    Args:
        quiet: say nothing but warnings.
        tokens: how many go through the layers, so that bars over layers can show tokens per second.
    """

    def __init__(self, *, quiet: bool = False, tokens: int = 0) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.quiet = quiet
        self._rate = RateColumn(tokens)
        self._progress: Progress | None = None
        self._open: set[int] = set()

    def start(self, title: str, total: int, unit: str) -> int:
        if self.quiet or not self.console.is_terminal:
            return -1
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
                self._rate,
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=True,
            )
            self._progress.start()
        handle = self._progress.add_task(title, total=total, unit=unit)
        self._open.add(handle)
        return handle

    def advance(self, handle: int, amount: int = 1) -> None:
        if self._progress is not None and handle in self._open:
            self._progress.advance(_task(handle), amount)

    def finish(self, handle: int) -> None:
        if self._progress is None or handle not in self._open:
            return
        self._open.discard(handle)
        self._progress.remove_task(_task(handle))
        if not self._open:
            self.close()

    def say(self, line: str) -> None:
        if not self.quiet:
            self.console.print(line, markup=False)

    def warn(self, line: str) -> None:
        self.console.print(Text.assemble(("warning: ", "yellow"), line))

    def close(self) -> None:
        """Take down the bars; the terminal is as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._open.clear()


def _task(handle: int) -> TaskID:
    from rich.progress import TaskID

    return TaskID(handle)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> Table:
    """A plain table; columns listed in `numbers` are aligned to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index in numbers else "left", header_style="dim", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def output_console(stream: TextIO) -> Console:
    """A console on `stream`; as wide as needed when it is not a terminal, so that no table is folded in a file."""
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, width=200)


#: Colours of a heat map from low to high: dark blue over teal to yellow, told apart by lightness alone as well.
_HEAT = ((38, 28, 89), (48, 85, 140), (33, 145, 140), (94, 201, 97), (253, 231, 37))


def heat_maps(maps: Mapping[str, Sequence[Sequence[float]]], *, width: int = 32) -> Table:
    """Several [layer, head] maps side by side, two characters a head; NaN is blank.

    Args:
        maps: rows of values by title; each is scaled to its own range.
        width: heads shown at most; wider maps are averaged down to it.
    """
    made = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=True, header_style="bold")
    made.add_column("layer", justify="right", style="dim", no_wrap=True)
    for title in maps:
        made.add_column(title)
    grids = [[_narrowed(row, width) for row in rows] for rows in maps.values()]
    ranges = [_range(grid) for grid in grids]
    for layer in range(max((len(grid) for grid in grids), default=0)):
        cells = [_heat_row(grid[layer], *bounds) for grid, bounds in zip(grids, ranges, strict=True)]
        made.add_row(str(layer), *cells)
    if grids:
        made.add_row("", *[Text(f"{low:.3g} ... {high:.3g}", style="dim") for low, high in ranges])
    return made


def _narrowed(row: Sequence[float], width: int) -> list[float]:
    if len(row) <= width:
        return list(row)
    parts = [row[i * len(row) // width : (i + 1) * len(row) // width] for i in range(width)]
    return [sum(part) / len(part) for part in parts]


def _range(grid: Sequence[Sequence[float]]) -> tuple[float, float]:
    values = [value for row in grid for value in row if value == value]
    return (min(values), max(values)) if values else (0.0, 0.0)


def _heat_row(row: Sequence[float], low: float, high: float) -> Text:
    line = Text()
    for value in row:
        if value != value:
            line.append("  ")
            continue
        place = (value - low) / (high - low) * (len(_HEAT) - 1) if high > low else 0.0
        left = min(int(place), len(_HEAT) - 2)
        mixed = [round(a + (b - a) * (place - left)) for a, b in zip(_HEAT[left], _HEAT[left + 1], strict=True)]
        # Blocks by height too, for terminals and files without colour.
        block = " ▁▂▃▄▅▆▇█"[round(8 * place / (len(_HEAT) - 1))]
        line.append(block * 2, style=f"rgb({mixed[0]},{mixed[1]},{mixed[2]})")
    return line


def gigabytes(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def percent(part: float, whole: float) -> str:
    """A share, e.g. "50 %"."""
    return f"{100 * part / whole:.0f} %" if whole else "-"
