"""Profile: what was measured of a model's attention, as two files that other runs can rely on.

`profile.json` (schema `attnopt.profile/1`) says of which model, on which prompts, with which versions of which metrics,
and holds the per-head and per-layer values; `profile.safetensors` holds all arrays, three per metric:

    METRIC/mean         mean over prompts
    METRIC/std          standard deviation over prompts
    METRIC/per_prompt   one value per prompt, the first axis

Of what does not depend on text (weights, pictures of one prompt) there is only the mean.

The axes of a metric are named. Models whose layers differ in heads are padded with NaN; NaN also stands wherever a
metric makes no sense (a pair of layers that cannot share, the first layer as a consumer).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import OptionError, SourceError
from attnopt.files import json_safe, write_text, writing
from attnopt.rewriter.program import Program
from attnopt.rewriter.safe_tensors import Outgoing, read_bytes, read_header, write_tensors
from attnopt.rewriter.weights import value_digest

SCHEMA = "attnopt.profile/1"
JSON_NAME = "profile.json"
TENSORS_NAME = "profile.safetensors"

#: What is kept of every metric.
PARTS = ("mean", "std", "per_prompt")

_KEYS = {"schema", "model", "calibration", "numeric", "sites", "metrics", "absent", "groups", "predictions", "tensors"}
_AGAIN = "make it again with attnopt profile"


@dataclass(frozen=True)
class MetricInfo:
    """What one metric of a profile is.

    Attributes:
        version: raised whenever the values change their meaning.
        axes: names of the axes, e.g. ("site", "head"); pairs of layers are ("source", "consumer").
        direction: "high_keep" if a large value argues against removing or changing, "low_keep" if a small one does,
            "" if it only describes.
        help: one line on what it is.
        source: paper and equation, or where it is defined.
        labels: what the entries of the last axis are (windows, patterns, bins); empty if they are just counted.
        prompts: how many it was measured on; 0 if it depends on the weights alone, or is not averaged.
        stability: how far the ranking of heads can be trusted, see `stability`; empty if there are too few.
    """

    version: int
    axes: tuple[str, ...]
    direction: str = ""
    help: str = ""
    source: str = ""
    labels: tuple[str, ...] = ()
    prompts: int = 0
    stability: Mapping[str, float] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        """Which of `PARTS` there are."""
        return PARTS if self.prompts else PARTS[:1]


@dataclass(frozen=True)
class SharingGroup:
    """Consecutive layers of a kind that can read the attention maps of the first.

    Attributes:
        layers: indices, ascending; the first is the source.
        similarity: smallest similarity of a consumer's maps to the source's, heads aligned.
        error: largest measured NMSE of a consumer's output when it reads the source's maps, heads aligned.
    """

    layers: tuple[int, ...]
    similarity: float
    error: float

    @property
    def source(self) -> int:
        """The layer whose maps are read."""
        return self.layers[0]

    @property
    def named(self) -> str:
        """ "2-5", or "2, 4" where layers of another kind lie between."""
        first, last = self.layers[0], self.layers[-1]
        whole = last - first + 1 == len(self.layers)
        return f"{first}-{last}" if whole else ", ".join(map(str, self.layers))


@dataclass(frozen=True, eq=False)
class Profile:
    """Measurements of one model.

    Attributes:
        model: identity: name, format, hashes of the source, and `program_digest`, the hash of the weights read.
        calibration: prompts: source, number, lengths, tokens, seed, one hash each and one of all.
        numeric: type, row block and thresholds used.
        sites: facts of each attention layer, in forward order: fqn, layer, kind, heads, kv_heads, ...
        metrics: what is there, by name.
        tensors: the arrays, by "METRIC/PART".
        absent: why a metric is not there, by name.
        groups: layers that can share attention maps.
        predictions: cache and compute of each method, as plain data.
    """

    model: Mapping[str, str]
    calibration: Mapping[str, Any]
    numeric: Mapping[str, Any]
    sites: tuple[Mapping[str, Any], ...]
    metrics: Mapping[str, MetricInfo]
    tensors: Mapping[str, Tensor]
    absent: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[SharingGroup, ...] = ()
    predictions: Mapping[str, Any] = field(default_factory=dict)

    def metric(self, name: str) -> Tensor:
        """Mean of a metric over prompts, float64, with the axes of `metrics[name]`.

        Raises:
            SourceError: if the profile does not hold it; the message says why, as far as is known.
        """
        return self._part(name, "mean")

    def std(self, name: str) -> Tensor:
        """Standard deviation over prompts, same axes; 0 if a metric does not depend on text; raises as `metric`."""
        mean = self._part(name, "mean")
        return self._part(name, "std") if self.metrics[name].prompts else torch.zeros_like(mean)

    def per_prompt(self, name: str) -> Tensor:
        """A metric by prompt, [prompts, *axes]; [0, *axes] if it does not depend on text; raises as `metric`."""
        mean = self._part(name, "mean")
        return self._part(name, "per_prompt") if self.metrics[name].prompts else mean.new_zeros(0, *mean.shape)

    def _part(self, name: str, part: str) -> Tensor:
        if name not in self.metrics:
            why = self.absent.get(name)
            raise SourceError(
                f"the profile of {self.model.get('name', 'the model')} has no metric {name!r}"
                + (f": {why}" if why else ""),
                f"it holds {', '.join(self.metrics)}" if not why else "choose another metric or another method",
            )
        return self.tensors[f"{name}/{part}"]

    def require(self, program: Program) -> None:
        """Refuse a program that this profile was not made of.

        A program that passes have already changed is compared by its layers' names and head counts only; check before
        the first pass.

        Raises:
            OptionError: if it is another model.
        """
        name = self.model.get("name", "another model")
        hint = "profile this model with attnopt profile, or name the profile that belongs to it"
        if not program.history:
            if program_digest(program) != self.model["program_digest"]:
                raise OptionError(f"the profile is of {name}, whose weights are not those of this model", hint)
            return
        mine = [(site["fqn"], site["heads"]) for site in self.sites]
        if [fqn for fqn, _ in mine] != list(program.sites):
            raise OptionError(f"the profile is of {name}, whose attention layers are not those of this model", hint)

    def save(self, directory: Path) -> None:
        """Write `profile.json` and `profile.safetensors` into an existing directory. Equal profiles give equal bytes.

        Raises:
            AttnoptError: if they cannot be written.
        """
        path = directory / TENSORS_NAME
        with writing(path):
            write_tensors(path, [_outgoing(name, tensor) for name, tensor in sorted(self.tensors.items())])
            write_text(directory / JSON_NAME, json.dumps(self.to_json(_sha256(path)), indent=1, sort_keys=True) + "\n")

    def to_json(self, tensors_sha256: str = "") -> dict[str, Any]:
        """The document `attnopt.profile/1`, with the values of every metric that has one number per head or layer."""
        metrics = {}
        for name, info in self.metrics.items():
            metrics[name] = {
                "version": info.version,
                "axes": list(info.axes),
                "direction": info.direction,
                "help": info.help,
                "source": info.source,
                "labels": list(info.labels),
                "n": info.prompts,
                "shape": list(self.tensors[f"{name}/mean"].shape),
                "stability": dict(info.stability),
                **{part: f"{name}/{part}" for part in info.parts},
            }
            if info.axes in (("site",), ("site", "head"), ("site", "kv_head")):
                metrics[name]["values"] = json_safe(self.metric(name).to(torch.float64).tolist())
                metrics[name]["spread"] = json_safe(self.std(name).to(torch.float64).tolist())
        groups = [{"layers": list(g.layers), "similarity": g.similarity, "error": g.error} for g in self.groups]
        return {
            "schema": SCHEMA,
            "model": dict(self.model),
            "calibration": dict(self.calibration),
            "numeric": dict(self.numeric),
            "sites": [dict(site) for site in self.sites],
            "metrics": metrics,
            "absent": dict(self.absent),
            "groups": groups,
            "predictions": dict(self.predictions),
            "tensors": {"file": TENSORS_NAME, "sha256": tensors_sha256},
        }

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile that `save` wrote.

        Args:
            path: its directory, or its `profile.json`.

        Raises:
            SourceError: if it is missing, damaged, of another schema, or its parts do not belong together.
        """
        directory = Path(path)
        if directory.name == JSON_NAME:
            directory = directory.parent
        file = directory / JSON_NAME
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise SourceError(
                f"cannot read the profile {file}: {error.strerror}",
                "give the directory that attnopt profile wrote",
            ) from error
        except ValueError as error:
            raise SourceError(f"{file} is not JSON: {error}", _AGAIN) from error
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            found = document.get("schema") if isinstance(document, dict) else None
            raise SourceError(f"{file} is of schema {found!r}, not {SCHEMA}", _AGAIN)
        if set(document) != _KEYS:
            raise SourceError(f"{file} has other keys than {SCHEMA}: {sorted(set(document) ^ _KEYS)}", _AGAIN)
        tensors = _read_tensors(directory / TENSORS_NAME, document["tensors"].get("sha256"))
        try:
            profile = cls(
                model=document["model"],
                calibration=document["calibration"],
                numeric=document["numeric"],
                sites=tuple(document["sites"]),
                metrics={name: _info(entry) for name, entry in document["metrics"].items()},
                tensors=tensors,
                absent=document["absent"],
                groups=tuple(SharingGroup(tuple(g["layers"]), g["similarity"], g["error"]) for g in document["groups"]),
                predictions=document["predictions"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{file} is damaged: {error!r} is missing or of a wrong kind", _AGAIN) from error
        _check(profile, file)
        return profile


def program_digest(program: Program) -> str:
    """SHA-256 that identifies the parameters a program reads (as `WeightStore.digest`: it tells models apart)."""
    names = {str(n.target) for n in program.graph.nodes if n.op == "get_attr" and not n.meta.get("buffer")}
    state = hashlib.sha256()
    for name in sorted(names):
        state.update(f"{name}\0{value_digest(program.weights[name])}\n".encode())
    return state.hexdigest()


def spread(values: Tensor) -> Tensor:
    """Standard deviation over the first axis, NaN left out; 0 where there is one value, NaN where there is none."""
    count = (~values.isnan()).sum(0)
    centred = values - values.nanmean(0)
    variance = centred.pow(2).nansum(0) / (count - 1).clamp(min=1)
    return torch.where(count > 0, variance.sqrt(), torch.nan)


def _info(entry: Mapping[str, Any]) -> MetricInfo:
    return MetricInfo(
        version=entry["version"],
        axes=tuple(entry["axes"]),
        direction=entry["direction"],
        help=entry["help"],
        source=entry["source"],
        labels=tuple(entry["labels"]),
        prompts=entry["n"],
        stability=entry["stability"],
    )


def _check(profile: Profile, file: Path) -> None:
    """Refuse what a careful writer would not have written.

    Raises:
        SourceError: naming it.
    """
    expected = {f"{name}/{part}" for name, info in profile.metrics.items() for part in info.parts}
    if expected != set(profile.tensors):
        odd = ", ".join(sorted(expected ^ set(profile.tensors))[:3])
        raise SourceError(f"{file} and its arrays do not belong together: {odd}", _AGAIN)
    if "program_digest" not in profile.model:
        raise SourceError(f"{file} does not say which model it is of", _AGAIN)
    for name, info in profile.metrics.items():
        shapes = {part: tuple(profile.tensors[f"{name}/{part}"].shape) for part in info.parts}
        shape = shapes["mean"]
        wanted = {"mean": shape, "std": shape, "per_prompt": (info.prompts, *shape)}
        if len(shape) != len(info.axes) or any(shapes[part] != wanted[part] for part in info.parts):
            raise SourceError(f"{file}: the arrays of {name} have shapes {shapes}, which do not fit its axes", _AGAIN)
        if info.axes[0] in ("site", "source") and shape[0] != len(profile.sites):
            raise SourceError(f"{file}: {name} is of {shape[0]} layers, the model has {len(profile.sites)}", _AGAIN)


def _read_tensors(path: Path, sha256: str | None) -> dict[str, Tensor]:
    header = read_header(path)
    if _sha256(path) != sha256:
        raise SourceError(f"{path} is not the file that its {JSON_NAME} was written with", _AGAIN)
    tensors = {}
    for key, entry in header.entries.items():
        raw = read_bytes(path, entry.offset, entry.nbytes, header.size)
        tensors[key] = raw.view(entry.dtype).view(entry.shape)
    return tensors


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _outgoing(name: str, tensor: Tensor) -> Outgoing:
    return Outgoing(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)
