"""The staging directory: finished steps survive a crash, and the output path sees one rename at the end.

Long work saves each finished step (usually a layer) into a directory beside the output, and a later run with the same
key goes on from there. Nothing appears at the output path before it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

import attnopt
from attnopt.errors import AttnoptError, SourceError
from attnopt.files import sync_directory, sync_tree, write_text, writing
from attnopt.rewriter.safe_tensors import Outgoing, read_header, write_tensors
from attnopt.rewriter.steps import StepStore
from attnopt.rewriter.weights import Stored

MANIFEST_NAME = "attnopt.json"


def resume_key(identity: Mapping[str, str], pipeline: str, options: Mapping[str, Any]) -> str:
    """What makes two runs the same run: the model, the pipeline text, every option that matters, and the tool."""
    text = json.dumps([attnopt.__version__, dict(identity), pipeline, dict(options)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Staging(StepStore):
    """The staging directory `.NAME.attnopt-staging` of an output directory NAME. Use it as a context manager.

    What goes into the result is written into `path`; finished steps are saved with `save` and come back after a crash.
    If the block fails, the half-made result is removed, and so is everything else unless a step was saved.

    Args:
        out: the output directory to be made.
        key: see `resume_key`.
        overwrite: replace an output that exists, and forget an unfinished run.
        resume: go on with an unfinished run of the same key.
        sources: paths that are read, which the output must not replace.

    Raises:
        AttnoptError: if the output exists, is not writable, belongs to another unfinished run, or would replace
            something that attnopt did not make.
    """

    def __init__(
        self, out: Path, *, key: str, overwrite: bool = False, resume: bool = False, sources: Sequence[Path] = ()
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.key = key
        self.overwrite = overwrite
        self.directory = self.out.parent / f".{self.out.name}.attnopt-staging"
        self._old = self.out.parent / f".{self.out.name}.attnopt-old"
        self._steps = self.directory / "steps"
        self._lock: IO[str] | None = None
        self._finished = False
        self._made: list[Path] = []
        with writing(self.out):
            self._check_output(sources)
            self._make_parents()
            if self._old.exists() and not self.out.exists():
                self._old.rename(self.out)  # a crash between the two renames of a replacement
                self._check_output(sources)
            self._open(resume)

    def _check_output(self, sources: Sequence[Path]) -> None:
        for source in map(Path, sources):
            if source.exists() and source.resolve().is_relative_to(self.out.resolve()):
                raise AttnoptError(f"{self.out} would replace the model it is made from", "choose another output path")
        if not os.path.lexists(self.out):
            return
        if not self.overwrite:
            raise AttnoptError(f"{self.out} exists", "choose another output path, or give --overwrite to replace it")
        if self.out.is_symlink() or not self.out.is_dir():
            raise AttnoptError(f"{self.out} is not a directory", "choose another output path")
        if not (self.out / MANIFEST_NAME).exists() and any(self.out.iterdir()):
            raise AttnoptError(
                f"{self.out} was not made by attnopt (it has no {MANIFEST_NAME}), so it is not replaced",
                "choose another output path, or remove it yourself",
            )

    def _open(self, resume: bool) -> None:
        try:
            self.directory.mkdir(exist_ok=True)
        except OSError:
            self._remove()
            raise
        self._lock = open(self.directory / "lock", "w")  # noqa: SIM115 - held until the end of the run
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise AttnoptError(
                f"another attnopt is writing {self.out} now", "wait for it, or choose another output path"
            ) from error
        try:
            self._adopt(resume)
        except BaseException:
            if self.steps_done():
                self._release()
            else:
                self._remove()
            raise

    def _adopt(self, resume: bool) -> None:
        key_file = self.directory / "key"
        unfinished = self._steps.is_dir() and any(self._steps.glob("*.json"))
        if unfinished and not self.overwrite:
            same = key_file.exists() and key_file.read_text() == self.key
            if not same:
                raise AttnoptError(
                    f"{self.directory} holds an unfinished run with another model, pipeline or other options",
                    "repeat that command with --resume, or give --overwrite to start again",
                )
            if not resume:
                raise AttnoptError(
                    f"{self.directory} holds an unfinished run of this command",
                    "give --resume to go on with it, or --overwrite to start again",
                )
        elif not (unfinished and resume and key_file.exists() and key_file.read_text() == self.key):
            shutil.rmtree(self._steps, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self._steps.mkdir(exist_ok=True)
        self.path.mkdir()
        write_text(key_file, self.key)

    @property
    def path(self) -> Path:
        """The directory that becomes the output."""
        return self.directory / "output"

    def save(self, step: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> dict[str, Stored]:
        """Keep the result of a finished step, so that it survives a crash.

        Args:
            step: its name, e.g. "layer-0007".
            tensors: its arrays.
            record: plain data about it.

        Returns:
            Lazy values of the arrays; good until `finish`.

        Raises:
            AttnoptError: if it cannot be written.
        """
        file, done = self._files(step)
        with writing(file):
            part = file.with_suffix(".part")
            try:
                write_tensors(part, [_outgoing_tensor(name, t) for name, t in tensors.items()])
                part.rename(file)
            finally:
                part.unlink(missing_ok=True)
            sync_directory(self._steps)
            # The record comes last: a step without one was never finished.
            write_text(done, json.dumps({"record": dict(record), "bytes": file.stat().st_size}, sort_keys=True))
        return self.load(step)[0]

    def steps_done(self) -> tuple[str, ...]:
        """Names of the saved steps, sorted."""
        return tuple(sorted(path.stem for path in self._steps.glob("*.json")))

    def load(self, step: str) -> tuple[dict[str, Stored], dict[str, Any]]:
        """Lazy arrays and record of a saved step.

        Raises:
            KeyError: if it was not saved.
            AttnoptError: if its files were damaged since.
        """
        file, done = self._files(step)
        if not done.exists():
            raise KeyError(step)
        try:
            content = json.loads(done.read_text())
            header = read_header(file)
            if header.size != content["bytes"]:
                raise ValueError("its length has changed")
        except (OSError, ValueError, KeyError, SourceError) as error:
            raise AttnoptError(
                f"the saved step {step} in {self.directory} is damaged: {error}", "give --overwrite to start again"
            ) from error
        return {key: Stored.of(header, entry) for key, entry in header.entries.items()}, content["record"]

    def _files(self, step: str) -> tuple[Path, Path]:
        return self._steps / f"{step}.safetensors", self._steps / f"{step}.json"

    def finish(self) -> Path:
        """Put the result at the output path, with one rename, and remove the staging directory.

        Raises:
            AttnoptError: if that fails; the output path is then as it was before.
        """
        with writing(self.out):
            sync_tree(self.path)
            replaced = os.path.lexists(self.out)
            if replaced:
                shutil.rmtree(self._old, ignore_errors=True)
                self.out.rename(self._old)
            try:
                self.path.rename(self.out)
            except OSError:
                if replaced:
                    self._old.rename(self.out)
                raise
            sync_directory(self.out.parent)
        self._finished = True
        shutil.rmtree(self._old, ignore_errors=True)
        self._remove()
        return self.out

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._finished:
            return
        if self.steps_done():
            shutil.rmtree(self.path, ignore_errors=True)
            self._release()
        else:
            self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self._release()
        if not self._finished:
            for parent in self._made:
                with suppress(OSError):  # someone else may have put something there
                    parent.rmdir()

    def _make_parents(self) -> None:
        missing = [parent for parent in self.out.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir()
            self._made.insert(0, parent)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _outgoing_tensor(name: str, tensor: torch.Tensor) -> Outgoing:
    return Outgoing(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)
