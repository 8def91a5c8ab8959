"""Answers of the model itself: those of transformers, whoever computes them, and the same again after a fault."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from jobs.config import TrainConfig
from jobs.unlearn.rollout import ROLLOUT, Going, RolloutJob, draw, roll_out
from jobs.unlearn.samples import as_sample, prompt_of
from launch.forkserver import ForkServer
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import preset
from pipeline.runtime.batch import IGNORED, Needs
from pipeline.runtime.step_commit import NonFiniteLoss, Vote, agree
from pipeline.runtime.terms import StepTerms
from pipeline.runtime.worker import StepResult
from tests import unlearn_rows as rows
from tests.harness import run_workers

SHAPE = preset("llama-tiny", vocab_size=rows.VOCABULARY)
END, MOST = 1, 7


class Alone:
    """An engine of one process, which may be interrupted."""

    def __init__(self, job: RolloutJob, seed: int = 0, interrupted: Callable[[], None] = lambda: None) -> None:
        self.job, self.interrupted, self.passes = job, interrupted, 0
        model = LayeredModel(SHAPE)
        self.module = model.build((0, model.num_layers), seed=seed).eval()

    @torch.no_grad()
    def measure(self, job: str, part: int) -> StepResult:
        assert job == ROLLOUT
        self.interrupted()
        self.passes += 1
        sums = {}
        for m in range(self.job.microbatches):
            batch = self.job.batch(part, m, Needs.INPUT | Needs.LOSS)
            assert len(batch.sample_ids) == len(batch["input_ids"]) <= self.job.size
            sums[m] = self.job.loss(self.module(batch["input_ids"]), batch)
        terms = StepTerms.of(self.job, part, self.job.microbatches)
        found = agree(None, terms, [], {0: Vote(sums).as_json()})
        return StepResult(found.loss, found.means, found.counts)

    def pulse(self) -> None:
        pass


def job(temperature: float = 0.0, microbatches: int = 2, size: int = 3, cut: bool = True) -> RolloutJob:
    return RolloutJob(
        microbatches=microbatches, size=size, sequence_length=rows.LENGTH, end_token=END, seed=5,
        temperature=temperature, cut=cut,
    )  # fmt: skip


def said(made: RolloutJob, step: int = 2, seed: int = 0) -> list[list[int]]:
    return roll_out(Alone(made, seed), made, step, rows.prompts(), MOST)


# ---- which tokens ----


def test_the_likeliest_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """One prompt at a time, without padding and with its cache."""
    made = job()
    engine = Alone(made)
    plain = AutoModelForCausalLM.from_config(SHAPE, attn_implementation="sdpa").eval()
    plain.load_state_dict({
        name: p for layer in range(engine.module.model.num_layers)
        for name, p in engine.module.named_layer_parameters(layer).items()
    }, strict=False)  # fmt: skip
    found, ends = roll_out(engine, made, 0, rows.prompts(), MOST), 0
    for prompt, answer in zip(rows.prompts(), found, strict=True):
        room = min(MOST, rows.LENGTH + 1 - len(prompt))
        if room <= 0:
            assert answer == []
            continue
        wanted = plain.generate(
            torch.tensor([prompt]), max_new_tokens=room, do_sample=False, eos_token_id=END, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert answer == wanted
        ends += answer[-1] == END
    assert len({tuple(answer) for answer in found}) > 5
    assert len({len(answer) for answer in found}) > 3


def test_what_has_ended_is_computed_no_more() -> None:
    made = job()
    engine = Alone(made)
    end = said(made)[0][1]
    made = RolloutJob(microbatches=1, size=1, sequence_length=rows.LENGTH, end_token=end, seed=5)
    engine = Alone(made)
    found = roll_out(engine, made, 2, rows.prompts(), MOST)
    assert found[0][-1] == end
    assert len(found[0]) < MOST
    assert all(end not in answer[:-1] for answer in found)
    assert engine.passes == sum(map(len, found)), "a pass takes one row here"


@given(st.floats(0.3, 3.0), st.integers(0, 1000))
def test_tokens_are_drawn_as_often_as_they_are_probable(temperature: float, seed: int) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, float("-inf")])
    keys = torch.arange(4000) * 7919 + seed
    found = draw(logits.expand(4000, -1), temperature, keys)
    wanted = (logits / temperature).softmax(0)
    share = torch.bincount(found.long(), minlength=5) / 4000
    assert torch.allclose(share, wanted, atol=0.04)


def test_what_is_no_number_is_no_token() -> None:
    logits = torch.tensor([[0.0, float("nan")], [0.0, 1.0]])
    assert draw(logits, 0.0, torch.zeros(2, dtype=torch.int64)).isnan().tolist() == [True, False]
    made = job()
    engine = Alone(made)
    with torch.no_grad():
        next(engine.module.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="no token can be drawn before step 3"):
        roll_out(engine, made, 2, rows.prompts(), MOST)


def test_what_is_drawn_is_keyed_by_seed_step_row_and_position() -> None:
    first = said(job(1.0))
    assert said(job(1.0)) == first
    assert said(job(1.0), step=3) != first
    made = job(1.0)
    keys = set()
    engine = Alone(made, interrupted=lambda: keys.update(going.key for going in made.rows))
    found = roll_out(engine, made, 2, rows.prompts(), MOST)
    assert len(keys) == sum(map(len, found))


# ---- whoever computes them ----


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("microbatches", "size"), [(1, 1), (5, 1), (1, 30), (4, 2)])
def test_answers_do_not_depend_on_how_rows_are_dealt(temperature: float, microbatches: int, size: int) -> None:
    assert said(job(temperature, microbatches, size)) == said(job(temperature))
    assert said(job(temperature, microbatches, size, cut=False)) == said(job(temperature))


@pytest.mark.parametrize(
    ("workers", "more"), [(1, {}), (2, {"scheduler": "interleaved"}), (4, {}), (4, {"replicas": 2})]
)
def test_answers_are_those_of_one_process(
    forkserver: ForkServer, tmp_path: Path, workers: int, more: dict[str, Any]
) -> None:
    """On a pipeline of real workers, each of which has all answers."""
    config = TrainConfig(
        workers=workers, microbatches=4, microbatch_size=3, steps=1, sequence_length=rows.LENGTH, evaluate_samples=6,
        data="rows", out=tmp_path, **more,
    )  # fmt: skip
    run_workers(forkserver, config, SHAPE, tmp_path, rollout=[0.0, 1.0])
    wanted = [said(job(temperature)) for temperature in (0.0, 1.0)]
    for worker in range(workers):
        assert json.loads((tmp_path / f"rollout-{worker}.json").read_text()) == wanted


@pytest.mark.parametrize("after", [1, 2, 5, 9])
def test_an_answer_that_was_interrupted_is_the_same_again(after: int) -> None:
    class Lost(Exception):
        pass

    calls = itertools.count(1)

    def interrupted() -> None:
        if next(calls) == after:
            raise Lost

    made = job(1.0)
    engine = Alone(made, interrupted=interrupted)
    with pytest.raises(Lost):
        roll_out(engine, made, 2, rows.prompts(), MOST)
    assert roll_out(engine, made, 2, rows.prompts(), MOST) == said(job(1.0))


# ---- workers that hold nothing ----


def test_a_worker_that_is_told_has_the_same_microbatches() -> None:
    host, worker = job(1.0), job(1.0)
    host.rows[:] = [Going([3, 4, 5], 17), Going([6], 2**62), Going([7, 8], 1), Going([9], 3)]
    worker.hear(4, json.loads(json.dumps(host.tell(4))))
    for m in range(2):
        ours, theirs = (each.batch(4, m, Needs.INPUT | Needs.LOSS) for each in (host, worker))
        assert ours.sample_ids == theirs.sample_ids
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.tensors)
    assert sorted(host.places()) == [0, 1, 3, 4]


# ---- rows of tokens ----


@given(st.lists(st.integers(2, 60), min_size=2, max_size=20), st.data())
def test_a_row_of_tokens_is_a_sample(tokens: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(1, len(tokens) - 1))
    sample = as_sample(tokens, start, 12, END)
    cut = tokens[:13]
    assert sample.input_ids.tolist() == cut[:-1] + [END] * (13 - len(cut))
    assert sample.labels[: len(cut) - 1].tolist() == [IGNORED] * (min(start, 13) - 1) + cut[start:]
    assert set(sample.labels[len(cut) - 1 :].tolist()) <= {IGNORED}
    if start < 13 and len(cut) > start:
        assert prompt_of(sample) == tokens[:start]
