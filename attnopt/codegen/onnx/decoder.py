"""Runs an exported decoder with onnxruntime: the cache in place, prompts in pieces, greedy generation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from attnopt.errors import AttnoptError, SourceError
from attnopt.staging import MANIFEST_NAME

MODEL_FILE = "model.onnx"

Array = npt.NDArray[Any]


def providers_here() -> list[str]:
    """Execution providers to ask for: CUDA where a device is, then the CPU.

    onnxruntime-gpu finds the CUDA libraries that torch brings once they are loaded.
    """
    import torch

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available():
        onnxruntime.preload_dlls()
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]


def open_session(
    path: Path, providers: Sequence[str] | None = None, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """An onnxruntime session on a model file.

    Args:
        providers: execution providers; None for `providers_here`.
        threads: of the CPU provider; None for onnxruntime's choice.

    Raises:
        SourceError: onnxruntime cannot load the file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers or providers_here()))
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise SourceError(f"onnxruntime cannot load {path}: {error}", "export the model again") from error


class OnnxDecoder:
    """A decoder that attnopt exported, and one batch of sequences.

    The cached tensors are buffers with room for `capacity` tokens. On the CPU a step writes its rows into them where
    they are. Rows may have different lengths: `past_length` says how many tokens of each are cached.

    Args:
        directory: what `attnopt export --format onnx` wrote.
        providers, threads: see `open_session`.
        block: buffers grow by multiples of this many tokens.

    Raises:
        SourceError: the directory is not an exported decoder.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        block: int = 256,
    ) -> None:
        self.directory = Path(directory)
        self.block = block
        try:
            manifest = json.loads((self.directory / MANIFEST_NAME).read_text(encoding="utf-8"))
            self._cache: list[dict[str, Any]] = manifest["cache"]
        except (OSError, ValueError, KeyError) as error:
            raise SourceError(
                f"{directory} holds no exported model", "give a directory that attnopt export --format onnx wrote"
            ) from error
        if not self._cache:
            raise SourceError(f"{directory} holds an encoder, which does not generate", "export a decoder")
        self.session = open_session(self.directory / MODEL_FILE, providers, threads)
        self.device = "cuda" if self.session.get_providers()[0].startswith("CUDA") else "cpu"
        self.reset(1)

    def reset(self, batch: int, capacity: int = 0) -> None:
        """Forget the cache and make room for new sequences."""
        self.past_length = np.zeros(batch, np.int64)
        self.capacity = 0
        self._buffers: list[onnxruntime.OrtValue] = []
        self._reserve(max(capacity, 1))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the buffers."""
        return 4 * sum(_numel(self._shape(entry, self.capacity)) for entry in self._cache)

    def forward(self, input_ids: Array, advance: Sequence[int] | None = None) -> Array:
        """Read tokens and append them to the cache.

        Args:
            input_ids: int64 [B, S]; rows may be padded at their right end.
            advance: number of tokens of each row that count; None means S for all.

        Returns:
            logits, float32 [B, S, vocabulary].
        """
        batch, length = input_ids.shape
        if batch != len(self.past_length):
            raise AttnoptError(f"{batch} rows given, but the cache holds {len(self.past_length)}", "call reset first")
        self._reserve(int(self.past_length.max()) + length)
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(input_ids, dtype=np.int64))
        binding.bind_cpu_input("past_length", self.past_length)
        for entry, buffer in zip(self._cache, self._buffers, strict=True):
            binding.bind_ortvalue_input(entry["past"], buffer)
        binding.bind_output("logits", "cpu")
        for entry, buffer in zip(self._cache, self._buffers, strict=True):
            if self.device == "cpu":  # TensorScatter then writes the new rows and copies nothing
                binding.bind_ortvalue_output(entry["present"], buffer)
            else:
                binding.bind_output(entry["present"], self.device)
        self.session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        if self.device != "cpu":
            self._buffers = list(outputs[1:])
        self.past_length = self.past_length + (length if advance is None else np.asarray(advance, np.int64))
        return outputs[0].numpy()

    def prefill(self, prompts: Sequence[Sequence[int]], chunk: int = 256) -> Array:
        """Read prompts of any lengths, piece by piece.

        Args:
            prompts: token ids, at least one each.
            chunk: tokens at a time; scores of chunk x cached tokens are in memory.

        Returns:
            logits after each prompt's last token, [B, vocabulary].
        """
        lengths = np.array([len(p) for p in prompts])
        if not len(prompts) or lengths.min() < 1:
            raise AttnoptError("an empty prompt cannot be continued", "give at least one token")
        self.reset(len(prompts), int(lengths.max()) + self.block)
        padded = np.zeros((len(prompts), int(lengths.max())), np.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        last: list[Array | None] = [None] * len(prompts)
        for start in range(0, padded.shape[1], chunk):
            piece = padded[:, start : start + chunk]
            self.past_length = np.full(len(prompts), start, np.int64)
            logits = self.forward(piece)
            for row, end in enumerate(lengths - 1 - start):
                if 0 <= end < piece.shape[1]:
                    last[row] = logits[row, end]
        self.past_length = lengths.astype(np.int64)
        return np.stack([row for row in last if row is not None])

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: Sequence[int] = ()) -> list[list[int]]:
        """Continue prompts with the most likely token, until an end token or `max_new_tokens`.

        Returns:
            the new tokens of each prompt; an end token is included.
        """
        produced: list[list[int]] = [[] for _ in prompts]
        if max_new_tokens < 1:
            return produced
        logits = self.prefill(prompts)
        running = np.ones(len(prompts), bool)
        for step in range(max_new_tokens):
            token = logits.argmax(-1)
            for row in np.flatnonzero(running):
                produced[row].append(int(token[row]))
                running[row] = int(token[row]) not in eos
            if not running.any() or step + 1 == max_new_tokens:
                break
            logits = self.forward(token[:, None])[:, -1]
        return produced

    def _shape(self, entry: dict[str, Any], capacity: int) -> tuple[int, ...]:
        return tuple(
            len(self.past_length) if d == "batch" else capacity if d == "capacity" else d for d in entry["shape"]
        )

    def _reserve(self, tokens: int) -> None:
        """Let the buffers hold `tokens` tokens, keeping what is in them."""
        if tokens <= self.capacity:
            return
        old, self.capacity = self.capacity, -(-tokens // self.block) * self.block
        grown = []
        for place, entry in enumerate(self._cache):
            # Zeros, not garbage: a slot that is not seen gets weight 0, and 0 times NaN is NaN.
            array = np.zeros(self._shape(entry, self.capacity), np.float32)
            if old:
                array[..., :old, :] = self._buffers[place].numpy()
            grown.append(onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device, 0))
        self._buffers = grown


def generate(
    directory: str | Path,
    prompts: str | Sequence[str],
    max_new_tokens: int = 64,
    *,
    providers: Sequence[str] | None = None,
) -> str | list[str]:
    """Continue text greedily with an exported decoder.

    Args:
        directory: what `attnopt export --format onnx` wrote, with its tokenizer.
        prompts: one text, or several that are continued as one batch.
        max_new_tokens: how far at most; generation config's end tokens stop a text earlier.
        providers: see `open_session`.

    Returns:
        the new text, or a list of them.

    Raises:
        SourceError: the directory holds no exported decoder, or no tokenizer.
    """
    from transformers import AutoTokenizer

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    decoder = OnnxDecoder(directory, providers=providers)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise SourceError(f"{directory} has no tokenizer: {error}", "use OnnxDecoder with token ids") from error
    produced = decoder.greedy([tokenizer(text)["input_ids"] for text in texts], max_new_tokens, end_tokens(directory))
    found = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in produced]
    return found[0] if isinstance(prompts, str) else found


def end_tokens(directory: str | Path) -> tuple[int, ...]:
    """Ids that end a text, from generation_config.json or config.json."""
    for name in ("generation_config.json", "config.json"):
        path = Path(directory) / name
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def _numel(shape: Sequence[int]) -> int:
    return int(np.prod(shape))
