"""What comes from another process becomes a field only if it is one."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.wire import WireError, checked, listed, numbered, parse, whole

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.binary() | st.text())
def test_parsing_is_total(data: bytes | str) -> None:
    with suppress(WireError):
        assert isinstance(parse(data, "x"), dict)


@given(st.dictionaries(st.sampled_from("abcde"), JSON))
def test_checking_is_total_and_gives_what_was_asked(values: dict[str, object]) -> None:
    try:
        found = checked(values, "x", a=int, b=float, c=str, d=bool, e=str | None)
    except WireError:
        return
    assert type(found["a"]) is int
    assert type(found["b"]) in (int, float)
    assert type(found["c"]) is str
    assert type(found["d"]) is bool
    assert found["e"] is None or type(found["e"]) is str


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "x has no step"),
        ({"step": True}, "step of x is True; expected int"),
        ({"step": "1"}, "step of x is '1'; expected int"),
        ({"step": [0] * 999}, r"step of x is \[0, 0.*\.\.\.; expected int"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, object], said: str) -> None:
    with pytest.raises(WireError, match=said):
        checked(values, "x", step=int)


def test_a_field_may_be_called_as_an_argument() -> None:
    assert checked({"what": 1, "values": 2}, "x", what=int, values=int) == {"what": 1, "values": 2}


@given(JSON)
def test_lists_and_tables_are_total(value: object) -> None:
    for read in (lambda: listed(value, "x", lambda each: whole(each, "y")), lambda: numbered(value, "x")):
        with suppress(WireError):
            assert isinstance(read(), tuple | dict)
