"""What the README and the documentation tell people to type is accepted, and the files that they name are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from attnopt.cli import app
from attnopt.passes.registry import REGISTRY
from attnopt.rewriter.pipeline import Pipeline

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
VERBS: dict[str, Any] = vars(typer.main.get_command(app))["commands"]

#: A name, and options in braces.
_OPTIONS = r"\{[a-z][a-z-]*=[^{}]*\}"
_PASS = rf"[a-z][a-z0-9-]*(?:{_OPTIONS})?"
#: Passes between code marks or quotes, at least one of them with options.
PIPELINE = re.compile(rf"""[`'"]((?=[^`'"]*{_OPTIONS}){_PASS}(?:,{_PASS})*)[`'"]""")
#: A command at the start of a line of code, or in code marks.
COMMAND = re.compile(r"^(?:torchrun .* -m )?attnopt ([a-z]+.*)$|`attnopt ([a-z]+ [^`]*)`")
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
FILE = re.compile(
    r"\b(?:attnopt|benchmarks|docs|tests|rewriter|passes|codegen|profiles|evaluate)/[\w/.-]+\.(?:py|md)\b"
)
LINK = re.compile(r"\]\(([^)#:]+)\)")
#: What is there only once a reader has made it.
MADE_BY_READERS = ("my-pass",)


def found(pattern: re.Pattern[str], *, code: bool = False) -> Iterator[Any]:
    """Everything that fits a pattern, by page and line; with `code` only in blocks of code, but for what has marks."""
    for page in PAGES:
        inside = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            inside ^= line.startswith("```")
            for match in pattern.finditer(line):
                text = next((group for group in match.groups() if group), match.group())
                legible = inside or not code or match.group().startswith("`")
                if legible and not any(name in text for name in MADE_BY_READERS):
                    yield pytest.param(text, id=f"{page.name}:{number}:{text}")


@pytest.mark.parametrize("text", found(PIPELINE))
def test_pipelines_are_read(text: str) -> None:
    Pipeline.parse(text, REGISTRY)


@pytest.mark.parametrize("text", found(COMMAND, code=True))
def test_commands_have_the_options_that_are_shown(text: str) -> None:
    verb = text.split()[0]
    assert verb in VERBS
    known = {name for parameter in VERBS[verb].params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert set(OPTION.findall(text)) <= known | {"--help"}


@pytest.mark.parametrize("name", found(FILE))
def test_files_are_there(name: str) -> None:
    assert (ROOT / name).exists() or (ROOT / "attnopt" / name).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_enough_is_found() -> None:
    """A pattern that finds nothing would test nothing."""
    assert all(len(list(found(pattern))) > 10 for pattern in (PIPELINE, COMMAND, FILE))
