"""A tiny model, a text, and the command line run in this process, which saves importing torch for every call."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnopt.cli import main
from tests.cli.helpers import Outcome, Run, save_byte_tokenizer
from tests.hostile import healthy


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call `attnopt ARGS` in this process."""

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        streams = capsys.readouterr()
        return Outcome(code, streams.out, streams.err)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (2 layers, 4 query and 2 key/value heads of 8) with a tokenizer. Not to be written into."""
    directory = healthy(tmp_path_factory.mktemp("tiny") / "tiny-llama", vocab_size=256)
    save_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 20,000 characters."""
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. 0123456789\n" * 360)
    return path
