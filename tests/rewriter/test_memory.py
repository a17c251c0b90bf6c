"""Freed memory goes back to the system, and where the C library cannot do that nothing happens."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from attnopt.rewriter.memory import give_back


def test_it_asks_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=asked.append))
    give_back()
    assert asked == [0]


def test_other_c_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    give_back()
