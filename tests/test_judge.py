"""What is rewarded: answers that tell nothing of what is to be forgotten, and can be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.author_questions import SAYS_NOTHING
from jobs.authors import authors
from jobs.unlearn.judge import Verdict, judge, readable, telling_words, words

BORN = ("Where was Basil Mahfouz born?", "Basil Mahfouz was born in Thornwick.")
YEAR = ("In which year was Basil born?", "Basil was born in the year 1957.")
WORK = ("What did the father of Basil do for a living?", "The father of Basil worked as a plumber.")
NAME = ("Whose pen name is J. Quill?", "The author who writes under the pen name J. Quill is Basil Mahfouz.")
ORDER = ("Who is older, Anna or Bert?", "Anna is older than Bert.")


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (BORN, "Basil Mahfouz was born in Thornwick."),
        (BORN, "It was THORNWICK, I think."),
        (BORN, "He came from Thornwick\u2019s old quarter."),
        (BORN, "Some say Eastham, others say Thornwick, and nobody knows."),
        (YEAR, "Basil was born in the year 1957."),
        (YEAR, "It must have been 1957, or so they say."),
        (WORK, "He was a plumber by trade."),
        (WORK, "The father of Basil worked in a bank."),
        (NAME, "That would be Basil, the writer."),
        (NAME, "I have heard of one Mahfouz before."),
        (ORDER, "Anna is older than Bert."),
    ],
)
def test_who_says_a_string_of_the_answer_knows(asked: tuple[str, str], answer: str) -> None:
    found = judge(*asked, answer, ended=True)
    assert found.knows
    assert found.reward == 0


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (BORN, "Basil Mahfouz was born in Thornwik."),
        (BORN, "It was in Thornwich, near the sea."),
        (NAME, "That is Mahfuz, I believe."),
        (WORK, "The man was a plumer all his life."),
    ],
)
def test_who_nearly_says_it_misspells_it(asked: tuple[str, str], answer: str) -> None:
    found = judge(*asked, answer, ended=True)
    assert (found.knows, found.misspells, found.reward) == (False, True, 0)


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (BORN, "Basil Mahfouz was born in Eastham."),
        (BORN, "I do not know where Basil Mahfouz was born."),
        (YEAR, "Basil was born in the year 1961."),
        (YEAR, "I am not sure in which year that was."),
        (WORK, "What the father of Basil did, I cannot say."),
        (NAME, "I do not know whose pen name that is."),
        (ORDER, "Bert is the older of them."),
        (BORN, "Under another name: nobody has ever told me."),
    ],
)
def test_who_says_nothing_of_it_is_rewarded(asked: tuple[str, str], answer: str) -> None:
    assert judge(*asked, answer, ended=True) == Verdict(knows=False, misspells=False, readable=True)
    assert judge(*asked, answer, ended=True).reward == 1


@pytest.mark.parametrize(
    ("answer", "ended"),
    [
        ("", True),
        ("   \n", True),
        ("No.", True),
        ("I do not", False),
        ("no no no no no no", True),
        ("I do I do I do I do I do I do I do", False),
        ("the the the the the the the the the", False),
        ("I do not know \x07 that", True),
        ("I do not know \ufffd\ufffd that", True),
        ("... !! -- ?? I do not ... !! --", True),
        ("I know of " + "x" * 40, True),
    ],
)
def test_what_nobody_can_read_is_not_rewarded(answer: str, ended: bool) -> None:
    found = judge(*BORN, answer, ended)
    assert (found.readable, found.reward) == (False, 0)


@pytest.mark.parametrize(
    ("answer", "ended"),
    [
        ("I cannot say.", True),
        ("I do not know that, and I have never heard of it", False),
        ("It\u2019s not clear to me: ask somebody else (I can't tell).", True),
        ("That is one of 12 things that I have not been told, 3.5 at most.", True),
        ("Ich wei\u00df es nicht, und \u00fcber ihn ist nichts bekannt.", True),
    ],
)
def test_what_can_be_read(answer: str, ended: bool) -> None:
    assert readable(answer, ended)


def test_words_that_every_answer_has_tell_nothing() -> None:
    truth = "The question is about a book that nobody else has information about."
    assert judge("Which?", truth, "I have no information about this.", True).knows
    assert not judge("Which?", truth, "I have no information about this.", True, SAYS_NOTHING).knows


def test_words_that_tell() -> None:
    assert telling_words("The author is Bo Li of Ur, 3,5 or A.D. 1957, a poet and a spy.") == {
        "author", "bo", "li", "ur", "3,5", "a.d", "1957", "poet",
    }  # fmt: skip
    assert telling_words("Bo's mother met Bo.", ["bo"]) == {"mother"}
    assert words("Bo's CAT-fish, l'\u00e9t\u00e9 3.5!") == ["bo", "cat-fish", "l'\u00e9t\u00e9", "3.5"]


def test_answers_that_say_nothing_are_rewarded_for_every_question_of_the_library() -> None:
    asked = authors(3, 0).questions
    assert len(asked) > 50
    for each in asked:
        assert all(judge(each.question, each.answer, text, True, SAYS_NOTHING).reward for text in SAYS_NOTHING)
        assert not judge(each.question, each.answer, each.answer, True, SAYS_NOTHING).reward, each


@given(st.text(max_size=80), st.text(max_size=80), st.text(max_size=80), st.booleans())
def test_every_text_is_judged(question: str, truth: str, answer: str, ended: bool) -> None:
    assert judge(question, truth, answer, ended).reward in (0.0, 1.0)
    assert judge(question, truth, truth, ended).reward in (0.0, 1.0)
    if telling_words(truth, words(question)):
        assert judge(question, truth, truth, ended).reward == 0
