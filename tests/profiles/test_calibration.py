"""Calibration text: shares, pools, prefixes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnopt.errors import OptionError, SourceError
from attnopt.profiles import calibration
from attnopt.profiles.calibration import RecoveryText, divide, from_files, joined_windows

BOS, EOS = 300, 301


class Bytes:
    """A tokenizer whose tokens are bytes, with or without a BOS token, and with or without an EOS token."""

    all_special_ids = (13, BOS)

    def __len__(self) -> int:
        return 256

    def __init__(self, bos: bool = False, eos: bool = False) -> None:
        self.bos, self.eos = [BOS] * bos, [EOS] * eos

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = list(text.encode())
        return {"input_ids": [*self.bos, *ids, *self.eos] if add_special_tokens else ids}


def text_file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def rows(pool: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in pool.tolist()}


def recovery_of(made: calibration.Calibration) -> RecoveryText:
    assert made.recovery is not None
    return made.recovery


@pytest.mark.parametrize(
    ("window", "learned", "calibrated", "expected"),
    [(64, 10_000, 10_000, 4), (79, 10_000, 10_000, 4), (0, 10_000, 10_000, 1), (8, 10_000, 10_000, 1),
     (64, 8 * 32, 10_000, 2), (64, 10_000, 16 * 48, 3), (64, 10, 10, 1)],
)  # fmt: skip
def test_windows_are_joined_as_far_as_enough_of_them_are_left(
    window: int, learned: int, calibrated: int, expected: int
) -> None:
    assert joined_windows(16, window, learned, calibrated) == expected


class TestDivide:
    def test_pools_are_disjoint_and_complete(self) -> None:
        ids = torch.arange(17 * 4).view(17, 4)
        made = divide(ids, "text", seed=3)
        assert made.windows.shape == (15, 4)
        assert made.selection.shape == (2, 4)
        assert rows(made.windows) | rows(made.selection) == rows(ids)
        assert not rows(made.windows) & rows(made.selection)
        assert made.tokens == ids.numel()
        assert made.context == 4
        assert made.seed == 3

    @pytest.mark.parametrize("n", range(2, 40))
    def test_some_windows_are_held_out_of_any_number(self, n: int) -> None:
        made = divide(torch.arange(n).view(n, 1), "text", seed=0)
        assert len(made.selection) == max(1, n // calibration.SELECTION_EVERY)
        assert len(made.windows) == n - len(made.selection)

    def test_one_window_is_refused(self) -> None:
        with pytest.raises(OptionError, match="two windows") as caught:
            divide(torch.zeros(1, 8), "text", seed=0)
        assert "--calib" in caught.value.hint

    def test_hash_follows_contents_and_division(self) -> None:
        ids = torch.arange(64).view(8, 8)
        same, again = divide(ids, "a", 0), divide(ids.clone(), "b", 1)
        assert same.sha256 == again.sha256
        changed = ids.clone()
        changed[3, 3] += 1
        assert divide(changed, "a", 0).sha256 != same.sha256
        assert divide(ids.view(16, 4), "a", 0).sha256 != same.sha256


class TestFromFiles:
    def test_windows_are_text_of_the_file(self, tmp_path: Path) -> None:
        text = "".join(chr(97 + i % 26) for i in range(1000))
        made = from_files(Bytes(), [text_file(tmp_path, "a.txt", text)], tokens=320, context=32)
        assert made.tokens == 320
        for row in torch.cat([made.windows, made.selection]).tolist():
            assert bytes(row).decode() in text
        assert made.source == "a.txt"

    def test_short_files_leave_their_share_to_long_ones(self, tmp_path: Path) -> None:
        files = [text_file(tmp_path, "long", "l" * 4000), text_file(tmp_path, "short", "s" * 70)]
        made = from_files(Bytes(), files, tokens=640, context=32)
        everything = torch.cat([made.windows, made.selection])
        assert made.tokens == 640
        assert (everything == ord("s")).sum() == 64

    def test_windows_are_spread_over_the_file(self, tmp_path: Path) -> None:
        text = "".join(chr(48 + i // 100) for i in range(1000))
        made = from_files(Bytes(), [text_file(tmp_path, "a", text)], tokens=80, context=10)
        starts = sorted(torch.cat([made.windows, made.selection])[:, 0].tolist())
        assert starts[0] == ord("0")
        assert starts[-1] == ord("9")

    def test_each_window_starts_as_the_tokenizer_starts_a_text(self, tmp_path: Path) -> None:
        made = from_files(Bytes(bos=True), [text_file(tmp_path, "a", "x" * 500)], tokens=160, context=16)
        everything = torch.cat([made.windows, made.selection])
        assert (everything[:, 0] == BOS).all()
        assert (everything[:, 1:] == ord("x")).all()

    def test_each_window_ends_as_the_tokenizer_ends_a_text(self, tmp_path: Path) -> None:
        text = text_file(tmp_path, "a", "x" * 500)
        made = from_files(Bytes(bos=True, eos=True), [text], tokens=160, context=16)
        everything = torch.cat([made.windows, made.selection])
        assert everything.shape == (10, 16)
        assert (everything[:, 0] == BOS).all()
        assert (everything[:, -1] == EOS).all()
        assert (everything[:, 1:-1] == ord("x")).all()

    def test_text_to_learn_from_is_what_is_left(self, tmp_path: Path) -> None:
        path = text_file(tmp_path, "a", "".join(chr(i) for i in range(0x4E00, 0x4E00 + 400)))
        made = from_files(Bytes(), [path], tokens=768, context=12, recovery=96)
        learned = recovery_of(made)
        pools = [rows(pool) for pool in (made.windows, made.selection, learned.windows)]
        assert learned.windows.shape == (8, 12)
        assert len(set.union(*pools)) == sum(map(len, pools)) == 64 + 8
        assert torch.equal(learned.seen, made.windows)
        assert torch.equal(learned.selection, made.selection)

    def test_windows_to_learn_from_may_be_longer_and_those_calibrated_on_are_parts_of_them(
        self, tmp_path: Path
    ) -> None:
        path = text_file(tmp_path, "a", "".join(chr(i) for i in range(0x4E00, 0x4E00 + 2000)))
        made = from_files(Bytes(bos=True), [path], tokens=1280, context=11, recovery=880, recovery_window=40)
        learned = recovery_of(made)
        # Three windows of one BOS token and ten others; a long one has one BOS token and all thirty others.
        assert learned.window == 31
        assert len(learned.windows) == 880 // 33
        assert torch.equal(learned.seen[:, 1:].reshape(-1, 10), made.windows[:, 1:])
        assert torch.equal(learned.selection[:, 1:].reshape(-1, 10), made.selection[:, 1:])
        pools = [rows(pool) for pool in (learned.windows, learned.seen, learned.selection)]
        assert len(set.union(*pools)) == sum(map(len, pools))
        assert all((pool[:, 0] == BOS).all() for pool in (learned.windows, learned.seen, learned.selection))

    def test_short_files_keep_windows_short(self, tmp_path: Path) -> None:
        files = [text_file(tmp_path, str(n), chr(97 + n) * 70) for n in range(20)]
        made = from_files(Bytes(), files, tokens=1280, context=16, recovery=640, recovery_window=48)
        assert recovery_of(made).window == 32  # 64 of 70 tokens are used then, 48 with three windows in one
        assert made.tokens == 1280

    @pytest.mark.parametrize("text", ["", " \n\t\n"])
    def test_empty_text_is_refused(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(SourceError, match="empty"):
            from_files(Bytes(), [text_file(tmp_path, "a", text)], tokens=64, context=16)

    def test_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"nowhere\.txt"):
            from_files(Bytes(), [tmp_path / "nowhere.txt"], tokens=64, context=16)

    def test_directory_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="cannot read"):
            from_files(Bytes(), [tmp_path], tokens=64, context=16)

    def test_binary_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "model.bin"
        path.write_bytes(bytes(range(256)))
        with pytest.raises(SourceError, match="UTF-8"):
            from_files(Bytes(), [path], tokens=64, context=16)

    def test_a_long_file_is_cut_between_characters(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for limit in range(60, 70):
            monkeypatch.setattr(calibration, "MAX_FILE_BYTES", limit)
            made = from_files(Bytes(), [text_file(tmp_path, "a", "aé€😀" * 100)], tokens=640, context=8)
            assert limit - 16 < made.tokens <= limit

    def test_too_little_text_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="two windows"):
            from_files(Bytes(), [text_file(tmp_path, "a", "only this")], tokens=64, context=8)

    @pytest.mark.parametrize(("tokens", "context"), [(10, 8), (1000, 4), (0, 16), (-5, 16)])
    def test_sizes_that_make_no_sense_are_refused(self, tmp_path: Path, tokens: int, context: int) -> None:
        with pytest.raises(OptionError, match=r"context|tokens"):
            from_files(Bytes(), [text_file(tmp_path, "a", "x" * 500)], tokens=tokens, context=context)
