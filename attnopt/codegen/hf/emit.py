"""Writes a Program as a Hugging Face directory: picks the class, streams the weights, copies what goes with them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from attnopt.artifact import Staging, outgoing, write_checkpoint, write_json
from attnopt.codegen.hf import deepseek_v3, own_class, source_class
from attnopt.codegen.hf.emission import Emission, Refusal
from attnopt.errors import OptionError, UnsupportedError
from attnopt.progress import Reporter, Silent, bar
from attnopt.rewriter.program import Program
from attnopt.rewriter.safe_tensors import Outgoing
from attnopt.staging import writing

TARGETS = ("auto", deepseek_v3.TARGET, source_class.TARGET, own_class.TARGET)


class SideFiles(Protocol):
    """What emission needs of the source: its tokenizer, chat template and generation config (see ModelSource)."""

    def copy_side_files(self, destination: Path) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class EmittedAs:
    """What was written.

    Attributes:
        target: "deepseek_v3", "attnopt", or the source's model type.
        architecture: class that loads it.
        cached_numbers_per_token: what that class keeps per token, all layers.
        parameters: numbers in the checkpoint.
        files: names of the files written, weights first.
        notes: facts worth telling (rope table, error bound of the constant lane).
        refused: why `auto` did not take the stock class, or None.
    """

    target: str
    architecture: str
    cached_numbers_per_token: int
    parameters: int
    files: tuple[str, ...]
    notes: tuple[str, ...]
    refused: Refusal | None = None


def check_source(program: Program, emit: str = "auto", latent: bool = True, reshaped: bool = True) -> None:
    """Refuse a target before hours of conversion rather than after them.

    Args:
        program: a Program as captured; its attention layers need not be converted.
        emit: see `choose`.
        latent: whether the result will hold latent attention; if not, the source's class may do.
        reshaped: whether more than values will change.

    Raises:
        OptionError: an unknown `emit`.
        UnsupportedError: nothing that a conversion can do will make this model fit the class asked for, or any.
    """
    if emit not in TARGETS:
        raise OptionError(f"unknown target {emit!r}", f"use one of {', '.join(TARGETS)}")
    if emit in ("auto", source_class.TARGET) and not reshaped and source_class.can_emit(program) is None:
        return
    stock = tuple(deepseek_v3.source_obstacles(program))
    own = tuple(own_class.source_obstacles(program))
    if emit == deepseek_v3.TARGET and (stock or not latent):
        hint = "use --emit attnopt" if not own else "only the listed architectures can be written"
        reasons = stock or ("no pass makes latent attention",)
        raise UnsupportedError(str(Refusal(emit, reasons)), hint)
    if emit == source_class.TARGET and latent:
        reasons = ("latent attention",)
        raise UnsupportedError(str(Refusal(program.model_type, reasons)), "use --emit auto")
    resized = reshaped and not latent and not source_class.can_resize(program)
    if own and (emit == own_class.TARGET or (latent and stock) or resized):
        raise UnsupportedError(str(Refusal(own_class.TARGET, own)), "only the listed architectures can be written")


def choose(program: Program, emit: str = "auto", dtype: torch.dtype | None = None) -> tuple[Emission, Refusal | None]:
    """Decide on the class and map the Program to it, without reading more than the latent encoders.

    `auto` takes a stock class whenever one holds the result within 1e-3 (see `lane`), otherwise ours: for attention
    that was made latent that is deepseek_v3, for everything else the source's own class.

    Args:
        program: a Program that passes have changed.
        emit: "auto", "deepseek_v3", "source" or "attnopt".
        dtype: type of the tensors written; None for the source's.

    Returns:
        The emission, and why `auto` did not take a stock class (None if it did or was not asked).

    Raises:
        OptionError: an unknown `emit`.
        UnsupportedError: the class asked for, or every class, cannot hold the Program; the message says why.
    """
    if emit not in TARGETS:
        raise OptionError(f"unknown target {emit!r}", f"use one of {', '.join(TARGETS)}")
    if emit == deepseek_v3.TARGET:
        return deepseek_v3.build(program, dtype), None
    if emit == source_class.TARGET:
        return source_class.build(program, dtype), None
    if emit == own_class.TARGET:
        return own_class.build(program, dtype), None
    stock = source_class.can_emit(program)
    if stock is None:
        return source_class.build(program, dtype), None
    if any(site.latent is not None for site in program.site_list):
        stock = deepseek_v3.can_emit(program, dtype)
        if stock is None:
            return deepseek_v3.build(program, dtype), None
    own = own_class.can_emit(program)
    if own is not None:
        raise UnsupportedError(f"{stock}. {own}", "only converted models of a listed architecture can be written")
    return own_class.build(program, dtype), stock


def emit(
    program: Program,
    source: SideFiles,
    staging: Staging,
    emit: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    reporter: Reporter | None = None,
) -> EmittedAs:
    """Write a Program into the staging directory: config, weights (one tensor in memory at a time), side files, and
    for our own class its code. Manifest and model card are the caller's (`artifact.Manifest`).

    Args:
        program, emit, dtype: see `choose`.
        source: where tokenizer, chat template and generation config come from.
        staging: an open staging directory; files go into `staging.path`.
        reporter: told of progress in tensors.

    Raises:
        OptionError, UnsupportedError: see `choose`.
        AttnoptError: a file cannot be written.
    """
    emission, refused = choose(program, emit, dtype)
    return replace(write(emission, source, staging.path, reporter), refused=refused)


def write(emission: Emission, source: SideFiles, directory: Path, reporter: Reporter | None = None) -> EmittedAs:
    """Write an emission into an existing directory."""
    reporter = reporter or Silent()
    tensors = outgoing(emission.store)
    with bar(reporter, "writing", len(tensors), "tensors") as handle:
        names = write_checkpoint(directory, _counted(tensors, reporter, handle))
    write_json(directory / "config.json", emission.config)
    with writing(directory):
        side = source.copy_side_files(directory)
        code = own_class.FILES if emission.target == own_class.TARGET else ()
        for name in code:
            shutil.copyfile(Path(__file__).with_name(name), directory / name)
    return EmittedAs(
        target=emission.target,
        architecture=emission.architecture,
        cached_numbers_per_token=emission.cached_numbers_per_token,
        parameters=emission.parameters,
        files=(*names, "config.json", *side, *code),
        notes=emission.notes,
    )


def _counted(tensors: Sequence[Outgoing], reporter: Reporter, handle: int) -> list[Outgoing]:
    """The same tensors, each telling the reporter when it is loaded."""

    def telling(tensor: Outgoing) -> Outgoing:
        def load() -> torch.Tensor:
            value = tensor.load()
            reporter.advance(handle)
            return value

        return replace(tensor, load=load)

    return [telling(tensor) for tensor in tensors]
