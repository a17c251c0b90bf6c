"""Help, usage errors, exit codes and streams: everything that needs no model."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import attnopt
from attnopt import api
from attnopt.cli import app
from attnopt.errors import AttnoptError
from tests.cli.helpers import Run, spawn

VERBS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from attnopt.cli import main; main(['--help'])\n"
        "print('LOADED', *[m for m in ('torch', 'transformers', 'numpy', 'rich', 'safetensors') if m in sys.modules])"
    )
    assert python(code).splitlines()[-1].split() == ["LOADED"]


def test_import_loads_nothing_heavy_and_offers_the_verbs() -> None:
    code = (
        "import sys, attnopt\n"
        "print('LOADED', *[m for m in ('torch', 'transformers', 'numpy', 'typer', 'rich') if m in sys.modules])\n"
        "print(all(callable(getattr(attnopt, n)) for n in attnopt.__all__ if n != '__version__'))"
    )
    assert python(code).splitlines() == ["LOADED", "True"]
    assert set(attnopt.__all__) <= set(dir(attnopt))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = attnopt.nothing_like_it


def test_help_is_quick() -> None:
    """0.2 s on an idle core. The bound leaves room for a machine that is busy with the other tests."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        outcome = spawn("--help")
        seconds.append(time.perf_counter() - started)
        assert outcome.code == 0
        assert all(verb in outcome.out for verb in VERBS)
    assert min(seconds) < 1.5


def test_verbs_are_those_of_this_version() -> None:
    assert VERBS == ["inspect", "profile", "convert", "run", "verify", "bench", "export", "passes", "demo"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_and_the_common_options(cli: Run, verb: str) -> None:
    outcome = cli(verb, "--help")
    assert outcome.code == 0
    assert re.search(rf"Example:\n\s+attnopt {verb}", outcome.out)
    for option in ("--json", "-q", "-v"):
        assert option in outcome.out
    assert not outcome.err


def test_module_and_version() -> None:
    outcome = spawn("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"attnopt {attnopt.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["convrt", "x"], "no such command 'convrt'. Did you mean 'convert'", "attnopt --help"),
        (["convert", "x", "--kv-kep", "1"], "--kv-keep", "attnopt convert --help"),
        (["convert", "x"], "no method is given", "--to"),
        (["inspect"], "missing argument 'MODEL'", "attnopt inspect --help"),
        (["convert", "x", "--to", "mla", "--kv-keep", "half"], "--kv-keep", "attnopt convert --help"),
        (["convert", "x", "--to", "mla", "--recover", "magic"], "none.*refit", "attnopt convert --help"),
        (["convert", "x", "--to", "mla", "--emit", "gguf"], "deepseek_v3.*attnopt", "attnopt convert --help"),
        (
            ["export", "x", "-o", "y", "--format", "gif"],
            "format': 'gif' is not one of",
            "attnopt export --help",
        ),
        (["inspect", "a", "b"], "unexpected extra argument", "attnopt inspect --help"),
        ([], "no command given", "attnopt --help"),
    ],
)
def test_usage_errors_name_the_option_and_exit_with_1(cli: Run, arguments: list[str], message: str, hint: str) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 1
    first, second = outcome.err.splitlines()[:2]
    assert first.startswith("error: ")
    assert re.search(message, first)
    assert second.startswith("hint: ")
    assert hint in second


def test_user_errors_exit_with_1_and_carry_their_hint(cli: Run, tmp_path: Path) -> None:
    outcome = cli("inspect", tmp_path / "nowhere")
    assert outcome.code == 1
    assert "nowhere does not exist" in outcome.err
    assert "hint: give a Hugging Face model directory" in outcome.err
    assert outcome.out == ""


def test_errors_under_json_are_a_document(cli: Run, tmp_path: Path) -> None:
    outcome = cli("inspect", tmp_path / "nowhere", "--json")
    assert outcome.code == 1
    assert outcome.document["schema"] == "attnopt.error/1"
    assert outcome.document["exit_code"] == 1
    assert "nowhere does not exist" in outcome.document["message"]
    assert outcome.document["hint"]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("seven by nothing")

    monkeypatch.setattr(api, "inspect", fail)


@pytest.mark.usefixtures("broken")
class TestBugs:
    def test_exit_with_2_and_put_the_traceback_into_a_file(self, cli: Run) -> None:
        outcome = cli("inspect", "x")
        assert outcome.code == 2
        assert "a bug in attnopt: ZeroDivisionError: seven by nothing" in outcome.err
        assert "Traceback" not in outcome.err
        named = re.search(r"the traceback is in (\S+);", outcome.err)
        assert named
        file = Path(named.group(1))
        assert "seven by nothing" in file.read_text()
        assert "Traceback" in file.read_text()
        file.unlink()

    def test_show_the_traceback_if_verbose(self, cli: Run) -> None:
        outcome = cli("inspect", "x", "-v")
        assert outcome.code == 2
        assert "Traceback" in outcome.err

    def test_are_told_apart_under_json(self, cli: Run) -> None:
        outcome = cli("inspect", "x", "--json", "-v")
        assert outcome.document["exit_code"] == 2


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (MemoryError(), 1, "out of memory"),
        (AttnoptError("what", "do"), 1, "error: what\nhint: do\n"),
        (AttnoptError("what"), 1, "error: what\n"),
    ],
)
def test_other_ends(cli: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, told: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(api, "inspect", fail)
    outcome = cli("inspect", "x")
    assert outcome.code == code
    assert told in outcome.err
    assert outcome.out == ""
