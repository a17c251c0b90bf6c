"""Exports of tiny models, each made once per test run, whichever worker asks first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from attnopt.exporting import ExportOptions, export_model
from attnopt.progress import Silent
from tests.models import save


def exported_once(factory: pytest.TempPathFactory, family: str, options: ExportOptions) -> Path:
    """The directory that `attnopt export` makes of a family. Not to be written into."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    name = "-".join(("export", family, options.format, options.attention, options.dtype))
    with FileLock(str(shared / f"{name}.lock")):
        if not (shared / name / "out").exists():
            save(family, shared / name / "model")
            export_model(shared / name / "model", shared / name / "out", options, Silent())
    return shared / name / "out"
