"""Options of passes and pipeline text: reading, writing, and what is said when they are wrong."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.errors import OptionError
from attnopt.rewriter.options import Options, build, option_specs, parse
from attnopt.rewriter.pipeline import Pipeline
from attnopt.rewriter.registry import Entry, Registry
from tests.rewriter.toys import REGISTRY, Everything, Scale

LABELS = st.text(max_size=12)
EVERYTHING = st.builds(
    Everything,
    needed=st.integers(),
    count=st.integers(-5, 99),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    flag=st.booleans(),
    label=LABELS | st.sampled_from(["none", "true", "1", "1e5", "-.5", "a b", "{}", '"', "[x]", "", "\\", "é"]),
    maybe=st.none() | LABELS | st.just("none"),
    mode=st.sampled_from(["fast", "slow", "none"]),
    items=st.lists(st.integers()).map(tuple),
    names=st.none() | st.lists(LABELS).map(tuple),
    two_words=st.integers() | st.floats(allow_nan=False, allow_infinity=False),
)
SCALES = st.builds(
    Scale,
    factor=st.floats(-8, 8),
    layers=st.just("all") | st.lists(st.integers(0, 50)).map(tuple),
)


@settings(max_examples=300)
@given(st.lists(EVERYTHING | SCALES, min_size=1, max_size=4), st.booleans())
def test_objects_to_text_and_back(items: list[Options], full: bool) -> None:
    text = ",".join(item.to_text(full=full) for item in items)
    assert [REGISTRY.make(parsed.name, parsed.options) for parsed in parse(text)] == items


@given(st.text())
def test_any_text_is_read_or_refused_by_name(text: str) -> None:
    with suppress(OptionError):
        parse(text)


def test_text_is_what_people_write() -> None:
    (scale, other) = parse(
        'scale{factor=0.5 layers=[0 2]} , everything{needed=1 label="two words" maybe=none flag=true}'
    )
    assert build(Scale, scale.options) == Scale(factor=0.5, layers=(0, 2))
    (patterns,) = parse("everything{needed=1 names=[*mlp* layers.?.norm]}")
    assert build(Everything, patterns.options).to_text() == "everything{needed=1 names=[*mlp* layers.?.norm]}"
    assert build(Everything, other.options) == Everything(needed=1, label="two words", maybe=None, flag=True)
    assert Scale().to_text() == "scale"
    assert Scale(factor=2.0).to_text() == "scale{factor=2.0}"
    assert Scale().to_text(full=True) == "scale{factor=1.5 layers=all}"
    assert Everything(needed=1, mode="none").to_text() == "everything{needed=1 mode=none}"
    assert Everything(needed=1, label="5").to_text() == "everything{needed=1 label=5}"
    assert Everything(needed=1, maybe="none", items=(1,), names=("a", "b c")).to_text() == (
        'everything{needed=1 maybe="none" items=[1] names=[a "b c"]}'
    )
    assert Everything(needed=1, two_words=2).to_text() == "everything{needed=1 two-words=2}"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "expected a name, found the end at character 1", "name{option=value"),
        ("scale,", "expected a name, found the end at character 7", "name{option=value"),
        ("scale{factor 2}", "expected '=', found '2' at character 14", "name{option=value"),
        ("scale{factor=}", "expected a value, found '}'", "name{option=value"),
        ("scale{factor=2", "expected a name, found the end", "name{option=value"),
        ("scale{factor=2}}", "unexpected '}' at character 16", "name{option=value"),
        ("scale{factor=2 factor=3}", "option factor given twice", "name{option=value"),
        ("scale{layers=[0 [1]]}", "a list within a list", "name{option=value"),
        ("scale;negate", "unexpected ';' at character 6", "name{option=value"),
        ('scale{layers="\\x"}', "bad string", "name{option=value"),
        ("scael", "there is no pass 'scael'", "did you mean scale"),
        ("zzzz", "there is no pass 'zzzz'", "there are: breaker, "),
        ("twice", "there is no pass 'twice'", "as a pipeline it is 'scale{factor=2}'"),
        ("scale{facter=2}", "scale has no option 'facter'", "did you mean factor? its options are: factor (a number"),
        ("negate{x=1}", "negate has no option 'x'", "its options are: none"),
        ("scale{factor=9}", "scale: factor=9 is not a number from -8 to 8", "factor: the factor"),
        ("scale{factor=two}", "scale: factor=two is not a number from -8 to 8", "the factor"),
        ("scale{layers=[0 -1]}", "is not a list [...] of which each is a whole number of at least 0 or all", "which"),
        ("everything", "everything needs the option needed", "needed (a whole number)"),
        ("everything{needed=1 count=1.5}", "count=1.5 is not a whole number from -5 to 99", "a count"),
        ("everything{needed=1 flag=1}", "flag=1 is not true or false", "a flag"),
        ("everything{needed=true}", "needed=true is not a whole number", "has no default"),
        ("everything{needed=1 mode=quick}", "mode=quick is not fast or slow or none", "a mode"),
        ("everything{needed=1 label=[5]}", "label=[5] is not text", "a label"),
        ('everything{needed="1"}', "needed=1 is not a whole number", "has no default"),
        ('everything{needed=1 flag="true"}', "flag=true is not true or false", "a flag"),
        ("scale{factor=1e999}", "factor=1e999 is not a number", "the factor"),
    ],
)
def test_mistakes_are_explained(text: str, message: str, hint: str) -> None:
    with pytest.raises(OptionError) as caught:
        Pipeline.parse(text, REGISTRY)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_objects_are_checked_like_text() -> None:
    with pytest.raises(OptionError, match="factor=99"):
        Scale(factor=99)
    assert Scale(factor=2).factor == 2.0
    assert isinstance(Scale(factor=2).factor, float)
    assert Scale(layers=[1, 2]).layers == (1, 2)  # type: ignore[arg-type]  # a list is taken for a tuple


def test_specs_describe_options_for_help_texts() -> None:
    specs = {spec.name: spec for spec in option_specs(Everything)}
    assert specs["two-words"].kind == "a whole number or a number"
    assert specs["names"].kind == "a list [...] of which each is text or none"
    assert specs["count"].help == "a count"
    assert specs["count"].default == 3


def test_fields_must_be_options_of_known_types() -> None:
    @dataclass(frozen=True)
    class Plain(Options):
        name: ClassVar[str] = "plain"
        x: int = 1

    with pytest.raises(TypeError, match=r"must be made with option\(\.\.\.\)"):
        Plain()


def test_a_registry_entry_must_name_the_right_class() -> None:
    registry = Registry({"other": Entry("tests.rewriter.toys:Scale", "")})
    with pytest.raises(TypeError, match="calls itself 'scale'"):
        registry.load("other")
    assert build(Scale, {"factor": 2}) == Scale(factor=2)
