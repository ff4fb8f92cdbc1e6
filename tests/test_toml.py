"""The line of every key: two readings of one text must find the same keys, however the text is written."""

import time
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from downslope.errors import BadInput
from downslope.toml import DEEPEST, LARGEST, Path, parse


def keys(value: Any, path: Path = ()) -> set[Path]:
    """The path of every key in a text's data."""
    found: set[Path] = set()
    if isinstance(value, dict):
        for key, inner in value.items():
            found |= {(*path, key)} | keys(inner, (*path, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            found |= keys(inner, (*path, place))
    return found


def agrees(text: str) -> None:
    """Every key is found, and none that is not there."""
    found = parse(text, "x.toml")
    noted = {path for path in found.lines if isinstance(path[-1], str)}
    assert noted == keys(found.data), text


TEXT = '''# a comment = 1
steps = "20 epochs" # [not] = "this"
"quoted key" = """
many = 1
[lines] \\"""
""" # three
'literal.key' = \'\'\'
x = 2 \'\'\'

[[chain]]
part = 'a'
lr = { peak = 1e-3, "steps" = [1, 2,
  # a comment in it
  3], inner = { deep = {} } }
when = 1979-05-27 07:32:00.5
[[chain]]
part = "b=]"
  [chain.lr]
  peak = +1_000.0
  end.of.it = -inf
[[chain.more]]
x = 1
[[chain.more]]
x = 2
[roles.norm]
a.b.c = true
a.b.d = false
[ roles . "bias" ]
weight_decay = 0.0
'''


def test_each_key_has_the_line_it_stands_on() -> None:
    agrees(TEXT)
    found = parse(TEXT, "x.toml")
    at = {path: found.line(path) for path in keys(found.data)}
    lines = TEXT.split("\n")
    for path, number in at.items():
        assert str(path[-1]) in lines[number - 1], path
    assert found.line(("chain", 0, "lr", "inner", "deep")) == 14
    assert (found.line(("chain", 0)), found.line(("chain", 1))) == (10, 16)
    assert found.line(("chain", 1, "more", 1, "x")) == 24
    assert found.line(("roles", "norm", "a", "b", "d")) == 27
    assert found.line(("steps", "int")) == 2  # a path that goes on where the text does not
    assert found.line(("nothing",)) == found.line(()) == 1


def test_windows_line_ends_count_once() -> None:
    agrees(TEXT.replace("\n", "\r\n"))
    assert parse(TEXT.replace("\n", "\r\n"), "x").lines == parse(TEXT, "x").lines


names = st.one_of(
    st.sampled_from(["a", "b", "c", "1", "a-b", "_"]),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=4).map(
        lambda s: '"' + s.replace("\\", "\\\\").replace('"', '\\"') + '"'
    ),
    st.text(st.sampled_from('ab#[]{}=.,"'), max_size=4).map(lambda s: f"'{s}'"),
)
dotted = st.lists(names, min_size=1, max_size=3).map(" . ".join)
scalars = st.one_of(
    st.sampled_from(["1", "-1.5e3", "true", "inf", "nan", "0x1F", "1979-05-27T07:32:00Z", "07:32:00", "1_0"]),
    st.sampled_from(
        ['""', '"""a\nb = 1\n"""', "'''\n[x]\n'''", '"\\" # ]"', "'}'", '""""x"""""', "''''x'''''"]
    ),
)
arrays_of = lambda inner: st.tuples(  # noqa: E731
    st.lists(inner, max_size=3), st.sampled_from([",", ", ", ",\n", " , # c ]\n"])
).map(lambda got: "[" + got[1].join(got[0]) + "]")
tables_of = lambda inner: st.lists(  # noqa: E731
    st.tuples(names, inner).map(" = ".join), max_size=3
).map(lambda pairs: "{ " + ", ".join(pairs) + " }")
anything = st.recursive(scalars, lambda inner: arrays_of(inner) | tables_of(inner), max_leaves=6)
lines = st.one_of(
    st.tuples(dotted, anything).map(" = ".join),
    dotted.map(lambda key: f"[{key}]"),
    dotted.map(lambda key: f"[[ {key} ]] # x"),
    st.sampled_from(["", "# [x]", "   "]),
)


@given(st.lists(lines, max_size=8).map("\n".join))
@settings(max_examples=300)
def test_both_readings_of_any_text_find_the_same_keys(text: str) -> None:
    try:
        tomllib.loads(text)
    except ValueError:
        with pytest.raises(BadInput):
            parse(text, "x.toml")
    else:
        agrees(text)


@given(st.text(st.sampled_from("ab=[]{}\"'\\\n.,# 1"), max_size=60))
@settings(max_examples=500)
def test_noise_is_read_or_refused_by_line(text: str) -> None:
    try:
        agrees(text)
    except BadInput as error:
        assert str(error).startswith("x.toml:")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = 1\nb =\n", "x.toml:2: not TOML: Invalid value"),
        ("a = 1\na = 2\n", "x.toml:2: not TOML: Cannot overwrite a value"),
        ("a = 1\n\nb = [1,", "x.toml:3: not TOML"),
        ("a = 012", "x.toml:1: not TOML"),
        ("a = on", "x.toml:1: not TOML"),
        ('a = "x', "x.toml:1: not TOML"),
        ("\ufeffa = 1", "x.toml:1: not TOML"),
        ("a = 1\nb = " + "9" * 5000, "x.toml:2: a number or key of more than 100 characters"),
        ("\n" + "[" * 20_000, "x.toml:2: nested more than 20 levels deep"),
        ("a = " + "[" * 20_000 + "]" * 20_000, "x.toml:1: nested more than 20 levels deep"),
        ("a = " + "{a=" * 20_000, "x.toml:1: nested more than 20 levels deep"),
        (".".join("a" * 20_000) + " = 1", "x.toml:1: nested more than 20 levels deep"),
        ("[" + ".".join("a" * 21) + "]", "x.toml:1: nested more than 20 levels deep"),
        ("#" * (LARGEST + 1), "x.toml:1: a file of 1000001 characters; at most 1000000 are read"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_toml_too_deep_or_too_large_is_refused_by_line(text: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(text, "x.toml")
    assert str(caught.value).startswith(said)


def test_the_deepest_that_is_allowed_is_read() -> None:
    agrees("a = " + "[" * DEEPEST + "]" * DEEPEST)
    agrees(".".join("a" * DEEPEST) + " = 1")


@pytest.mark.parametrize(
    "piece", ['"""', "'''", '\\"""', '"\\"', '"\\', "'", '"', "[", "a.", "a = 1,", '"""\\', "'''\"\"\""]
)
def test_no_text_makes_the_reader_look_twice_at_what_follows(piece: str) -> None:
    """Work that grows with the square of the size would take hours; this is no timing."""
    begun = time.monotonic()
    with pytest.raises(BadInput):
        parse("a = " + piece * (LARGEST // len(piece) - 4), "x.toml")
    assert time.monotonic() - begun < 60
