"""Broken and dangerous models through the command line: exit 1, a message and a hint, nothing written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import hostile
from tests.cli.helpers import Run, entries

CASES = [pytest.param(case, id=case.name) for case in hostile.CASES]


@pytest.mark.parametrize("case", CASES)
def test_inspect_and_convert_refuse(cli: Run, tmp_path: Path, case: hostile.Hostile) -> None:
    model = hostile.make(case.name, tmp_path / "model")
    before = entries(tmp_path)
    arguments = ["convert", model, "--to", "mla", "--kv-keep", "0.5", "-o", tmp_path / "out"]
    arguments += ["--calib-tokens", "64", "--context", "16"]
    commands = [arguments] if case.on_read else [arguments, ["inspect", model]]
    for command in commands:
        outcome = cli(*command)
        assert outcome.code == 1, outcome.err
        error = next(line for line in outcome.err.splitlines() if line.startswith("error: "))
        hint = next(line for line in outcome.err.splitlines() if line.startswith("hint: "))
        assert re.search(case.message, error)
        assert re.search(case.hint, hint)
        assert outcome.out == ""
        assert entries(tmp_path) == before
