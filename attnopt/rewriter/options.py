"""Options of passes: dataclass fields that are checked, and written and read as pipeline text.

    to-mla{kv-keep=0.5 rope-dim=48},share

A pass is a name in kebab case, with options in braces; a value is a number, true, false, none, a bare word, a string in
double quotes, or a list in brackets with spaces between its items. Options at their default may be left out.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attnopt.errors import OptionError

#: Names, numbers, paths, and shell patterns of names.
_WORD = r"[A-Za-z0-9_./:+*?-]+"
_BARE = re.compile(_WORD)
_TOKEN = re.compile(rf'\s*(?:(?P<word>{_WORD})|(?P<text>"(?:[^"\\]|\\.)*")|(?P<mark>[{{}}\[\]=,]))')


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field that is an option of a pass.

    Args:
        default: its default; without one the option must be given.
        help: one line for `--help`.
        minimum, maximum: smallest and largest legal number.
    """
    return dataclasses.field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True)
class OptionSpec:
    """One option, for help texts and command-line parsers.

    Attributes:
        name: in kebab case.
        field: the dataclass field.
        type: the annotation.
        kind: the legal values in words, e.g. "a number from 0 to 1".
        default: its default, or `dataclasses.MISSING`.
        help: one line.
    """

    name: str
    field: str
    type: Any
    kind: str
    default: Any
    help: str


class Options:
    """Base of frozen dataclasses whose fields are options. Fields must be made with `option`.

    Constructing one checks every value.

    Raises:
        OptionError: for a value of the wrong type or out of range.
    """

    name: typing.ClassVar[str]

    def __post_init__(self) -> None:
        for spec in option_specs(type(self)):
            field = _fields(type(self))[spec.field]
            object.__setattr__(self, spec.field, _checked(getattr(self, spec.field), spec, field.metadata, self.name))

    def to_text(self, *, full: bool = False) -> str:
        """Pipeline text of this pass; `full` writes the options at their default too."""
        parts = []
        for spec in option_specs(type(self)):
            value = getattr(self, spec.field)
            if full or spec.default is dataclasses.MISSING or value != spec.default:
                parts.append(f"{spec.name}={_format(value, spec.type)}")
        return self.name + (f"{{{' '.join(parts)}}}" if parts else "")


def _fields(cls: type) -> Mapping[str, Any]:
    return {field.name: field for field in dataclasses.fields(cls)}


def option_specs(cls: type[Options]) -> tuple[OptionSpec, ...]:
    """The options of a pass class, in order."""
    hints = typing.get_type_hints(cls)
    specs = []
    for field in _fields(cls).values():
        if "help" not in field.metadata:
            raise TypeError(f"{cls.__name__}.{field.name} must be made with option(...)")
        kind = _in_words(hints[field.name], field.metadata)
        help_text = field.metadata["help"]
        specs.append(
            OptionSpec(field.name.replace("_", "-"), field.name, hints[field.name], kind, field.default, help_text)
        )
    return tuple(specs)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _in_words(kind: Any, limits: Mapping[str, Any]) -> str:
    words = []
    for choice in _alternatives(kind):
        origin, args = typing.get_origin(choice), typing.get_args(choice)
        if choice is type(None):
            words.append("none")
        elif origin is Literal:
            words.append(" or ".join(str(a) for a in args))
        elif origin is tuple and len(args) == 2 and args[1] is Ellipsis:
            words.append(f"a list [...] of which each is {_in_words(args[0], limits)}")
        elif choice in (int, float):
            words.append(("a whole number" if choice is int else "a number") + _range(limits))
        elif choice is bool:
            words.append("true or false")
        elif choice is str:
            words.append("text")
        else:
            raise TypeError(f"options cannot be of type {choice!r}")
    return " or ".join(words)


def _range(limits: Mapping[str, Any]) -> str:
    low, high = limits.get("minimum"), limits.get("maximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    return f" of at least {low}" if low is not None else f" of at most {high}" if high is not None else ""


class Bare(str):
    """A word without quotes in pipeline text. What it stands for depends on the option: a number, true, none, text."""

    __slots__ = ()


def _checked(value: Any, spec: OptionSpec, limits: Mapping[str, Any], owner: str) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    result = _fit(value, spec.type, limits)
    if result is _NO:
        shown = f"[{' '.join(map(str, value))}]" if isinstance(value, tuple) else value
        raise OptionError(f"{owner}: {spec.name}={shown} is not {spec.kind}", f"{spec.name}: {spec.help}")
    return result


_NO = object()


def _fit(value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    """The value as one of type `kind`, or _NO. Text is the last thing a bare word is taken for."""
    choices = sorted(_alternatives(kind), key=lambda choice: choice is str)
    fitted = (_fit_one(value, choice, limits) for choice in choices)
    return next((result for result in fitted if result is not _NO), _NO)


def _fit_one(value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return next((a for a in args if _fit_plain(value, type(a)) == a), _NO)
    if origin is tuple:
        if not isinstance(value, tuple):
            return _NO
        items = tuple(_fit(item, args[0], limits) for item in value)
        return _NO if _NO in items else items
    result = _fit_plain(value, kind)
    if result is not _NO and kind in (int, float):
        low, high = limits.get("minimum"), limits.get("maximum")
        legal = math.isfinite(result) and (low is None or result >= low) and (high is None or result <= high)
        return result if legal else _NO
    return result


_WORDS = {"none": None, "true": True, "false": False}
_NUMBERS = {int: re.compile(r"[+-]?\d{1,1000}"), float: re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")}


def _fit_plain(value: Any, kind: Any) -> Any:
    """The value as one of a plain type, or _NO. Whole numbers pass as numbers; nothing else is converted."""
    if isinstance(value, Bare):
        if kind in (bool, type(None)):
            value = _WORDS.get(value, _NO)
        elif kind in _NUMBERS:
            value = kind(value) if _NUMBERS[kind].fullmatch(value) else _NO
        else:
            value = str(value)
    if kind is float and type(value) is int:
        return float(value)
    return value if type(value) is kind else _NO


def _format(value: Any, kind: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        (item,) = (typing.get_args(c)[0] for c in _alternatives(kind) if typing.get_origin(c) is tuple)
        return f"[{' '.join(_format(v, item) for v in value)}]"
    if _BARE.fullmatch(value) and _fit(Bare(value), kind, {}) == value:
        return value
    return json.dumps(value)


@dataclass(frozen=True)
class ParsedPass:
    """A pass as written: its name, and its options by their names; values are `Bare`, text, or tuples of these."""

    name: str
    options: dict[str, Any]


def parse(text: str) -> list[ParsedPass]:
    """Read pipeline text, without knowing the passes.

    Raises:
        OptionError: where the text is not of the form given at the top of this module.
    """
    return _Reader(text).pipeline()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        place = 0
        while text[place:].strip():
            match = _TOKEN.match(text, place)
            if match is None:
                place += len(text[place:]) - len(text[place:].lstrip())
                raise self.error(place, f"unexpected {text[place]!r}")
            kind = match.lastgroup or ""
            self.tokens.append((kind, match.group(kind), match.start(kind)))
            place = match.end()
        self.tokens.append(("end", "", len(text)))
        self.next = 0

    def error(self, place: int, what: str) -> OptionError:
        return OptionError(
            f"pipeline text: {what} at character {place + 1} of {self.text!r}",
            "write passes as name{option=value option=value}, with commas between passes; other signs than letters, "
            "digits and _./:+*?- go between double quotes",
        )

    def take(self, kind: str, mark: str = "") -> str:
        found, text, place = self.tokens[self.next]
        if found != kind or (mark and text != mark):
            wanted = repr(mark) if mark else "a name"
            raise self.error(place, f"expected {wanted}, found {repr(text) if text else 'the end'}")
        self.next += 1
        return text

    def at(self, mark: str) -> bool:
        return self.tokens[self.next][:2] == ("mark", mark)

    def pipeline(self) -> list[ParsedPass]:
        result = [self.one_pass()]
        while self.at(","):
            self.take("mark", ",")
            result.append(self.one_pass())
        _, text, place = self.tokens[self.next]
        if text:
            raise self.error(place, f"unexpected {text!r}")
        return result

    def one_pass(self) -> ParsedPass:
        name = self.take("word")
        options: dict[str, Any] = {}
        if self.at("{"):
            self.take("mark", "{")
            while not self.at("}"):
                place = self.tokens[self.next][2]
                key = self.take("word")
                if key in options:
                    raise self.error(place, f"option {key} given twice")
                self.take("mark", "=")
                options[key] = self.value()
            self.take("mark", "}")
        return ParsedPass(name, options)

    def value(self) -> Any:
        kind, text, place = self.tokens[self.next]
        if kind == "word":
            self.next += 1
            return Bare(text)
        if kind == "text":
            self.next += 1
            try:
                return json.loads(text)
            except ValueError as error:
                raise self.error(place, f"bad string {text}") from error
        if self.at("["):
            self.take("mark", "[")
            items = []
            while not self.at("]"):
                if self.at("["):
                    raise self.error(self.tokens[self.next][2], "a list within a list")
                items.append(self.value())
            self.take("mark", "]")
            return tuple(items)
        raise self.error(place, f"expected a value, found {repr(text) if text else 'the end'}")


def build(cls: type[Any], options: Mapping[str, Any]) -> Any:
    """Make a pass from options named as in pipeline text.

    Raises:
        OptionError: for an unknown, missing or illegal option.
    """
    specs = {spec.name: spec for spec in option_specs(cls)}
    known = ", ".join(f"{spec.name} ({spec.kind})" for spec in specs.values()) or "none"
    for key in options:
        if key not in specs:
            near = difflib.get_close_matches(key, list(specs), n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise OptionError(f"{cls.name} has no option {key!r}", f"{guess}its options are: {known}")
    missing = [s.name for s in specs.values() if s.default is dataclasses.MISSING and s.name not in options]
    if missing:
        raise OptionError(f"{cls.name} needs the option {missing[0]}", f"its options are: {known}")
    return cls(**{specs[key].field: value for key, value in options.items()})
