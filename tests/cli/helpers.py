"""Ways to run the command line, and the tiny model it is run on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Stdout as one JSON document; fails if anything else is there."""
        return json.loads(self.out)


Run = Callable[..., Outcome]


def spawn(*arguments: str | Path, cwd: Path | None = None, timeout: float = 240) -> Outcome:
    """Call `python -m attnopt ARGS` in a process of its own."""
    command = [sys.executable, "-m", "attnopt", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def save_byte_tokenizer(directory: Path) -> None:
    """A tokenizer with one token per byte and nothing else, so that a text has as many tokens as bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def entries(directory: Path) -> set[str]:
    """Everything below a directory, hidden files included."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}
