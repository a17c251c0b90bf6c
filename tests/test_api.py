"""The Python interface: what the verbs accept and refuse; the documents are tested with the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attnopt
from attnopt import api, conversion
from attnopt.conversion import CalibrationOptions, RunOptions
from attnopt.errors import AttnoptError, OptionError, SourceError
from attnopt.results import Conversion, equal_runs
from tests import hostile


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.healthy(tmp_path_factory.mktemp("api") / "model")


def test_inspect(model: Path) -> None:
    found = attnopt.inspect(model)
    assert [site.fqn for site in found.sites] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert found.cached_numbers_per_token == 64
    assert found.parameters > 0
    with pytest.raises(SourceError):
        attnopt.inspect(model / "nothing")


def test_convert_needs_no_options(model: Path, tmp_path: Path) -> None:
    done = attnopt.convert(model, tmp_path / "out", calibration=CalibrationOptions(tokens=1024, context=64))
    assert isinstance(done, Conversion)
    assert done.exit_code == 0
    assert done.cached_after <= 32
    assert done.details["calibration"]["source"] == "self"
    assert (tmp_path / "out" / "model.safetensors").exists()


class TestMethodPipeline:
    def test_options_that_are_not_given_are_left_out(self) -> None:
        assert api.method_pipeline("mla", {"kv-keep": 0.25, "kv-lora-rank": None}) == "to-mla{kv-keep=0.25}"
        assert api.method_pipeline("mla", {}) == "to-mla"

    def test_unknown_method_and_option(self) -> None:
        with pytest.raises(OptionError, match="no method 'mal'") as caught:
            api.method_pipeline("mal", {})
        assert "mla" in caught.value.hint
        with pytest.raises(OptionError, match="no option 'kv-kept'"):
            api.method_pipeline("mla", {"kv-kept": 1})


class TestCalibrationOptions:
    def test_self_is_the_default(self) -> None:
        assert CalibrationOptions.parse(None, 1, 2, 3) == CalibrationOptions((), 1, 2, 3)
        assert CalibrationOptions.parse(["self"], 1, 2, 3).files == ()

    def test_files(self) -> None:
        assert CalibrationOptions.parse(["a", "b"], 1, 2, 3).files == (Path("a"), Path("b"))

    def test_files_beside_text_of_the_model(self) -> None:
        both = CalibrationOptions.parse(["a", "self", "b"], 99, 2, 3)
        assert both == CalibrationOptions((Path("a"), Path("b")), 99, 2, 3, own=True)
        assert [both.of_files(99), CalibrationOptions().of_files(99)] == [66, 0]
        assert both.writes
        assert not CalibrationOptions((Path("a"),)).writes

    def test_too_few_tokens_to_share(self) -> None:
        with pytest.raises(OptionError, match="31 are the files' and 32 are the model's") as error:
            CalibrationOptions.parse(["a", "self"], 63, 16, 0).check_shares()
        assert "--calib-tokens" in error.value.hint
        with pytest.raises(OptionError, match="10 are the files'"):
            CalibrationOptions.parse(["a", "self"], 20, 16, 0).check_shares()
        for enough in (CalibrationOptions.parse(["a", "self"], 64, 16, 0), CalibrationOptions.parse(["a"], 63, 16, 0)):
            enough.check_shares()
        assert CalibrationOptions.parse(["a", "self"], 64, 16, 0).of_files(64) == 32
        assert CalibrationOptions.parse(["a"], 63, 16, 0).of_files(63) == 63  # nothing to share


class TestDevicesAndTypes:
    def test_auto(self) -> None:
        assert conversion.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert conversion.resolve_dtype("auto") is None
        assert conversion.resolve_dtype("bfloat16") == torch.bfloat16

    @pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99", ""])
    def test_devices_that_are_not_there(self, name: str) -> None:
        with pytest.raises(OptionError):
            conversion.resolve_device(name)

    @pytest.mark.parametrize("name", ["int8", "float64", "half", "__name__"])
    def test_types_weights_are_not_written_in(self, name: str) -> None:
        with pytest.raises(OptionError):
            conversion.resolve_dtype(name)


def test_memory_is_predicted_before_anything_is_computed(model: Path, tmp_path: Path) -> None:
    small, large = (
        api.run_pipeline(
            model,
            "to-mla",
            None,
            calibration=CalibrationOptions(tokens=tokens),
            options=RunOptions(dry_run=True),
        ).memory_bytes  # type: ignore[union-attr]  # a dry run returns a plan
        for tokens in (1024, 1 << 22)
    )
    assert large - small > (1 << 22) * 32 * 4
    with pytest.raises(AttnoptError, match="memory") as caught:
        attnopt.convert(model, tmp_path / "out", options=RunOptions(memory_budget=1e-3))
    assert "--memory-budget" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_needs_an_output(model: Path) -> None:
    with pytest.raises(OptionError, match="output"):
        attnopt.run_pipeline(model, "to-mla", None)


def test_verify_needs_a_directory_that_says_what_it_was_made_from(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AttnoptError, match="not a directory"):
        attnopt.verify(tmp_path / "nothing")
    (tmp_path / "attnopt.json").write_text("[]")
    with pytest.raises(AttnoptError, match="made from"):
        attnopt.verify(tmp_path)


def test_equal_runs() -> None:
    assert equal_runs("aabccc") == [(0, 1), (2, 2), (3, 5)]
    assert equal_runs([]) == []
