"""The adapter to lm-eval, with a harness of our own in its place: what it is given, what it gives, what goes wrong."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import attnopt
from attnopt.errors import AttnoptError, OptionError
from attnopt.evaluate import HarnessSpec
from attnopt.evaluate.harness import Harness
from tests.test_evaluate import WORDS, save_model

#: As much of lm_eval 0.4 as is used; the score of a model is its first weight, so that two models differ.
FAKE = """
import fnmatch

__version__ = "0.4.fake"
CALLS = []


class TaskManager:
    def __init__(self, include_path=None):
        self.include_path = include_path
        self.all_tasks = ["arc_easy", "arc_challenge", "offline", "words"]

    def match_tasks(self, names):
        return [task for task in self.all_tasks if any(fnmatch.fnmatch(task, name) for name in names)]


class HFLM:
    def __init__(self, pretrained, tokenizer, batch_size):
        self.model, self.tokenizer = pretrained, tokenizer


def simple_evaluate(model, tasks, task_manager, limit, log_samples):
    print("a harness that talks")
    CALLS.append((model.tokenizer, tasks, task_manager.include_path, limit))
    if "offline" in tasks:
        raise ConnectionError("Couldn't reach 'offline' on the Hub\\nand more")
    weight = float(next(model.model.parameters()).detach().flatten()[0])
    return {
        "results": {
            task: {
                "alias": task,
                "acc,none": weight,
                "acc_stderr,none": 0.25,
                "exact_match,strict": 1,
                "exact_match_stderr,strict": "N/A",
                "sample_len": 7,
            }
            for task in tasks
        },
        "higher_is_better": {task: {"acc": True} for task in tasks},
        "n-samples": {task: {"original": 9, "effective": 5} for task in tasks},
    }
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `lm_eval` for this process and those it starts."""
    folder = tmp_path / "site" / "lm_eval"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text(FAKE)
    (folder / "tasks.py").write_text("from lm_eval import TaskManager\n")
    (folder / "models" / "__init__.py").write_text("")
    (folder / "models" / "huggingface.py").write_text("from lm_eval import HFLM\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    paths = [str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


@pytest.fixture(autouse=True)
def forget() -> Any:
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]


def test_what_it_is_given_and_what_comes_back(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", 0)
    harness = Harness(HarnessSpec(("arc_*", "words"), limit=5, folder="more"))
    assert (harness.tasks, harness.version) == (["arc_easy", "arc_challenge", "words"], "0.4.fake")
    rows = harness.run(model, "the tokenizer")
    import lm_eval

    assert lm_eval.CALLS == [("the tokenizer", ["arc_easy", "arc_challenge", "words"], "more", 5)]
    first, second = rows[:2]
    assert len(rows) == 6
    assert first == {
        "task": "arc_easy",
        "metric": "acc",
        "filter": "none",
        "value": pytest.approx(float(next(model.parameters()).detach().flatten()[0])),
        "standard_error": 0.25,
        "examples": 5,
        "higher_is_better": True,
    }
    assert (second["metric"], second["filter"], second["value"]) == ("exact_match", "strict", 1.0)
    assert (second["standard_error"], second["higher_is_better"]) == (None, None)
    streams = capsys.readouterr()
    assert streams.out == ""  # progress travels there
    assert "a harness that talks" in streams.err


def test_what_goes_wrong(fake: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no task 'arc_esy'") as caught:
        Harness(HarnessSpec(("arc_esy",)))
    assert "arc_easy" in caught.value.hint
    harness = Harness(HarnessSpec(("offline",)))
    with pytest.raises(AttnoptError, match=r"cannot run offline: Couldn't reach 'offline' on the Hub$"):
        harness.run(save_model(tmp_path / "model", 0), None)
    for bad in ({"tasks": ()}, {"tasks": ("",)}, {"tasks": ("words",), "limit": 0}):
        with pytest.raises(OptionError):
            HarnessSpec(**bad)


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AttnoptError, match="cannot be imported") as caught:
        Harness(HarnessSpec(("words",)))
    assert "attnopt[lm-eval]" in caught.value.hint


@pytest.mark.slow
def test_both_models_side_by_side(fake: Path, tmp_path: Path) -> None:
    first, second = (save_model(tmp_path / name, seed) for seed, name in enumerate("ab"))
    (tmp_path / "text.txt").write_text(" ".join(WORDS))
    document = attnopt.verify(
        tmp_path / "b", against=tmp_path / "a", texts=[tmp_path / "text.txt"], window=16, lm_eval=["words"]
    ).to_json()
    assert document["lm_eval_version"] == "0.4.fake"
    row = document["tasks"][0]
    before, after = (float(next(model.parameters()).detach().flatten()[0]) for model in (first, second))
    assert (row["task"], row["metric"], row["examples"]) == ("words", "acc", 5)
    assert row["original"] == pytest.approx(before)
    assert row["converted"] == pytest.approx(after)
    assert row["difference"] == pytest.approx(after - before)
    assert row["standard_error"] == {"original": 0.25, "converted": 0.25}
    json.dumps(document)
