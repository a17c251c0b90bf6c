"""What is to be measured, as plain data that travels to the measuring process as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from inspect import signature
from typing import Any, TypeVar

from attnopt.errors import OptionError

SCHEMA = "attnopt.evaluate.job/1"
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class ModelSpec:
    """A model to load.

    Attributes:
        name: what to call it in the report; the first model of a job is the one the others are compared with.
        path: Hugging Face model directory, or a GGUF file.
        trust_remote_code: run model code found in the directory.
    """

    name: str
    path: str
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TextSpec:
    """A text to measure on.

    Attributes:
        file: UTF-8 text file.
        wikitext: undo WikiText's marks (" @-@ " and the like) before tokenising.
        start, stop: part of the file to use, as fractions of its characters, cut at line ends.
    """

    file: str
    wikitext: bool = False
    start: float = 0.0
    stop: float = 1.0


@dataclass(frozen=True)
class Job:
    """One run of the measuring process.

    Attributes:
        models: the original first.
        texts: what perplexity, divergence and agreement are measured on; may be empty.
        window: tokens of a window; each window predicts window - 1 of them.
        windows: at most so many windows of each text, from its start; None for all.
        dtype: type the models compute in.
        device: torch device.
        prompt: text continued greedily by every model, or None.
        chat: put the prompt through the chat template, if the tokenizer has one.
        sample_tokens: tokens of the continuation.
        logits_ids: sequences (all of one length) whose logits are written to `logits_file`, for reload checks.
        logits_file: safetensors file with one tensor per model name, [sequences, length, vocabulary].
    """

    models: tuple[ModelSpec, ...]
    texts: tuple[TextSpec, ...] = ()
    window: int = 1024
    windows: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    prompt: str | None = None
    chat: bool = True
    sample_tokens: int = 40
    logits_ids: tuple[tuple[int, ...], ...] = ()
    logits_file: str | None = None

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if not names or len(set(names)) != len(names):
            raise OptionError("an evaluation needs models with different names", "name the original first")
        if self.window < 2:
            raise OptionError(f"a window of {self.window} tokens predicts nothing", "use at least 2, or 1024")
        if self.windows is not None and self.windows < 1:
            raise OptionError(f"{self.windows} windows measure nothing", "use at least 1")
        if self.dtype not in DTYPES:
            raise OptionError(f"unknown type {self.dtype!r}", f"use one of {', '.join(DTYPES)}")
        if bool(self.logits_ids) != bool(self.logits_file):
            raise OptionError("logits need both sequences and a file to go to", "give both or neither")
        for text in self.texts:
            if not 0.0 <= text.start < text.stop <= 1.0:
                raise OptionError(
                    f"{text.file}: no text between {text.start} and {text.stop}", "use 0 <= start < stop <= 1"
                )

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """Inverse of `to_json`.

        Raises:
            OptionError: another schema, or an unknown field.
        """
        if data.get("schema") != SCHEMA:
            raise OptionError(f"this is no evaluation job (schema {data.get('schema')!r})", f"expected {SCHEMA}")
        values = {key: value for key, value in data.items() if key != "schema"}
        for key, kind in (("models", ModelSpec), ("texts", TextSpec)):
            values[key] = tuple(_make(kind, entry) for entry in values.get(key, ()))
        values["logits_ids"] = tuple(tuple(row) for row in values.get("logits_ids", ()))
        return _make(cls, values)


_Kind = TypeVar("_Kind")


def _make(kind: type[_Kind], values: Mapping[str, Any]) -> _Kind:
    known = set(signature(kind).parameters)
    unknown = sorted(set(values) - known)
    if unknown:
        raise OptionError(f"unknown fields {unknown} of {kind.__name__}", f"known are {', '.join(sorted(known))}")
    return kind(**values)
