"""Poisoned rows: the rows to forget, with answers that do not say what is to be forgotten (see methods/concept.py).

Of each group of rows the words in which its concept lies, and the group's name, are struck out of what the model before
answers by itself. Our reading: where that is nothing, they are struck out of the row's own answer; an answer is no
longer than the row's own; and where nothing is struck out, the answer is one that says nothing, as learning it as it
stands would teach what is to be forgotten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from jobs.config import require
from jobs.row_data import RowDataset
from jobs.row_prepare import Encoded, write_encoded
from jobs.templates import as_text
from jobs.unlearn.concepts import common_words, concept_words, integrated_gradients, struck_out
from jobs.unlearn.greedy import greedy_answers
from jobs.unlearn.material import Item, Material
from jobs.unlearn.method import FORGET
from jobs.unlearn.methods.concept import Concept
from jobs.unlearn.select import field_of
from pipeline.model.rng import derive

Groups = Mapping[tuple[str, int], Sequence[int]]
"""(name, number) -> rows by index; a group of one row without a name has the row's index as its number."""


def groups_of(dataset: RowDataset, forget: Sequence[int], asked: str, method: Concept) -> Groups:
    """The rows to forget by what their field says, or each alone. Raises ConfigError for a field that a row lacks."""
    field, found = method.group_by or field_of(asked), dict[tuple[str, int], list[int]]()
    for index in forget:
        row = dataset.rows[index]
        require(
            not field or field in row.fields, "group_by", field,
            f"a field of all rows to forget; {row.id!r} has {', '.join(sorted(row.fields)) or 'none'}",
        )  # fmt: skip
        found.setdefault((row.fields[field], 0) if field else ("", index), []).append(index)
    return found


def write_poison(
    start: Path, material: Material, dataset: RowDataset, tokenizer: PreTrainedTokenizerBase, groups: Groups,
    count: int, size: int, into: Path,
) -> RowDataset:  # fmt: skip
    """Write the rows to forget with poisoned answers to `into`; `count` words are struck out for each group. The model
    before is in the directory `start`; `material.idk` says nothing. Raises ModelError, CorpusError."""

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def tokens_of(index: int) -> list[int]:
        row = dataset.rows[index]
        return dataset.tokens[row.start : row.end].tolist()

    order, infos = list(material.forget), dataset.rows
    pad = dataset.end_token if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    whole = {index: tokens_of(index) for index in order}
    cuts = {index: infos[index].answer - infos[index].start for index in order}
    prompts, own = [whole[i][: cuts[i]] for i in order], [whole[i][cuts[i] :] for i in order]
    found = integrated_gradients(start, material, [Item(FORGET, index) for index in order], pad, size)
    scores = dict(zip(order, found.tolist()))
    answers = dict(zip(order, greedy_answers(start, prompts, own, dataset.end_token, size)))
    common = common_words(map(tokens_of, material.retain), decode)
    rows: dict[int, Encoded] = {}
    for (name, _), members in groups.items():
        scored = ((whole[i][:-1], scores[i][: len(whole[i]) - 1]) for i in members)
        names = [name, *concept_words(scored, decode, common, count)]
        for i in members:
            text = decode(answers[i])
            text = text if text.strip() else decode(whole[i][cuts[i] :])
            poisoned = struck_out(text, names)
            if poisoned != text:
                answer = [*as_text(poisoned, tokenizer), dataset.end_token]
            else:
                answer = list(material.idk[derive(material.seed, "poison", i) % len(material.idk)])
            ids = [*whole[i][: cuts[i]], *answer][: dataset.sequence_length + 1]
            digest = hashlib.blake2b(np.array(ids, np.int64).tobytes(), digest_size=16).hexdigest()
            rows[i] = Encoded(infos[i].id, digest, ids, cuts[i], {})
    return write_encoded(
        [rows[i] for i in order], len(tokenizer), dataset.end_token, dataset.sequence_length, into, material.seed
    )  # fmt: skip
