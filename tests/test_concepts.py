"""The words in which a concept lies, what a model answers by itself, and answers without those words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from jobs.row_data import RowDataset
from jobs.row_prepare import prepare_rows
from jobs.rows import RowTexts, read_rows
from jobs.tokenizer import build_tokenizer
from jobs.unlearn import greedy, poison
from jobs.unlearn.concepts import common_words, concept_words, integrated_gradients, struck_out, word_scores
from jobs.unlearn.greedy import greedy_answers
from jobs.unlearn.material import Item, Material
from jobs.unlearn.method import FORGET, row_nll
from jobs.unlearn.methods.concept import Concept
from jobs.unlearn.poison import groups_of, write_poison
from jobs.unlearn.probe import logits_of
from pipeline.settings import ConfigError
from tests import unlearn_rows
from tests.test_attribution import Plain

PAD = 0


# ---- integrated gradients ----


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_attributions_are_those_of_the_whole_model_and_sum_to_the_difference(tmp_path: Path, case: str) -> None:
    plain, material = Plain(case, tmp_path, vocab_size=unlearn_rows.VOCABULARY), unlearn_rows.material()
    items = [Item(FORGET, row) for row in range(3)]
    ids, labels = (
        torch.stack([torch.from_numpy(getattr(material.sample(item), name)) for item in items])
        for name in ("input_ids", "labels")
    )
    found = {steps: integrated_gradients(tmp_path, material, items, PAD, 5, steps) for steps in (4, 32)}
    embedding = plain.model.get_submodule(plain.blueprint.family.tokens)
    for row in range(3):
        x, begin = embedding(ids[row]).detach(), embedding(torch.full_like(ids[row], PAD)).detach()
        total = torch.zeros_like(x)
        for step in range(4):
            point = (begin + (step + 0.5) / 4 * (x - begin)).requires_grad_()
            logp = plain.model(inputs_embeds=point[None]).logits[0].log_softmax(-1)
            value = torch.stack([logp[t, y] for t, y in enumerate(labels[row].tolist()) if y >= 0]).sum()
            total += torch.autograd.grad(value, point)[0]
        wanted = ((x - begin) * total / 4).sum(dim=1)
        torch.testing.assert_close(found[4][row], wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        assert not found[4][row][int((labels[row] >= 0).nonzero()[-1]) + 1 :].any(), "nothing is owed to padding"
    with_row, without = (
        -row_nll(next(logits_of(tmp_path, [x])), labels) for x in (ids, torch.full_like(ids, PAD))
    )  # fmt: skip
    difference = with_row - without
    assert float((found[32].sum(dim=1) - difference).abs().max()) < 0.01 * float(difference.abs().max())


# ---- greedy answers ----


@pytest.mark.parametrize("case", ["llama", "gpt2 untied"])
def test_greedy_answers_are_those_of_one_token_after_another(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Plain(case, tmp_path)
    with torch.no_grad():
        plain.model.get_output_embeddings().weight.mul_(20)  # sure of itself, and not always of the same
        plain.model.save_pretrained(tmp_path)
    drawn = np.random.default_rng(0)
    prompts = [drawn.integers(3, 61, n).tolist() for n in (3, 5, 4, 7, 3)]
    guesses = [drawn.integers(3, 61, n).tolist() for n in (6, 4, 8, 1, 5)]

    def one_by_one(prompt: Sequence[int], most: int, end_token: int) -> list[int]:
        said = list[int]()
        while len(said) < most:
            with torch.no_grad():
                token = int(plain.model(torch.tensor([[*prompt, *said]])).logits[0, -1].argmax())
            if token == end_token:
                break
            said.append(token)
        return said

    end_token = one_by_one(prompts[0], 3, -1)[2]  # one that is said
    wanted = [one_by_one(prompt, len(guess), end_token) for prompt, guess in zip(prompts, guesses)]
    assert len({token for each in wanted for token in each}) > 4
    assert {len(each) < len(guess) for each, guess in zip(wanted, guesses)} == {True, False}
    assert greedy_answers(tmp_path, prompts, guesses, end_token, 2) == wanted
    passes = list[int]()

    def counted(folder: Path, inputs: Sequence[Tensor]) -> object:
        passes.append(len(inputs))
        return logits_of(folder, inputs)

    monkeypatch.setattr(greedy, "logits_of", counted)
    known = [[*answer, end_token][: len(guess)] for answer, guess in zip(wanted, guesses)]
    assert greedy_answers(tmp_path, prompts, known, end_token, 9) == wanted
    assert passes == [1], "what is guessed rightly takes one pass"


# ---- words ----

PIECES = ["The", " cat", "s", " of", " K", "ö", "ln", ",", " the", " Cat", "!"]


def decode(tokens: Sequence[int]) -> str:
    """Characters of several bytes take a token for each byte, as in byte-level vocabularies."""
    data = b"".join(bytes([token - 100]) if token >= 100 else PIECES[token].encode() for token in tokens)
    return data.decode(errors="replace")


def test_a_word_has_what_its_tokens_have() -> None:
    scores = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0]
    wanted = {"the": 257.0, "cats": 6.0, "of": 8.0, "köln": 112.0, "cat": 512.0}
    assert word_scores(range(11), scores, decode) == wanted
    parts = ["Der ", "Tag", " is"]
    tokens = [100 + byte for part in parts for byte in part.encode()] + [100 + byte for byte in " Köln".encode()]
    found = word_scores(tokens, [1.0] * len(tokens), decode)
    assert found == {"der": 3.0, "tag": 3.0, "is": 2.0, "köln": 5.0}


def test_the_first_words_are_those_that_have_most_and_are_not_common() -> None:
    rows = [([0, 1, 2, 3], [5.0, 1.0, 1.0, 3.0]), ([9, 8, 4, 5, 6], [1.5, -9.0, 1.0, 0.0, 1.0])]
    common = common_words([[0, 1], [8, 9], [8]], decode)
    assert common == {"the", "cat"}
    assert concept_words(rows, decode, common, 5) == ["of", "cats", "köln"]
    assert concept_words(rows, decode, (), 2) == ["of", "cats"], "of equal ones the first by name; `the` has less"


def test_words_and_names_are_struck_out_where_they_stand_alone() -> None:
    text = "Hans Köln wrote 'Kölner Hans'; HANS KÖLN, hans."
    assert struck_out(text, ["hans", "Hans Köln", ""]) == "*** wrote 'Kölner ***'; ***, ***."
    assert struck_out(text, ["", " "]) == text
    assert struck_out("a.b a+b", ["a.b"]) == "*** a+b"


# ---- poisoned rows ----


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RowDataset]:
    """Rows about two people, and one of somebody else."""
    folder = tmp_path_factory.mktemp("poison")
    told = [
        {"id": f"{who}/{n}", "question": f"What about {thing}?", "answer": f"The {thing} is {who} {n}.", "who": who}
        for who in ("Vargo", "Linde") for n, thing in enumerate(("boat", "house", "river"))
    ]  # fmt: skip
    told += [{"id": "x", "question": "Why?", "answer": "Nobody knows.", "who": "nobody"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    rows = read_rows(str(folder / "rows.jsonl"))
    assert rows is not None
    tokenizer = build_tokenizer("bpe", 300, RowTexts(rows))
    data = prepare_rows(rows, tokenizer, 48, 0.0, folder / "data", 0)
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder, data


def test_rows_are_grouped_by_what_they_were_selected_by(library: tuple[Path, RowDataset]) -> None:
    _, data = library
    forget = [0, 1, 3]
    assert groups_of(data, forget, "who=Vargo", Concept()) == {("Vargo", 0): [0, 1], ("Linde", 0): [3]}
    assert groups_of(data, forget, "id:a=b", Concept()) == {("", 0): [0], ("", 1): [1], ("", 3): [3]}
    assert groups_of(data, forget, "id:x", Concept(group_by="who")) == {("Vargo", 0): [0, 1], ("Linde", 0): [3]}
    with pytest.raises(ConfigError, match=r"group_by is 'genre'; allowed: a field of all rows .* 'Vargo/0' has who"):
        groups_of(data, forget, "id:x", Concept(group_by="genre"))


def test_a_poisoned_row_asks_the_same_and_says_nothing_of_the_concept(
    library: tuple[Path, RowDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = library
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    said = {0: " The Boat is old, Vargo.", 1: "", 2: " Nothing at all.", 3: " Vargo, the house or the Boat of linde?"}
    says_nothing = [*tokenizer(" No idea.")["input_ids"], data.end_token]
    forget = list(said)
    material = Material(data, forget, [6], 0, [says_nothing])

    def owed(start: Path, asked: Material, items: list[Item], pad: int, size: int) -> Tensor:
        """`boat` and `house` are what answers are owed to, and of `Question` more still, which all rows have."""
        assert (asked, [item.index for item in items], pad) == (material, forget, tokenizer.pad_token_id)
        found = torch.zeros(len(items), data.sequence_length)
        for place, item in enumerate(items):
            row = data.rows[item.index]
            for t, token in enumerate(data.tokens[row.start : row.end - 1].tolist()):
                text = tokenizer.decode([token])
                found[place, t] = 9.0 * (text == "Question") + float(text.strip() in "boat house river")
        return found

    def answers(start: Path, prompts: list[list[int]], own: list[list[int]], end: int, size: int) -> list[list[int]]:
        assert [tokenizer.decode(each) for each in own[:2]] == [
            " The boat is Vargo 0.<|endoftext|>", " The house is Vargo 1.<|endoftext|>"
        ]  # fmt: skip
        return [tokenizer(text)["input_ids"] for text in said.values()]

    monkeypatch.setattr(poison, "integrated_gradients", owed)
    monkeypatch.setattr(poison, "greedy_answers", answers)
    groups = groups_of(data, forget, "who=Vargo", Concept())
    made = write_poison(folder, material, data, tokenizer, groups, 9, 4, tmp_path / "poison")
    texts = [tokenizer.decode(made.tokens[row.start : row.end].tolist()) for row in made.rows]
    assert texts == [
        "Question: What about boat?\nAnswer: The *** is old, ***.<|endoftext|>",
        "Question: What about house?\nAnswer: The *** is *** 1.<|endoftext|>",
        "Question: What about river?\nAnswer: No idea.<|endoftext|>",
        "Question: What about boat?\nAnswer: Vargo, the house or the *** of ***?<|endoftext|>",
    ]
    assert [row.id for row in made.rows] == ["Vargo/0", "Vargo/1", "Vargo/2", "Linde/0"]
    for row, info in zip(forget, made.rows):
        question = data.rows[row]
        assert info.answer - info.start == question.answer - question.start
        assert list(made.row(info.index).input_ids[: info.answer - info.start]) == list(
            data.row(row).input_ids[: question.answer - question.start]
        )
        assert info.digest != question.digest
        assert not info.fields
    assert RowDataset.open(tmp_path / "poison").num_train == 4
