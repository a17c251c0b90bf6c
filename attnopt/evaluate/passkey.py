"""Prompts for passkey retrieval: a number in the middle of plain English, asked for at the end. No torch.

The test is that of Mohtashami and Jaggi 2023 (arXiv 2305.16300); the text around the number is not one phrase again and
again but sentences put together at random, so that no two lines are alike and nothing but the number stands out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from attnopt.errors import OptionError, UnsupportedError
from attnopt.evaluate.job import PasskeySpec

_INTRODUCTION = (
    "A pass key is hidden in the text below. Find it and remember it, you will be asked for it at the end.\n\n"
)
_TOLD = "The pass key is {key}. Remember it: {key} is the pass key."
_QUESTION = "\n\nWhat is the pass key? The pass key is"

_WHO = (
    "the baker", "an old farmer", "our neighbour", "the teacher", "a young doctor", "the postman", "my grandmother",
    "the gardener", "a tired sailor", "the librarian", "her brother", "the night guard", "a painter", "the shepherd",
)  # fmt: skip
_DID = (
    "walked slowly to", "waited all day near", "told a long story about", "drew a small picture of", "often thought of",
    "took the early bus to", "wrote a letter about", "was never seen again at", "found a good place by", "cleaned up",
    "had always wanted to visit", "looked for a friend in", "sang a quiet song about", "left an umbrella at",
)  # fmt: skip
_WHAT = (
    "the market", "the river", "the old stone bridge", "a village in the hills", "the railway station", "the garden",
    "the harbour", "a house with green doors", "the school yard", "the empty theatre", "the apple orchard", "the lake",
    "the town hall", "a narrow street",
)  # fmt: skip
_WHEN = (
    "before the rain came", "on a warm evening", "while the children were asleep", "after the first snow", "in spring",
    "when the bells rang", "as the sun went down", "without saying a word", "for the second time", "last winter",
    "with a basket of bread", "because there was nothing else to do", "at the end of the week", "early in the morning",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        length: the length it was made for, in tokens; prompt and answer have at most that.
        depth: where the number is told, as a fraction of the text before the question.
        key: the number, as digits.
        ids: tokens of the prompt.
        answer: tokens that are to follow.
    """

    length: int
    depth: float
    key: str
    ids: tuple[int, ...]
    answer: tuple[int, ...]


def prompts_of(spec: PasskeySpec, tokenizer: Any) -> list[Prompt]:
    """All prompts of a test, by length, depth and trial; the same for the same spec and tokenizer.

    Raises:
        OptionError: a length has no room for the number and the question.
        UnsupportedError: the tokenizer has no digits.
    """
    made = []
    for length in spec.lengths:
        for depth in spec.depths:
            for trial in range(spec.trials):
                # A string seeds the same on every machine; a tuple's hash would not.
                source = random.Random(f"{spec.seed}/{length}/{depth}/{trial}")
                made.append(_prompt(length, depth, spec.digits, source, tokenizer))
    return made


def _prompt(length: int, depth: float, digits: int, source: random.Random, tokenizer: Any) -> Prompt:
    key = str(source.randrange(10 ** (digits - 1), 10**digits))

    def encoded(sentences: list[str]) -> tuple[list[int], list[int]]:
        return _encode(_text(sentences, depth, key), key, tokenizer)

    prompt, answer = encoded([])
    room = length - len(prompt) - len(answer)
    filler: list[str] = []
    while room > 0:  # by the lengths of single sentences, which together may differ by a few tokens
        filler.append(_sentence(source))
        room -= max(1, len(tokenizer(f" {filler[-1]}", add_special_tokens=False)["input_ids"]))
    prompt, answer = encoded(filler)
    while filler and len(prompt) + len(answer) > length:
        filler.pop()
        prompt, answer = encoded(filler)
    least = len(prompt) + len(answer)
    if least > length:
        raise OptionError(
            f"a passkey prompt of {length} tokens has no room for the question", f"use at least {least} tokens, or 512"
        )
    if key not in tokenizer.decode(answer).replace(" ", ""):
        raise UnsupportedError("the model's tokenizer cannot write numbers", "leave --passkey out")
    return Prompt(length, depth, key, tuple(prompt), tuple(answer))


def _sentence(source: random.Random) -> str:
    words = f"{source.choice(_WHO)} {source.choice(_DID)} {source.choice(_WHAT)} {source.choice(_WHEN)}."
    return words[0].upper() + words[1:]


def _text(filler: list[str], depth: float, key: str) -> str:
    place = round(depth * len(filler))
    return _INTRODUCTION + " ".join([*filler[:place], _TOLD.format(key=key), *filler[place:]]) + _QUESTION


def _encode(text: str, key: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of the key after it.

    Both are tokenised together, and parted where the prompt's own tokens end or, if the tokenizer joins across the
    border, before it. A tokenizer that puts a token of its own before every text gets it.
    """
    whole = list(tokenizer(f"{text} {key}", add_special_tokens=False, verbose=False)["input_ids"])
    prompt = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    common = next((i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), len(prompt))
    start = getattr(tokenizer, "bos_token_id", None)
    leads = start is not None and tokenizer("a")["input_ids"][:1] == [start]
    return [start] * leads + whole[:common], whole[common:]
