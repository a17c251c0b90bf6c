"""The pass that trains a rewritten model on what its original says, end to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnopt.errors import OptionError, UnsupportedError
from attnopt.passes.common.difference import Kind, kind_for
from attnopt.passes.common.moments import check_text
from attnopt.passes.common.peaks import with_peaks
from attnopt.passes.common.positions import reach_of
from attnopt.passes.repair.parameters import Selection, select
from attnopt.passes.repair.student import Model, Pool
from attnopt.passes.repair.training import TOKENS_AT_ONCE, History, Settings, Training, merged
from attnopt.profiles.calibration import Calibration
from attnopt.rewriter import parallel
from attnopt.rewriter.capture import capture
from attnopt.rewriter.passes import LearningText, Pass, PassContext, PassResult, Plan, SitePlan, option, sites_differing
from attnopt.rewriter.program import Program
from attnopt.rewriter.source import ModelSource, open_source
from attnopt.rewriter.weights import Inline, Value

#: Values per token and layer that a gradient needs, as a multiple of the hidden size; roughly.
KEPT_PER_LAYER = 24
#: With `recompute=auto`, layers are run twice if what a gradient needs would take more than this.
KEPT_BYTES = 4 << 30
SAME_WORDS = "a teacher must have the same tokenizer, so that both speak of the same words"


@dataclass(frozen=True)
class Distill(Pass):
    """Train the rewritten model on what the original says: self-distillation, end to end."""

    name: ClassVar[str] = "distill"
    section: ClassVar[str] = "distill"
    may_change_nothing: ClassVar[bool] = True

    tokens: int = option(250_000, help="tokens to learn from, repeats counted", minimum=1)
    parameters: str | tuple[str, ...] = option(
        "attention", help="what is trained: attention, all, lora, or patterns of weight names"
    )
    rank: int | None = option(None, help="train changes of this rank (LoRA) instead of all numbers", minimum=1)
    rate: float | None = option(
        Settings.rate,
        help="largest step, relative to each weight's size; none follows from the distance",
        minimum=0,
    )
    window: int = option(
        2048, help="tokens in a window to learn from; less where the text or --calib-tokens are short", minimum=1
    )
    batch: int = option(Settings.batch, help="tokens per step, a window at least", minimum=1)
    warmup: float = option(Settings.warmup, help="share of the steps in which the rate rises", minimum=0, maximum=1)
    decay: float = option(Settings.decay, help="weight decay, towards what the weights are now", minimum=0)
    checks: int = option(Settings.checks, help="how often the held-out text is looked at", minimum=1)
    patience: int = option(Settings.patience, help="stop after so many checks without a lower loss", minimum=1)
    checkpoint_minutes: float = option(
        Settings.minutes, help="minutes between two saved states, for --resume", minimum=0
    )
    precision: Literal["auto", "float32", "quick", "bfloat16"] = option(
        "auto", help="of products; quick takes 16-bit factors, bfloat16 runs under autocast"
    )
    recompute: Literal["auto", "always", "never"] = option(
        "auto", help="run layers twice instead of keeping what is inside them for the gradient"
    )
    teacher: str | None = option(None, help="another model to learn from, with the same tokenizer; a directory or id")
    again: bool = option(
        False, help="read files with too little text again, instead of letting the model write the rest"
    )

    def check(self, program: Program) -> None:
        """Refuse a teacher that does not fit, before the passes in front of this one work.

        Raises:
            OptionError: it has another vocabulary.
            SourceError: it cannot be read.
        """
        if self.teacher is not None:
            teacher_source(self.teacher, program)

    def plan(self, program: Program, profiles: Mapping[str, Any]) -> Plan:
        """What is trained; weights as they will be after the passes before are not known yet."""
        what = self.parameters if isinstance(self.parameters, str) else " ".join(self.parameters)
        edits = tuple(
            SitePlan(site.fqn, {"train": what}, (site.cached_numbers_per_token,) * 2) for site in program.site_list
        )
        inside = program.parameters if self.parameters == "all" else program.parameters // 3
        # Teacher and student share what is not rewritten; changes have a gradient, two moments and a best copy.
        memory = 4 * (program.parameters + 7 * inside) + KEPT_BYTES // 2
        return Plan(edits, (), (f"distilled from the original on {self.tokens:,} tokens",), memory)

    def reshapes(self) -> bool:
        """Values alone change."""
        return False

    @property
    def learns_from(self) -> LearningText:
        """The model to learn from writes as it speaks; one that was converted already writes worse."""
        return LearningText(self.tokens, self.teacher, self.again, self.window)

    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        """Train.

        Raises:
            OptionError: there is no text, nothing to train, or the teacher has another tokenizer.
        """
        check_text(program, context, "distill")
        selection = select(program, self.parameters, self.rank)
        if not selection.names:
            raise OptionError("distill: there is nothing to train", "give parameters=all, or names of weights")
        original = context.original if context.original is not None else program
        target = original if self.teacher is None else other_teacher(self.teacher, program, context)
        windows, held_out, repeated = self._text(context.calibration)
        pool: Pool = {}
        teacher = Model(target, pool, dtype=context.dtype, device=context.device)
        student = Model(
            program, pool, selection,
            dtype=context.dtype, device=context.device, seed=context.seed,
            recompute=self._recompute(program, windows.shape[1], context),
        )  # fmt: skip
        shard(teacher, student)
        training = Training(
            student, teacher, windows, held_out, self._settings(kind_for(program.outputs), context), context,
            min(reach_of(program), reach_of(target)),
        )  # fmt: skip
        history = training.run()
        after = _with_changes(program, student) if history.best[0] else program
        changed = sites_differing(program, after)
        after = with_peaks(after, changed, context.calibration.windows, context)
        summary = {"rate": training.rate, **self._summary(program, selection, history, windows, repeated)}
        return PassResult(after, changed, (), summary, _layers(after, changed))

    def ensures(self, before: Program, after: Program) -> list[str]:
        """The graph is what it was; only weights have changed."""
        same = [n.name for n in before.graph.nodes] == [n.name for n in after.graph.nodes]
        return [] if same else ["the graph has changed"]

    def _settings(self, kind: Kind, context: PassContext) -> Settings:
        return Settings(
            tokens=self.tokens, batch=self.batch, rate=self.rate, warmup=self.warmup, decay=self.decay,
            checks=self.checks, patience=self.patience, minutes=self.checkpoint_minutes, precision=self.precision,
            kind=kind, seed=context.seed,
        )  # fmt: skip

    def _text(self, text: Calibration) -> tuple[Tensor, Tensor, bool]:
        """(windows to learn from, windows to judge by, whether calibration text is among the first).

        Text that nothing was calibrated on comes first; where that is not enough, calibration text serves better than
        the same text again. The selection never serves: it judges.
        """
        own = text.recovery
        if own is None:
            return text.windows, text.selection, True
        if own.windows.numel() >= self.tokens or not len(own.seen):
            return own.windows, own.selection, False
        missing = -(-(self.tokens - own.windows.numel()) // own.window)
        return torch.cat([own.windows, own.seen[:missing]]), own.selection, True

    def _recompute(self, program: Program, window: int, context: PassContext) -> bool:
        if self.recompute != "auto":
            return self.recompute == "always"
        width = max(site.o.out_features for site in program.site_list)
        tokens = max(window, min(TOKENS_AT_ONCE[context.device.type], self.batch))
        kept = 4 * tokens * width * KEPT_PER_LAYER * len(program.sites)
        return kept > min(KEPT_BYTES, (context.memory_budget or KEPT_BYTES * 2) // 2)

    def _summary(
        self, program: Program, selection: Selection, history: History, windows: Tensor, repeated: bool
    ) -> dict[str, Any]:
        numbers = sum(program.weights.meta(name).numel for name in selection.names)
        return {
            "trained_weights": len(selection.names),
            "trained_numbers": numbers,
            "tokens": history.loss[-1][0] if history.loss else 0,
            "text_tokens": windows.numel(),
            "calibration_text_repeated": repeated,
            "held_out_before": history.held_out[0][1],
            "held_out_after": history.best[1],
            "processes": parallel.world(),
            "curve": history.to_json(),
        }


def teacher_source(path: str, program: Program) -> ModelSource:
    """Open another model to learn from.

    Raises:
        OptionError: it has another vocabulary.
        SourceError: it cannot be read.
    """
    source = open_source(path)
    sizes = [config.get("vocab_size") for config in (program.config, source.config.to_dict())]
    if sizes[0] != sizes[1]:
        raise OptionError(f"distill: the teacher {path} has {sizes[1]} words, the model {sizes[0]}", SAME_WORDS)
    return source


def other_teacher(path: str, program: Program, context: PassContext) -> Program:
    """Capture another model to learn from.

    Raises:
        OptionError: it has another vocabulary, tokenizer or output.
        SourceError: it cannot be read.
    """
    source = teacher_source(path, program)
    if context.tokenizer is not None and source.has_tokenizer:
        ours, theirs = context.tokenizer().get_vocab(), source.tokenizer().get_vocab()
        if ours != theirs:
            raise OptionError(f"distill: the teacher {path} has another tokenizer", SAME_WORDS)
    captured = capture(source)
    if captured.outputs[:1] != program.outputs[:1]:
        raise OptionError(f"distill: the teacher {path} gives {captured.outputs[0]}, the model {program.outputs[0]}")
    return captured


def shard(*models: Model) -> None:
    """Spread weights, gradients and moments over the processes, layer by layer (FSDP2); nothing in a single one."""
    if parallel.world() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for model in models:
        device = model.runner.device.type
        mesh = init_device_mesh(device, (parallel.world(),))
        _own_tensors(model)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        # Embedding and head stay whole between forward and backward: the head runs chunk by chunk outside of them.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)


def _own_tensors(model: Model) -> None:
    """Give every parameter a tensor of its own: sharding replaces what is shared with another model."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


@torch.no_grad()
def _with_changes(program: Program, student: Model) -> Program:
    """The program with the trained weights in the place of those they started from."""
    new: dict[Value, Value] = {}
    for name, tensor in merged(student).items():
        if not bool(torch.isfinite(tensor).all()):
            raise UnsupportedError(f"{name} is not finite after distillation", "lower the rate")
        new[program.weights[name]] = Inline(tensor.to("cpu", torch.float32))
    # Every name of a tied weight gets the new value, those that the graph does not read included.
    values = {name: new[value] for name, value in program.weights.items() if value in new}
    return program.replace(weights=program.weights.with_values(values))


def _layers(program: Program, changed: tuple[str, ...]) -> tuple[Mapping[str, Any], ...]:
    """Per-layer facts: the largest latent where that matters."""
    found = []
    for fqn in changed:
        site = program.sites[fqn]
        record: dict[str, Any] = {"site": fqn, "layer": site.layer, "distilled": True}
        if site.latent is not None and site.latent.peak:
            record["peak"] = site.latent.peak
        found.append(record)
    return tuple(found)
