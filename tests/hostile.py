"""Broken and dangerous model directories, each with what the refusal must say.

`CASES` lists them; `make(name, directory)` builds one and returns the path to give as MODEL. `healthy` builds the tiny
Llama they are damaged from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Hostile:
    """One broken input.

    Attributes:
        name: what to call it.
        damage: turns a healthy directory into the broken input; returns the path to give as MODEL.
        message, hint: regular expressions the error must match.
        on_read: True if it can only be noticed when the tensor is read, not when the model is opened.
    """

    name: str
    damage: Callable[[Path], Path]
    message: str
    hint: str
    on_read: bool = False


def healthy(directory: Path, *, shards: bool = False, **config: object) -> Path:
    """Write a tiny random Llama (2 layers, 4 query and 2 key/value heads) to `directory`."""
    torch.manual_seed(0)
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**options, **config}))
    model.save_pretrained(directory, max_shard_size="20KB" if shards else "5GB")
    return directory


def make(name: str, directory: Path) -> Path:
    """Build the case called `name` in `directory` and return the path to give as MODEL."""
    case = next(case for case in CASES if case.name == name)
    return case.damage(healthy(directory, shards=name.startswith("index")))


def edit_config(directory: Path, **changes: object) -> Path:
    """Set fields of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))
    return directory


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Rewrite the weight file after a change to its tensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return directory


def edit_header(directory: Path, change: Callable[[dict[str, dict]], None]) -> Path:
    """Rewrite the header of the weight file, leaving the data as it is."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
    return directory


def edit_index(directory: Path, change: Callable[[dict[str, str]], None]) -> Path:
    """Change the weight map of a sharded checkpoint."""
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return directory


def _truncate(directory: Path, keep: float) -> Path:
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    return directory


def _overwrite(directory: Path, name: str, content: bytes) -> Path:
    (directory / name).write_bytes(content)
    return directory


def _poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ][3, 5] = float("nan")


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ][:24].contiguous()


def _lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[Q_PROJ]


def _overlap(header: dict[str, dict]) -> None:
    first, second = (v for k, v in list(header.items())[:3] if k != "__metadata__")
    second["data_offsets"] = [offset - 4 for offset in second["data_offsets"]]
    del first


def _set(key: str, field: str, value: object) -> Callable[[dict[str, dict]], None]:
    return lambda header: header[key].__setitem__(field, value)


def _pickled(directory: Path) -> Path:
    tensors = load_file(directory / "model.safetensors")
    torch.save(tensors, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


def _pickle_file(directory: Path) -> Path:
    return _pickled(directory) / "pytorch_model.bin"


def _link_out(directory: Path) -> Path:
    outside = directory.parent / f"{directory.name}-outside.safetensors"
    (directory / "model.safetensors").rename(outside)
    (directory / "model.safetensors").symlink_to(outside)
    return directory


def _index_out(target: Callable[[Path], str]) -> Callable[[Path], Path]:
    def damage(directory: Path) -> Path:
        shard = sorted(directory.glob("model-*.safetensors"))[0]
        outside = directory.parent / f"{directory.name}-{shard.name}"
        outside.write_bytes(shard.read_bytes())

        def change(weight_map: dict[str, str]) -> None:
            for key, name in weight_map.items():
                if name == shard.name:
                    weight_map[key] = target(outside)

        return edit_index(directory, change)

    return damage


def _lose_shard(directory: Path) -> Path:
    sorted(directory.glob("model-*.safetensors"))[0].unlink()
    return directory


def _empty(directory: Path) -> Path:
    for path in directory.iterdir():
        path.unlink()
    return directory


def _without(name: str) -> Callable[[Path], Path]:
    def damage(directory: Path) -> Path:
        (directory / name).unlink()
        return directory

    return damage


CASES = [
    Hostile("missing tensor", lambda d: edit_tensors(d, _lose), "lacks the weights .*q_proj", "incomplete"),
    Hostile("wrong shape", lambda d: edit_tensors(d, _narrow), r"q_proj.*\[24, 32\].*\[32, 32\]", "belong together"),
    Hostile("nan", lambda d: edit_tensors(d, _poison), "q_proj.*NaN", "another one", on_read=True),
    Hostile("truncated", lambda d: _truncate(d, 0.7), "truncated: tensor", "copy or download"),
    Hostile("truncated header", lambda d: _truncate(d, 0.01), "truncated: the header", "copy or download"),
    Hostile("no bytes", lambda d: _truncate(d, 0), "truncated: 0 bytes", "copy or download"),
    Hostile(
        "trailing bytes", lambda d: _overwrite(d, "model.safetensors", _file(d) + b"x" * 9), "9 bytes after", "copy"
    ),
    Hostile("giant header", lambda d: _overwrite(d, "model.safetensors", b"\xff" * 64), "no safetensors", "copy"),
    Hostile(
        "header not json", lambda d: _overwrite(d, "model.safetensors", b"\4" + b"\0" * 7 + b"abcd"), "JSON", "copy"
    ),
    Hostile("unknown dtype", lambda d: edit_header(d, _set(Q_PROJ, "dtype", "Q4")), "element type 'Q4'", "store it"),
    Hostile("negative shape", lambda d: edit_header(d, _set(Q_PROJ, "shape", [-4, 8])), "impossible shape", "copy"),
    Hostile("size mismatch", lambda d: edit_header(d, _set(Q_PROJ, "shape", [32, 31])), "needs 3,968 bytes", "copy"),
    Hostile("bad offsets", lambda d: edit_header(d, _set(Q_PROJ, "data_offsets", [8, 4])), "byte range", "copy"),
    Hostile("overlap", lambda d: edit_header(d, _overlap), "overlaps", "copy"),
    Hostile("no heads", lambda d: edit_config(d, num_attention_heads=None), "attention heads", "num_attention_heads"),
    Hostile("zero heads", lambda d: edit_config(d, num_attention_heads=0), "attention heads|legal", "num_att|correct"),
    Hostile("no model type", lambda d: edit_config(d, model_type=None), "no model_type", "save_pretrained"),
    Hostile("unknown model type", lambda d: edit_config(d, model_type="lama"), "unknown model_type 'lama'", "llama"),
    Hostile(
        "remote code",
        lambda d: edit_config(d, model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}),
        "brings its own code",
        "--trust-remote-code",
    ),
    Hostile("quantised", lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}), "gptq", "dequantise"),
    Hostile("heads do not divide", lambda d: edit_config(d, num_attention_heads=5, head_dim=None), "config", "correct"),
    Hostile("config not json", lambda d: _overwrite(d, "config.json", b"{"), "not JSON", "restore"),
    Hostile("config a list", lambda d: _overwrite(d, "config.json", b"[]"), "not a JSON object", "restore"),
    Hostile("no config", _without("config.json"), "no config.json", "Hugging Face model directory"),
    Hostile("no weights", _without("model.safetensors"), "no model.safetensors", "save_pretrained"),
    Hostile("pickled", _pickled, "pickled", r"python -c .*from_pretrained.*save_pretrained"),
    Hostile("pickle file", _pickle_file, "pickled", r"python -c .*from_pretrained.*save_pretrained"),
    Hostile("link out", _link_out, "link that leaves", "copy the file"),
    Hostile("index dot dot", _index_out(lambda p: f"../{p.name}"), "leaves the model directory", "do not trust"),
    Hostile("index absolute", _index_out(str), "leaves the model directory", "do not trust"),
    Hostile("index lost shard", _lose_shard, "does not exist", "incomplete"),
    Hostile("index wrong file", lambda d: edit_index(d, _swap), "but it is not there", "incomplete"),
    Hostile("index empty", lambda d: edit_index(d, dict.clear), "lists no tensors", "incomplete"),
    Hostile("empty directory", _empty, "is empty", "config.json"),
    Hostile("no such path", lambda d: d / "nothing" / "here", "does not exist", "directory"),
    Hostile("plain file", lambda d: d / "config.json", "neither a model directory nor", "did you mean"),
    Hostile("broken gguf", lambda d: _overwrite(d, "x.gguf", b"GGUF" + os.urandom(64)) / "x.gguf", "GGUF", "download"),
    Hostile("not a gguf", lambda d: _overwrite(d, "x.gguf", b"hello") / "x.gguf", "GGUF", "download"),
]


def _file(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def _swap(weight_map: dict[str, str]) -> None:
    names = sorted(set(weight_map.values()))
    key = next(key for key, name in weight_map.items() if name == names[0])
    weight_map[key] = names[1]
