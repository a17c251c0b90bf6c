"""What is to be timed, as plain data that travels to the measuring process as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from attnopt.errors import OptionError
from attnopt.evaluate.job import DTYPES, ModelSpec

SCHEMA = "attnopt.timing.job/1"


@dataclass(frozen=True)
class BenchJob:
    """One run of the measuring process.

    Attributes:
        models: the original first, where there is one; every measurement is taken of one after the other.
        contexts: prompt lengths, in tokens.
        batches: sequences at once.
        steps: tokens decoded behind every prompt, each timed.
        runs: times that every prompt is read.
        dtype: type the models compute in, or "auto" for that of their weights.
        device: torch device.
    """

    models: tuple[ModelSpec, ...]
    contexts: tuple[int, ...] = (1024, 4096)
    batches: tuple[int, ...] = (1,)
    steps: int = 16
    runs: int = 3
    dtype: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if not names or len(set(names)) != len(names):
            raise OptionError("a measurement needs models with different names", "name the original first")
        for what, values, least in (
            ("context", self.contexts, 2),
            ("batch", self.batches, 1),
            ("step count", (self.steps,), 1),
            ("run count", (self.runs,), 1),
        ):
            if not values:
                raise OptionError(f"no {what} is given", f"give at least one, of at least {least}")
            if min(values) < least:
                raise OptionError(f"a {what} of {min(values)} cannot be timed", f"use at least {least}")
        if self.dtype not in ("auto", *DTYPES):
            raise OptionError(f"unknown type {self.dtype!r}", f"use one of auto, {', '.join(DTYPES)}")

    def largest(self, model: ModelSpec) -> BenchJob:
        """The largest case of this job for one model, read once: what its memory is measured with."""
        return replace(
            self, models=(model,), contexts=(max(self.contexts),), batches=(max(self.batches),), runs=1, steps=1
        )

    @property
    def tokens(self) -> int:
        """Tokens that go through models."""
        per_case = sum(self.batches) * sum(self.contexts) * self.runs
        return len(self.models) * (per_case + sum(self.batches) * len(self.contexts) * self.steps)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BenchJob:
        """Inverse of `to_json`.

        Raises:
            OptionError: another schema.
        """
        if data.get("schema") != SCHEMA:
            raise OptionError(f"this is no job of the bench (schema {data.get('schema')!r})", f"expected {SCHEMA}")
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in data.items() if key != "schema"
        }
        values["models"] = tuple(ModelSpec(**entry) for entry in values["models"])
        return cls(**values)
