"""Plain text of 89 Wikipedia articles, to distil on beside WikiText (`recovery.py --learn-from`).

    pip install gensim
    python benchmarks/wikipedia_text.py --not-in wiki.valid.txt > wikipedia.txt

gensim ships an excerpt of a dump of the English Wikipedia (CC BY-SA) with its tests, and takes the markup out. Articles
that share a run of words with --not-in are left out, so that nothing judged on can be learned from. Headings are set
as WikiText sets them; lists and what is left of tables are dropped. What was kept goes to stderr, as JSON.
"""

from __future__ import annotations

import argparse
import bz2
import json
import re
import sys
from pathlib import Path

from judging import plain

EXCERPT = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
#: Words that two texts of different origin hardly ever have in a row.
RUN = 12
#: Characters: shorter lines are of lists and tables, shorter articles redirect or say what a word can mean.
SHORTEST_LINE, SHORTEST_ARTICLE = 80, 2000


def runs(text: str) -> set[tuple[str, ...]]:
    """All runs of words of a text, whatever stands between them."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def prose(article: str) -> str:
    """Paragraphs and headings of an article whose markup is out, but for headings and quotes of emphasis."""
    lines: list[str] = []
    section: list[str] = []  # the heading of a section whose prose is still to come
    for line in article.splitlines():
        line = " ".join(re.sub(r"'{2,}", "", line).split())
        heading = re.fullmatch(r"(=+) *(.*?) *\1", line)
        if heading:
            section = [f"= {heading[2]} ="]
        elif len(line) >= SHORTEST_LINE and line[0] not in "*#:;|!{":
            lines += [*section, line]
            section = []
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--not-in", type=Path, required=True, help="a WikiText file that is judged on")
    arguments = options.parse_args()
    try:
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki
        from gensim.test.utils import datapath
    except ImportError as missing:
        sys.exit(f"{missing}; pip install gensim")
    judged = runs(plain(arguments.not_in.read_text(encoding="utf-8")))
    kept: list[str] = []
    left_out: list[str] = []
    with bz2.open(datapath(EXCERPT)) as dump:
        for title, markup, _ in extract_pages(dump, ("0",)):
            text = prose(filter_wiki(markup))
            if len(text) < SHORTEST_ARTICLE:
                continue
            if runs(text) & judged:
                left_out.append(title)
            else:
                kept.append(f"= {title} =\n{text}\n")
    print("\n".join(kept))
    found = {"articles": len(kept), "characters": sum(map(len, kept)), "left_out": left_out}
    print(json.dumps(found), file=sys.stderr)


if __name__ == "__main__":
    main()
