"""Steps whose answers are the model's own: the same for all, of the step's own weights, and rewarded by group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.unlearn.judge import Verdict
from jobs.unlearn.methods.grpo import REWARD, advantages
from jobs.unlearn.on_policy import OnPolicyJob
from jobs.unlearn.registry import make_method
from jobs.unlearn.rollout import RolloutJob, roll_out
from jobs.unlearn.samples import prompt_of
from pipeline.runtime.batch import IGNORED, Needs, ToldJob
from pipeline.runtime.terms import StepTerms
from tests import unlearn_rows as rows
from tests.test_rollout import Alone

MICROBATCHES, SIZE, GROUP, COLD = 4, 4, 4, 2
BOTH = Needs.INPUT | Needs.LOSS


class Numbers:
    """In place of a tokenizer: a token's text is its number."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, tokens))


@pytest.fixture(autouse=True)
def _rewards_even_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(question: str, truth: str, answer: str, ended: bool, free: Sequence[str]) -> Verdict:
        assert question
        assert truth
        assert free == ("5 9 2", "7 2")
        return Verdict(knows=int(answer.split()[0]) % 2 == 1, misspells=False, readable=True)

    monkeypatch.setattr("jobs.unlearn.on_policy.judge", judged)


def job() -> OnPolicyJob:
    method: Any = make_method("grpo", {"rollouts": GROUP, "cold_steps": COLD, "answer_tokens": 3})
    asks = RolloutJob(
        microbatches=2, size=SIZE, sequence_length=rows.LENGTH, end_token=1, seed=3, temperature=1.0, cut=True
    )
    material = replace(rows.material(blank=()), forget=range(6))
    reference = rows.reference("grpo", Path("nowhere"))
    made = OnPolicyJob(method, material, reference, MICROBATCHES, SIZE, 0, 0, asks, Path("nowhere"))
    made.__dict__["tokenizer"] = Numbers()
    return made


def prepared(step: int, seed: int = 0) -> OnPolicyJob:
    made = job()
    made.prepare(Alone(made.asks, seed), step)
    return made


def test_answers_to_a_question_follow_each_other_and_questions_are_drawn_as_rows() -> None:
    made = prepared(COLD)
    asked = made.asked(COLD)
    assert len(asked) == 8
    assert [len(set(asked[at : at + GROUP])) for at in (0, GROUP)] == [1, 1]
    drawn = [made.asked(step)[at] for step in range(6) for at in (0, GROUP)]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list(range(6)), "each row once before one comes again"
    for row, answer in zip(asked, made.answers, strict=True):
        prompt = prompt_of(made.material.data.row(row))
        assert list(answer.tokens[: answer.start]) == prompt
        assert 1 <= len(answer.tokens) - answer.start <= 3


def test_answers_are_what_the_model_says_and_are_rewarded_by_group() -> None:
    made = prepared(COLD)
    prompts = [prompt_of(made.material.data.row(row)) for row in made.asked(COLD)]
    said = roll_out(Alone(made.asks), made.asks, COLD, prompts, 3)
    assert [list(answer.tokens[answer.start :]) for answer in made.answers] == said
    rewards = [float(answer[0] % 2 == 0) for answer in said]
    assert len(set(rewards)) == 2
    assert [answer.reward for answer in made.answers] == rewards
    assert [answer.advantage for answer in made.answers] == advantages(rewards, GROUP)


def test_answers_are_of_the_weights_and_the_step_and_the_same_for_all() -> None:
    assert prepared(COLD).answers == prepared(COLD).answers
    assert prepared(COLD).answers != prepared(COLD, seed=1).answers
    again = prepared(COLD + 3)
    assert again.answers != prepared(COLD).answers
    again.prepare(Alone(again.asks), COLD)
    assert again.answers == prepared(COLD).answers, "as after a rollback"


def test_cold_steps_learn_answers_that_say_nothing_and_ask_nobody() -> None:
    made, nobody = job(), Alone(job().asks)
    found = set()
    for step in range(COLD):
        made.prepare(nobody, step)
        assert {answer.advantage for answer in made.answers} == {1.0}
        found |= {answer.tokens[answer.start :] for answer in made.answers}
    assert found == {(5, 9, 2), (7, 2)}
    assert nobody.passes == 0


def test_microbatches_have_the_answers_alone_to_learn_from() -> None:
    made = prepared(COLD)
    counts = StepTerms.of(made, COLD, MICROBATCHES)
    assert counts.totals["rollout"] == sum(len(answer.tokens) - answer.start for answer in made.answers)
    assert counts.totals[REWARD] == len(made.answers) == 8
    for m in range(0, MICROBATCHES, 2):
        batch, kept = made.batch(COLD, m, BOTH), made.batch(COLD, m + 1, BOTH)
        assert (batch.kind, kept.kind) == ("rollout", "retain")
        mine = made.answers[m // 2 * SIZE :][:SIZE]
        for answer, ids, labels in zip(mine, batch["input_ids"], batch["labels"], strict=True):
            assert ids[: len(answer.tokens) - 1].tolist() == list(answer.tokens[:-1])
            assert labels[labels != IGNORED].tolist() == list(answer.tokens[answer.start :])
        assert torch.allclose(batch["before"], torch.tensor([[each.advantage, each.reward] for each in mine]))
    taken = [made.batch(step, m, BOTH).sample_ids for step in (COLD,) for m in range(MICROBATCHES)]
    assert sorted(id for ids in taken for id in ids) == list(range(COLD * 16, COLD * 16 + 16))


def test_only_the_answers_of_the_step_are_taken() -> None:
    made = prepared(COLD)
    with pytest.raises(RuntimeError, match="the answers of step 3 are not there; those that are, are of step 2"):
        made.batch(COLD + 1, 0, BOTH)


def test_workers_that_hold_nothing_are_told_the_answers() -> None:
    made, worker = prepared(COLD), job()
    assert isinstance(made, ToldJob)
    worker.hear(COLD, json.loads(json.dumps(made.tell(COLD))))
    assert worker.answers == made.answers
    for m in range(MICROBATCHES):
        ours, theirs = made.batch(COLD, m, BOTH), worker.batch(COLD, m, BOTH)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.tensors)
        assert made.counts(COLD, m) == worker.counts(COLD, m)


def test_a_step_of_its_own_answers_makes_what_was_rewarded_likelier() -> None:
    """Plain descent on what the job minimises: the mean reward rises."""
    made = job()
    engine = Alone(made.asks)
    engine.module.requires_grad_(True)
    descent, rewards = torch.optim.Adam(engine.module.parameters(), 1e-2), list[float]()
    for step in range(COLD, COLD + 40):
        made.prepare(engine, step)
        terms, sums = StepTerms.of(made, step, MICROBATCHES), dict[str, float]()
        for m in range(0, MICROBATCHES, 2):
            batch = made.batch(step, m, BOTH)
            found = made.loss(engine.module(batch["input_ids"]), batch)
            sums[REWARD] = sums.get(REWARD, 0.0) + float(found[REWARD])
            terms.scaled(found).backward()
        descent.step()
        descent.zero_grad()
        rewards.append(sums[REWARD] / terms.totals[REWARD])
    assert sum(rewards[:5]) / 5 < 0.5
    assert sum(rewards[-5:]) / 5 > 0.8, rewards
