"""What a model in a directory answers by itself, the likeliest token each time, with one layer in memory at a time.

All tokens of an answer are guessed, and one pass over the layers says which token the model would have said at each
place after what was guessed before it. Up to the first wrong guess all are right, and so is what the model says there;
what it says after it is the next guess. So each pass finds at least one more token, and what comes out is exactly the
greedy answer (Jacobi decoding: Santilli et al., arXiv 2305.10427, algorithm 1). A model that has learned the rows
finds their own answers right at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from jobs.unlearn.probe import logits_of


def greedy_answers(
    folder: Path, prompts: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]], end_token: int, size: int
) -> list[list[int]]:
    """The greedy answer to each prompt, tokens up to the end token, which is left out, and no more than its guess has;
    `size` rows are computed at a time. No prompt or guess may be empty. Raises ModelError."""
    found = [list(guess) for guess in guesses]
    left = sorted(range(len(found)), key=lambda row: len(prompts[row]) + len(found[row]))  # of like lengths together
    while left:
        parts = [left[at : at + size] for at in range(0, len(left), size)]
        inputs = [_padded([[*prompts[row], *found[row]] for row in part], end_token) for part in parts]
        wrong: list[int] = []
        for part, logits in zip(parts, logits_of(folder, inputs), strict=True):
            for row, of_row in zip(part, logits):
                start = len(prompts[row]) - 1
                said = of_row[start : start + len(found[row])].argmax(dim=-1).tolist()
                if _answer(said, end_token) != _answer(found[row], end_token):
                    wrong.append(row)
                found[row] = said
        left = wrong
    return [_answer(each, end_token) for each in found]


def _answer(tokens: Sequence[int], end_token: int) -> list[int]:
    return list(tokens[: tokens.index(end_token)]) if end_token in tokens else list(tokens)


def _padded(rows: Sequence[Sequence[int]], end_token: int) -> torch.Tensor:
    """[rows, the longest]: nothing sees what comes after it."""
    ids = np.full((len(rows), max(map(len, rows))), end_token, dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    return torch.from_numpy(ids)
