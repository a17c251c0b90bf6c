"""Calibration text: windows of token ids from files; `writing` has those that the model writes itself.

Every Calibration holds two disjoint pools. `windows` are for statistics, `selection` is for choosing between results
(rank against rotary width, stopping a fit). Text on which a result is reported belongs to neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import OptionError, SourceError

#: Of these many windows, one is kept for selection.
SELECTION_EVERY = 8

#: What is to be learned from comes in this many windows at least, and what is calibrated on in twice as many: longer
#: windows are not worth fewer of them.
LEAST_WINDOWS = 8
#: Longer windows must use so much of the text that shorter ones would: files are no multiples of them.
LEAST_USE = 0.8

#: No more than this is read of one file: tokenising more takes minutes and the windows are spread over it anyway.
MAX_FILE_BYTES = 16 << 20


@dataclass(frozen=True)
class RecoveryText:
    """Text to learn from, in windows of a length of its own.

    Attributes:
        windows: int64 [k, S] of text that nothing is calibrated on.
        seen: int64 [l, S], the text that is calibrated on.
        selection: int64 [m, S] to judge by: the calibration's selection, or other text of the same kind.
        written: how many of `windows`, the last ones, the model wrote.
    """

    windows: Tensor
    seen: Tensor
    selection: Tensor
    written: int = 0

    @property
    def window(self) -> int:
        """Tokens in a window."""
        return self.windows.shape[1]

    def with_written(self, written: Tensor, held_out: int = 0) -> RecoveryText:
        """With windows [n, S] that the model wrote behind those that are there, some of them, the last, to judge by."""
        learned, judging = written[: len(written) - held_out], written[len(written) - held_out :]
        windows, selection = torch.cat([self.windows, learned]), torch.cat([self.selection, judging])
        return replace(self, windows=windows, selection=selection, written=len(learned))


@dataclass(frozen=True)
class Calibration:
    """Token windows to calibrate with.

    Attributes:
        windows: int64 [n, context], for statistics.
        selection: int64 [m, context], disjoint from `windows`, for choosing between results.
        source: "self", the file names, or both.
        sha256: hash of all token ids and of how they are divided.
        seed: of the sampling.
        recovery: text to learn from; None if no pass asked for it.
    """

    windows: Tensor
    selection: Tensor
    source: str
    sha256: str
    seed: int
    recovery: RecoveryText | None = None

    @property
    def context(self) -> int:
        """Tokens in a window."""
        return self.windows.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens in both pools."""
        return self.windows.numel() + self.selection.numel()


def divide(ids: Tensor, source: str, seed: int) -> Calibration:
    """Divide windows [n, context] into the two pools, the selection spread evenly over the text.

    Raises:
        OptionError: if there are fewer than two windows.
    """
    return _calibration(*_pools(ids), source, seed)


def together(text: Calibration, other: Calibration) -> Calibration:
    """The windows of both, in both pools, those of `other` behind; all else is that of `text`."""
    windows, selection = torch.cat([text.windows, other.windows]), torch.cat([text.selection, other.selection])
    both = _calibration(windows, selection, f"{text.source}, {other.source}", text.seed)
    return replace(both, recovery=text.recovery)


def _pools(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(windows to fit on, windows to choose by), the second spread evenly over the text."""
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
    return ids[rest].long().contiguous(), ids[chosen].long().contiguous()


def _calibration(windows: Tensor, selection: Tensor, source: str, seed: int) -> Calibration:
    digest = hashlib.sha256(repr((tuple(windows.shape), tuple(selection.shape))).encode())
    for pool in (windows, selection):
        digest.update(pool.numpy().astype("<i8").tobytes())
    return Calibration(windows, selection, source, digest.hexdigest(), seed)


def joined_windows(context: int, window: int, learned: int, calibrated: int) -> int:
    """How many windows of `context` tokens make one to learn from.

    Args:
        context: tokens in a calibration window.
        window: tokens wanted in a window to learn from.
        learned, calibrated: tokens to learn from and to calibrate on.
    """
    most = min(window, learned // LEAST_WINDOWS, calibrated // (2 * LEAST_WINDOWS))
    return max(1, most // context)


def from_files(
    tokenizer: Any,
    files: Sequence[str | Path],
    tokens: int,
    context: int,
    seed: int = 0,
    recovery: int = 0,
    recovery_window: int = 0,
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
        recovery: at most this many tokens more, of other text, for `Calibration.recovery`.
        recovery_window: tokens in a window of that, as `joined_windows` allows. Calibration windows that are to be
            joined lie side by side in the text.

    Raises:
        SourceError: a file is missing, not UTF-8 text, or empty.
        OptionError: there is too little text for two windows, or `tokens` or `context` make no sense.
    """
    check_sizes(tokens, context)
    frame = text_frame(tokenizer)
    body = context - len(frame[0]) - len(frame[1])
    texts = [_token_ids(tokenizer, Path(file)) for file in files]
    there = _whole_windows(texts, body)
    joined = joined_windows(context, recovery_window, recovery, min(tokens, there * context))
    while joined > 1 and joined * _whole_windows(texts, joined * body) < LEAST_USE * there:
        joined -= 1
    blocks, left = _shares([_cut(ids, joined * body) for ids in texts], tokens // (joined * context))
    pools = _pools(blocks)
    windows, selection = (_framed(pool.reshape(-1, body), frame) for pool in pools)
    text = _calibration(windows, selection, ", ".join(Path(file).name for file in files), seed)
    if not recovery:
        return text
    unseen, _ = _shares(left, recovery // (joined * context))
    learned, seen, held_out = (_framed(pool, frame) for pool in (unseen, *pools))
    return replace(text, recovery=RecoveryText(learned, seen, held_out))


def _whole_windows(texts: Sequence[Sequence[int]], length: int) -> int:
    return sum(len(ids) // length for ids in texts)


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


def check_sizes(tokens: int, context: int) -> None:
    """Refuse sizes that make no sense.

    Raises:
        OptionError: a context below 8 tokens, or tokens for less than two windows.
    """
    if context < 8:
        raise OptionError(f"a context of {context} tokens is too short to calibrate with", "give --context 128 or more")
    if tokens < 2 * context:
        raise OptionError(
            f"{tokens} calibration tokens are less than two windows of {context}",
            "raise --calib-tokens or lower --context",
        )


def text_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
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
