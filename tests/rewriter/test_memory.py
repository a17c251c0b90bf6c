"""Freed memory goes back to the system, and where the C library cannot do that nothing happens."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from attnopt.rewriter import interpret
from attnopt.rewriter.memory import give_back
from tests.passes.helpers import program_of


def test_it_asks_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=asked.append))
    give_back()
    assert asked == [0]


def test_other_c_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    give_back()


def test_a_layer_that_is_let_go_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = interpret.LayerRunner(program_of("llama", layers=2))
    freed = []
    monkeypatch.setattr(interpret, "give_back", lambda: freed.append(not layer._weights))
    with runner.load(runner.layers[0]) as layer:
        assert runner.layers[0].site is not None
        layer.weight(runner.layers[0].site.o.weight)
        assert not freed
    assert freed == [True], "once, and after the weights were dropped"
