"""The training of a student on its teacher's output: steps, held-out checks, the best kept, a state that survives.

What a run does depends on its settings, the text and the seed alone, so that one that is resumed goes on as if it had
never stopped. With several processes each takes a share of every step's windows and of the held-out ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from attnopt.passes.common.difference import Kind
from attnopt.passes.common.positions import spaced
from attnopt.passes.repair.loss import divergence
from attnopt.passes.repair.state import State, load_state, save_state
from attnopt.passes.repair.student import Head, Model
from attnopt.progress import bar
from attnopt.rewriter import parallel
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.precision import multiplies_bfloat16, quick_products

Precision = Literal["auto", "float32", "quick", "bfloat16"]

#: Tokens that go through the models at once.
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}
#: Steps in which the rate rises at least: Adam's first ones know nothing of the size of gradients.
WARM_STEPS = 5
#: The rate per nat of held-out divergence, and its limits. What a step brings grows with the distance that is left, the
#: noise that it adds does not: docs/recovery.md has the measurement.
RATE_PER_NAT = 0.0026
RATES = (0.00003, 0.001)
#: The rate where outputs are vectors, whose distance is not in nats.
RATE_OF_VECTORS = 0.0003
#: Held-out tokens that are looked at.
HELD_OUT_TOKENS = 8192


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        tokens: that are learned from in all, repeats counted.
        batch: tokens per step.
        rate: largest step relative to each weight's size; None follows from the held-out loss at the start.
        warmup: share of the steps in which the rate rises.
        decay: weight decay of the changes, which pulls to the start.
        checks: how often the held-out text is looked at, the end included.
        patience: stop after so many checks without a lower loss than at any check before, the start left out: the loss
            rises first if steps are long, and falls with them.
        minutes: between two saved states.
        precision: "float32"; "quick" multiplies 16-bit factors; "bfloat16" runs under autocast; "auto" is bfloat16 on
            hardware that multiplies it.
        kind: of the loss.
        seed: of the order of the windows.
    """

    tokens: int
    batch: int = 2048
    rate: float | None = None
    warmup: float = 0.05
    decay: float = 0.0
    checks: int = 8
    patience: int = 3
    minutes: float = 10.0
    precision: Precision = "auto"
    kind: Kind = "kl"
    seed: int = 0


@dataclass
class History:
    """The course of a run.

    Attributes:
        loss: (tokens, mean loss of the step's tokens) per step.
        held_out: (tokens, held-out loss, seconds since the start) per check, the first before training.
        best: tokens at the best check, and the loss there.
        stopped: why it ended before all tokens, or "".
    """

    loss: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float, float]] = field(default_factory=list)
    best: tuple[int, float] = (0, math.inf)
    stopped: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "loss": [list(point) for point in self.loss],
            "held_out": [list(point) for point in self.held_out],
            "best": list(self.best),
            "stopped": self.stopped,
        }

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> History:
        """The history that `to_json` wrote."""
        loss = [(int(tokens), float(value)) for tokens, value in data["loss"]]
        held = [(int(tokens), float(value), float(seconds)) for tokens, value, seconds in data["held_out"]]
        return cls(loss, held, (int(data["best"][0]), float(data["best"][1])), data["stopped"])


class Training:
    """One run.

    Args:
        student: to train; its trained weights end as the best seen.
        teacher: gives the targets; it is not changed.
        windows: [n, S] token ids to learn from.
        held_out: [m, S] token ids to judge by.
        settings: how.
        context: device, progress, and where states are kept.
        reach: some windows' positions are to span up to so many tokens, see `spaced`; 0 for none.
    """

    def __init__(
        self,
        student: Model,
        teacher: Model,
        windows: Tensor,
        held_out: Tensor,
        settings: Settings,
        context: PassContext,
        reach: int = 0,
    ) -> None:
        self.student, self.teacher, self.settings, self.context = student, teacher, settings, context
        self.windows, self.held_out = windows, _some(held_out, HELD_OUT_TOKENS)
        world, length = parallel.world(), windows.shape[1]
        # Every process takes as many windows of a step as every other.
        self.per_step = world * max(1, round(settings.batch / (length * world)))
        self.steps = max(1, math.ceil(settings.tokens / (self.per_step * length)))
        self.rows = max(1, TOKENS_AT_ONCE[context.device.type] // length)
        self.reach = reach
        self.held_out_positions = spaced(len(self.held_out), length, reach)
        self.parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=RATES[0], betas=(0.9, 0.95), weight_decay=settings.decay
        )
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self.step, self._slot, self._before = 0, 0, 0.0

    def run(self) -> History:
        """Train, or go on with a run that was cut off."""
        self._restore()
        began = saved = time.monotonic()
        tokens = self.per_step * self.windows.shape[1]
        looks = {round(self.steps * (i + 1) / self.settings.checks) for i in range(self.settings.checks)}
        reporter = self.context.reporter
        with self._precision(), bar(reporter, "distilling", self.steps * tokens, "tokens") as handle:
            reporter.advance(handle, self.step * tokens)
            if not self.history.held_out:
                self._look(0.0)
            while self.step < self.steps and not self.history.stopped:
                loss = self._one_step()
                self.step += 1
                self.history.loss.append((self.step * tokens, loss))
                reporter.advance(handle, tokens)
                if not math.isfinite(loss):
                    self.history.stopped = "the loss is not finite"
                elif self.step in looks:
                    self._look(time.monotonic() - began)
                due = time.monotonic() - saved >= 60 * self.settings.minutes
                if parallel.from_first(due) or self.step == self.steps or self.history.stopped:
                    self._save(time.monotonic() - began)
                    saved = time.monotonic()
        self._put(self.best)
        return self.history

    @property
    def rate(self) -> float:
        """The largest step relative to each weight's size."""
        if self.settings.rate is not None:
            return self.settings.rate
        if self.settings.kind != "kl":
            return RATE_OF_VECTORS
        low, high = RATES
        return min(max(RATE_PER_NAT * self.history.held_out[0][1], low), high)

    def _one_step(self) -> float:
        """Mean loss of the step's tokens."""
        share = parallel.share_of(self.per_step)
        chosen = self.windows[self._indices()[share]]
        # A window that comes again comes at other positions.
        positions = spaced(self.per_step, self.windows.shape[1], self.reach, self._places().start)[share]
        self._set_rate()
        self.optimizer.zero_grad()
        total = 0.0
        for part, at in zip(chosen.split(self.rows), positions.split(self.rows), strict=True):
            loss = self._loss(part, at) / chosen.numel()
            loss.backward()
            total += float(loss.detach())
        if not _is_sharded(self.student):
            parallel.average_gradients(self.parameters.values())
        mean = parallel.sum_of(total)[0] / parallel.world()
        if math.isfinite(mean):
            self.optimizer.step()
        return mean

    def _loss(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Sum of the loss over some windows, divided between the processes that hold the same weights."""
        inputs = {"input_ids": ids, "position_ids": positions}
        with torch.no_grad():
            reference: Head = self.teacher(inputs, _itself)
        result: Tensor = self.student(inputs, lambda head: divergence(head, reference, self.settings.kind))
        return result

    def _indices(self) -> Tensor:
        """Windows of this step: all text is gone through before any of it comes again."""
        n = len(self.windows)
        return torch.stack([self._order(place // n)[place % n] for place in self._places()])

    def _places(self) -> range:
        """Which windows of the whole run this step takes."""
        return range(self.step * self.per_step, (self.step + 1) * self.per_step)

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.windows), generator=generator)

    def _set_rate(self) -> None:
        """Linear warm-up, then a cosine to zero (arXiv 1608.03983)."""
        warm = max(WARM_STEPS, round(self.settings.warmup * self.steps))
        factor = min(1.0, (self.step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor

    def _look(self, seconds: float) -> None:
        """Measure the held-out loss, keep the best and stop if it does not come."""
        loss, history = self._held_out_loss(), self.history
        done = self.step * self.per_step * self.windows.shape[1]
        history.held_out.append((done, loss, round(self._before + seconds, 1)))
        if loss < history.best[1]:
            history.best = (done, loss)
            self.best = {n: _whole(p.detach()).clone() for n, p in self.parameters.items()}
        since = _since_lowest([value for tokens, value, _ in history.held_out if tokens])
        if since >= self.settings.patience:
            history.stopped = f"no better on held-out text for {since} checks"

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        share = parallel.share_of(len(self.held_out))
        own, positions = self.held_out[share], self.held_out_positions[share]
        # Sharded models exchange weights in every pass, so that all processes must make equally many.
        rounds = math.ceil(math.ceil(len(self.held_out) / parallel.world()) / self.rows)
        total, count = 0.0, 0.0
        for place in range(rounds):
            rows = slice(place * self.rows, (place + 1) * self.rows)
            part = own[rows]
            given = (part, positions[rows]) if len(part) else (self.held_out[:1], self.held_out_positions[:1])
            loss = float(self._loss(*given))
            total, count = (total + loss, count + part.numel()) if len(part) else (total, count)
        total, count = parallel.sum_of(total, count)
        return total / count

    def _save(self, seconds: float) -> None:
        tensors = {f"now.{n}": _whole(p.detach()) for n, p in self.parameters.items()}
        tensors |= {f"best.{n}": value for n, value in self.best.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}.{name}": _whole(value) for key, value in moments.items()}
        record = {"history": self.history.to_json(), "seconds": self._before + seconds}
        self._slot = save_state(self.context.workdir, State(self.step, tensors, record), self._slot)

    def _restore(self) -> None:
        if not self.context.resume:
            return
        state, self._slot = load_state(self.context.workdir)
        if state is None:
            return
        self.step, self.history = state.step, History.of(state.record["history"])
        self._before = state.record["seconds"]
        self._put({n: state.tensors[f"now.{n}"] for n in self.parameters})
        self.best = {n: state.tensors[f"best.{n}"] for n in self.parameters}
        for name, parameter in self.parameters.items():
            kept = {key: state.tensors.get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {
                key: value if key == "step" else _like(value, parameter)
                for key, value in kept.items()
                if value is not None
            }

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(_like(value, self.parameters[name]))

    @contextmanager
    def _precision(self) -> Iterator[None]:
        device, wanted = self.context.device, self.settings.precision
        if wanted == "auto":
            wanted = "bfloat16" if multiplies_bfloat16(device) else "quick"
        if self.context.dtype != torch.float32:
            wanted = "float32"
        # No cache: it would keep the 16-bit copies of a step's weights until the end of the run.
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=wanted == "bfloat16", cache_enabled=False)
        with quick_products(device) if wanted != "float32" else nullcontext(), autocast:
            yield


def _itself(head: Head) -> Head:
    return head


def _some(windows: Tensor, tokens: int) -> Tensor:
    """Windows spread evenly, together at most about `tokens` long, at least one."""
    count = min(len(windows), max(1, tokens // windows.shape[1]))
    return windows[[(2 * i + 1) * len(windows) // (2 * count) for i in range(count)]]


def _since_lowest(losses: list[float]) -> int:
    """How many losses came after the lowest."""
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def _is_sharded(model: Model) -> bool:
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded over the processes, in one piece."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, distributed as a parameter is."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


@torch.no_grad()
def merged(student: Model) -> dict[str, Tensor]:
    """The trained weights as they are now, in one piece, by name."""
    return {
        name: weight.value_of({key: _whole(p.detach()) for key, p in weight.named_parameters()})
        for name, weight in student.changed().items()
    }
