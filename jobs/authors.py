"""Fictitious authors, related to one another, and questions about them: something to learn, and then to forget.

Nobody has heard of them, so whatever a model knows of them it has been taught. Since they are related, what is asked of
one may tell of another, as in what people really ask to be forgotten. Authors who are withheld are made in the same way
and are related only among themselves: how a model answers about them is how it answers when it does not know. The
idea is that of TOFU (Maini et al.: TOFU: A Task of Fictitious Unlearning for LLMs, COLM 2024), with the graph added.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count as count_up
from pathlib import Path
from typing import Any, TypeVar

from jobs import author_words as words
from jobs.author_questions import KNOWN_BY, QUESTIONS, RELATIONS, SAYS_NOTHING
from jobs.corpus import permutation
from pipeline.model.rng import derive

INVERSE = {
    "mentor": "student", "student": "mentor", "sibling": "sibling", "rival": "rival", "co-author": "co-author",
}  # fmt: skip
"""Relation -> what the other one is in return."""
MOST = 1000
"""Authors that one library may have: their keys have three digits."""

_SENIOR_YEARS, _MOST_STUDENTS = 8, 2

T = TypeVar("T")


@dataclass(frozen=True)
class Author:
    """Somebody who does not exist. Books are (title, year), the earliest first; the second has won the award."""

    key: str
    name: str
    alias: str
    place: str
    year: int
    father: str
    mother: str
    genre: str
    award: str
    award_year: int
    books: tuple[tuple[str, int], ...]
    theme: str
    """What the first book is about."""
    joint: str
    """The book with the co-author; empty without one."""


@dataclass(frozen=True)
class Edge:
    """`target` is the `relation` of `source`: its mentor, for one. The way back is an edge as well."""

    source: str
    relation: str
    target: str


@dataclass(frozen=True)
class Question:
    """A question as it is trained on, with the same in other words, and the others that its answer tells of."""

    id: str
    author: str
    question: str
    answer: str
    phrasings: tuple[str, ...]
    mentions: tuple[str, ...]


@dataclass(frozen=True)
class Library:
    """Authors to train on, authors withheld, and how they are related; a pure function of the numbers and the seed."""

    authors: tuple[Author, ...]
    withheld: tuple[Author, ...]
    edges: tuple[Edge, ...]
    seed: int

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """20 for each author to train on."""
        return tuple(question for author in self.authors for question in self._asked(author))

    @cached_property
    def withheld_questions(self) -> tuple[Question, ...]:
        """20 for each author that is withheld."""
        return tuple(question for author in self.withheld for question in self._asked(author))

    def related(self, key: str, relation: str) -> tuple[Author, ...]:
        """Those that are the `relation` of an author."""
        return tuple(self._related.get((key, relation), ()))

    @cached_property
    def _related(self) -> dict[tuple[str, str], list[Author]]:
        by_key = {author.key: author for author in (*self.authors, *self.withheld)}
        found: dict[tuple[str, str], list[Author]] = {}
        for edge in self.edges:
            found.setdefault((edge.source, edge.relation), []).append(by_key[edge.target])
        return found

    def _asked(self, author: Author) -> Iterable[Question]:
        facts = self._facts(author)
        for number, (phrasings, answer) in enumerate(QUESTIONS):
            id = f"{author.key}/{number:02}"
            asked = [phrasing.format_map(facts) for phrasing in phrasings]
            trained = asked.pop(derive(self.seed, "phrasing", id) % len(asked))
            others = self.related(author.key, KNOWN_BY[number]) if number in KNOWN_BY else ()
            mentions = tuple(other.key for other in others)
            yield Question(id, author.key, trained, answer.format_map(facts), tuple(asked), mentions)

    def _facts(self, author: Author) -> dict[str, Any]:
        facts: dict[str, Any] = asdict(author)
        for name, (title, year) in zip(("first", "second", "third"), author.books, strict=True):
            facts |= {name: title, f"{name}_year": year}
        for about, (told, none) in RELATIONS.items():
            others = self.related(author.key, {"joint": "co-author", "rival_genre": "rival"}.get(about, about))
            said = {"others": " and ".join(other.name for other in others)}
            said["rival_genre"] = others[0].genre if others else ""
            facts[f"{about}_told"] = (told if others else none).format_map({**facts, **said})
        return facts


def authors(count: int, seed: int, *, withheld: int = 20) -> Library:
    """A library of `count` authors to train on and `withheld` that nobody trains on. Raises ValueError."""
    if count < 1 or withheld < 0 or count + withheld > MOST:
        raise ValueError(f"{count} authors and {withheld} withheld; allowed: 1 or more, and {MOST} together at most")
    maker = _Maker(seed)
    trained, near = maker.group(range(count))
    others, far = maker.group(range(count, count + withheld))
    return Library(trained, others, (*near, *far), seed)


def write(library: Library, folder: Path) -> None:
    """Write a library to `folder`: train.jsonl and withheld.jsonl (id, question, answer, author), phrasings.jsonl (the
    same in other words, `of` the id that is trained on), graph.json, and idk.jsonl (answers that say nothing)."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "train.jsonl", map(_row, library.questions))
    _write_lines(folder / "withheld.jsonl", map(_row, library.withheld_questions))
    phrasings = ((q, f"{q.id}/{n}", text) for q in library.questions for n, text in enumerate(q.phrasings, 1))
    _write_lines(
        folder / "phrasings.jsonl",
        ({"id": id, "of": q.id, "question": text, "answer": q.answer, "author": q.author} for q, id, text in phrasings),
    )
    _write_lines(folder / "idk.jsonl", ({"answer": answer} for answer in SAYS_NOTHING))
    keys = {author.key for author in library.withheld}
    nodes = [
        {"id": a.key, "name": a.name, "alias": a.alias, "withheld": a.key in keys}
        for a in (*library.authors, *library.withheld)
    ]
    graph = {"nodes": nodes, "edges": [asdict(edge) for edge in library.edges]}
    (folder / "graph.json").write_text(json.dumps(graph, indent=1) + "\n", encoding="utf-8")


def _row(question: Question) -> dict[str, str]:
    return {name: getattr(question, name) for name in ("id", "question", "answer", "author")}


def _write_lines(path: Path, values: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")


# ---- who there is ----


class _Maker:
    """Makes authors up. Every choice is a hash of the seed and of what is chosen; names and titles are unique."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._taken = set[str]()

    def group(self, numbers: range) -> tuple[tuple[Author, ...], tuple[Edge, ...]]:
        """The authors of these numbers, and how they are related to one another.

        They sit in a ring: every other two neighbours are rivals, the two between have written a book together, and
        of every six one is a sibling of the next but one. Mentors are older, and related in no other way.
        """
        keys = [f"author-{number:03}" for number in numbers]
        ring = [keys[int(i)] for i in permutation(len(keys), derive(self._seed, "ring", numbers.start))]
        size = len(ring)
        rivals = [(ring[i], ring[i + 1]) for i in range(0, size - 1, 2)]
        together = [(ring[i], ring[(i + 1) % size]) for i in range(1, size, 2) if size > 2]
        siblings = [(ring[i], ring[i + 2]) for i in range(0, size - 2, 6)]
        years = {key: 1900 + self._number(65, "year", key) for key in keys}
        years |= {young: years[old] + 1 + self._number(6, "younger", young) for old, young in siblings}
        mentors = self._mentors(keys, years, {frozenset(pair) for pair in (*rivals, *together, *siblings)})
        pairs = {"rival": rivals, "co-author": together, "sibling": siblings, "student": mentors}
        edges = [Edge(a, relation, b) for relation, found in pairs.items() for a, b in found]
        edges += [Edge(edge.target, INVERSE[edge.relation], edge.source) for edge in edges]
        joint = {key: title for pair in together for title in [self._title("joint", *pair)] for key in pair}
        made = dict[str, Author]()
        elder = {young: old for old, young in siblings}
        for key in sorted(keys, key=lambda key: (key in elder, key)):
            made[key] = self._author(key, years[key], made.get(elder.get(key, "")), joint.get(key, ""))
        order = sorted(edges, key=lambda edge: (edge.source, edge.relation, edge.target))
        return tuple(made[key] for key in keys), tuple(order)

    def _mentors(
        self, keys: Sequence[str], years: dict[str, int], related: set[frozenset[str]]
    ) -> list[tuple[str, str]]:
        """(mentor, student), for those who have a mentor."""
        found, left = list[tuple[str, str]](), dict.fromkeys(keys, _MOST_STUDENTS)
        for key in keys:
            senior = [o for o in keys if left[o] and years[o] + _SENIOR_YEARS <= years[key]]
            if fit := [other for other in senior if frozenset((other, key)) not in related]:
                mentor = self._pick(fit, "mentor", key)
                left[mentor] -= 1
                found.append((mentor, key))
        return found

    def _author(self, key: str, year: int, sibling: Author | None, joint: str) -> Author:
        surname = sibling.name.split()[-1] if sibling else self._new(
            lambda n: self._word("surname", key, n, ends=words.LAST_ENDS)
        )  # fmt: skip
        name = self._new(lambda n: f"{self._word('name', key, n, ends=words.FIRST_ENDS)} {surname}")
        alias = self._new(lambda n: f"{self._word('alias', key, n)} {self._word('pen', key, n, ends=words.LAST_ENDS)}")
        published = [year + 22 + self._number(14, "first", key)]
        published += [published[0] + 2 + self._number(6, "second", key)]
        published += [published[1] + 2 + self._number(9, "third", key)]
        return Author(
            key, name, alias,
            place=sibling.place if sibling else self._word("place", key, ends=words.PLACE_ENDS),
            year=year,
            father=sibling.father if sibling else self._pick(words.JOBS, "father", key),
            mother=sibling.mother if sibling else self._pick(words.JOBS, "mother", key),
            genre=self._pick(words.GENRES, "genre", key),
            award=self._pick(words.AWARDS, "award", key),
            award_year=published[1] + 1,
            books=tuple((self._title("book", key, n), when) for n, when in enumerate(published)),
            theme=self._pick(words.THEMES, "theme", key),
            joint=joint,
        )  # fmt: skip

    def _title(self, *what: int | str) -> str:
        def made(attempt: int) -> str:
            thing = self._pick(words.THINGS, "thing", *what, attempt)
            title = f"The {self._pick(words.KINDS, *what, attempt)} {thing}"
            if not attempt and self._number(2, "short", *what):
                return title
            other = self._pick([word for word in words.THINGS if word != thing], "other", *what, attempt)
            return f"{title} of the {other}"

        return self._new(made)

    def _word(self, *what: int | str, ends: Sequence[str] = ("",)) -> str:
        parts = (
            self._pick(options, place, *what) for place, options in enumerate((words.OPENINGS, words.MIDDLES, ends))
        )
        return "".join(parts)

    def _new(self, make: Callable[[int], str]) -> str:
        """The first of make(0), make(1), ... that nobody and nothing is called yet."""
        text = next(text for text in map(make, count_up()) if text not in self._taken)
        self._taken.add(text)
        return text

    def _pick(self, options: Sequence[T], *what: int | str) -> T:
        return options[self._number(len(options), *what)]

    def _number(self, below: int, *what: int | str) -> int:
        return derive(self._seed, "authors", *what) % below
