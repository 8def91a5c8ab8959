"""Every method on a pipeline of real workers gives the loss and the gradients of one process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from jobs.config import TrainConfig
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.material import Item, stacked
from jobs.unlearn.method import FORGET, PAIR, RETAIN, Reads
from jobs.unlearn.reference import Reference
from launch.forkserver import ForkServer
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import preset
from pipeline.runtime.batch import IGNORED, Needs
from pipeline.wire import WireError
from tests import unlearn_rows as rows
from tests.harness import run_workers

SHAPE = preset("llama-tiny", vocab_size=rows.VOCABULARY)


def alone(name: str, folder: Path) -> tuple[float, Mapping[str, float], dict[str, Tensor]]:
    """Loss, means of terms and gradients in one process, what is read beforehand included."""
    job = rows.job(name, folder)
    depth = job.method.depth
    model = LayeredModel(SHAPE, depth=depth)
    module = model.build((0, model.num_layers), seed=0).eval()
    before, material = rows.reference_job(name, folder), job.material
    scores: dict[str, float] = {}
    with torch.no_grad():
        for item, reads in before.wanted.items():
            tensors = stacked(material, [item], Needs.INPUT | Needs.LOSS)
            y, labels = module(tensors["input_ids"]), tensors["labels"]
            if reads is Reads.SCORE:
                wanted = labels[0] != IGNORED
                logp = torch.log_softmax(y[0][wanted], dim=-1)
                scores[item.key] = -float(logp.gather(1, labels[0][wanted][:, None]).sum())
            else:
                job.reference.write(item, y[0], labels[0], reads is Reads.LOGITS)
    job.reference.finish(scores)
    totals, sums = dict.fromkeys(job.terms, 0), dict[str, Tensor]()
    for m in range(rows.MICROBATCHES):
        for term, count in job.counts(0, m).items():
            totals[term] += count
        batch = job.batch(0, m, Needs.INPUT | Needs.LOSS)
        for term, value in job.loss(module(batch["input_ids"]), batch).items():
            sums[term] = sums.get(term, torch.zeros(())) + value
    means = {term: value / max(1, totals[term]) for term, value in sums.items()}
    loss = sum((job.terms[term] * mean for term, mean in means.items()), torch.zeros(()))
    loss.backward()
    gradients = {
        key: p.grad for layer in range(model.num_layers)
        for key, p in module.named_layer_parameters(layer).items() if p.grad is not None
    }  # fmt: skip
    return float(loss.detach()), {term: float(mean.detach()) for term, mean in means.items()}, gradients


@pytest.mark.parametrize(("workers", "names"), [(2, rows.WHOLE), (4, rows.WHOLE), (2, rows.DEEP)])
def test_loss_and_gradients_are_those_of_one_process(
    forkserver: ForkServer, tmp_path: Path, workers: int, names: list[str]
) -> None:
    sizes = {
        "workers": workers, "microbatches": rows.MICROBATCHES, "microbatch_size": rows.SIZE, "steps": 1, "clip": 0.0,
        "sequence_length": rows.LENGTH, "evaluate_samples": 6, "data": "rows", "out": tmp_path,
    }  # fmt: skip
    deep = UnlearnConfig(method="rmu", layer=1, forget="x", **sizes)
    config: TrainConfig = deep if names == rows.DEEP else TrainConfig(**sizes)
    run_workers(forkserver, config, SHAPE, tmp_path, unlearn=names)
    told = json.loads((tmp_path / "unlearn-0.json").read_text())
    for name in names:
        loss, means, gradients = alone(name, tmp_path / "alone")
        assert told[name]["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-5), name
        assert told[name]["means"] == pytest.approx(means, rel=1e-5, abs=1e-5), name
        found: dict[str, Tensor] = {}
        for worker in range(workers):
            found |= load_file(tmp_path / f"gradients-{name}-{worker}.safetensors")
        assert set(found) == set(gradients), name
        for key, gradient in gradients.items():
            assert torch.allclose(found[key], gradient, rtol=1e-5, atol=1e-5), (name, key)
        ours, theirs = rows.reference(name, tmp_path / "read"), rows.reference(name, tmp_path / "alone")
        if rows.reference_job(name, tmp_path).wanted:
            assert ours.scores == pytest.approx(theirs.scores, rel=1e-5), name
            assert sorted(p.name for p in ours.folder.iterdir()) == sorted(p.name for p in theirs.folder.iterdir())


# ---- which rows ----


@given(st.sampled_from([FORGET, RETAIN, PAIR]), st.integers(0, 200), st.integers(1, 9))
def test_no_row_comes_a_second_time_before_all_have_come(kind: str, first: int, count: int) -> None:
    material = rows.material()
    every = list(material.indices(kind))
    drawn = [material.drawn(kind, position) for position in range(len(every) * 3)]
    for epoch in range(3):
        assert sorted(drawn[epoch * len(every) : (epoch + 1) * len(every)]) == sorted(every)
    assert [material.drawn(kind, first + i) for i in range(count)] == [
        item.index for item in material.items(kind, first, 2 * count if kind == PAIR else count)[:count]
    ]


def test_rows_to_keep_are_distinct_within_a_step() -> None:
    job = rows.job("npo", Path("nowhere"))
    for step in range(2):
        kept = [item for m in (1, 3) for item in job.rows(step, m)[1]]
        assert len(set(kept)) == len(kept)
        assert {item.source for item in kept} == {RETAIN}


def test_an_answer_that_says_nothing_follows_the_same_question() -> None:
    material = rows.material()
    for index in range(6):
        asked, says = material.sample(Item(FORGET, index)), material.sample(Item("idk", index))
        first = int((asked.labels != IGNORED).nonzero()[0][0])
        assert list(says.input_ids[: first + 1]) == list(asked.input_ids[: first + 1])
        said = list(says.labels[says.labels != IGNORED])
        assert said in [[5, 9, 2], [7, 2]]
        assert int((says.labels != IGNORED).nonzero()[0][0]) == first


# ---- what is carried and kept ----


def test_what_pdu_carries_follows_the_committed_steps() -> None:
    job, other = rows.job("pdu", Path("nowhere")), rows.job("pdu", Path("nowhere"))
    weight = job.terms["retain"]
    job.committed(0, {"retain": 2.0, "forget": 1.0})
    assert job.terms["retain"] != weight
    other.restore(job.carried)
    assert other.terms == job.terms
    with pytest.raises(WireError, match="a job carries"):
        other.restore({"mu": 1.0})


@given(st.integers(1, 30))
def test_the_likeliest_tokens_keep_their_probability_and_the_rest_theirs_together(top: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kept: dict[str, dict[str, Tensor]] = {}
        patch.setattr("jobs.unlearn.reference.save_file", lambda tensors, path: kept.update({"it": tensors}))
        patch.setattr("jobs.unlearn.reference.os.replace", lambda a, b: None)
        patch.setattr("jobs.unlearn.reference.load_file", lambda path: kept["it"])
        patch.setattr(Path, "mkdir", lambda *args, **more: None)
        reference = Reference(Path("nowhere"), top=top)
        logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(top)) * 3
        labels = torch.tensor([IGNORED, 3, 4, IGNORED, 6])
        reference.write(Item(FORGET, 0), logits, labels, logits=True)
        read = reference.read([Item(FORGET, 0)], Reads.LOGITS, labels[None])[0]
    for at in (1, 2, 4):
        before, after = torch.log_softmax(logits[at], -1), read[at]
        best = before.topk(top).indices
        assert torch.allclose(after[best], before[best], atol=1e-5)
        assert float(after.double().exp().sum()) == pytest.approx(1.0, abs=1e-4)
    assert not read[0].any()
