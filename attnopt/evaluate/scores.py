"""From tokens to numbers: pieces of a forward pass, and loss, divergence and agreement for every predicted token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch

from attnopt.evaluate.report import WindowScores

PIECE = 1024  # tokens of a long sequence that go through a model at a time
_SLICE = 256  # positions whose distributions over the vocabulary are in memory in full at a time


def forward_pieces(model: Any, ids: torch.Tensor, piece: int | None = None) -> Iterator[Any]:
    """Run a model over windows and yield what it returns, piece by piece.

    A long window goes through with the cache, as a runtime prefills it, so that memory for logits does not grow with
    the window, and so that what is measured is the cache too.

    Args:
        ids: [B, W] tokens.
        piece: tokens of a piece; None for the whole window at once, without a cache.

    Yields:
        the model's outputs: `logits` [B, tokens of the piece, vocabulary] and, with a piece, `past_key_values`.
    """
    if piece is None:
        yield model(input_ids=ids, use_cache=False)
        return
    cache = None
    for start in range(0, ids.shape[1], piece):
        out = model(input_ids=ids[:, start : start + piece], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        yield out


@dataclass
class PositionScores:
    """What was measured for one model on one text; all [windows, W - 1], entry t about token t + 1 of the window.

    Attributes:
        nll: negative log-likelihood in nats.
        kl: KL(original || model) in nats; 0 for the original.
        agree: 1 where both have the same most likely token.
    """

    nll: torch.Tensor
    kl: torch.Tensor
    agree: torch.Tensor

    @classmethod
    def join(cls, batches: Sequence[PositionScores]) -> PositionScores:
        """Those of several batches of windows, in order."""
        return cls(
            torch.cat([b.nll for b in batches]),
            torch.cat([b.kl for b in batches]),
            torch.cat([b.agree for b in batches]),
        )

    def windows(self, start: int, stop: int) -> WindowScores:
        """Means per window (and quarter) of the predictions of tokens `start` to `stop`, not included."""
        part = slice(max(start, 1) - 1, stop - 1)
        return WindowScores(
            self.nll[:, part].mean(1).tolist(),
            [_quarters(row) for row in self.kl[:, part]],
            [_quarters(row) for row in self.agree[:, part]],
        )


def _quarters(row: torch.Tensor) -> list[float]:
    return [float(part.mean()) if part.numel() else 0.0 for part in row.tensor_split(4)]


def score_windows(
    ids: torch.Tensor, logits: Iterable[torch.Tensor], reference: Iterable[torch.Tensor] | None = None
) -> PositionScores:
    """Loss of a batch of windows, and divergence and agreement with the original.

    Args:
        ids: [B, W] tokens.
        logits: the model's, in pieces along the window, [B, n, vocabulary] each; position t predicts token t + 1.
        reference: the original's, in the same pieces; None if these are the original's own.
    """
    shape = (ids.shape[0], ids.shape[1] - 1)
    scores = PositionScores(
        torch.empty(shape, dtype=torch.float64),
        torch.zeros(shape, dtype=torch.float64),
        torch.ones(shape, dtype=torch.float64),
    )
    other = iter(reference) if reference is not None else None
    at = 0
    for mine in logits:
        original = next(other) if other is not None else None
        for start in range(0, mine.shape[1], _SLICE):
            here = slice(start, min(start + _SLICE, mine.shape[1], shape[1] - at))
            if here.stop <= here.start:
                continue
            there = slice(at + here.start, at + here.stop)
            target = ids[:, there.start + 1 : there.stop + 1, None]
            log_q = mine[:, here].float().log_softmax(-1)
            scores.nll[:, there] = -log_q.gather(-1, target).squeeze(-1).double().cpu()
            if original is not None:
                log_p = original[:, here].float().log_softmax(-1)
                scores.agree[:, there] = (log_p.argmax(-1) == log_q.argmax(-1)).double().cpu()
                scores.kl[:, there] = (log_p.exp() * (log_p - log_q)).sum(-1).double().cpu()
        at += mine.shape[1]
    return scores


def score_answer(model: Any, prompt: torch.Tensor, answer: torch.Tensor) -> tuple[bool, float]:
    """Does greedy decoding after a prompt give exactly this answer?

    The answer's tokens are put in whatever the model says, in one pass with the cache of the prompt. All of them are
    the most likely ones exactly when decoding greedily writes them.

    Args:
        prompt: [T] tokens.
        answer: [n] tokens.

    Returns:
        (whether all n tokens are the most likely ones, mean negative log-likelihood of the answer's tokens in nats).
    """
    options: dict[str, Any] = {}
    if "logits_to_keep" in signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    cache, last = None, None
    for start in range(0, len(prompt), PIECE):
        out = model(input_ids=prompt[None, start : start + PIECE], past_key_values=cache, use_cache=True, **options)
        cache, last = out.past_key_values, out.logits[:, -1:]
    assert last is not None
    if len(answer) > 1:
        rest = model(input_ids=answer[None, :-1], past_key_values=cache, use_cache=True).logits
        last = torch.cat([last, rest], dim=1)
    log_q = last[0].float().log_softmax(-1)
    nll = -log_q.gather(-1, answer[:, None]).mean()
    return bool((log_q.argmax(-1) == answer).all()), float(nll)
