"""Writes a Program as an ONNX directory and checks what it wrote, from the saved file, against the program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch

from attnopt.artifact import write_json, writing
from attnopt.codegen.artefact import Exported, cache_records
from attnopt.codegen.decoding import CacheTensor
from attnopt.codegen.onnx.decoder import MODEL_FILE, OnnxDecoder, open_session
from attnopt.codegen.onnx.forms import claim
from attnopt.codegen.onnx.graph import OPSET, lower
from attnopt.codegen.target import Claim, Target, refusals
from attnopt.errors import OptionError, UnsupportedError
from attnopt.progress import Reporter
from attnopt.rewriter.absorb import to_latent_form
from attnopt.rewriter.interpret import run
from attnopt.rewriter.program import Program
from attnopt.staging import MANIFEST_NAME

FORMS = ("auto", "matmul", "operator")
DATA_FILE = MODEL_FILE + ".data"
#: Weights of at least this many bytes go into the data file.
_EXTERNAL = 1024
#: Largest difference of the saved model's outputs from the program's, as a share of the largest value.
TOLERANCE = 1e-4
_TEXT_SHAPES = ((1, 13, 6), (2, 10, 4), (1, 1, 3))
"""(batch, prompt, cached steps) of the check: none has a size that was traced with."""


def emit_onnx(program: Program, directory: Path, target: Target, form: str, reporter: Reporter) -> Exported:
    """Write `model.onnx` and its weights into an existing directory, and check them.

    Args:
        program: as captured or converted.
        form: "auto", "matmul" or "operator", see `forms`.

    Raises:
        OptionError: an unknown form.
        UnsupportedError: a site has no form, the graph cannot be written, or the saved file does not compute what
            the program does.
    """
    if form not in FORMS:
        raise OptionError(f"attention form {form!r} is unknown", f"give one of {', '.join(FORMS)}")
    program = to_latent_form(program)
    verdicts = tuple(claim(program, site, target, form) for site in program.site_list)
    refused = refusals(verdicts)
    if refused:
        hint = "give --attention auto" if form != "auto" else "this model cannot be exported to ONNX"
        raise UnsupportedError(f"{refused[0].site} cannot be written as ONNX: {refused[0].reason}", hint)
    reporter.say("building the ONNX graph")
    model = lower(program, {v.site: v.form for v in verdicts if isinstance(v, Claim)})
    reporter.say("writing its weights")
    model.model.producer_name = "attnopt"
    with writing(directory):
        ir.save(model.model, directory / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=_EXTERNAL)
    reporter.say("checking the saved file with onnxruntime")
    checks = check(program, model.cache, model.outputs, directory)
    files = [MODEL_FILE, *([DATA_FILE] if (directory / DATA_FILE).exists() else [])]
    notes = sorted({v.note for v in verdicts if isinstance(v, Claim) and v.note})
    return Exported(
        format="onnx",
        target=target,
        verdicts=verdicts,
        cache=model.cache,
        files=tuple(files),
        checks=checks,
        details={"opset": OPSET, "inputs": list(model.inputs), "outputs": list(model.outputs)},
        notes=tuple(notes),
        usage=_usage(model.cache),
    )


def check(program: Program, cache: Sequence[CacheTensor], outputs: Sequence[str], directory: Path) -> dict[str, float]:
    """Compare the saved file with the program, at sizes that were not traced with.

    Args:
        program: in latent form.
        cache, outputs: cached tensors and names of outputs of the written graph.
        directory: where `model.onnx` is. A decoder's manifest is written there for the check, if there is none.

    Returns:
        the largest relative difference of prompts and of cached steps (or of all outputs, for encoders).

    Raises:
        UnsupportedError: the file is not valid ONNX, or a difference is above `TOLERANCE`.
    """
    try:
        onnx.checker.check_model(str(directory / MODEL_FILE), full_check=True)
    except onnx.checker.ValidationError as error:
        raise UnsupportedError(
            f"the written ONNX file is not valid: {error}", "open an issue naming the model"
        ) from error
    errors = _check_decoder(program, cache, directory) if cache else _check_encoder(program, outputs, directory)
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= TOLERANCE:
        raise UnsupportedError(
            f"the written ONNX file differs from the model: {worst} by {errors[worst]:.1e} of its scale",
            "open an issue naming the model",
        )
    return errors


def _check_decoder(program: Program, cache: Sequence[CacheTensor], directory: Path) -> dict[str, float]:
    # The runtime reads names and shapes of the cache from the manifest, which is written after the check.
    manifest = directory / MANIFEST_NAME
    made = not manifest.exists()
    if made:
        write_json(manifest, {"cache": cache_records(cache, "float32")})
    try:
        decoder = OnnxDecoder(directory, providers=["CPUExecutionProvider"], block=8)
        errors = {"prompt": 0.0, "cached steps": 0.0}
        for batch, prompt, steps in _TEXT_SHAPES:
            ids = _tokens(program, batch, prompt + steps)
            wanted = run(program, input_ids=ids)[program.outputs[0]].numpy()
            decoder.reset(batch)
            found = decoder.forward(ids[:, :prompt].numpy())
            errors["prompt"] = max(errors["prompt"], _error(found, wanted[:, :prompt]))
            for step in range(prompt, prompt + steps):
                found = decoder.forward(ids[:, step : step + 1].numpy())
                errors["cached steps"] = max(errors["cached steps"], _error(found, wanted[:, step : step + 1]))
    finally:
        if made:
            manifest.unlink()
    return errors


def _check_encoder(program: Program, outputs: Sequence[str], directory: Path) -> dict[str, float]:
    session = open_session(directory / MODEL_FILE, ["CPUExecutionProvider"])
    errors = dict.fromkeys(outputs, 0.0)
    for batch, length in ((1, 13), (2, 5)):
        given: dict[str, torch.Tensor] = {}
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            name = str(node.target)
            if name == "pixel_values":
                size = [int(d) for d in node.meta["val"].shape[1:]]
                given[name] = torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))
            elif name == "attention_mask":
                given[name] = torch.ones(batch, length, dtype=torch.long)
                given[name][-1, length - 2 :] = 0
            elif name == "input_ids":
                given[name] = _tokens(program, batch, length)
            else:
                given[name] = torch.zeros(batch, length, dtype=torch.long)
        wanted = run(program, torch.float32, "cpu", **given)
        found = session.run(list(outputs), {name: value.numpy() for name, value in given.items()})
        for name, value in zip(outputs, found, strict=True):
            errors[name] = max(errors[name], _error(value, wanted[name].numpy()))
    return errors


def _tokens(program: Program, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(17 * batch + length)
    vocabulary = int(program.config.get("vocab_size") or program.config.get("text_config", {}).get("vocab_size", 2))
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))


def _usage(cache: Sequence[CacheTensor]) -> str:
    if not cache:
        return "Run it with onnxruntime: `onnxruntime.InferenceSession('model.onnx')`."
    return "\n".join(
        [
            "```python",
            "from attnopt.codegen.onnx import generate",
            "",
            'print(generate("OUT", "The capital of France is", max_new_tokens=40))',
            "```",
            "",
            "One graph reads prompts and decodes. Inputs are `input_ids` [batch, sequence], `past_length` [batch]",
            "(tokens that each row has cached) and the cached tensors, buffers with room for `capacity` tokens;",
            "outputs are the logits and the same buffers with the new rows written at `past_length`. Bind a past",
            "and its present to one buffer and nothing is copied. Buffers must be finite; what lies behind a",
            "row's end is never seen.",
        ]
    )
