"""Trials: what one converted layer alone costs the model, measured at its output."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.passes.common import stream as stream_module
from attnopt.passes.common.stream import Stream
from attnopt.passes.mla import trials as trials_module
from attnopt.passes.mla.budget import Split
from attnopt.passes.mla.layer import LatentLayer
from attnopt.passes.mla.source_layer import SourceLayer, read_source
from attnopt.passes.mla.statistics import LayerStatistics
from attnopt.passes.mla.to_mla import ToMla
from attnopt.passes.mla.trials import Trials
from attnopt.progress import Silent
from attnopt.rewriter.capture import capture_module
from attnopt.rewriter.interpret import LayerRunner
from attnopt.rewriter.program import Program
from tests import models
from tests.passes.mla.test_to_mla import calibration

SIZES = (8, 16, 24)


def tried(
    program: Program, sizes: tuple[int, ...] = SIZES, windows: int = 20
) -> tuple[Trials, dict[str, dict[Split, float]]]:
    """All layers tried, and the losses."""
    text = calibration(windows, 40)
    runner = LayerRunner(program, torch.float64)
    with torch.no_grad():
        stream = Stream(runner, text.windows, text.selection, torch.float64)
        trials = Trials(stream, sizes, False, len(program.sites))
        for site, loaded in stream.layers(Silent(), "test"):
            trials.advance(loaded)
            stats = LayerStatistics(read_source(site, loaded.weight), 1)
            for batch in stream.batches:
                if not batch.held_out:
                    x = loaded.evaluate(stream.env(batch), site.nodes.input)
                    stats.update(x, stream.weights(batch, stats.layer.attend(x)))
            trials.begin(site, loaded, stats, 0.5)
        return trials, trials.losses(Silent())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_layer_is_tried_at_every_size_and_more_is_better(family: str) -> None:
    _, program = models.captured(family)
    _, losses = tried(program)
    assert list(losses) == list(program.sites)
    for found in losses.values():
        assert [split.total for split in found] == list(SIZES)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert min(found.values()) > 1e-6


def test_at_full_width_nothing_is_lost() -> None:
    _, program = models.captured("llama")
    site = program.site_list[0]
    _, losses = tried(program, (2 * site.kv_heads * site.d_qk,))  # half of it turns: all pairs, beside the values
    assert all(loss < 1e-12 for found in losses.values() for loss in found.values())


def test_the_loss_is_that_of_the_model_with_one_layer_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another way: transformers' own model, in which one attention gives what the converted layer gives."""
    model = models.build("llama").double()
    made: list[tuple[SourceLayer, LatentLayer]] = []
    quick_form = trials_module.quick_form

    def noted(stats: LayerStatistics, energies: Tensor, split: Split, lane: bool) -> LatentLayer:
        made.append((stats.layer, quick_form(stats, energies, split, lane)))
        return made[-1][1]

    monkeypatch.setattr(trials_module, "quick_form", noted)
    _, losses = tried(capture_module(models.build("llama")))
    ids = calibration(20, 40).selection
    before = model(ids).logits.log_softmax(-1).detach()
    expected = []
    for place, (source, layer) in enumerate(made):
        attention = model.model.layers[place // len(SIZES)].self_attn
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(
                attention,
                "forward",
                lambda hidden_states, *_, s=source, m=layer, **__: (m.attend(s, hidden_states), None),
            )
            after = model(ids).logits.log_softmax(-1)
        expected.append(float(F.kl_div(after, before, log_target=True, reduction="none").sum(-1).mean()))
    found = [loss for tries in losses.values() for loss in tries.values()]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("room", "tokens", "batches"), [(1 << 30, 2048, 5), (1 << 30, 100, 3), (1, 2048, 1)])
def test_text_is_bounded_by_tokens_and_memory_but_there_is_some(
    monkeypatch: pytest.MonkeyPatch, room: int, tokens: int, batches: int
) -> None:
    monkeypatch.setattr(stream_module, "TOKENS_AT_ONCE", 40)
    monkeypatch.setattr(trials_module, "TRIAL_BYTES", room)
    monkeypatch.setattr(trials_module, "TRIAL_TOKENS", tokens)
    trials, losses = tried(models.captured("llama")[1], (16,), windows=40)
    assert sum(batch.held_out and not batch.lone for batch in trials.stream.batches) == 5
    assert len(trials.batches) == batches
    assert all(loss > 0 for found in losses.values() for loss in found.values())


def test_predicted_memory_is_bounded_and_grows_with_the_trials() -> None:
    assert trials_module.trial_bytes(2, 3, 32) == 2 * 3 * 32 * 4 * trials_module.TRIAL_TOKENS
    assert trials_module.trial_bytes(80, 3, 8192) == trials_module.TRIAL_BYTES
    _, program = models.captured("llama")
    equal, measured = (ToMla(kv_keep=0.5, sizes=sizes).plan(program, {}).memory for sizes in ("equal", "measured"))
    assert measured - equal == trials_module.trial_bytes(len(program.sites), 3, 32)
