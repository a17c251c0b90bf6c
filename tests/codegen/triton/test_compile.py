"""What the compiler makes of the kernels, for sm_80 and sm_90, without a GPU.

A kernel is judged by rules (fits, no spills, tensor cores, blocks in flight, no work done twice) and by golden figures
of the Triton version they were reviewed with.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from attnopt.codegen.target import find_target
from attnopt.codegen.triton.compile import Compiled, gqa_decode_kernel, mla_decode_kernel
from attnopt.codegen.triton.runtime.select import Config, gqa_decode_config, mla_decode_config, pow2
from tests.codegen.triton.gate import LATENTS, cases

GOLDEN = Path(__file__).with_name("golden") / f"triton-{triton.__version__}.json"
CASES = cases()


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))


_compiled: dict[str, Compiled] = {}


def compiled(name: str) -> Compiled:
    if name not in _compiled:
        _compiled[name] = CASES[name]()
    return _compiled[name]


@pytest.mark.parametrize("name", CASES)
def test_fits_and_does_not_spill(name: str) -> None:
    figures = compiled(name).figures
    assert figures.shared <= find_target(name.split()[0]).shared_memory
    assert figures.stack == 0
    assert 0 < figures.registers <= 255


@pytest.mark.parametrize("name", [n for n in CASES if "combine" not in n])
def test_uses_tensor_cores_and_keeps_blocks_in_flight(name: str) -> None:
    figures = compiled(name).figures
    assert figures.instructions
    assert figures.buffers >= 2


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("heads", "rank", "rope"), LATENTS)
def test_no_product_is_computed_twice(target: str, heads: int, rank: int, rope: int) -> None:
    """Tensor-core work of one pass over the code: scores and values of one block, and for D3 the last values."""
    spec = find_target(target)
    config = mla_decode_config(heads, rank, rope, 2, target.replace("_", ""), spec.shared_memory)
    figures = compiled(f"{target} mla H{heads} R{rank} P{rope}").figures
    scores = config.BH * config.BN * (pow2(rank) + pow2(rope))
    values = config.BH * config.BN * pow2(rank) * (2 if config.kernel == "mla_decode_d3" else 1)
    assert figures.multiply_adds == scores + values


def test_hopper_gets_its_own_instructions() -> None:
    for heads in (32, 64):
        assert any(i.startswith("wgmma") for i in compiled(f"sm_90 mla H{heads} R512 P64").figures.instructions)
    assert set(compiled("sm_90 mla H16 R512 P64").figures.instructions) == {"mma.m16n8k16"}


def test_golden_figures() -> None:
    if not GOLDEN.exists():
        pytest.skip(f"no figures were reviewed for Triton {triton.__version__}")
    golden = json.loads(GOLDEN.read_text())["kernels"]
    assert set(golden) == set(CASES)
    for name, expected in golden.items():
        found = compiled(name).figures
        assert found.instructions == expected["instructions"], name
        assert (found.shared, found.buffers) == (expected["shared"], expected["buffers"]), name
        assert found.registers <= expected["registers"] + 8, name


def test_the_gate_sees_a_page_id_in_the_loop() -> None:
    """The reason for the look-ahead: with the page id loaded in the loop one buffer is left, and a test must say so."""
    assert compiled("sm_90 mla H16 R512 P64").figures.buffers == 2
    single = Config("mla_decode_d1", 16, 32, 4, 1)
    assert mla_decode_kernel(16, 512, 64, "bfloat16", single, find_target("sm_90")).figures.buffers == 1


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
