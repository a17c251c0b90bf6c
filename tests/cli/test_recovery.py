"""--recover from the command line: what pipeline it stands for, kill -9 and resume, torchrun."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attnopt.api import method_pipeline
from attnopt.errors import OptionError
from tests import models
from tests.cli.helpers import Outcome, entries, save_byte_tokenizer

Cli = Callable[..., Outcome]

TRAINING = "distill{tokens=4096 batch=128 rate=0.003 checks=4 checkpoint-minutes=0}"
PIPELINE = f'share{{layers="1" fill=none}},{TRAINING}'


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("mla", {"kv-keep": 0.5, "recover": "none"}, "to-mla{kv-keep=0.5}"),
        ("mla", {"recover": "refit"}, "to-mla{recover=refit}"),
        ("mla", {"recover": "distill"}, "to-mla{recover=refit},distill"),
        ("share", {"recover": "distill", "recover-tokens": 5000}, "share{recover=refit},distill{tokens=5000}"),
        ("dimap", {"sparsity": 0.6, "recover": "refit"}, "dimap{sparsity=0.6},refit"),
        ("dimap", {"sparsity": 0.6, "recover": "none"}, "dimap{sparsity=0.6}"),
        ("dimap", {"sparsity": 0.6, "recover": "distill"}, "dimap{sparsity=0.6},refit,distill"),
    ],
)
def test_what_recover_stands_for(method: str, options: dict[str, object], expected: str) -> None:
    assert method_pipeline(method, options) == expected


def test_tokens_without_distill_are_refused() -> None:
    with pytest.raises(OptionError, match="--recover distill"):
        method_pipeline("mla", {"recover": "refit", "recover-tokens": 5000})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = models.save("llama", tmp_path_factory.mktemp("model"), vocab_size=256)
    save_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    words = [chr(c) for c in torch.randint(97, 123, (9000,), generator=generator).tolist()]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(words))
    return file


def arguments(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    size = ["--calib-tokens", "1024", "--context", "32"]
    return ["run", str(model), "-p", PIPELINE, "--calib", str(text), *size, "-o", str(out), "--json", *more]


def test_distillation_is_written_with_its_curve(cli: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    document = cli(*arguments(model, text, tmp_path / "out")).document
    manifest = json.loads((tmp_path / "out" / "attnopt.json").read_text())
    curve = manifest["recovery"]["curve"]
    assert [tokens for tokens, _ in curve["loss"]] == [128 * (i + 1) for i in range(32)]
    assert curve["held_out"][0] == [0, manifest["recovery"]["held_out_before"]]
    assert manifest["recovery"]["held_out_after"] < manifest["recovery"]["held_out_before"]
    assert manifest["options"]["calibration"]["recovery_tokens"] == 4096
    assert manifest["options"]["calibration"]["recovery_window"] == 64  # a sixteenth of 1,024
    page = (tmp_path / "out" / "recovery.html").read_text()
    assert "held-out text" in page
    assert 'src="http' not in page
    assert document["calibration"]["tokens"] == 1024


@pytest.mark.parametrize("target", ["deepseek_v3", "attnopt"])
def test_a_converted_model_is_distilled_later(cli: Cli, model: Path, text: Path, tmp_path: Path, target: str) -> None:
    """From its directory, in its class, on what the model it was made from says."""
    converted, out = tmp_path / "converted", tmp_path / "out"
    size = ["--calib", text, "--calib-tokens", "1024", "--context", "32"]
    cli("convert", model, "--to", "mla", "--kv-keep", "0.25", "--emit", target, *size, "-o", converted)
    pipeline = TRAINING.replace("rate=0.003", f'rate=0.0003 teacher="{model}"')
    document = cli("run", converted, "-p", pipeline, *size, "-o", out, "--json").document
    assert document["emitted_as"] == target
    assert document["cached_numbers_per_token"]["before"] == document["cached_numbers_per_token"]["after"]
    recovery = json.loads((out / "attnopt.json").read_text())["recovery"]
    assert recovery["held_out_after"] < recovery["held_out_before"]
    before, after = (load_file(path / "model.safetensors") for path in (converted, out))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_teacher_that_is_missing_is_told_before_any_work(
    cli: Cli, model: Path, text: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    pipeline = f'share{{layers="1" fill=none}},distill{{teacher="{tmp_path}/nobody"}}'
    found = cli("run", model, "-p", pipeline, "--calib", text, "-o", tmp_path / "out", *more)
    assert found.code == 1
    assert "nobody does not exist" in found.err
    assert "running" not in found.err
    assert not list(tmp_path.glob("*out*"))


def test_text_to_learn_from_is_written_by_the_model(cli: Cli, model: Path, tmp_path: Path) -> None:
    pipeline = 'share{layers="1" fill=none},distill{tokens=640 batch=128}'
    size = ["--calib-tokens", "512", "--context", "32"]
    document = cli("run", model, "-p", pipeline, *size, "-o", tmp_path / "out", "--json").document
    assert document["calibration"]["source"] == "self"
    assert document["calibration"]["recovery_tokens"] == 640


def test_where_a_file_has_too_little_the_model_writes_the_rest(cli: Cli, model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("ab" * 640)
    pipeline = 'share{layers="1" fill=none},distill{tokens=2048 batch=128}'
    size = ["--calib", short, "--calib-tokens", "1024", "--context", "32"]
    document = cli("run", model, "-p", pipeline, *size, "-o", tmp_path / "out", "--json").document
    calibration = document["calibration"]
    # 1,280 tokens: an eighth of 1,024 is chosen by, 896 are calibrated on and learned from, 256 are left to learn from.
    assert calibration["source"] == "short.txt"
    assert calibration["recovery_tokens_written"] == 2048 - 256 - 896
    assert calibration["recovery_tokens"] == 2048 - 896
    (summary,) = (v for k, v in document["summary"].items() if k.startswith("distill"))
    assert summary["text_tokens"] == 2048


def test_the_teacher_writes_what_is_learned_from(cli: Cli, model: Path, tmp_path: Path) -> None:
    size = ["--calib-tokens", "512", "--context", "32"]
    silent = 'share{layers="1" fill=none},distill{tokens=640 batch=128}'
    cli("run", model, "-p", 'share{layers="1" fill=none}', *size, "-o", tmp_path / "shared")
    taught = f'distill{{tokens=640 batch=128 teacher="{model}"}}'
    own = cli("run", model, "-p", silent, *size, "-o", tmp_path / "own", "--json").document
    later = cli("run", tmp_path / "shared", "-p", taught, *size, "-o", tmp_path / "later", "--json").document
    assert later["calibration"] == own["calibration"]  # its hash, too: the same model wrote it


def test_a_model_that_cannot_write_learns_from_the_same_text_again(cli: Cli, tmp_path: Path) -> None:
    encoder = models.save("bert", tmp_path / "model", vocab_size=256)
    save_byte_tokenizer(encoder)
    short = tmp_path / "short.txt"
    short.write_text("abcd" * 320)
    pipeline = 'share{layers="1" fill=none},distill{tokens=2048 batch=128}'
    size = ["--calib", short, "--calib-tokens", "1024", "--context", "32"]
    found = cli("run", encoder, "-p", pipeline, *size, "-o", tmp_path / "out", "--json")
    assert found.code == 0, found.err
    assert "come again" in found.err
    assert found.document["calibration"]["recovery_tokens_written"] == 0


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_curve(cli: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    assert cli(*arguments(model, text, tmp_path / "whole")).code == 0
    command = [sys.executable, "-m", "attnopt", *arguments(model, text, tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps = tmp_path / ".out.attnopt-staging" / "steps"
    deadline = time.monotonic() + 200
    while not (steps / "01-distill.training-1.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert steps.is_dir()
    assert cli(*arguments(model, text, tmp_path / "out", "--resume")).code == 0
    assert entries(tmp_path / "whole") == entries(tmp_path / "out")
    for name in ("model.safetensors", "recovery.html"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.slow
def test_torchrun_writes_once(cli: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    assert cli(*arguments(model, text, tmp_path / "whole")).code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = [*launcher, "-m", "attnopt", *arguments(model, text, tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    (summary,) = (v for k, v in json.loads(done.stdout)["summary"].items() if k.startswith("distill"))
    assert summary["processes"] == 2
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[n], two[n], atol=0.02) for n in one)
