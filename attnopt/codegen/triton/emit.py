"""Writes a Program as a standalone Triton package, and checks it by loading what was written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attnopt.artifact import write_checkpoint, write_json, writing
from attnopt.codegen.artefact import Exported
from attnopt.codegen.decoding import SHARED, Decoding, decoding_graph
from attnopt.codegen.folding import fold_constants
from attnopt.codegen.target import Claim, Target, Verdict, refusals
from attnopt.codegen.triton.compile import (
    Compiled,
    combine_kernel,
    gqa_decode_kernel,
    map_decode_kernel,
    mla_decode_kernel,
    prefill_kernel,
)
from attnopt.codegen.triton.lane import TritonLane, arch_of, claim
from attnopt.codegen.triton.runtime import ops
from attnopt.codegen.triton.runtime.select import (
    PAGE,
    gqa_decode_config,
    latent_key,
    map_decode_config,
    mla_decode_config,
    prefill_config,
    tuned_document,
)
from attnopt.codegen.triton.source import model_source
from attnopt.errors import OptionError, UnsupportedError
from attnopt.files import write_text
from attnopt.progress import Reporter, bar
from attnopt.rewriter.absorb import to_latent_form
from attnopt.rewriter.interpret import run
from attnopt.rewriter.program import Program
from attnopt.rewriter.safe_tensors import Outgoing
from attnopt.rewriter.site import AttentionSite
from attnopt.rewriter.weights import Derived

#: Name of the Python package in the directory.
PACKAGE = "attention_model"
#: Files of the runtime, and their names in a package.
RUNTIME = {
    **{f"{name}.py": f"{name}.py" for name in (
        *("combine", "decoder", "designs", "gqa_decode", "launch", "loader", "mla_decode", "mla_decode_gluon", "ops"),
        *("prefill", "reference", "schedule", "select", "selftest", "trial", "tune"),
    )},
    "main.py": "__main__.py",
}  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16")
#: Largest difference of the written model's logits, in float32 and plain torch, from the program's.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shape:
    """A distinct shape of attention in a model.

    `kind` is "latent", "grouped", "owner" (grouped, and others use its map) or "map" (uses the map of an owner).
    """

    kind: str
    heads: int
    groups: int
    rank: int
    rope: int
    width: int
    value_width: int
    nope: int
    scale: float
    softcap: float

    @classmethod
    def of(cls, site: AttentionSite, kind: str) -> Shape:
        """The shape of a site; `kind` if it is not latent."""
        cap, spec = site.mask.softcap or 0.0, site.latent
        if spec is None:
            return cls(kind, site.heads, site.kv_heads, 0, 0, site.d_qk, site.d_v, site.d_qk, site.scale, cap)
        sizes = (spec.kv_lora_rank, spec.d_rope, spec.kv_lora_rank + spec.d_rope, site.d_v, spec.d_nope)
        return cls("latent", site.heads, site.heads, *sizes, site.scale, cap)

    @property
    def name(self) -> str:
        """A short name that tells shapes of a model apart."""
        if self.kind == "latent":
            return f"latent_h{self.heads}_r{self.rank}_p{self.rope}"
        return f"{self.kind}_h{self.heads}_g{self.groups}_d{self.width}_v{self.value_width}"


def emit_triton(program: Program, directory: Path, target: Target, dtype: str, reporter: Reporter) -> Exported:
    """Write the package into an existing directory.

    Args:
        program: as captured or converted; a decoder.
        target: a GPU; kernels are compiled for it ahead of time.
        dtype: of weights and cache, one of `DTYPES`, or "auto" for the source's (bfloat16 if that is none of them).

    Raises:
        OptionError: an unknown type, or a target that is no GPU.
        UnsupportedError: no site can be lowered, or the package does not compute what the program does.
    """
    if not target.is_gpu:
        raise OptionError(f"Triton does not compile for {target.name}", "give --target sm_80, sm_90, ... or gfx942")
    dtype = _resolve(program, dtype)
    itemsize = getattr(torch, dtype).itemsize
    program = _rounded(to_latent_form(program), dtype)
    verdicts = tuple(claim(program, site, target, itemsize) for site in program.site_list)
    refused = refusals(verdicts)
    if len(refused) == len(verdicts):
        raise UnsupportedError(f"no attention layer can be lowered to Triton: {refused[0].reason}")
    decoding = decoding_graph(program, TritonLane({v.site: v for v in verdicts}, _owners(program)))
    folded = fold_constants(decoding.graph, program, _role)
    package = directory / PACKAGE
    with writing(directory):
        package.mkdir()
        for source, name in RUNTIME.items():
            shutil.copyfile(Path(__file__).with_name("runtime") / source, package / name)
        write_text(package / "__init__.py", '"""A model with Triton attention, written by attnopt."""\n')
        write_text(package / "model.py", model_source(decoding, f"{program.model_type} with attention in Triton."))
    tensors = _weights(decoding, program, folded, getattr(torch, dtype))
    with bar(reporter, "writing", len(tensors), "tensors") as handle:
        files = write_checkpoint(directory, tensors)
        reporter.advance(handle, len(tensors))
    shapes = _shapes(program, verdicts)
    compiled = _compile(shapes, target, dtype, package, reporter)
    reporter.say("checking the written package")
    error = _check(program, directory)
    notes = [f"{r.site} runs in plain torch: {r.reason}" for r in refused]
    return Exported(
        format="triton",
        target=target,
        verdicts=verdicts,
        cache=decoding.cache,
        files=(*files, PACKAGE),
        checks={"logits in plain torch": error},
        details={
            "dtype": dtype,
            "cache_dtype": dtype,
            "shapes": [{"name": s.name, **{k: getattr(s, k) for k in s.__dataclass_fields__}} for s in shapes],
            "kernels": compiled,
        },
        notes=tuple(dict.fromkeys(notes)),
        usage=_USAGE,
    )


def _resolve(program: Program, dtype: str) -> str:
    if dtype == "auto":
        stored = program.weights.meta(program.site_list[0].o.weight).dtype
        name = str(stored).removeprefix("torch.")
        return name if name in DTYPES else "bfloat16"
    if dtype not in DTYPES:
        raise OptionError(f"a package cannot hold {dtype!r}", f"give one of auto, {', '.join(DTYPES)}")
    return dtype


def _weights(decoding: Decoding, program: Program, folded: Any, dtype: torch.dtype) -> list[Outgoing]:
    """Weights the model reads: matrices in the package's type, vectors and tables in float32."""
    result: dict[str, Outgoing] = {}
    for node in decoding.graph.nodes:
        name = str(node.target)
        if node.op != "get_attr" or name in result:
            continue
        if name in folded:
            like = folded[name].meta()
            load: Callable[[], torch.Tensor] = folded[name].compute
        else:
            like = program.weights.meta(name)
            load = _reader(program, name)
        kind = like.dtype
        if kind.is_floating_point:
            kind = dtype if len(like.shape) > 1 and not node.meta.get("buffer") else torch.float32
        result[name] = Outgoing(name, tuple(like.shape), kind, _cast(load, kind))
    return list(result.values())


def _role(node: fx.Node) -> str:
    for user in node.users:
        if user.target is ops.attend_latent:
            return "w_uk" if user.args[2] is node else "w_uv"
    return node.name


def _reader(program: Program, name: str) -> Callable[[], torch.Tensor]:
    return lambda: program.weights.get(name)


def _cast(load: Callable[[], torch.Tensor], kind: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: load().to(kind).contiguous()


def _owners(program: Program) -> frozenset[int]:
    """Layers whose map others use."""
    anchors = [program.node(site.nodes.attention) for site in program.site_list]
    return frozenset(int(str(node.args[10])) for node in anchors if node.target is SHARED)


def _shapes(program: Program, verdicts: Sequence[Verdict]) -> list[Shape]:
    owners = _owners(program)
    found: dict[Shape, None] = {}
    for site, verdict in zip(program.site_list, verdicts, strict=True):
        if isinstance(verdict, Claim):
            owner = site.layer in owners and not site.mask.window
            found[Shape.of(site, "map" if verdict.form == "map_decode" else "owner" if owner else "grouped")] = None
    return list(found)


def _compile(
    shapes: Sequence[Shape], target: Target, dtype: str, package: Path, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Compile every kernel of every shape, and write binaries, their metadata and the picks."""
    import triton

    arch, size = arch_of(target), getattr(torch, dtype).itemsize
    made: dict[str, Compiled] = {}
    picks: dict[str, dict[str, Any]] = {"mla_decode": {}, "gqa_decode": {}, "prefill": {}}
    with bar(reporter, "compiling", len(shapes), "shapes") as handle:
        for shape in shapes:
            rows, width = shape.heads // shape.groups, shape.value_width
            sizes = (shape.heads, shape.groups, shape.nope, shape.rope, shape.value_width)
            if shape.kind == "latent":
                rows, width = shape.heads, shape.rank
                config = mla_decode_config(rows, width, shape.rope, size, arch, target.shared_memory)
                picks["mla_decode"][latent_key(shape.heads, shape.rank, shape.rope, PAGE, size, 1)] = config
                decode = mla_decode_kernel(shape.heads, shape.rank, shape.rope, dtype, config, target)
            elif shape.kind == "map":
                config = map_decode_config(rows)
                decode = map_decode_kernel(shape.heads, shape.groups, width, dtype, config, target, paged=False)
            else:
                config = gqa_decode_config(rows, shape.width, width, size, arch, target.shared_memory)
                key = f"H{shape.heads} G{shape.groups} D{shape.width} DV{width} {size} sq1"
                picks["gqa_decode"][key] = config
                options = {"softcap": shape.softcap > 0, "store_map": shape.kind == "owner", "paged": False}
                heads = (shape.heads, shape.groups, shape.width, width)
                decode = gqa_decode_kernel(*heads, dtype, config, target, **options)
            prompt = prefill_config(sizes[2], sizes[3], sizes[4], size, arch, target.shared_memory)
            picks["prefill"][f"DN{sizes[2]} DR{sizes[3]} DV{sizes[4]} {size}"] = prompt
            made[f"{shape.name}_decode"] = decode
            made[f"{shape.name}_combine"] = combine_kernel(rows, width, dtype, target, add=shape.kind == "map")
            made[f"{shape.name}_prefill"] = prefill_kernel(*sizes, dtype, prompt, target)
            reporter.advance(handle)
    binaries, suffix = package / "binaries", "cubin" if target.vendor == "nvidia" else "hsaco"
    with writing(package):
        binaries.mkdir()
        (package / "configs").mkdir()
        for name, one in made.items():
            (binaries / f"{name}.{suffix}").write_bytes(one.binary)
            write_json(binaries / f"{name}.json", one.metadata)
    document = tuned_document(arch, target.multiprocessors, triton.__version__, picks)
    write_json(package / "configs" / f"{arch}.json", document)
    return {
        name: {
            "shared": one.figures.shared,
            "registers": one.figures.registers,
            "stack": one.figures.stack,
            "instructions": dict(one.figures.instructions),
            "buffers": one.figures.buffers,
        }
        for name, one in made.items()
    }


_CHECK = """
import json, sys, torch
from pathlib import Path
from attention_model import model, ops
from attention_model.decoder import Decoder
ops.force("reference")
decoder = Decoder(model, Path.cwd(), "cpu", torch.float32)
ids = torch.tensor(json.loads(sys.argv[1]))
decoder.reset(ids.shape[0], ids.shape[1])
pieces = [decoder.forward(ids[:, :6])] + [decoder.forward(ids[:, i : i + 1]) for i in range(6, ids.shape[1])]
torch.save(torch.cat(pieces, 1), sys.argv[2])
assert "attnopt" not in sys.modules and "transformers" not in sys.modules
"""


def _check(program: Program, directory: Path) -> float:
    """Run the written package in a fresh process, without attnopt, and compare its logits with the program's."""
    vocabulary = int(program.config.get("vocab_size") or program.config.get("text_config", {}).get("vocab_size", 2))
    ids = torch.randint(0, vocabulary, (2, 9), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.pt"
        done = subprocess.run(
            [sys.executable, "-c", _CHECK, json.dumps(ids.tolist()), str(out)],
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UnsupportedError(
                f"the written package does not run: {done.stderr.strip().splitlines()[-1:]}", "open an issue"
            )
        found = torch.load(out)
    for leftover in directory.rglob("__pycache__"):
        shutil.rmtree(leftover)
    wanted = run(program, input_ids=ids)[program.outputs[0]]
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE:
        raise UnsupportedError(
            f"the written package differs from the model by {error:.1e} of its scale", "open an issue"
        )
    return error


def _rounded(program: Program, dtype: str) -> Program:
    """The program with its matrices rounded to a type, so that a check compares code and nothing else."""
    values = {}
    buffers = {str(n.target) for n in program.graph.nodes if n.op == "get_attr" and n.meta.get("buffer")}
    for name in program.weight_names:
        meta = program.weights.meta(name)
        if name not in buffers and meta.dtype.is_floating_point and len(meta.shape) > 1:
            values[name] = Derived.of("cast", program.weights[name], dtype=getattr(torch, dtype))
    return program.replace(weights=program.weights.with_values(values))


_USAGE = f"""```
cd OUT
python -m {PACKAGE}.selftest                 # kernels against references, on this machine
python -m {PACKAGE}.selftest --tune          # and the fastest design of latent attention that is right here
python -m {PACKAGE} "The capital of France is" --tokens 40
```

The package imports only torch and triton (and tokenizers for prompts in text). `{PACKAGE}/model.py` is the model, a
line an operation; the kernels lie beside it with their references. `binaries/` holds them compiled for the target with
what a launcher must know; from Python, Triton compiles them itself for the GPU it finds. `configs/` holds tiles by
device and Triton version; a shape that is not there gets the deterministic default of `select.py`."""
