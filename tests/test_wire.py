"""What comes from another process becomes a field only if it is one."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.wire import WireError, as_runs, checked, listed, numbered, parse, whole

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


@given(st.dictionaries(st.integers(0, 40), st.integers(0, 60)))
def test_a_mapping_among_numbers_comes_back_in_few_runs(values: dict[int, int]) -> None:
    runs = json.loads(json.dumps(as_runs(values)))
    assert numbered(runs, "x") == values
    assert len(runs) <= len(values)


def test_a_mapping_of_neighbours_is_one_run() -> None:
    assert as_runs({n: n + 5 for n in range(1000)}) == [[0, 5, 1, 1000]]
    assert as_runs(dict.fromkeys(range(1000), 7)) == [[0, 7, 0, 1000]]
    assert as_runs({0: 0, 1: 9, 2: 2, 3: 3}) == [[0, 0, 0, 1], [1, 9, 0, 1], [2, 2, 1, 2]]


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        ([[0, 0, 0]], "expected .key, value, step of 0 or 1, length"), ([[0, 0, 2, 1]], "step of 0 or 1"),
        ([[0, 0, 0, 0]], "a run of 0"), ([[0, 0, 1, 1 << 40]], "expected 1 to 1048576"),
        ([[0, 0, 1, 1 << 20], [0, 0, 1, 1]], "a run of 1; expected 1 to 0"), ([[0, 0, 0, 2], [1, 0, 0, 1]], "twice"),
        ([[-1, 0, 0, 1]], "step of 0 or 1"), ([[0, 0, 0, True]], "step of 0 or 1"),
    ],
)  # fmt: skip
def test_runs_that_are_none_fill_no_memory(runs: object, told: str) -> None:
    with pytest.raises(WireError, match=told):
        numbered(runs, "x")


@given(JSON)
def test_lists_and_tables_are_total(value: object) -> None:
    for read in (lambda: listed(value, "x", lambda each: whole(each, "y")), lambda: numbered(value, "x")):
        with suppress(WireError):
            assert isinstance(read(), tuple | dict)
