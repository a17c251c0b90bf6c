"""Staging, resuming, checkpoint writing, manifest and model card."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnopt import staging as staging_module
from attnopt.artifact import Manifest, Staging, outgoing, resume_key, write_checkpoint
from attnopt.errors import AttnoptError
from attnopt.rewriter.safe_tensors import write_tensors
from attnopt.rewriter.weights import Inline, WeightStore, evaluate


def _run(out: Path, die: str, resume: bool) -> None:
    """A run of four steps. `die` names the point at which it is killed as if the machine had lost power."""
    fsync, calls = os.fsync, 0

    def reach(point: str) -> None:
        if point == die:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(fd: int) -> None:
        nonlocal calls
        calls += 1
        reach(f"fsync {calls}")
        fsync(fd)

    os.fsync = counted
    with Staging(out, key="k", resume=resume) as staging:
        reach("start")
        state = torch.zeros(3)
        for layer in range(4):
            if layer in staging.layers_done():
                state = evaluate(staging.load_layer(layer)[0]["state"])
            else:
                state = state * 1.5 + torch.tensor([layer, 0.1, -1.0])
                staging.save_layer(layer, {"state": state}, {"norm": float(state.norm())})
            reach(f"layer {layer}")
        store = WeightStore({f"w{i}": staging.load_layer(i)[0]["state"] for i in range(4)})
        write_checkpoint(staging.path, outgoing(store), max_shard_bytes=24)
        (staging.path / "attnopt.json").write_text("{}")
        reach("written")
        staging.finish()
        reach("finished")


def _in_child(action: Callable[[], None]) -> int:
    """Run in a child process; returns its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # threads do not survive a fork
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _job(out: Path, die: str = "", resume: bool = False) -> int:
    return _in_child(lambda: _run(out, die, resume))


def _files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert _job(out) == 0
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    return _files(out)


@pytest.mark.parametrize("die", ["start", "layer 0", "fsync 7", "fsync 10", "layer 3", "written"])
def test_killed_then_resumed_is_byte_identical(die: str, tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    assert _job(out, die) == -signal.SIGKILL
    assert not out.exists()
    assert _job(out, resume=True) == 0
    assert _files(out) == uninterrupted
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_after_the_rename_leaves_a_whole_output(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    assert _job(tmp_path / "out", "finished") == -signal.SIGKILL
    assert _files(tmp_path / "out") == uninterrupted


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def _unfinished(out: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Staging(out, key="k") as staging:  # noqa: PT012
        staging.save_layer(0, {"x": torch.ones(2)}, {"error": 0.5})
        raise KeyboardInterrupt


def test_an_unfinished_run_is_kept_and_asked_about(out: Path) -> None:
    _unfinished(out)
    with pytest.raises(AttnoptError, match="unfinished run of this command") as caught:
        Staging(out, key="k")
    assert "--resume" in caught.value.hint
    with pytest.raises(AttnoptError, match="another model, pipeline or other options"):
        Staging(out, key="other", resume=True)
    with Staging(out, key="k", resume=True) as staging:
        assert staging.layers_done() == (0,)
        values, record = staging.load_layer(0)
        assert record == {"error": 0.5}
        assert torch.equal(evaluate(values["x"]), torch.ones(2))
        assert list(staging.path.iterdir()) == []


def test_overwrite_forgets_an_unfinished_run(out: Path) -> None:
    _unfinished(out)
    with Staging(out, key="other", overwrite=True) as staging:
        assert staging.steps_done() == ()
    _unfinished(out)
    with Staging(out, key="k", overwrite=True) as staging:
        assert staging.steps_done() == ()


def test_overwrite_and_resume_go_together(out: Path) -> None:
    _unfinished(out)
    with Staging(out, key="k", overwrite=True, resume=True) as staging:
        assert staging.layers_done() == (0,)


def test_a_failed_run_without_finished_steps_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "out"
    with pytest.raises(RuntimeError), Staging(out, key="k") as staging:  # noqa: PT012
        (staging.path / "config.json").write_text("{}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_existing_outputs(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(AttnoptError, match="exists") as caught:
        Staging(out, key="k")
    assert "--overwrite" in caught.value.hint
    with pytest.raises(AttnoptError, match="not made by attnopt"):
        Staging(out, key="k", overwrite=True)
    (out / "attnopt.json").write_text("{}")
    with Staging(out, key="k", overwrite=True) as staging:
        (staging.path / "attnopt.json").write_text("new")
        assert (out / "thesis.txt").exists(), "the old output stays until the new one is complete"
        staging.finish()
    assert _files(out) == {"attnopt.json": b"new"}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_output_that_is_a_file_is_not_replaced(out: Path) -> None:
    out.write_text("x")
    with pytest.raises(AttnoptError, match="not a directory"):
        Staging(out, key="k", overwrite=True)


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "attnopt.json").write_text("{}")
    for out in (model, tmp_path):
        with pytest.raises(AttnoptError, match="would replace the model"):
            Staging(out, key="k", overwrite=True, sources=[model])


def test_a_crash_between_the_two_renames_is_repaired(out: Path) -> None:
    old = out.parent / ".out.attnopt-old"
    old.mkdir()
    (old / "attnopt.json").write_text("old")
    with pytest.raises(AttnoptError, match="exists"):
        Staging(out, key="k")
    assert (out / "attnopt.json").read_text() == "old"


def test_a_failing_rename_puts_the_old_output_back(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.mkdir()
    (out / "attnopt.json").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "output":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return rename(self, target)

    with Staging(out, key="k", overwrite=True) as staging:
        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(AttnoptError, match="no space left"):
            staging.finish()
        monkeypatch.undo()
    assert (out / "attnopt.json").read_text() == "old"


def test_two_runs_at_once(out: Path) -> None:
    with Staging(out, key="k"), pytest.raises(AttnoptError, match="another attnopt is writing"):
        Staging(out, key="k")
    assert not out.parent.joinpath(".out.attnopt-staging").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO])
def test_unwritable_places(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root, who may run the tests, is refused nothing
    with pytest.raises(AttnoptError, match=r"may not be written|cannot write") as caught:
        Staging(tmp_path / "new" / "out", key="k")
    assert "output path" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AttnoptError, match="cannot write"):
        Staging(tmp_path / "file" / "out", key="k")


def _limited(action: Callable[[], None]) -> int:
    """Run in a child with a file size limit, for which the system's answer is that of a full disk."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(AttnoptError, match="no space left") as caught:
            action()
        assert "--resume" in caught.value.hint

    return _in_child(limited)


def test_full_disk_while_saving_a_layer(out: Path) -> None:
    def action() -> None:
        with Staging(out, key="k") as staging:
            staging.save_layer(0, {"x": torch.zeros(10)}, {})
            staging.save_layer(1, {"x": torch.zeros(1_000_000)}, {})

    assert _limited(action) == 0
    assert not out.exists()
    assert not list(out.parent.rglob("*.part"))
    with Staging(out, key="k", resume=True) as staging:
        assert staging.layers_done() == (0,)


def test_full_disk_while_writing_the_result(out: Path) -> None:
    def action() -> None:
        with Staging(out, key="k") as staging:
            write_checkpoint(staging.path, outgoing(WeightStore({"w": Inline(torch.zeros(1_000_000))})))

    assert _limited(action) == 0
    assert list(out.parent.iterdir()) == []


def test_a_damaged_step_is_noticed(out: Path) -> None:
    _unfinished(out)
    file = out.parent / ".out.attnopt-staging" / "steps" / "layer-0000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with Staging(out, key="k", resume=True) as staging:
        with pytest.raises(AttnoptError, match=r"layer-0000 .* is damaged"):
            staging.load_layer(0)
        with pytest.raises(KeyError):
            staging.load_layer(1)


def test_a_step_without_its_record_was_never_finished(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _unfinished(out)
    with Staging(out, key="k", resume=True) as staging:

        def interrupted(path: Path, text: str) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(staging_module, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            staging.save_layer(1, {"x": torch.ones(1)}, {})
        monkeypatch.undo()
        assert staging.layers_done() == (0,)


def test_resume_key_follows_everything_that_matters() -> None:
    base = ({"weights_digest": "a"}, "to-mla", {"seed": 0})
    keys = {
        resume_key(*base),
        resume_key({"weights_digest": "b"}, "to-mla", {"seed": 0}),
        resume_key({"weights_digest": "a"}, "to-mla{kv-keep=0.4}", {"seed": 0}),
        resume_key({"weights_digest": "a"}, "to-mla", {"seed": 1}),
    }
    assert len(keys) == 4
    assert resume_key(*base) == resume_key({"weights_digest": "a"}, "to-mla", {"seed": 0})


def _store() -> WeightStore:
    torch.manual_seed(0)
    return WeightStore({f"layer.{i}.w": Inline(torch.randn(8, 16)) for i in range(5)})


def test_checkpoints_read_back_by_the_library(tmp_path: Path) -> None:
    store = _store()
    assert write_checkpoint(tmp_path, outgoing(store)) == ("model.safetensors",)
    read = load_file(tmp_path / "model.safetensors")
    assert set(read) == set(store.names())
    assert all(torch.equal(read[name], store.get(name)) for name in read)


def test_the_bytes_are_those_the_library_writes(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3), "a": torch.arange(4), "c": torch.ones(2, 2, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "ours", outgoing(WeightStore({k: Inline(v) for k, v in tensors.items()})))
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_and_their_index(tmp_path: Path) -> None:
    store = _store()
    names = write_checkpoint(tmp_path, outgoing(store, dtype=torch.bfloat16), max_shard_bytes=600)
    assert names[0] == "model-00001-of-00003.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 8 * 16 * 2
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], store.get(name, torch.bfloat16))


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    peak = 0
    entries = []
    for entry in outgoing(_store()):

        def load(inner: Callable[[], torch.Tensor] = entry.load) -> torch.Tensor:
            nonlocal peak
            peak = max(peak, sum(ref() is not None for ref in made))
            value = inner()
            made.append(weakref.ref(value))
            return value

        entries.append(type(entry)(entry.key, entry.shape, entry.dtype, load))
    write_checkpoint(tmp_path, entries)
    assert len(made) == 5
    assert peak == 0, "no tensor is alive when the next one is loaded"


def test_a_tensor_that_is_not_as_announced(tmp_path: Path) -> None:
    entry = outgoing(_store())[0]
    wrong = type(entry)(entry.key, (8, 15), entry.dtype, entry.load)
    with pytest.raises(ValueError, match=r"announced \(8, 15\)"):
        write_checkpoint(tmp_path, [wrong])


def test_manifest_and_card(tmp_path: Path) -> None:
    manifest = Manifest(
        source={"name": "tiny", "weights_digest": "abc"},
        pipeline="to-mla{kv-keep=0.5}",
        options={"seed": 0, "calib": "self"},
        emitted_as="deepseek_v3",
        sites_changed=2,
        cached_numbers_per_token=(100, 50),
        parameters=(1000, 1100),
        layers=[{"layer": 0, "error": 0.01}],
        metrics={"perplexity_ratio": 1.0512345},
        run={"seconds": 1.5},
    )
    manifest.write(tmp_path)
    document = json.loads((tmp_path / "attnopt.json").read_text())
    assert document["schema"] == "attnopt.manifest/1"
    assert document["pipeline"] == "to-mla{kv-keep=0.5}"
    assert document["cached_numbers_per_token"] == {"before": 100, "after": 50}
    assert document["run"] == {"seconds": 1.5}
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "\ntags: [attnopt, deepseek_v3]\n" in card
    assert "\ntags: [attnopt]\n" in replace(manifest, emitted_as="attnopt").card()
    assert "| cached numbers per token | 100 | 50 (50.0%) |" in card
    assert "attnopt run MODEL -p 'to-mla{kv-keep=0.5}'" in card
    assert "| perplexity_ratio | | 1.0512 |" in card
    assert "1.5" not in card, "the card does not vary from run to run"
