"""Calibration text: windows of token ids from files, or sampled from the model itself.

Every Calibration holds two disjoint pools. `windows` are for statistics, `selection` is for choosing between results
(rank against rotary width, stopping a fit). Text on which a result is reported belongs to neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnopt.errors import OptionError, SourceError, UnsupportedError
from attnopt.progress import Reporter, Silent, bar
from attnopt.rewriter.precision import multiplies_bfloat16

if TYPE_CHECKING:
    from attnopt.rewriter.source import ModelSource

#: Of these many windows, one is kept for selection.
SELECTION_EVERY = 8

#: No more than this is read of one file: tokenising more takes minutes and the windows are spread over it anyway.
MAX_FILE_BYTES = 16 << 20

#: Sequences sampled side by side at most, and what their caches may take together. A larger batch reads the weights
#: less often, but a large model's caches soon outgrow the model itself.
SAMPLING_BATCH = 64
SAMPLING_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Calibration:
    """Token windows to calibrate with.

    Attributes:
        windows: int64 [n, context], for statistics.
        selection: int64 [m, context], disjoint from `windows`, for choosing between results.
        source: "self", or the file names.
        sha256: hash of all token ids and of how they are divided.
        seed: of the sampling.
        recovery: int64 [k, context], disjoint from both, to learn from; None if no pass asked for it.
        recovery_written: how many of those windows the model wrote.
    """

    windows: Tensor
    selection: Tensor
    source: str
    sha256: str
    seed: int
    recovery: Tensor | None = None
    recovery_written: int = 0

    @property
    def context(self) -> int:
        """Tokens in a window."""
        return self.windows.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens in both pools."""
        return self.windows.numel() + self.selection.numel()

    def with_recovery(self, written: Tensor) -> Calibration:
        """With windows [n, context] to learn from that the model wrote, behind those that are there."""
        there = self.windows[:0] if self.recovery is None else self.recovery
        return replace(self, recovery=torch.cat([there, written]), recovery_written=len(written))


def divide(ids: Tensor, source: str, seed: int) -> Calibration:
    """Divide windows [n, context] into the two pools, the selection spread evenly over the text.

    Raises:
        OptionError: if there are fewer than two windows.
    """
    n = ids.shape[0]
    if n < 2:
        raise OptionError(
            f"calibration needs at least two windows of text, one of them to choose by; {n} given",
            "give more text or tokens (--calib, --calib-tokens) or a shorter --context",
        )
    held = max(1, n // SELECTION_EVERY)
    chosen = torch.tensor(sorted({(2 * i + 1) * n // (2 * held) for i in range(held)}))
    rest = torch.ones(n, dtype=torch.bool)
    rest[chosen] = False
    windows, selection = ids[rest].long().contiguous(), ids[chosen].long().contiguous()
    digest = hashlib.sha256(repr((tuple(windows.shape), tuple(selection.shape))).encode())
    for pool in (windows, selection):
        digest.update(pool.numpy().astype("<i8").tobytes())
    return Calibration(windows, selection, source, digest.hexdigest(), seed)


def from_files(
    tokenizer: Any, files: Sequence[str | Path], tokens: int, context: int, seed: int = 0, recovery: int = 0
) -> Calibration:
    """Windows of the text in files, spread evenly over each; every file gives as many as it can of an equal share.

    A window starts with what the tokenizer puts before a text (a BOS or CLS token, or nothing) and ends with what it
    puts behind (a SEP token): the model expects them, and attention sinks sit there.

    Args:
        tokenizer: the model's.
        files: plain UTF-8 text.
        tokens: at most this many in all.
        context: tokens in a window.
        seed: recorded only.
        recovery: at most this many tokens more, of other windows, for `Calibration.recovery`.

    Raises:
        SourceError: a file is missing, not UTF-8 text, or empty.
        OptionError: there is too little text for two windows, or `tokens` or `context` make no sense.
    """
    _check_sizes(tokens, context)
    frame = _text_frame(tokenizer)
    body = context - len(frame[0]) - len(frame[1])
    streams = [_cut(_token_ids(tokenizer, Path(file)), body) for file in files]
    ids, rest = _shares(streams, tokens // context)
    text = divide(_framed(ids, frame), ", ".join(Path(file).name for file in files), seed)
    return replace(text, recovery=_framed(_shares(rest, recovery // context)[0], frame)) if recovery else text


def _shares(streams: Sequence[Tensor], budget: int) -> tuple[Tensor, list[Tensor]]:
    """(at most `budget` windows, equally many of each stream as far as it has them, spread over it; what is left)."""
    # Short streams first, so that what they leave of their share goes to the longer ones; the order of text is kept.
    order = sorted(range(len(streams)), key=lambda i: len(streams[i]))
    taken: dict[int, Tensor] = {}
    rest: dict[int, Tensor] = {}
    left = budget
    for place, index in enumerate(order):
        stream = streams[index]
        count = min(len(stream), left // (len(order) - place))
        chosen = torch.zeros(len(stream), dtype=torch.bool)
        chosen[[(2 * i + 1) * len(stream) // (2 * count) for i in range(count)]] = True
        taken[index], rest[index] = stream[chosen], stream[~chosen]
        left -= count
    return torch.cat([taken[i] for i in range(len(streams))]), [rest[i] for i in range(len(streams))]


def _framed(windows: Tensor, frame: tuple[Sequence[int], Sequence[int]]) -> Tensor:
    """Windows with what the tokenizer puts before and behind a text."""
    before, behind = (torch.tensor(part, dtype=torch.long).expand(len(windows), -1) for part in frame)
    return torch.cat([before, windows, behind], dim=1)


def _check_sizes(tokens: int, context: int) -> None:
    if context < 8:
        raise OptionError(f"a context of {context} tokens is too short to calibrate with", "give --context 128 or more")
    if tokens < 2 * context:
        raise OptionError(
            f"{tokens} calibration tokens are less than two windows of {context}",
            "raise --calib-tokens or lower --context",
        )


def _text_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and behind every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return list(full[:start]), list(full[start + len(plain) :])
    return [], []


def _token_ids(tokenizer: Any, file: Path) -> list[int]:
    try:
        with file.open("rb") as handle:
            data = handle.read(MAX_FILE_BYTES)
            cut = bool(handle.read(1))
    except OSError as error:
        raise SourceError(f"cannot read calibration text {file}: {error.strerror}", "check the path") from error
    try:
        # A cut may fall inside a character; nothing else may be undecodable.
        text = data[: _last_whole_character(data)].decode() if cut else data.decode()
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{file} is not UTF-8 text (byte {error.start})", "give plain text; convert it to UTF-8 first"
        ) from error
    if not text.strip():
        raise SourceError(f"calibration text {file} is empty", "give a file with text, or leave out --calib")
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _last_whole_character(data: bytes) -> int:
    end = len(data)
    while end and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    return max(end - 1, 0)


def _cut(ids: list[int], length: int) -> Tensor:
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)


def self_sampled(
    source: ModelSource,
    tokens: int,
    context: int,
    seed: int = 0,
    *,
    device: str = "cpu",
    memory_budget: float | None = None,
    reporter: Reporter | None = None,
) -> Calibration:
    """Text that the model writes itself: sampled at temperature 1 from any first word.

    Nothing has to be downloaded, and the text follows the distribution the model was trained on, chat models' included.
    The sampling runs in bfloat16 where the machine multiplies it natively, else in float32. The same machine, seed and
    thread count give the same text.

    Args:
        source: the model; one that generates text.
        tokens, context: how much, and in windows of what length.
        seed: of the sampling.
        device: where to sample.
        memory_budget: bytes the model may take in memory; sampling needs all of it at once.
        reporter: told of the tokens sampled.

    Raises:
        UnsupportedError: if the model does not generate text or does not fit `memory_budget`.
        OptionError: if `tokens` or `context` make no sense.
    """
    _check_sizes(tokens, context)
    writer = Writer.of(source, device, memory_budget)
    return divide(writer.write(tokens // context, context, seed, reporter), "self", seed)


@dataclass(frozen=True)
class Writer:
    """A model that writes text, and what its texts begin with.

    Attributes:
        model: a causal language model of transformers, on its device.
        prefix, words: of `known_words`.
    """

    model: Any
    prefix: Sequence[int]
    words: Tensor

    @classmethod
    def of(cls, source: ModelSource, device: str = "cpu", memory_budget: float | None = None) -> Writer:
        """The source's model, loaded.

        Raises:
            UnsupportedError: as `sampler`.
        """
        return cls(sampler(source, device, memory_budget), *known_words(source))

    def write(self, count: int, length: int, seed: int, reporter: Reporter | None = None) -> Tensor:
        """Token ids [count, length]; see `sequence_starts` and `sample`."""
        starts = sequence_starts(self.prefix, self.words, count, seed)
        return sample(self.model, starts, length, seed=seed, reporter=reporter)


def sampler(source: ModelSource, device: str = "cpu", memory_budget: float | None = None) -> Any:
    """The model, ready to write text.

    Raises:
        UnsupportedError: if it does not generate text or does not fit `memory_budget`.
    """
    if not source.model_class.can_generate():
        raise UnsupportedError(
            f"{source.model_class.__name__} does not generate text, so it cannot write its own calibration text",
            "give text files with --calib FILE",
        )
    dtype = sampling_dtype(device)
    model = source.skeleton(dtype=dtype)
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if memory_budget is not None and size > memory_budget:
        raise UnsupportedError(
            f"sampling calibration text needs the whole model in memory ({size / 1e9:.1f} GB), more than the memory "
            f"budget of {memory_budget / 1e9:.1f} GB",
            "give text files with --calib FILE, which needs one layer at a time, or raise --memory-budget",
        )
    materialize(model, source, dtype, device)
    return model


def sampling_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively (measured: twice as fast), else float32."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def materialize(model: Any, source: ModelSource, dtype: torch.dtype, device: str) -> None:
    """Fill a skeleton with the source's weights; parameters that share a tensor go on sharing it."""
    loaded: dict[int, torch.nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in loaded:
                full = f"{module_name}.{name}" if module_name else name
                value = source.weights.get(full, dtype).to(device)
                loaded[id(parameter)] = torch.nn.Parameter(value, requires_grad=False)
            module._parameters[name] = loaded[id(parameter)]
    model.to(device)


def known_words(source: ModelSource) -> tuple[list[int], Tensor]:
    """(what the tokenizer puts before a text, ids of all words that are not special).

    Without a tokenizer that is nothing, and the whole vocabulary.
    """
    words = torch.arange(source.config.get_text_config().vocab_size)
    if not source.has_tokenizer:
        return [], words
    tokenizer = source.tokenizer()
    words = words[: len(tokenizer)]
    special = torch.tensor(tokenizer.all_special_ids, dtype=torch.long)
    return _text_frame(tokenizer)[0], words[~torch.isin(words, special)]


def sequence_starts(prefix: Sequence[int], words: Tensor, count: int, seed: int) -> Tensor:
    """What the sampled sequences begin with, [count, n]: what the tokenizer puts before a text, then any word.

    Sequences from the start of a document only would all begin alike, and a model trained on chats would write chats.
    A word drawn uniformly from the vocabulary leads to text of every kind (LLM-QAT, arXiv 2305.17888, section 3.1).

    Args:
        prefix, words: of `known_words`.
        count: sequences.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    first = words[torch.randint(len(words), (count, 1), generator=generator)]
    return torch.cat([torch.tensor(prefix, dtype=torch.long).expand(count, -1), first], dim=1)


@torch.inference_mode()
def sample(model: Any, prompts: Tensor, length: int, *, seed: int, reporter: Reporter | None = None) -> Tensor:
    """Sample sequences at temperature 1, side by side.

    Args:
        model: a causal language model of transformers, on its device.
        prompts: [count, n] what each sequence begins with.
        length: tokens in each, the prompt included.
        seed: of the random numbers, which are drawn on the CPU.
        reporter: told of the tokens sampled.

    Returns:
        token ids [count, length], on the CPU.

    Raises:
        UnsupportedError: if the model's logits are not finite.
    """
    reporter = reporter or Silent()
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    batch = sampling_batch(model.config, length, model.dtype.itemsize)
    rows = []
    with bar(reporter, "sampling calibration text", len(prompts) * length, "tokens") as handle:
        for given in prompts.split(batch):
            cache, ids, position = None, given, 0
            sequence = [given]
            reporter.advance(handle, given.numel())
            while position + ids.shape[1] < length:
                positions = torch.arange(position, position + ids.shape[1], device=model.device)
                step = model(
                    input_ids=ids.to(model.device),
                    position_ids=positions.expand(len(ids), -1),
                    past_key_values=cache,
                    use_cache=True,
                )
                cache, position = step.past_key_values, position + ids.shape[1]
                ids = _draw(step.logits[:, -1, :vocabulary].float().cpu(), generator)
                sequence.append(ids)
                reporter.advance(handle, len(ids))
            rows.append(torch.cat(sequence, dim=1))
    return torch.cat(rows)


def sampling_batch(config: Any, length: int, itemsize: int) -> int:
    """How many sequences to sample side by side, so that their caches stay within `SAMPLING_CACHE_BYTES`."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    per_token = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width * itemsize
    return max(1, min(SAMPLING_BATCH, SAMPLING_CACHE_BYTES // (per_token * length)))


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row [B, 1], by inverting the cumulative distribution: one random number a row, not one a word."""
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    if not torch.isfinite(total).all():
        raise UnsupportedError(
            "the model's logits are not finite, so it cannot write calibration text", "check its weights"
        )
    picked = torch.searchsorted(cumulative, torch.rand(len(logits), 1, generator=generator) * total)
    return picked.clamp(max=logits.shape[-1] - 1)
