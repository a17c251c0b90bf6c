"""What the compiler makes of the kernels, for sm_80 and sm_90, without a GPU.

A kernel is judged by rules (fits, no spills, tensor cores, blocks in flight, no work done twice) and by golden figures
of the Triton version they were reviewed with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6", reason="the kernels need Triton 3.6 or newer")

import triton

from attnopt.codegen.target import find_target
from attnopt.codegen.triton.compile import gqa_decode_kernel, mla_decode_kernel
from attnopt.codegen.triton.runtime.select import Config, gqa_decode_config, mla_decode_config, pow2
from tests.codegen.triton.gate import cases

GOLDEN = Path(__file__).with_name("golden") / f"triton-{triton.__version__}.json"
GOLDEN_FIGURES = json.loads(GOLDEN.read_text())["kernels"] if GOLDEN.exists() else None
CASES = cases()
#: Each design on its target, converted models' odd sizes, and the kernels users meet first; the others are slow.
FEW = (
    *("sm_80 mla H9 R144 P48", "sm_90 mla H16 R512 P64", "sm_90 mla H32 R512 P64", "sm_90 mla H64 R512 P64"),
    *("sm_90 gqa", "sm_90 prefill 192/128"),
)
NAMES = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in CASES]
_SIZES = re.compile(r"(sm_\d+) mla H(\d+) R(\d+) P(\d+)")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("name", NAMES)
def test_compiled_code_is_what_it_should_be(name: str) -> None:
    figures = CASES[name]().figures
    target = find_target(name.split()[0])
    assert figures.shared <= target.shared_memory
    assert figures.stack == 0  # no spills
    assert 0 < figures.registers <= 255
    if "combine" not in name:
        assert figures.instructions  # tensor cores
        assert figures.buffers >= 2  # blocks of the cache in flight
    sizes = _SIZES.fullmatch(name)
    if sizes is not None:
        # Tensor-core work of one pass over the code: scores and values of one block, and for D3 the last values. A
        # product that is computed twice does not hide.
        heads, rank, rope = (int(n) for n in sizes.groups()[1:])
        config = mla_decode_config(heads, rank, rope, 2, sizes[1].replace("_", ""), target.shared_memory)
        scores = config.BH * config.BN * (pow2(rank) + pow2(rope))
        values = config.BH * config.BN * pow2(rank) * (2 if config.kernel == "mla_decode_d3" else 1)
        assert figures.multiply_adds == scores + values
        wide = sizes[1] == "sm_90" and heads > 16
        assert all(i.startswith("wgmma" if wide else "mma.m16n8k16") for i in figures.instructions)
    if GOLDEN_FIGURES is None:
        pytest.skip(f"rules hold; no figures were reviewed for Triton {triton.__version__} ({reviewed()} were)")
    expected = GOLDEN_FIGURES[name]
    assert figures.instructions == expected["instructions"]
    assert (figures.shared, figures.buffers) == (expected["shared"], expected["buffers"])
    assert figures.registers <= expected["registers"] + 8


def reviewed() -> str:
    """Versions of Triton with golden figures."""
    return ", ".join(sorted(path.stem.removeprefix("triton-") for path in GOLDEN.parent.glob("*.json")))


def test_every_kernel_has_golden_figures() -> None:
    for path in GOLDEN.parent.glob("*.json"):
        assert set(json.loads(path.read_text())["kernels"]) == set(CASES)


def test_the_gate_sees_a_kernel_that_does_not_pipeline() -> None:
    """One stage leaves one buffer: the figure that the gate reads does change."""
    single = Config("mla_decode_d1", 16, 32, 4, 1)
    assert mla_decode_kernel(16, 512, 64, "bfloat16", single, find_target("sm_90")).figures.buffers == 1


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_89", "sm_100", "gfx942"])
def test_other_targets_compile(target: str) -> None:
    spec = find_target(target)
    arch = target.replace("_", "")
    config = mla_decode_config(16, 512, 64, 2, arch, spec.shared_memory)
    figures = mla_decode_kernel(16, 512, 64, "bfloat16", config, spec).figures
    assert figures.shared <= spec.shared_memory
    assert figures.stack == 0
    grouped = gqa_decode_config(4, 128, 128, 2, arch, spec.shared_memory)
    assert gqa_decode_kernel(32, 8, 128, 128, "bfloat16", grouped, spec).figures.shared <= spec.shared_memory
