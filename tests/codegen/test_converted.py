"""What `to-mla` really makes, written by both classes: the written model computes what the Program computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnopt.artifact import Staging
from attnopt.codegen.hf.emit import check_source, choose
from attnopt.evaluate.measure import measure_cache
from attnopt.passes.registry import REGISTRY
from attnopt.profiles.calibration import Calibration
from attnopt.rewriter.capture import capture
from attnopt.rewriter.interpret import run
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.pipeline import Pipeline
from attnopt.rewriter.source import open_source
from tests.codegen.loading import module_of, tokens
from tests.codegen.lossless import tiny

#: Both move all weights; the constant lane must be left for the stock class to hold the result.
RECOVERY = ",refit{epochs=1},distill{tokens=1024 batch=128 rate=0.003 parameters=all}"


@pytest.mark.parametrize(
    ("model_type", "targets", "then"),
    [
        ("llama", ("deepseek_v3", "attnopt"), ""),
        ("llama", ("deepseek_v3", "attnopt"), RECOVERY),
        ("qwen2", ("deepseek_v3", "attnopt"), ""),
        ("qwen3", ("attnopt",), ""),
        ("mixtral", ("attnopt",), ""),
    ],
)
def test_written_model_equals_the_program(model_type: str, targets: tuple[str, ...], then: str, tmp_path: Path) -> None:
    tiny(model_type, tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    source = capture(open_source(tmp_path / "source"))
    text = torch.randint(3, 97, (20, 32), generator=torch.Generator().manual_seed(1))
    with Staging(tmp_path / "out", key="test") as staging:
        context = PassContext(workdir=staging, calibration=Calibration(text[:16], text[16:], "test", "", 0))
        pipeline = Pipeline.parse(f"to-mla{{kv-lora-rank=13 qk-rope-head-dim=8}}{then}", REGISTRY)
        program = pipeline.run(source, context).program
        ids = tokens(2, 12)
        expected = run(program, input_ids=ids, position_ids=torch.arange(12).expand(2, -1))["logits"]
        for target in targets:
            check_source(source, target)
            emission, refused = choose(program, "auto" if target == targets[0] else target)
            assert emission.target == target
            assert (refused is None) == ("deepseek_v3" in targets)
            model = module_of(emission)
            with torch.no_grad():
                got = model(ids).logits
            assert float((got - expected).norm() / expected.norm()) < 1e-5
            cached, decode_error = measure_cache(model)
            assert cached == emission.cached_numbers_per_token == program.cached_numbers_per_token == 2 * (13 + 8)
            assert decode_error < 1e-5
