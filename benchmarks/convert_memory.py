"""Peak memory of a conversion: a random-weight Llama is written to disk and converted in a fresh process.

    python benchmarks/convert_memory.py --shape 1.1b          # 2.2 GB on disk; minutes
    python benchmarks/convert_memory.py --shape 7b            # 13.5 GB on disk; slow

Prints JSON: bytes on disk, peak resident set of the converting process, seconds. Quality means nothing here, the
weights are random; the calibration text is random words, so that no text has to be at hand.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

#: layers, hidden, intermediate, heads, kv heads, of TinyLlama-1.1B and Llama-2-7B (their published configurations).
SHAPES = {"tiny": (2, 256, 512, 8, 2), "1.1b": (22, 2048, 5632, 32, 4), "7b": (32, 4096, 11008, 32, 32)}
VOCABULARY = 32000


def write_model(folder: Path, shape: str, layers: int | None, seed: int) -> int:
    """Write a random bf16 model of a shape, or of fewer layers, one shard per layer; returns its size in bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    all_layers, hidden, intermediate, heads, kv_heads = SHAPES[shape]
    layers = layers or all_layers
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    d = hidden // heads

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    def layer(i: int) -> dict[str, torch.Tensor]:
        parts = {
            "self_attn.q_proj": (heads * d, hidden),
            "self_attn.k_proj": (kv_heads * d, hidden),
            "self_attn.v_proj": (kv_heads * d, hidden),
            "self_attn.o_proj": (hidden, heads * d),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }
        prefix = f"model.layers.{i}."
        tensors = {f"{prefix}{name}.weight": matrix(*size) for name, size in parts.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        return tensors

    index: dict[str, str] = {}
    outer = {
        "model.embed_tokens.weight": matrix(VOCABULARY, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": matrix(VOCABULARY, hidden),
    }
    for i in range(layers + 1):
        tensors = layer(i) if i < layers else outer
        name = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
    return size


def write_text(folder: Path, words: int, seed: int) -> Path:
    """Write a word-level tokenizer into the model's directory and a file of random words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    source = random.Random(seed)
    path = folder / "calibration.txt"
    path.write_text(" ".join(f"w{source.randrange(VOCABULARY)}" for _ in range(words)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has: a layer's peak does not need all")
    parser.add_argument("--calib-tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--kv-lora-rank", type=int, help="by default half the cache, less the rotary key")
    parser.add_argument("--qk-rope-head-dim", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, help="where to write the model; a temporary folder by default")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="attnopt-memory-", dir=arguments.workdir))
    try:
        size = write_model(folder / "model", arguments.shape, arguments.layers, arguments.seed)
        text = write_text(folder / "model", arguments.calib_tokens + arguments.context, arguments.seed)
        _, hidden, _, heads, kv_heads = SHAPES[arguments.shape]
        rank = arguments.kv_lora_rank or hidden // heads * kv_heads - arguments.qk_rope_head_dim
        command = [sys.executable, "-m", "attnopt", "convert", str(folder / "model"), "--to", "mla", "--json"]
        command += ["-o", str(folder / "out"), "--kv-lora-rank", str(rank)]
        command += ["--qk-rope-head-dim", str(arguments.qk_rope_head_dim), "--calib", str(text)]
        command += ["--calib-tokens", str(arguments.calib_tokens), "--context", str(arguments.context)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        result = json.loads(done.stdout)
        report = {
            "shape": arguments.shape,
            "layers": arguments.layers or SHAPES[arguments.shape][0],
            "bytes_on_disk": size,
            "calib_tokens": arguments.calib_tokens,
            "cached_numbers_per_token": result["cached_numbers_per_token"],
            "emitted_as": result["emitted_as"],
            "peak_rss_bytes": result["peak_rss_bytes"],
            "seconds": result["seconds"],
        }
        print(json.dumps(report, indent=2))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
