"""`python -m attention_model`: continue text with this package's model, on a GPU or, in plain torch, without one.

Token ids need nothing but torch and triton; text needs the `tokenizers` package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import model, ops  # type: ignore[attr-defined]  # model is generated
from .decoder import Decoder, end_tokens


def main() -> None:
    """Parse the command line, generate, print."""
    parser = argparse.ArgumentParser(prog="python -m attention_model", description=__doc__)
    parser.add_argument("prompt", nargs="?", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=64, help="how many at most")
    parser.add_argument("--ids", help="token ids in place of a prompt, separated by commas; prints ids")
    parser.add_argument("--device", help="default: the first GPU, or cpu")
    parser.add_argument("--kernels", default="auto", choices=("auto", "triton", "reference"))
    given = parser.parse_args()
    directory = Path(__file__).resolve().parent.parent
    ops.force(given.kernels)
    decoder = Decoder(model, directory, given.device)
    eos = end_tokens(directory)
    if given.ids is not None:
        (produced,) = decoder.greedy([[int(part) for part in given.ids.split(",")]], given.tokens, eos)
        print(",".join(map(str, produced)))
        return
    try:
        from tokenizers import Tokenizer
    except ImportError:
        parser.error("a prompt in text needs the tokenizers package (pip install tokenizers); or give --ids")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    (produced,) = decoder.greedy([tokenizer.encode(given.prompt).ids], given.tokens, eos)
    print(given.prompt + tokenizer.decode(produced))


if __name__ == "__main__":
    main()
