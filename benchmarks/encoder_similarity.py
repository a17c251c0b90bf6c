"""How far sentence embeddings move when an encoder's layers share maps or lose heads, with and without repair.

    python benchmarks/encoder_similarity.py ENCODER --text wiki.valid.txt > encoder.json

The first half of the text calibrates; sentences of the second half are embedded (mean over tokens, normalised) by the
original and by the result, both loaded from disk, and compared by their cosine. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from judging import add_only, asked_for, first_half, plain

#: name -> (method, options, mean cosine to reach). Figures are for all-MiniLM-L6-v2: 6 layers of 12 heads.
ROWS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "share 2 of 6": ("share", {"fraction": 2 / 6}, 0.97),
    "share 2 of 6, no repair": ("share", {"fraction": 2 / 6, "fill": "none"}, None),
    "prune 3 of 12": ("prune", {"keep-heads": 9 / 12}, 0.97),
    "prune 3 of 12, no repair": ("prune", {"keep-heads": 9 / 12, "fill": "none"}, None),
}


def sentences(text: Path, count: int) -> list[str]:
    """Sentences of the second half, of 8 to 60 words, spread over it."""
    content = text.read_text(encoding="utf-8")
    content = plain(content[len(content) // 2 :])
    found = [s.strip() for line in content.splitlines() for s in line.split(" . ") if 8 <= len(s.split()) <= 60]
    return found[:: max(1, len(found) // count)][:count]


def embed(directory: str, tokenizer: Any, texts: list[str]) -> Any:
    """[sentences, D], normalised."""
    import torch
    from transformers import AutoModel

    import attnopt  # noqa: F401 (registers our class)

    model = AutoModel.from_pretrained(directory).eval()
    rows = []
    with torch.no_grad():
        for start in range(0, len(texts), 20):
            batch = tokenizer(texts[start : start + 20], return_tensors="pt", padding=True, truncation=True)
            hidden = model(**batch)[0]
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of an encoder")
    parser.add_argument("--text", type=Path, required=True, help="a WikiText file with its marks")
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--calib-tokens", type=int, default=65536)
    parser.add_argument("--context", type=int, default=48, help="of calibration windows; sentences have 31 tokens")
    add_only(parser)
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    from attnopt import api
    from attnopt.conversion import CalibrationOptions, RunOptions

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = sentences(arguments.text, arguments.sentences)
    original = embed(arguments.model, tokenizer, texts)
    rows = []
    with tempfile.TemporaryDirectory(prefix="attnopt-encoder-") as name:
        folder = Path(name)
        half = first_half(arguments.text, folder)
        for row, (method, options, floor) in ROWS.items():
            if not asked_for(arguments, row):
                continue
            result = api.convert(
                arguments.model,
                folder / "out",
                to=method,
                method_options=options,
                calibration=CalibrationOptions((half,), arguments.calib_tokens, arguments.context),
                options=RunOptions(overwrite=True),
            )
            cosine = (embed(str(folder / "out"), tokenizer, texts) * original).sum(-1)
            rows.append(
                {
                    "row": row,
                    "pipeline": result.pipeline,
                    "parameters": {"before": result.parameters_before, "after": result.parameters_after},
                    "mean_cosine": float(cosine.mean()),
                    "least_cosine": float(cosine.min()),
                    "sentences": len(texts),
                    "to_reach": floor,
                    "seconds": round(result.seconds, 1),
                }
            )
    print(json.dumps({"schema": "attnopt.encoder_similarity/1", "model": arguments.model, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
