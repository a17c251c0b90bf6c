"""Progress and tables: bars on a terminal, lines elsewhere, nothing if quiet."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from attnopt.progress import bar
from attnopt.render import RateColumn, TerminalReporter, gigabytes, output_console, percent, table


def on_terminal(quiet: bool = False) -> tuple[TerminalReporter, io.StringIO]:
    reporter = TerminalReporter(quiet=quiet, tokens=4000)
    stream = io.StringIO()
    reporter.console = Console(file=stream, force_terminal=True, width=120, highlight=False)
    return reporter, stream


def test_bars_show_what_is_done_and_how_fast() -> None:
    reporter, stream = on_terminal()
    with bar(reporter, "converting", 4, "layers") as handle:
        for _ in range(4):
            reporter.advance(handle)
        assert reporter._progress is not None
        reporter._progress.refresh()
    shown = stream.getvalue()
    assert "converting" in shown
    assert "4/4 layers" in shown
    assert "tokens/s" in shown
    assert reporter._progress is None


def test_bars_within_bars() -> None:
    reporter, stream = on_terminal()
    with bar(reporter, "outer", 2, "layers") as outer:
        with bar(reporter, "inner", 5, "steps") as inner:
            reporter.advance(inner, 5)
        reporter.advance(outer)
        assert reporter._progress is not None
        reporter._progress.refresh()
    assert "1/2 layers" in stream.getvalue()
    assert reporter._progress is None


def test_layers_become_tokens() -> None:
    reporter, _ = on_terminal()
    handle = reporter.start("converting", 4, "layers")
    assert reporter._progress is not None
    task = reporter._progress.tasks[0]
    task.finished_speed = 2.0  # layers a second; 4000 tokens go through 4 of them
    assert RateColumn(4000).render(task).plain == "2,000 tokens/s"
    assert RateColumn(0).render(task).plain == "2.0 layers/s"
    reporter.finish(handle)


def test_no_bars_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = TerminalReporter()
    with bar(reporter, "converting", 4, "layers") as handle:
        reporter.advance(handle)
    reporter.say("[bold]as it is[/bold]")
    streams = capsys.readouterr()
    assert streams.err == "[bold]as it is[/bold]\n"
    assert streams.out == ""


def test_quiet_says_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = TerminalReporter(quiet=True)
    reporter.say("nothing of this")
    reporter.warn("but [this]")
    assert capsys.readouterr().err == "warning: but [this]\n"
    quiet, stream = on_terminal(quiet=True)
    with bar(quiet, "converting", 4, "layers") as handle:
        quiet.advance(handle)
    assert stream.getvalue() == ""


def test_tables_are_not_folded_in_files() -> None:
    stream = io.StringIO()
    output_console(stream).print(table("title", ("name", "number"), [["x" * 120, "1,234"]], numbers=(1,)))
    assert "x" * 120 in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 3


def test_units() -> None:
    assert gigabytes(2_340_000_000) == "2.34 GB"
    assert gigabytes(640_000_000) == "640 MB"
    assert percent(192, 384) == "50 %"
    assert percent(1, 0) == "-"
