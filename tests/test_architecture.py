"""The house rules that a machine can check: who may import whom, what is lazy, how long a file may get."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "attnopt"
LONGEST_FILE = 450

#: What each part may import, besides itself and what every part may. The order is that of docs/architecture.md.
EVERYWHERE = {"attnopt.errors", "attnopt.files", "attnopt.progress", "attnopt.rewriter.site"}
MAY_IMPORT = {
    "attnopt.errors": set(),
    "attnopt.progress": set(),
    "attnopt.rewriter.site": set(),
    "attnopt.rewriter": set(),
    "attnopt.files": set(),
    "attnopt.staging": {"attnopt.rewriter"},
    "attnopt.artifact": {"attnopt.rewriter", "attnopt.staging"},
    "attnopt.profiles": {"attnopt.rewriter"},
    "attnopt.passes": {"attnopt.rewriter", "attnopt.profiles", "attnopt.staging"},
    "attnopt.codegen": {"attnopt.rewriter", "attnopt.staging", "attnopt.artifact"},
    "attnopt.evaluate": {"attnopt.rewriter", "attnopt.codegen"},
    "attnopt.timing": {"attnopt.evaluate", "attnopt.render"},
    "attnopt.results": {"attnopt.rewriter", "attnopt.render", "attnopt.timing", "attnopt.profiles"},
    "attnopt.verification": {"attnopt.render"},
    "attnopt.render": set(),
}
#: Above the parts there are the verbs, and above them the door; these may import all that lies below.
VERBS = {
    "attnopt.api", "attnopt.conversion", "attnopt.planning", "attnopt.profiling", "attnopt.exporting", "attnopt.demo",
    "attnopt.texts", "attnopt.curve",
}  # fmt: skip
DOOR = {
    "attnopt.cli", "attnopt.cli_common", "attnopt.cli_measure", "attnopt.cli_options", "attnopt.cli_verify",
    "attnopt.session", "attnopt.__main__",
}  # fmt: skip

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of everything attnopt imports from itself, in functions and for type checking too."""
    known = {name_of(p) for p in MODULES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # "from package import module" imports a module too.
            names = [
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            ]
        else:
            continue
        for name in names:
            if name == "attnopt" or name.startswith("attnopt."):
                yield node.lineno, name


def part_of(module: str) -> str | None:
    """The longest listed name that the module is, or lies in."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in MAY_IMPORT or name in VERBS or name in DOOR:
            return name
    return None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_downwards(path: Path) -> None:
    module = name_of(path)
    if module == "attnopt":
        return  # offers the verbs; what it loads is tested with the command line
    part = part_of(module)
    assert part is not None, f"{module} has no place in the house; give it one in this test and in docs/architecture.md"
    if part in DOOR:
        return
    wrong = []
    for line, target in imports_of(path):
        other = part_of(target)
        if target == "attnopt" or other == part or other in EVERYWHERE:
            continue  # the package itself is imported for its version
        allowed = other not in DOOR if part in VERBS else other in MAY_IMPORT[part]
        if not allowed:
            wrong.append(f"{path.name}:{line} imports {target}")
    assert not wrong


def test_the_rule_can_fail(tmp_path: Path) -> None:
    assert part_of("attnopt.rewriter.capture") == "attnopt.rewriter"
    assert part_of("attnopt.rewriter.site") == "attnopt.rewriter.site"
    assert "attnopt.passes" not in MAY_IMPORT["attnopt.codegen"]
    assert "attnopt.codegen" not in MAY_IMPORT["attnopt.passes"]
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from attnopt.passes import registry\n")
    assert [part_of(module) for _, module in imports_of(file)] == ["attnopt.passes"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


#: What a verb may import before it does anything.
LIGHT = ["attnopt", "attnopt.cli", "attnopt.api", "attnopt.results", "attnopt.verification", "attnopt.evaluate"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_stay_light(module: str) -> None:
    code = f"import sys, {module}; print(*[m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
