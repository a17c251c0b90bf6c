"""Work is divided completely, without overlap, evenly, and without reading values back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", minversion="3.6", reason="the kernels need Triton 3.6 or newer")

from attnopt.codegen.triton.runtime.schedule import OVERHEAD, schedule, streaming_blocks
from attnopt.codegen.triton.runtime.select import (
    Config,
    Tuned,
    gqa_decode_config,
    mla_decode_config,
    prefill_config,
    tuned_document,
)

BLOCKS = st.lists(st.integers(0, 300), min_size=1, max_size=12)


@given(BLOCKS, st.integers(1, 140))
def test_every_block_is_read_once(blocks: list[int], parts: int) -> None:
    work = schedule(torch.tensor(blocks), parts)
    assert work.sequence.shape[0] == len(blocks) + parts
    first = work.first_item.tolist()
    for sequence, count in enumerate(blocks):
        items = range(first[sequence], first[sequence + 1])
        assert len(items) >= 1  # an empty sequence has a part, too, which says that nothing was seen
        read = [b for i in items for b in range(int(work.start[i]), int(work.stop[i]))]
        assert read == list(range(count))
        assert all(int(work.sequence[i]) == sequence for i in items)
    assert (work.sequence[first[-1] :] == -1).all()


@given(BLOCKS, st.integers(1, 140))
def test_no_part_is_much_larger_than_the_mean(blocks: list[int], parts: int) -> None:
    work = schedule(torch.tensor(blocks), parts)
    mean = (sum(blocks) + OVERHEAD * len(blocks)) / parts
    assert int((work.stop - work.start).max()) <= mean + 1


def test_one_long_request_fills_the_machine() -> None:
    work = schedule(torch.tensor([512]), 132)
    assert int((work.sequence >= 0).sum()) >= 100


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 200)), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from([16, 32, 64]),
)
def test_streaming_heads_read_the_blocks_that_hold_what_they_see(
    lengths: list[int], heads: list[tuple[int, int]], tokens: int, block: int
) -> None:
    lengths = [max(length, tokens) if length else 0 for length in lengths]
    sinks, windows = (torch.tensor([h[i] for h in heads]) for i in (0, 1))
    counted = streaming_blocks(torch.tensor(lengths), sinks, windows, tokens, block)
    for b, length in enumerate(lengths):
        for h, (sink, window) in enumerate(heads):
            blocks = range(-(-length // block))
            if window > 0:
                sink_blocks = -(-sink // block)
                oldest = max(0, length - tokens + 1 - window)
                blocks = [i for i in blocks if i < sink_blocks or (i + 1) * block > oldest]
            assert int(counted[b, h]) == len(blocks)


@pytest.mark.parametrize("arch", ["sm80", "sm89", "sm90", "sm100", "gfx942"])
@pytest.mark.parametrize(
    ("rows", "rank", "rope"), [(1, 16, 4), (9, 144, 48), (16, 512, 64), (32, 512, 64), (128, 512, 64)]
)
def test_defaults_fit_the_machine(arch: str, rows: int, rank: int, rope: int) -> None:
    limits = {"sm80": 166_912, "sm89": 101_376, "sm90": 232_448, "sm100": 232_448, "gfx942": 65_536}
    config = mla_decode_config(rows, rank, rope, 2, arch, limits[arch])
    assert 64 % config.BN == 0
    if arch == "sm90":
        expected = "mla_decode_d1" if rows <= 16 else "mla_decode_d2" if rows <= 32 else "mla_decode_d3"
        assert config.kernel == expected
    assert gqa_decode_config(rows, 128, 128, 2, arch, limits[arch]).BN >= 16
    assert prefill_config(128, 64, 128, 2, arch, limits[arch]).BN >= 16


def test_tuned_picks_are_used_only_where_they_were_measured(tmp_path: object) -> None:
    import json
    from pathlib import Path

    path = Path(str(tmp_path)) / "sm90.json"
    pick, default = Config("mla_decode_d1", 16, 64, 4, 2), Config("mla_decode_d1", 16, 32, 4, 3)
    path.write_text(json.dumps(tuned_document("sm90", 132, "3.6.0", {"mla_decode": {"H16": pick}})))
    assert Tuned(path, "sm90", "3.6.0").get("mla_decode", "H16", default) == pick
    assert Tuned(path, "sm90", "3.6.0").get("mla_decode", "H32", default) == default
    assert Tuned(path, "sm90", "3.7.1").get("mla_decode", "H16", default) == default
    assert Tuned(path, "sm80", "3.6.0").get("mla_decode", "H16", default) == default
    assert Tuned(None, "sm90", "3.6.0").get("mla_decode", "H16", default) == default
