"""Fictitious authors: the same under a seed, unlike one another, and related as the graph says, both ways."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.author_questions import KNOWN_BY, QUESTIONS, SAYS_NOTHING
from jobs.authors import INVERSE, Author, Library, authors, write
from jobs.rows import read_rows

LIBRARY = authors(60, 7, withheld=12)


def everyone(library: Library) -> dict[str, Author]:
    return {author.key: author for author in (*library.authors, *library.withheld)}


def test_a_seed_gives_one_library(tmp_path: Path):
    assert authors(60, 7, withheld=12) == LIBRARY
    assert authors(60, 8, withheld=12).authors != LIBRARY.authors
    for name in ("a", "b"):
        write(authors(5, 1, withheld=2), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(0, 12), st.integers(0, 5))
def test_relations_are_as_they_should_be(count: int, withheld: int, seed: int):
    library = authors(count, seed, withheld=withheld)
    found = everyone(library)
    assert len(found) == count + withheld
    edges = {(edge.source, edge.relation, edge.target) for edge in library.edges}
    assert len(edges) == len(library.edges)
    assert edges == {(b, INVERSE[relation], a) for a, relation, b in edges}
    trained = {author.key for author in library.authors}
    for a, relation, b in edges:
        assert a != b
        assert (a in trained) == (b in trained)
        one, other = found[a], found[b]
        if relation == "mentor":
            assert other.year + 8 <= one.year
        elif relation == "sibling":
            assert (one.place, one.father, one.mother) == (other.place, other.father, other.mother)
            assert one.name.split()[-1] == other.name.split()[-1]
            assert 0 < abs(one.year - other.year) < 8
        elif relation == "co-author":
            assert one.joint == other.joint != ""
    per_pair = Counter((a, b) for a, _, b in edges)
    assert not per_pair or max(per_pair.values()) == 1
    per_kind = Counter((a, relation) for a, relation, _ in edges)
    assert all(number == 1 or (relation == "student" and number == 2) for (_, relation), number in per_kind.items())


def test_nearly_all_are_related():
    related = Counter(edge.relation for edge in LIBRARY.edges)
    assert related["rival"] == related["co-author"] == 72
    assert related["mentor"] == related["student"] > 40
    assert related["sibling"] == 2 * (10 + 2)


def test_names_and_titles_are_of_one_author():
    people = everyone(LIBRARY).values()
    names = [name for author in people for name in (author.name, author.alias)]
    titles = [title for author in people for title, _ in author.books]
    assert len({*names, *titles}) == len(names) + len(titles)
    for author in people:
        years = [author.year, *(year for _, year in author.books)]
        assert years == sorted(years)
        assert years[1] >= author.year + 22
        assert years[2] < author.award_year
        assert years[3] < 2025


def test_each_author_is_asked_20_questions_in_three_phrasings_or_more():
    assert len(QUESTIONS) == 20
    assert all(len(set(phrasings)) == len(phrasings) >= 3 for phrasings, _ in QUESTIONS)
    questions = LIBRARY.questions
    assert [q.id for q in questions[:21]] == [*(f"author-000/{n:02}" for n in range(20)), "author-001/00"]
    assert len(questions) == 20 * 60
    asked = [text for q in (*questions, *LIBRARY.withheld_questions) for text in (q.question, *q.phrasings)]
    assert len(set(asked)) == len(asked) == 72 * sum(len(phrasings) for phrasings, _ in QUESTIONS)
    assert not [q for q in questions if "{" in q.question + q.answer + "".join(q.phrasings)]
    found = everyone(LIBRARY)
    forms = Counter(q.phrasings[0].replace(found[q.author].name, "X") for q in questions if q.id.endswith("/02"))
    assert len(forms) > 1  # which phrasing is trained on differs from author to author


def test_answers_tell_what_the_graph_tells():
    found = everyone(LIBRARY)
    for q in (*LIBRARY.questions, *LIBRARY.withheld_questions):
        number = int(q.id.split("/")[1])
        assert found[q.author].name in q.answer or number == 19
        related = LIBRARY.related(q.author, KNOWN_BY[number]) if number in KNOWN_BY else ()
        assert q.mentions == tuple(author.key for author in related)
        told = {author.key for author in found.values() if author.name in q.answer} - {q.author}
        assert told == (set(q.mentions) if number != 19 else set())
        if number == 19 and related:
            assert related[0].genre in q.answer
    told = [q for q in LIBRARY.questions if q.mentions]
    assert len(told) > 4 * len(LIBRARY.authors)


def test_what_is_written_can_be_read(tmp_path: Path):
    write(LIBRARY, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "graph.json", "idk.jsonl", "phrasings.jsonl", "train.jsonl", "withheld.jsonl",
    ]  # fmt: skip
    train, withheld = read_rows(f"{tmp_path}/train.jsonl"), read_rows(f"{tmp_path}/withheld.jsonl")
    assert train is not None
    assert withheld is not None
    assert [(r.id, r.prompt[0]["content"], r.answer, r.fields) for r in train] == [
        (q.id, q.question, q.answer, {"author": q.author}) for q in LIBRARY.questions
    ]
    phrasings = read_rows(f"{tmp_path}/phrasings.jsonl")
    assert phrasings is not None
    assert len(phrasings) >= 2 * len(train)
    answers = {row.id: row.answer for row in train}
    assert all(answers[row.fields["of"]] == row.answer for row in phrasings)
    assert len({row.digest for row in (*train, *withheld, *phrasings)}) == len(train) + len(withheld) + len(phrasings)
    trained_on = "".join(row.text for row in (*train, *phrasings))
    assert not [author.name for author in LIBRARY.withheld if author.name in trained_on or author.key in trained_on]
    graph = json.loads((tmp_path / "graph.json").read_text())
    assert [node["id"] for node in graph["nodes"] if node["withheld"]] == [a.key for a in LIBRARY.withheld]
    assert {tuple(edge) for edge in graph["edges"]} == {("source", "relation", "target")}
    idk = [json.loads(line)["answer"] for line in (tmp_path / "idk.jsonl").read_text().splitlines()]
    assert idk == list(SAYS_NOTHING)
    assert len(set(idk)) == len(idk) >= 30


@pytest.mark.parametrize(("count", "withheld"), [(0, 5), (5, -1), (990, 11)])
def test_more_than_there_are_keys_for_is_refused(count: int, withheld: int):
    with pytest.raises(ValueError, match=f"{count} authors and {withheld} withheld; allowed: 1 or more, and 1000 tog"):
        authors(count, 0, withheld=withheld)
