"""Text that a model writes itself: sampled at temperature 1, many sequences side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicCache, DynamicLayer

from attnopt.errors import UnsupportedError
from attnopt.profiles.calibration import Calibration, check_sizes, divide, text_frame
from attnopt.progress import Reporter, Silent, bar
from attnopt.rewriter.precision import multiplies_bfloat16

if TYPE_CHECKING:
    from attnopt.rewriter.source import ModelSource

#: Sequences sampled side by side at most, and what their caches may take together. A larger batch reads the weights
#: less often, but a large model's caches soon outgrow the model itself.
SAMPLING_BATCH = 64
SAMPLING_CACHE_BYTES = 1 << 30


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
    check_sizes(tokens, context)
    writer = Writer.of(source, device, memory_budget)
    return divide(writer.write(tokens // context, context, seed, reporter), "self", seed)


def self_written(
    source: ModelSource,
    tokens: int,
    context: int,
    seed: int,
    kept: Callable[[int, Callable[[], Tensor]], Tensor],
    *,
    device: str = "cpu",
    memory_budget: float | None = None,
    reporter: Reporter | None = None,
) -> Tensor:
    """More text that the model writes itself, for `RecoveryText`, in parts that can be kept: what goes side by side.

    Args:
        source, tokens, context, device, memory_budget, reporter: as for `self_sampled`.
        seed: of the calibration text, which is other text than this.
        kept: gets the number of a part and what makes it; returns the part, which it may have from an unfinished run.

    Returns:
        int64 [n, context].

    Raises:
        UnsupportedError: as `self_sampled`.
    """
    check_writes(source)
    count = -(-tokens // context)
    side_by_side = sampling_batch(source.config, context, sampling_dtype(device).itemsize)
    # Made when the first part has to be written, if one has to.
    writer = cache(partial(Writer.of, source, device, memory_budget))

    def write(part: int) -> Tensor:
        own = (seed * 1_000_003 + part + 1) * 2_147_483_629 % (1 << 62)
        return writer().write(min(side_by_side, count - part * side_by_side), context, own, reporter).long()

    return torch.cat([kept(part, partial(write, part)) for part in range(-(-count // side_by_side))])


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
    check_writes(source)
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


def check_writes(source: ModelSource) -> None:
    """Refuse a model that writes no text.

    Raises:
        UnsupportedError: it does not generate text.
    """
    if not source.model_class.can_generate():
        raise UnsupportedError(
            f"{source.model_class.__name__} does not generate text, so it cannot write its own calibration text",
            "give text files with --calib FILE",
        )


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
    return text_frame(tokenizer)[0], words[~torch.isin(words, special)]


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
    total = len(prompts) * length
    with bar(reporter, "sampling calibration text", total, "tokens") as handle, SingleQueries():
        for given in prompts.split(batch):
            cache, ids, position = roomy_cache(model.config, length), given, 0
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
                position += ids.shape[1]
                ids = _draw(step.logits[:, -1, :vocabulary].float().cpu(), generator)
                sequence.append(ids)
                reporter.advance(handle, len(ids))
            rows.append(torch.cat(sequence, dim=1))
    return torch.cat(rows)


class RoomyLayer(DynamicLayer):
    """A layer of a cache whose room is taken once: growing it by concatenation copies all of it with every token.

    That was most of the time of sampling 512 tokens (measured: 540 of 811 ms a step at 400 tokens, SmolLM2-135M).

    Args:
        room: tokens that it can hold.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, G, S, d]; returns all."""
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._all = [x.new_empty(*x.shape[:-2], self.room, x.shape[-1]) for x in (key_states, value_states)]
        end = start + key_states.shape[-2]
        for buffer, new in zip(self._all, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._all)
        return self.keys, self.values


def roomy_cache(config: Any, length: int) -> DynamicCache:
    """The cache of a model for sequences of so many tokens; layers other than plain ones are left as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class SingleQueries(TorchFunctionMode):
    """Attention of one token on a processor, in 16 bits: heads that share keys go as queries of one, two at least.

    For a single query its kernel takes 4 times as long, and copies of long keys and values in float32 take longer than
    attention does; `benchmarks/writing_speed.py` has what a step takes.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch, attention with queries side by side."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and len(args) == 3 and _single_queries(*args[:2], kwargs):
            q, k, v = args
            shared = q.unflatten(-3, (k.shape[-3], -1)).squeeze(-2)
            rows = shared if shared.shape[-2] > 1 else shared.expand(*shared.shape[:-2], 2, -1)
            found = func(rows, k, v, **{key: value for key, value in kwargs.items() if key != "enable_gqa"})
            return found[..., : shared.shape[-2], :].flatten(-3, -2).unsqueeze(-2)
        return func(*args, **kwargs)


def _single_queries(q: Tensor, k: Tensor, options: dict[str, Any]) -> bool:
    """Whether these are 16-bit queries of one token on a processor, and heads that share keys see the same of them."""
    mask = options.get("attn_mask")
    alike = mask is None or (mask.dim() == q.dim() and mask.shape[-3] in (1, k.shape[-3]))
    narrow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return narrow and q.shape[-2] == 1 and alike and not options.get("is_causal")


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
