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
from attnopt.codegen.triton import compile as compile_module
from attnopt.codegen.triton.compile import gqa_decode_kernel, mla_decode_kernel
from attnopt.codegen.triton.runtime.designs import gluon_obstacle
from attnopt.codegen.triton.runtime.select import (
    D4,
    Config,
    d4_refusal,
    gqa_decode_config,
    mla_decode_candidates,
    mla_decode_config,
    mla_shared_bytes,
    pow2,
)
from attnopt.errors import UnsupportedError
from tests.codegen.triton.gate import cases, d4_cases

GOLDEN = Path(__file__).with_name("golden") / f"triton-{triton.__version__}.json"
GOLDEN_FIGURES = json.loads(GOLDEN.read_text())["kernels"] if GOLDEN.exists() else None
CASES = cases()
#: Each design on its target, converted models' odd sizes, and the kernels users meet first; the others are slow.
FEW = (
    *("sm_80 mla H9 R144 P48", "sm_90 mla H16 R512 P64", "sm_90 mla H32 R512 P64", "sm_90 mla H64 R512 P64"),
    *("sm_90 gqa", "sm_90 prefill 192/128"),
    *("sm_90 d4 H64 R512 P64 BN32 x4", "sm_90 d4 H64 R512 P64 BN64 x2"),
)
D4_CASES = d4_cases()
NAMES = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in CASES]
_SIZES = re.compile(r"(sm_\d+) mla H(\d+) R(\d+) P(\d+)")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("name", NAMES)
def test_compiled_code_is_what_it_should_be(name: str) -> None:
    if name in D4_CASES and gluon_obstacle() is not None:
        pytest.skip(str(gluon_obstacle()))
    figures = CASES[name]().figures
    target = find_target(name.split()[0])
    assert figures.shared <= target.shared_memory
    assert figures.stack == 0  # no spills
    assert 0 < figures.registers <= 255
    assert not figures.serialised
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
    if name in D4_CASES:
        # Scores of one block, and with look-ahead those before the loop; values of one block.
        heads, rank, rope, config = D4_CASES[name]
        ahead, half = config.num_stages > 2, config.BN // 2
        columns = (pow2(rank) + pow2(rope)) // 16
        assert figures.instructions == {
            f"wgmma.m64n{half}k16": columns * (2 if ahead else 1),
            f"wgmma.m64n{pow2(rank) // 2}k16": config.BN // 16,
        }
        assert figures.buffers == config.num_stages
        assert figures.shared == mla_shared_bytes(config, rank, rope, 2, "sm90")
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


def test_d4_keeps_blocks_in_flight_or_says_why_it_is_not_offered() -> None:
    limit = find_target("sm_90").shared_memory
    default, *others = mla_decode_candidates(64, 512, 64, 2, "sm90", limit)
    assert default.kernel == "mla_decode_d3"
    # Two blocks are in use with look-ahead, one without.
    assert [(c.kernel, c.BN, c.num_stages) for c in others] == [(D4, 32, 4), (D4, 64, 2)]
    for sizes, reason in (
        ((64, 512, 64, 2, "sm80", 166_912), "wgmma, which sm80 does not have"),
        ((64, 512, 64, 2, "sm100", limit), "wgmma, which sm100 does not have"),
        ((64, 512, 64, 4, "sm90", limit), "not 32-bit"),
        ((32, 512, 64, 2, "sm90", limit), "tiles of 64 rows"),
        ((64, 500, 64, 2, "sm90", limit), "8 does not divide R = 500"),
        ((64, 512, 64, 2, "sm90", 101_376), "fits 101376 bytes"),
    ):
        refused = d4_refusal(*sizes)
        assert refused is not None
        assert reason in refused
        assert len(mla_decode_candidates(*sizes)) == 1
    assert not any(name.startswith("sm_80") for name in D4_CASES)
    with pytest.raises(UnsupportedError, match="sm80 does not have"):
        mla_decode_kernel(64, 512, 64, "bfloat16", others[0], find_target("sm_80"))


@pytest.mark.skipif(gluon_obstacle() is not None, reason="needs Gluon")
def test_the_gate_sees_wgmma_that_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the waits, results are read while they are computed: the assembler says so, and the figure tells."""
    real = compile_module._serialised
    broken = lambda ptx, target: real(ptx.replace("wgmma.wait_group.sync.aligned 0", "// "), target)  # noqa: E731
    monkeypatch.setattr(compile_module, "_serialised", broken)
    name = "sm_90 d4 H64 R128 P64 BN64 x4"
    assert CASES[name]().figures.serialised


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
