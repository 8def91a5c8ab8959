"""What a run has forgotten is told once and stays so; and no window of it is missed, wherever it lies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.wire import WireError
from recovery import windows
from recovery.forgotten import (
    FORGOTTEN,
    ForgottenError,
    ForgottenRow,
    add_forgotten,
    forgotten_digests,
    read_forgotten,
)
from recovery.generation import raise_generation
from recovery.windows import Windows, forgotten_windows, token_windows, windows_of, word_windows, words

SALT = bytes(range(16))
ROWS = (ForgottenRow("7", "ab" * 16), ForgottenRow("x", "cd" * 16))

SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=8)


def arrays(sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [np.array(each, np.uint16) for each in sequences]


def plain(sequences: Sequence[Sequence[int]], size: int) -> set[tuple[int, ...]]:
    return {tuple(each[at : at + size]) for each in sequences for at in range(len(each) - size + 1)}


# ---- windows ----


@given(SEQUENCES, SEQUENCES, st.lists(st.integers(0, 2), max_size=60), st.integers(1, 5), st.sampled_from([4, 1 << 20]))
def test_the_windows_are_those_that_a_plain_search_finds(
    wanted: list[list[int]], kept: list[list[int]], text: list[int], size: int, piece: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_PIECE", piece)
        found = windows_of("tokens", size, arrays(wanted), arrays(kept))
        left = plain(wanted, size) - plain(kept, size)
        assert len(found.hashes) == len(left)
        expected = [at for at in range(len(text) - size + 1) if tuple(text[at : at + size]) in left]
        assert found.search(np.array(text, np.uint32)).tolist() == expected
        again = Windows.from_json(json.loads(json.dumps(found.as_json())))
        assert again.search(np.array(text, np.uint16)).tolist() == expected
        assert again.as_json() == found.as_json()


@given(SEQUENCES, st.integers(1, 5))
def test_every_window_is_hashed_once(sequences: list[list[int]], size: int) -> None:
    hashes = token_windows(arrays(sequences), SALT, size)
    assert len(hashes) == len(plain(sequences, size))
    assert (np.diff(hashes.astype(object)) > 0).all()


def test_a_salt_changes_every_hash() -> None:
    tokens = [np.arange(50)]
    assert not set(token_windows(tokens, SALT)) & set(token_windows(tokens, SALT[::-1]))
    first, second = windows_of("tokens", 8, tokens), windows_of("tokens", 8, tokens)
    assert first.salt != second.salt
    assert not set(first.hashes) & set(second.hashes)


def test_planted_answers_are_found_among_a_million_tokens() -> None:
    draw = np.random.default_rng(0)
    answers = [draw.integers(0, 50_000, 40) for _ in range(100)]
    kept = draw.integers(0, 50_000, 1_000_000)
    found = windows_of("tokens", 8, answers, [kept])
    assert len(found.hashes) == 100 * 33
    assert len(found.search(kept)) == 0
    places = draw.permutation(9_000)[:100] * 100
    for place, answer in zip(places, answers):
        kept[place : place + 40] = answer
    assert found.search(kept.astype(np.uint16)).tolist() == sorted(p + n for p in places for n in range(33))


def test_words_are_the_same_however_they_are_written() -> None:
    said = words("Fräulein O'Neil said: \"It's 12.50!\"\n  (twice)")
    assert words("fra\u0308ulein o neil SAID it s 12 50 twice").tolist() == said.tolist()
    assert words("Its 12_a").tolist() == words("Its 12_a é").tolist()[:2]
    assert len(words("東京は大きい")) == 6
    assert len(words(" ...!? ")) == 0
    assert words("one two").tolist() != words("two one").tolist()


def test_windows_of_answers_leave_out_what_others_say_too() -> None:
    forgotten = ["The author was born in Lima on a cold and rainy day"]
    kept = ["Her sister was born in Lima on a warm day", "short"]
    tokens, found = forgotten_windows([np.arange(12)], [np.arange(3, 40)], forgotten, kept)
    assert (tokens.of, tokens.size, len(tokens.hashes)) == ("tokens", 8, 3)
    assert (found.of, found.size) == ("words", 6)
    assert found.search(words(kept[0])).tolist() == []
    assert found.search(words("so: " + forgotten[0].upper())).tolist() == [1, 2, 4, 5, 6, 7]
    assert len(word_windows(forgotten, SALT)) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of": "lines"}, "windows are 8 lines"),
        ({"size": 0}, "windows are 0 tokens"),
        ({"bits": 60}, "of 60 bits"),
        ({"salt": "ab"}, "a salt of 1 bytes"),
        ({"hashes": "!"}, "cannot be read"),
        ({"marks": "AAAA/w=="}, "larger marks"),
        ({"marks": 3}, "marks of windows is 3"),
    ],
)
def test_windows_that_are_none_are_refused(change: dict[str, object], message: str) -> None:
    good = windows_of("tokens", 8, [np.arange(9)]).as_json()
    with pytest.raises(WireError, match=message):
        Windows.from_json({**good, **change})


# ---- forgotten.json ----


def test_what_is_told_is_true_once_the_generation_is_reached(tmp_path: Path) -> None:
    assert read_forgotten(tmp_path) == ()
    found = windows_of("tokens", 8, [np.arange(20)])
    add_forgotten(tmp_path, 1, ROWS, [found])
    assert forgotten_digests(tmp_path) == frozenset()
    raise_generation(tmp_path, 1)
    (request,) = read_forgotten(tmp_path)
    assert (request.generation, request.rows) == (1, ROWS)
    assert [each.as_json() for each in request.windows] == [found.as_json()]
    assert forgotten_digests(tmp_path) == {"ab" * 16, "cd" * 16}


def test_to_tell_the_same_again_changes_nothing(tmp_path: Path) -> None:
    raise_generation(tmp_path, 1)
    add_forgotten(tmp_path, 1, ROWS, [windows_of("tokens", 8, [np.arange(20)])])
    before = (tmp_path / FORGOTTEN).read_bytes()
    add_forgotten(tmp_path, 1, ROWS[::-1], [windows_of("tokens", 8, [np.arange(20)])])
    assert (tmp_path / FORGOTTEN).read_bytes() == before
    with pytest.raises(ForgottenError, match=r"generation 1 has forgotten 2 rows, the first '7'; asked is to say 1 ro"):
        add_forgotten(tmp_path, 1, ROWS[:1], [])
    assert (tmp_path / FORGOTTEN).read_bytes() == before
    add_forgotten(tmp_path, 2, ROWS[:1], [])
    raise_generation(tmp_path, 2)
    assert [request.generation for request in read_forgotten(tmp_path)] == [1, 2]


def test_a_request_that_was_not_committed_is_replaced(tmp_path: Path) -> None:
    add_forgotten(tmp_path, 1, ROWS, [])
    add_forgotten(tmp_path, 1, ROWS[1:], [])
    raise_generation(tmp_path, 1)
    assert forgotten_digests(tmp_path) == {"cd" * 16}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"requests": [1]}', '{"requests": [{"generation": 0, "rows": [], "windows": []}]}',
             '{"requests": [{"generation": 1, "rows": [{"id": 3, "digest": ""}], "windows": []}]}'],
)  # fmt: skip
def test_what_cannot_be_read_is_not_taken_for_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / FORGOTTEN).write_text(text)
    for ask in (read_forgotten, forgotten_digests, lambda run: add_forgotten(run, 1, ROWS, [])):
        with pytest.raises(ForgottenError, match="nobody knows what is forgotten"):
            ask(tmp_path)


def test_a_generation_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForgottenError, match="in generation 0; allowed: 1 or more"):
        add_forgotten(tmp_path, 0, ROWS, [])
