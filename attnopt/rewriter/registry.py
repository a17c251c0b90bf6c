"""Registry: passes, analyses and methods by name. Imports nothing heavy; an item is imported when first used."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from attnopt.errors import OptionError
from attnopt.rewriter.options import build

if TYPE_CHECKING:
    from attnopt.rewriter.passes import Analysis, Item


@dataclass(frozen=True)
class Entry:
    """A line of a registry: where an item is defined, without importing it.

    Attributes:
        target: "module:Class".
        summary: one line.
    """

    target: str
    summary: str


class Registry:
    """Passes and analyses by name, imported when they are first used.

    Args:
        items: by name.
        methods: short names for pipelines, with one line each: {"mla": ("to-mla", "...")}.
    """

    def __init__(self, items: Mapping[str, Entry], methods: Mapping[str, tuple[str, str]] | None = None) -> None:
        self.items = dict(items)
        self.methods = dict(methods or {})

    def load(self, name: str) -> type[Item]:
        """The class of an item.

        Raises:
            OptionError: if there is none of that name; near names are listed.
        """
        if name not in self.items:
            near = difflib.get_close_matches(name, [*self.items, *self.methods], n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(sorted(self.items))}"
            if name in self.methods:
                hint = f"{name} is a method; as a pipeline it is {self.methods[name][0]!r}"
            raise OptionError(f"there is no pass {name!r}", hint)
        module, _, attribute = self.items[name].target.partition(":")
        cls: type[Item] = getattr(import_module(module), attribute)
        if cls.name != name:
            raise TypeError(f"{self.items[name].target} calls itself {cls.name!r}, not {name!r}")
        return cls

    def make(self, name: str, options: Mapping[str, Any]) -> Item:
        """An item with options named as in pipeline text.

        Raises:
            OptionError: if the name or an option is wrong.
        """
        item: Item = build(self.load(name), options)
        return item

    def provider(self, what: str) -> Analysis:
        """An analysis, with its default options, that provides `what`.

        Raises:
            OptionError: if none does.
        """
        from attnopt.rewriter.passes import Analysis

        for name in self.items:
            cls = self.load(name)
            if issubclass(cls, Analysis) and what in cls.provides:
                return cls()
        raise OptionError(f"nothing provides {what!r}", "put the pass that does before the one that requires it")
