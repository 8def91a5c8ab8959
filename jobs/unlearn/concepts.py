"""The words in which a concept lies: those of the rows of a group to which the model owes their answers most.

Integrated gradients (Sundararajan et al., arXiv 1703.01365, equation 3) of the log-likelihood of a row's answer, along
the straight line of embeddings from padding alone to the row, at the midpoints of equal pieces of it. The number of
steps and the baseline are those of the authors of class unlearning by concepts. From tokens to words is our reading: a
word has what its tokens have in all rows of the group together, and a word that half of the rows to keep have as well
says nothing of the group.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from jobs.unlearn.material import Item, Material, stacked
from jobs.unlearn.method import row_nll
from jobs.unlearn.probe import parts_of
from jobs.unlearn.sweep import embedded, sweep
from pipeline.runtime.batch import Needs

STEPS, STRUCK = 32, "***"
_WORD = re.compile(r"\w+")
_CONTEXT = 8  # tokens that decide how the next one is spelled
_UNFINISHED = "\ufffd"

Decode = Callable[[Sequence[int]], str]
Scored = tuple[Sequence[int], Sequence[float]]
"""The tokens of a row, and what each of them has."""


def integrated_gradients(
    folder: Path, material: Material, items: Sequence[Item], pad: int, size: int, steps: int = STEPS
) -> Tensor:
    """Of each row, what each of its input tokens adds to the log-likelihood of its answer against tokens `pad` alone:
    [rows, sequence]. Their sum is the difference of the two log-likelihoods, but for what `steps` steps leave: little,
    unless the embedding of `pad` is zero, where an RMS norm is steep. `size` points of the way are computed at a time.
    Raises ModelError."""
    ids = [stacked(material, part, Needs.INPUT)["input_ids"] for part in parts_of(items, size)]
    ends, begins = torch.cat(embedded(folder, ids)), torch.cat(embedded(folder, [torch.full_like(x, pad) for x in ids]))
    pieces = ((torch.arange(steps) + 0.5) / steps).split(size)

    def points() -> Iterator[Tensor]:
        for begin, end in zip(begins, ends, strict=True):
            yield from (begin + places[:, None, None] * (end - begin) for places in pieces)

    def likelihood(number: int, logits: Tensor) -> Tensor:
        labels = stacked(material, [items[number // len(pieces)]], Needs.LOSS)["labels"]
        return -row_nll(logits, labels.expand(len(logits), -1)).sum()

    total = torch.zeros_like(ends)
    for number, each in enumerate(sweep(folder, points(), likelihood)):
        total[number // len(pieces)] += each.gradient.sum(dim=0)
    return ((ends - begins) * total / steps).sum(dim=-1)


def concept_words(rows: Iterable[Scored], decode: Decode, common: Collection[str], count: int) -> list[str]:
    """The `count` words, in small letters, that have most in all rows together, the first of them first; none that has
    nothing, or is `common`."""
    total = dict[str, float]()
    for tokens, scores in rows:
        for word, score in word_scores(tokens, scores, decode).items():
            total[word] = total.get(word, 0.0) + score
    found = sorted((word for word in total if total[word] > 0 and word not in common), key=lambda w: (-total[w], w))
    return found[:count]


def common_words(rows: Iterable[Sequence[int]], decode: Decode) -> set[str]:
    """The words, in small letters, that at least half of the rows have."""
    texts = [decode(tokens) for tokens in rows]
    counts = Counter(word for text in texts for word in {found.lower() for found in _WORD.findall(text)})
    return {word for word, count in counts.items() if 2 * count >= len(texts)}


def word_scores(tokens: Sequence[int], scores: Sequence[float], decode: Decode) -> dict[str, float]:
    """Word, in small letters -> what its tokens have; a token that has parts of several words counts for the first."""
    text, at = "", list[tuple[int, float]]()
    for piece, score in _pieces(tokens, scores, decode):
        begins = re.search(r"\w", piece)
        at.append((len(text) + (begins.start() if begins else 0), score))
        text += piece
    found, words = dict[str, float](), list(_WORD.finditer(text))
    for place, score in at:
        word = next((word for word in words if word.start() <= place < word.end()), None)
        if word is not None:
            found[word.group().lower()] = found.get(word.group().lower(), 0.0) + score
    return found


def _pieces(tokens: Sequence[int], scores: Sequence[float], decode: Decode) -> Iterator[tuple[str, float]]:
    """(text, what its tokens have): a token each, or as many as make whole characters."""
    start = 0
    for end in range(1, len(tokens) + 1):
        context = max(0, start - _CONTEXT)
        before, after = decode(tokens[context:start]), decode(tokens[context:end])
        if after.endswith(_UNFINISHED) and end < len(tokens) and end - start < _CONTEXT:
            continue
        yield after[len(before) :], sum(scores[start:end])
        start = end


def struck_out(text: str, names: Iterable[str]) -> str:
    """A text with *** in place of these words or names, wherever they stand alone, in large or small letters."""
    every = sorted({name for name in names if name.strip()}, key=len, reverse=True)
    if not every:
        return text
    return re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, every))})(?!\w)", STRUCK, text, flags=re.IGNORECASE)
