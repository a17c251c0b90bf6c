"""Instruments: what can be hung between passes without editing them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from attnopt.errors import VerificationError
from attnopt.rewriter.interpret import LayerRunner
from attnopt.rewriter.pipeline import Between
from attnopt.rewriter.printer import long_print, short_print
from attnopt.rewriter.program import Program
from attnopt.rewriter.verify import Stage, verify


class Verify:
    """Checks the program's legality at the start and after every pass.

    Raises:
        VerificationError: naming the pass whose result is not legal.
    """

    def __call__(self, event: Between) -> None:
        stage: Stage = "captured" if event.text is None else "transformed"
        try:
            verify(event.after, stage)
        except VerificationError as error:
            where = f"after {event.text}: " if event.text else "before the first pass: "
            raise VerificationError([where + line for line in error.violations]) from error


class PrintBetween:
    """Prints the program at the start and after every pass.

    Args:
        write: takes the text.
        long: print every equation instead of a line per attention layer.
    """

    def __init__(self, write: Callable[[str], None], *, long: bool = False) -> None:
        self._write = write
        self._print = long_print if long else short_print

    def __call__(self, event: Between) -> None:
        title = "start" if event.text is None else f"after {event.text}"
        self._write(f"== {title}\n{self._print(event.after)}\n")


class Time:
    """Records how long each pass took.

    Attributes:
        seconds: (pass text, seconds), in order.
    """

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []

    def __call__(self, event: Between) -> None:
        if event.text is not None:
            self.seconds.append((event.text, event.seconds))


class StopAfter:
    """Stops the pipeline after `count` passes, to find by bisection the one that does harm."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, event: Between) -> bool:
        return event.index >= self.count


@dataclass(frozen=True)
class Change:
    """How much a pass changed what the program computes.

    Attributes:
        text: the pass.
        relative: root-mean-square of the change of the first output over that of the output before.
        bound: what it may be; None if the pass is lossy by nature.
        first_site: the first attention layer after which the hidden states differ by more than the bound (or at all,
            beyond rounding, if there is none); None if none does or it cannot be told.
    """

    text: str
    relative: float
    bound: float | None
    first_site: str | None

    @property
    def too_large(self) -> bool:
        """True if it is over its bound."""
        return self.bound is not None and not self.relative <= self.bound


#: Relative change below which two float32 results count as equal to rounding.
ROUNDING = 1e-4


class NumericCheck:
    """Compares what the program computes before and after each pass; the first pass over its bound is an error.

    The bound is the pass's own (`Pass.bound`); lossy passes have none and are only measured.

    Args:
        inputs: one batch for the program, by input name.
        bound: used instead of the passes' own bounds if given.
        dtype, device: how to compute.

    Attributes:
        changes: one per pass.
    """

    def __init__(
        self,
        inputs: Mapping[str, torch.Tensor],
        *,
        bound: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self._inputs = dict(inputs)
        self._bound = bound
        self._dtype = dtype
        self._device = device
        self._last: tuple[Program, list[torch.Tensor | None], torch.Tensor] | None = None
        self.changes: list[Change] = []

    @property
    def first_offender(self) -> Change | None:
        """The first pass over its bound."""
        return next((change for change in self.changes if change.too_large), None)

    def __call__(self, event: Between) -> None:
        """Measure one pass.

        Raises:
            VerificationError: if it is over its bound.
        """
        hidden, output = self._evaluate(event.after)
        if event.text is not None and event.item is not None:
            if self._last is None or self._last[0] is not event.before:
                self._last = (event.before, *self._evaluate(event.before))
            bound = self._bound if self._bound is not None else event.item.bound
            first = self._first_site(event.after, self._last[1], hidden, ROUNDING if bound is None else bound)
            self.changes.append(Change(event.text, relative_change(self._last[2], output), bound, first))
        self._last = (event.after, hidden, output)
        offender = self.first_offender
        if offender is not None:
            where = f", first at {offender.first_site}" if offender.first_site else ""
            size = f"by {offender.relative:.2e}, its bound is {offender.bound:.2e}"
            raise VerificationError([f"{offender.text} changed the output {size}{where}"])

    def _evaluate(self, program: Program) -> tuple[list[torch.Tensor | None], torch.Tensor]:
        """Hidden states leaving each layer (None where there is no single stream), and the first output."""
        with torch.no_grad():
            runner = LayerRunner(program, self._dtype, self._device)
            env = runner.start(self._inputs)
            hidden: list[torch.Tensor | None] = []
            for segment in runner.layers:
                with runner.load(segment) as layer:
                    env = layer.advance(env)
                hidden.append(None if env.stream is None else env.hidden)
            output = runner.finish(env)
            runner.close()
        return hidden, output

    @staticmethod
    def _first_site(
        program: Program, before: list[torch.Tensor | None], after: list[torch.Tensor | None], bound: float
    ) -> str | None:
        for site, old, new in zip(program.site_list, before, after, strict=False):
            if old is not None and new is not None and not relative_change(old, new) <= bound:
                return site.fqn
        return None


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Root mean square of after - before over that of before; infinite if the shapes differ, NaN if one holds NaN."""
    if before.shape != after.shape:
        return float("inf")
    scale = before.double().norm()
    return float((after.double() - before.double()).norm() / scale.clamp_min(torch.finfo(torch.float64).tiny))
