"""Judges an answer of a model to a question whose true answer is to be forgotten, by the strings in it.

The reward of "Unlearn-and-Reinvent" (the authors' code) is 1 where a judge says that the answer does not know,
misspells nothing and is readable, and 0 where a string of the true answer occurs that the question does not have.
There, a model judges; here, words do, which is our reading, and needs no second model. What words cannot tell, such as
the same fact put in other words, passes for not knowing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import pairwise

SHORTEST = 3
"""Words of an answer that ends by itself: fewer say nothing that can be read."""
LONG_ENOUGH = 8
"""Words of an answer that was cut."""
_WORD = re.compile(r"[^\W_]+(?:['\u2019.,-][^\W_]+)*")
_RUN = 4
"""Words in a row that tell a true answer, of which no word alone does: they are all in the question."""
_NEAR = 0.8
"""Of difflib's ratio."""
_SHORT = 4
"""Letters of a word that is no name and says something."""
_LONGEST = 30
_VARIED, _TIMES = 0.5, 3
_SAYS_LITTLE = frozenset(re.findall(r"[a-z]+", """
    a about above after again against all also am among an and another any anybody anyone anything are as at be because
    been before being between both but by can cannot come could did do does doing done down each either else even ever
    every few for from further get give given go had has have having he her here hers him his how i if in into is it
    its itself just know known less like made make many may me might mine more most much must my name named near
    neither never no nobody none nor not nothing now of off often on once one only or other others our out over own
    perhaps quite rather really said same say she should since so some somebody something such take than that the their
    theirs them then there these they thing this those though through to too two under until up upon us use very was
    way we well were what when where whether which while who whom whose why will with within without would yes yet you
    your
"""))  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What is said of an answer."""

    knows: bool
    """A string that tells the true answer occurs."""
    misspells: bool
    """A word occurs that is nearly one of those."""
    readable: bool
    """It ends, or is long; it is made of words, and not of the same ones again and again."""

    @property
    def reward(self) -> float:
        """1 for an answer that is wanted, else 0."""
        return float(self.readable and not self.knows and not self.misspells)


def judge(question: str, truth: str, answer: str, ended: bool, free: Collection[str] = ()) -> Verdict:
    """The verdict on an answer; `ended` says that it was not cut. `free` are texts whose words tell nothing, such as
    the answers that say nothing."""
    asked, said = words(question), words(answer)
    telling = telling_words(truth, (*asked, *_words_of(tuple(free))))
    runs = set() if telling else _runs(words(truth)) - _runs(asked)
    knows = not telling.isdisjoint(said) or not runs.isdisjoint(_runs(said))
    others = set(said) - set(asked) - _SAYS_LITTLE - _words_of(tuple(free))
    return Verdict(knows, any(_nearly(word, each) for word in telling for each in others), readable(answer, ended))


def telling_words(truth: str, known: Iterable[str] = ()) -> set[str]:
    """The words by which a true answer is told apart: numbers and names, and other words of four letters or more; none
    that says little, or that is `known` before."""
    spelled = _WORD.findall(unicodedata.normalize("NFKC", truth))
    names = {word.casefold() for word in spelled if word[0].isupper() or any(c.isdigit() for c in word)}
    found = {word for word in words(truth) if word in names or len(word) >= _SHORT}
    return found - _SAYS_LITTLE - set(known)


def readable(answer: str, ended: bool) -> bool:
    """Whether a person could read it."""
    said = words(answer)
    if len(said) < (SHORTEST if ended else LONG_ENOUGH):
        return False
    printable = all(c.isprintable() or c in "\n\t" for c in answer) and "\ufffd" not in answer
    pieces = answer.split()
    made_of_words = sum(bool(_WORD.search(piece)) for piece in pieces) >= 0.8 * len(pieces)
    if not printable or not made_of_words or any(len(word) > _LONGEST for word in said):
        return False
    again = any(len(set(said[i : i + _TIMES])) == 1 for i in range(len(said) - _TIMES + 1))
    pairs = list(pairwise(said))
    return not again and len(set(pairs)) >= _VARIED * len(pairs)


def words(text: str) -> list[str]:
    """Its words, without case and possessive endings; a number keeps its points and commas."""
    found = (word.casefold() for word in _WORD.findall(unicodedata.normalize("NFKC", text)))
    return [re.sub(r"['\u2019]s$", "", word) for word in found]


def _runs(said: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(said[i : i + _RUN]) for i in range(len(said) - _RUN + 1)}


@lru_cache(maxsize=8)
def _words_of(texts: tuple[str, ...]) -> frozenset[str]:
    return frozenset(word for text in texts for word in words(text))


@lru_cache(maxsize=1 << 16)
def _nearly(wanted: str, found: str) -> bool:
    """Whether a word is another one misspelt; a number is another number."""
    if wanted == found or min(len(wanted), len(found)) < _SHORT or any(c.isdigit() for c in wanted + found):
        return False
    match = SequenceMatcher(None, wanted, found, autojunk=False)
    return match.real_quick_ratio() >= _NEAR and match.quick_ratio() >= _NEAR and match.ratio() >= _NEAR
