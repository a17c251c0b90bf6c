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
class PasskeySpec:
    """Passkey retrieval (Mohtashami and Jaggi 2023, arXiv 2305.16300): a number told once inside a long text, asked for
    at its end.

    Attributes:
        lengths: tokens of a prompt with its answer, at most.
        depths: where the number is told, as fractions of the text before the question.
        trials: prompts of each length and depth, with different numbers and different text around them.
        digits: of the number.
        seed: of the numbers and the text.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 4
    digits: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or len(set(self.lengths)) != len(self.lengths) or min(self.lengths) < 1:
            raise OptionError(
                f"passkey lengths {list(self.lengths)} are no lengths", "give different ones, e.g. 512,2048"
            )
        if not self.depths or any(not 0.0 <= depth <= 1.0 for depth in self.depths):
            raise OptionError(f"passkey depths {list(self.depths)} do not lie in 0 to 1", "use e.g. 0, 0.5 and 1")
        if self.trials < 1 or self.digits < 1:
            raise OptionError("a passkey test needs prompts and digits", "use at least 1 of each")


@dataclass(frozen=True)
class HarnessSpec:
    """Tasks of the lm-eval harness.

    Attributes:
        tasks: names as `lm_eval --tasks` takes them; patterns with * are allowed.
        limit: at most so many examples of each task; None for all.
        folder: more task definitions (YAML), or None.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    folder: str | None = None

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise OptionError("no lm-eval tasks named", "give names separated by commas, e.g. arc_easy,hellaswag")
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"{self.limit} examples of a task measure nothing", "use at least 1")


@dataclass(frozen=True)
class Job:
    """One run of the measuring process.

    Attributes:
        models: the original first.
        texts: what perplexity, divergence and agreement are measured on; may be empty.
        window: tokens of a window; each window predicts window - 1 of them.
        windows: at most so many windows of each text, from its start; None for all.
        long_context: tokens of the long windows of which loss is told by position; None for none.
        long_windows: at most so many long windows of each text, from its start.
        passkey: retrieval test, or None.
        harness: lm-eval tasks, or None.
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
    long_context: int | None = None
    long_windows: int = 4
    passkey: PasskeySpec | None = None
    harness: HarnessSpec | None = None
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
        if self.long_context is not None and self.long_context < 16:
            raise OptionError(f"a context of {self.long_context} tokens is not long", "use at least 16, or 8192")
        if self.long_context is not None and not self.texts:
            raise OptionError("loss by position needs a text", "give one")
        if self.long_windows < 1:
            raise OptionError(f"{self.long_windows} long windows measure nothing", "use at least 1")
        if self.dtype not in DTYPES:
            raise OptionError(f"unknown type {self.dtype!r}", f"use one of {', '.join(DTYPES)}")
        if bool(self.logits_ids) != bool(self.logits_file):
            raise OptionError("logits need both sequences and a file to go to", "give both or neither")
        for text in self.texts:
            if not 0.0 <= text.start < text.stop <= 1.0:
                raise OptionError(
                    f"{text.file}: no text between {text.start} and {text.stop}", "use 0 <= start < stop <= 1"
                )

    @property
    def tokens(self) -> int:
        """Tokens that will go through the models, all together; 0 if only the texts can tell."""
        if self.texts and self.windows is None:
            return 0
        each = len(self.texts) * (self.windows or 0) * self.window
        each += len(self.texts) * self.long_windows * (self.long_context or 0)
        if self.passkey is not None:
            each += sum(self.passkey.lengths) * len(self.passkey.depths) * self.passkey.trials
        return each * len(self.models)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence whose length was asked for; 0 for none."""
        lengths = self.passkey.lengths if self.passkey is not None else ()
        return max((self.long_context or 0, *lengths))

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
        for key, many in (("models", ModelSpec), ("texts", TextSpec)):
            values[key] = tuple(_make(many, entry) for entry in values.get(key, ()))
        for key, one in (("passkey", PasskeySpec), ("harness", HarnessSpec)):
            if values.get(key) is not None:
                fields = {name: tuple(v) if isinstance(v, list) else v for name, v in values[key].items()}
                values[key] = _make(one, fields)
        values["logits_ids"] = tuple(tuple(row) for row in values.get("logits_ids", ()))
        return _make(cls, values)


_Kind = TypeVar("_Kind")


def _make(kind: type[_Kind], values: Mapping[str, Any]) -> _Kind:
    known = set(signature(kind).parameters)
    unknown = sorted(set(values) - known)
    if unknown:
        raise OptionError(f"unknown fields {unknown} of {kind.__name__}", f"known are {', '.join(sorted(known))}")
    return kind(**values)
