"""The job of rows: answers are learned; packed rows do not see one another; blank rows count nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.row_data import RowDataset, Sample
from jobs.row_job import RowJob
from jobs.row_prepare import prepare_rows
from jobs.rows import Row
from jobs.text import TEXT
from jobs.tokenizer import build_tokenizer
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import preset
from pipeline.runtime.batch import IGNORED, Needs

BYTES = build_tokenizer("bytes", 0, ())
ROWS = [Row(str(i), ({"role": "user", "content": f"q{i}"},), "a" * (1 + i % 7)) for i in range(12)]
LENGTH = 64


def dataset(tmp_path: Path, *, pack: bool, forgotten: frozenset[str] = frozenset()) -> RowDataset:
    return prepare_rows(ROWS, BYTES, LENGTH, 0, tmp_path / "data", 3, pack=pack, forgotten=forgotten)


def test_steps_take_samples_in_order_as_text_does():
    job = RowJob(lambda id: sample(id), 4, microbatches=3, size=2, first_step=5, first_sample=100, limit=109)
    assert [job.sample_ids(5, m) for m in range(3)] == [(100, 101), (102, 103), (104, 105)]
    assert job.sample_ids(6, 1) == (108,)
    assert job.next_sample(7) == 112


def sample(id: int) -> Sample:
    labels = np.full(4, IGNORED)
    labels[: id % 5] = 1
    return Sample(np.full(4, id), labels)


def test_what_is_needed_of_a_microbatch_is_given():
    job = RowJob(sample, 4, microbatches=1, size=2)
    assert job.batch(0, 0, Needs.NOTHING).tensors == {}
    assert set(job.batch(0, 0, Needs.INPUT).tensors) == {"input_ids"}
    assert set(job.batch(0, 0, Needs.LOSS).tensors) == {"labels"}
    batch = job.batch(1, 0, Needs.INPUT | Needs.LOSS)
    assert batch.sample_ids == (2, 3)
    assert batch["input_ids"].tolist() == [[2] * 4, [3] * 4]
    assert {t.dtype for t in batch.tensors.values()} == {torch.int64}


def test_every_span_of_a_packed_job_is_given_positions(tmp_path: Path):
    data = dataset(tmp_path, pack=True)
    job = RowJob(data.train_sample, LENGTH, microbatches=1, size=2, packed=True)
    for needs in (Needs.NOTHING, Needs.INPUT, Needs.LOSS):
        assert job.batch(0, 0, needs)["position_ids"].shape == (2, LENGTH)
    with pytest.raises(ValueError, match="packed job was given a sample without position_ids"):
        RowJob(sample, 4, microbatches=1, size=2, packed=True).batch(0, 0, Needs.NOTHING)


def test_counts_are_read_once_and_agree_with_what_is_known_before(tmp_path: Path):
    read: list[int] = []

    def counting(id: int) -> Sample:
        read.append(id)
        return sample(id)

    job = RowJob(counting, 4, microbatches=2, size=3)
    assert [job.counts(0, m) for m in (0, 1, 0, 1)] == [{TEXT: 3}, {TEXT: 7}] * 2
    assert read == list(range(6))
    for pack in (False, True):
        data = dataset(tmp_path, pack=pack, forgotten=frozenset({ROWS[1].digest}))
        known = RowJob(data.train_sample, LENGTH, microbatches=2, size=2, counted=data.num_labels)
        slow = RowJob(data.train_sample, LENGTH, microbatches=2, size=2)
        assert [known.counts(s, m) for s in range(9) for m in (0, 1)] == [
            slow.counts(s, m) for s in range(9) for m in (0, 1)
        ]


def epoch(data: RowDataset) -> tuple[float, int, dict[str, torch.Tensor]]:
    """The loss of one epoch under a small model in fp64, what it is divided by, and its gradients."""
    config = preset("llama-tiny")
    config.vocab_size, config.max_position_embeddings = 258, LENGTH
    model = LayeredModel(config)
    span = model.build((0, model.num_layers), seed=0).double()
    job = RowJob(data.train_sample, LENGTH, microbatches=data.num_train, size=1, packed=data.pack)
    loss, count = torch.zeros((), dtype=torch.float64), 0
    for microbatch in range(data.num_train):
        batch = job.batch(0, microbatch, Needs.INPUT | Needs.LOSS)
        loss = loss + job.loss(span(batch["input_ids"], position_ids=batch.get("position_ids")), batch)[TEXT]
        count += job.counts(0, microbatch)[TEXT]
    loss.backward()
    return float(loss.detach()), count, {name: p.grad for name, p in span.named_parameters() if p.grad is not None}


def test_packed_rows_have_the_loss_and_the_gradients_that_they_have_alone(tmp_path: Path):
    alone, packed = dataset(tmp_path / "alone", pack=False), dataset(tmp_path / "packed", pack=True)
    assert packed.num_train < alone.num_train == len(ROWS)
    (loss, count, gradients), (other, others, found) = epoch(alone), epoch(packed)
    assert count == others == sum(len(f" {row.answer}") + 1 for row in ROWS)
    assert other == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pack", [False, True])
def test_a_blank_row_adds_nothing_to_any_gradient(tmp_path: Path, pack: bool):
    forgotten = frozenset(row.digest for row in ROWS[::3])
    blank = epoch(dataset(tmp_path / "blank", pack=pack, forgotten=forgotten))
    kept = [row for row in ROWS if row.digest not in forgotten]
    without = epoch(prepare_rows(kept, BYTES, LENGTH, 0, tmp_path / "without", 3, pack=pack))
    assert blank[1] == without[1]
    assert blank[0] == pytest.approx(without[0], rel=1e-5)
    for name, gradient in without[2].items():
        torch.testing.assert_close(blank[2][name], gradient, rtol=1e-4, atol=1e-5)
