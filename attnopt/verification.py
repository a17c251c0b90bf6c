"""What `verify` returns: a written model next to its original, as data and as tables. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Verification:
    """A written model next to its original.

    Attributes:
        document: `attnopt.verify/1`, as `evaluate.verify_report` makes it.
    """

    document: Mapping[str, Any]

    @property
    def exit_code(self) -> int:
        """3 if a gate was asked for and is missed, else 0."""
        return 0 if self.document.get("gate", {}).get("passed", True) else 3

    def to_json(self) -> dict[str, Any]:
        """The document `attnopt.verify/1`."""
        return dict(self.document)

    def view(self, *, quiet: bool) -> RenderableType:
        """A table for everything measured, the cache, and the gates; only the worst ratio of the texts if quiet."""
        from rich.console import Group

        if quiet:
            return f"{max(text['perplexity']['ratio'] for text in self.document['texts']):.4f}"
        lines: list[RenderableType] = [_texts(self.document["texts"])]
        lines += [part for text in self.document.get("long_context", ()) for part in _positions(text)]
        if "passkey" in self.document:
            lines += ["", _passkey(self.document["passkey"])]
        if "tasks" in self.document:
            lines += ["", _tasks(self.document["tasks"], self.document["lm_eval_version"])]
        if len(lines) > 1:
            lines.append("")
        lines += [
            _cache(self.document),
            f"reloaded in a fresh process as {self.document['reloaded_as']}",
            *_gates(self.document.get("gate")),
        ]
        return Group(*lines)


def _quality(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['perplexity']['original']:.3f}",
        f"{row['perplexity']['converted']:.3f}",
        f"{row['perplexity']['ratio']:.4f}",
        f"{row['kl']:.4f}",
        f"{row['top1_agreement']:.1%}",
    ]


_QUALITY = ("original", "converted", "ratio", "KL (nats)", "same top word")


def _texts(texts: Sequence[Mapping[str, Any]]) -> RenderableType:
    from attnopt.render import table

    rows = [[text["file"], f"{text['windows']} x {text['window']}", *_quality(text)] for text in texts]
    return table("perplexity", ("text", "windows", *_QUALITY), rows, numbers=range(1, 7))


def _positions(text: Mapping[str, Any]) -> Iterator[RenderableType]:
    from attnopt.render import gigabytes, percent, table

    yield ""
    rows = [[f"{b['from']:,}-{b['to']:,}", f"{b['tokens']:,}", *_quality(b)] for b in text["buckets"]]
    title = f"perplexity by position: {text['file']}, {text['windows']} x {text['window']:,}"
    yield table(title, ("position", "tokens", *_QUALITY), rows, numbers=range(1, 7))
    before, after = text["cache_bytes"]["original"], text["cache_bytes"]["converted"]
    yield (
        f"cache after {text['window']:,} tokens: {gigabytes(before)} -> {gigabytes(after)} ({percent(after, before)})"
    )


def _passkey(passkey: Mapping[str, Any]) -> RenderableType:
    """A row per length: both accuracies at every depth, and over all of them."""
    from attnopt.render import table

    depths = list(dict.fromkeys(cell["depth"] for cell in passkey["cells"]))
    cells = {(cell["length"], cell["depth"]): cell for cell in passkey["cells"]}

    def both(accuracy: Mapping[str, float]) -> str:
        return f"{accuracy['original']:.0%} {accuracy['converted']:.0%}"

    rows = [
        [
            f"{row['length']:,}",
            *(both(cells[row["length"], depth]["accuracy"]) for depth in depths),
            both(row["accuracy"]),
            f"{row['nll']['original']:.3f} {row['nll']['converted']:.3f}",
        ]
        for row in passkey["lengths"]
    ]
    columns = ("tokens", *(f"depth {depth:.0%}" for depth in depths), "all", "loss (nats)")
    title = f"passkey retrieval, original and converted: {passkey['digits']} digits, {passkey['trials']} prompts each"
    return table(title, columns, rows, numbers=range(len(columns)))


def _tasks(tasks: Sequence[Mapping[str, Any]], version: str) -> RenderableType:
    from attnopt.render import table

    def value(number: float, error: float | None) -> str:
        return f"{number:.4f}" if error is None else f"{number:.4f} ± {error:.4f}"

    rows = [
        [
            row["task"],
            row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}",
            "-" if row["examples"] is None else f"{row['examples']:,}",
            value(row["original"], row["standard_error"]["original"]),
            value(row["converted"], row["standard_error"]["converted"]),
            f"{row['difference']:+.4f}",
        ]
        for row in tasks
    ]
    columns = ("task", "metric", "examples", "original", "converted", "difference")
    return table(f"lm-eval {version}", columns, rows, numbers=(2, 3, 4, 5))


def _cache(document: Mapping[str, Any]) -> str:
    from attnopt.render import percent

    cached = document["cached_numbers_per_token"]
    before, after = cached["original"], cached["converted"]
    return (
        f"cached numbers per token, counted on the running model: {before:,} -> {after:,} ({percent(after, before)}); "
        f"at 16 bits {2 * before:,} -> {2 * after:,} bytes"
    )


def _gates(gate: Mapping[str, Any] | None) -> Iterator[str]:
    """One line per thing judged."""
    for check in gate["checks"] if gate else ():
        verdict = "passed" if check["passed"] else "missed"
        if check["of"] == "passkey":
            skipped = ", ".join(f"{length:,}" for length in check["not_judged"])
            note = f" (not judged at {skipped} tokens, where the original finds nothing)" if skipped else ""
            yield f"passkey gate {check['limit']:g} {verdict}: {check['worst']:.1%} of the original's accuracy{note}"
        else:
            yield f"gate {check['limit']:g} {verdict}: the worst {_RATIOS[check['of']]} is {check['worst']:.4f}"


_RATIOS = {"perplexity": "ratio", "perplexity by position": "ratio by position"}
