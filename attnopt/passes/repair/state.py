"""The state of a training run on disk: everything the next step depends on, so that a run killed at any moment goes on
with the same numbers.

Two slots are written in turn. A slot is two files, and a crash between them leaves one with an old record and new
tensors; the step number is in both, so that such a slot is told from a whole one, and the other slot still is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.rewriter.steps import StepStore
from attnopt.rewriter.weights import evaluate

SLOTS = ("training-0", "training-1")


@dataclass(frozen=True)
class State:
    """A moment of a run.

    Attributes:
        step: steps done.
        tensors: by name: changes, moments of the optimizer, best changes.
        record: plain data: history and what is to be known of the best.
    """

    step: int
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]


def save_state(store: StepStore, state: State, slot: int) -> int:
    """Write a slot; returns the one to write next."""
    tensors = {**state.tensors, "step": torch.tensor(state.step)}
    store.save(SLOTS[slot], tensors, {**state.record, "step": state.step})
    return (slot + 1) % len(SLOTS)


def load_state(store: StepStore) -> tuple[State | None, int]:
    """(the last whole state or None, the slot to write next)."""
    found: list[tuple[int, int, State]] = []
    for slot, name in enumerate(SLOTS):
        if name not in store.steps_done():
            continue
        try:
            values, record = store.load(name)
            tensors = {key: evaluate(value).clone() for key, value in values.items()}
        except AttnoptError:  # half written when the run was killed: the other one is whole
            continue
        if int(tensors.pop("step")) == record["step"]:
            found.append((record["step"], slot, State(record["step"], tensors, record)))
    if not found:
        return None, 0
    _, slot, state = max(found, key=lambda item: item[0])
    return state, (slot + 1) % len(SLOTS)
