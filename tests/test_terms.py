"""A loss of several signed terms, each divided by its own count, on any routes, against plain autograd on the whole
model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import LlamaConfig

from jobs.text import TextJob, token_loss
from pipeline.model.layered import LayeredModel
from pipeline.runtime.batch import IGNORED, Batch, Needs
from pipeline.runtime.compute import Settings
from pipeline.runtime.reducer import Reducer
from pipeline.runtime.step_commit import StepCommit
from pipeline.runtime.terms import StepTerms, TermError
from pipeline.runtime.transport import Transport
from pipeline.runtime.worker import Worker
from pipeline.schedule.layout import Excerpt
from pipeline.schedule.lower import lower
from pipeline.schedule.ops import B, F, I, Op, Route, Schedule, Span, W
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore
from tests.harness import random_tokens

LAYERS, SPANS = 6, [(0, 1), (1, 3), (3, 5), (5, 6)]
CONFIG = LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=LAYERS - 2, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=32, max_position_embeddings=16,
)  # fmt: skip
SEQUENCE, SIZE = 7, 2
CPU = torch.device("cpu")


@dataclass
class Mixed:
    """Microbatches of two kinds: what is to be forgotten, whose loss is to rise, and what is kept. The first `masked`
    labels of what is forgotten count for nothing; of what is kept, the largest logits are held down as well."""

    kinds: Sequence[str]
    both: bool = False
    masked: int = 4
    terms: Mapping[str, float] = field(default_factory=lambda: {"forget": -0.5, "retain": 1.0, "flat": 0.1})

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        ids = tuple(range(microbatch * SIZE, (microbatch + 1) * SIZE))
        tokens = torch.stack([torch.from_numpy(random_tokens(32, SEQUENCE + 1, i)) for i in ids])
        labels = tokens[:, 1:].clone()
        if self.kinds[microbatch] == "forget":
            labels[:, : self.masked + microbatch % 2] = IGNORED
        found = {"input_ids": tokens[:, :-1]} if Needs.INPUT in needs else {}
        return Batch(ids, {**found, **({"labels": labels} if Needs.LOSS in needs else {})}, self.kinds[microbatch])

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        labels = int((self.batch(step, microbatch, Needs.LOSS)["labels"] != IGNORED).sum())
        return {self.kinds[microbatch]: labels, **({"flat": SIZE} if self._is_flat(microbatch) else {})}

    def _is_flat(self, microbatch: int) -> bool:
        return self.both and self.kinds[microbatch] == "retain"

    def loss(self, logits: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        found = {batch.kind: token_loss(logits, batch["labels"])}
        if self.both and batch.kind == "retain":
            found["flat"] = logits.float().amax(-1).mean(-1).sum()
        return found


def alone(routes: Sequence[Route], split: bool = False) -> Schedule:
    """All spans on one worker, microbatch after microbatch."""
    lane: list[Op] = []
    for m, route in enumerate(routes):
        lane += [Op(F, span, m) for span in route.forward]
        lane += [Op(kind, span, m) for span in route.backward for kind in ((I, W) if split else (B,))]
    return lower(Schedule(tuple(routes), {0: tuple(lane)}, "alone"))


def route(*spans: Span) -> Route:
    return Route(spans, tuple(reversed(spans)))


def worker() -> Worker:
    store = ResidentStore(
        LayeredModel(CONFIG), SPANS, OptimizerConfig(clip=0.0, lr=1e-2, warmup_steps=0), seed=3, device=CPU
    )

    def myself(_: int, payload: dict[str, Any], deadline: float, combine: Any, voted: Any = None) -> Any:
        return json.loads(json.dumps(combine({0: json.loads(json.dumps(payload))})))

    return Worker(
        0, store, Transport(0), Reducer(0, store.gradients.get), StepCommit(myself), Settings(CPU, seed=3)
    )  # fmt: skip


def reference(job: Any, routes: Sequence[Route]) -> tuple[float, dict[str, Tensor]]:
    """The loss, and parameter -> gradient: of each layer, the sum of every term over the microbatches that visit it,
    divided by the term's count over those."""
    model = LayeredModel(CONFIG)
    whole = model.build((0, LAYERS), seed=3)
    gradients: dict[tuple[int, str, str], Tensor] = {}
    counts: dict[tuple[int, str], int] = {}
    sums: dict[str, float] = {}
    for m, each in enumerate(routes):
        batch, counted = job.batch(0, m, Needs.INPUT | Needs.LOSS), job.counts(0, m)
        visited = [layer for span in each.forward for layer in range(*span)]
        for term in counted:
            x = batch["input_ids"]
            for span in each.forward:
                x = model_span(whole, span)(x)
            value = job.loss(x, batch)[term]
            whole.zero_grad()
            value.backward()
            sums[term] = sums.get(term, 0.0) + float(value.detach())
            for layer in visited:
                counts[layer, term] = counts.get((layer, term), 0) + counted[term]
                for name, parameter in whole.named_layer_parameters(layer).items():
                    if parameter.grad is not None:
                        key = layer, term, name
                        gradients[key] = gradients.get(key, torch.zeros_like(parameter)) + parameter.grad
    found: dict[str, Tensor] = {}
    for (layer, term, name), gradient in gradients.items():
        found[name] = found.get(name, torch.zeros_like(gradient)) + job.terms[term] * gradient / counts[layer, term]
    totals = {t: sum(job.counts(0, m).get(t, 0) for m in range(len(routes))) for t in sums}
    return sum(job.terms[t] * value / totals[t] for t, value in sums.items()), found


def model_span(whole: Any, span: Span) -> Any:
    from pipeline.model.layered import SpanModule

    return SpanModule(whole.model, span, {str(n): whole.layers[str(n)] for n in range(*span)}, whole.rotary)


def ours(job: Any, routes: Sequence[Route], split: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """The result of a step, and the gradients that the optimizer was given."""
    one, found = worker(), dict[str, Tensor]()
    for state in one.store.states.values():
        apply = state.apply

        def watched(scale: float, lr: float, state: Any = state, apply: Any = apply) -> None:
            found.update({name: scale * p.grad.clone() for name, p in state.parameters.items()})
            apply(scale, lr)

        state.apply = watched  # type: ignore[method-assign]
    return one.run(Excerpt.of(alone(routes, split), 0), job, 0), found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


FULL = route(*SPANS)
KINDS = ("forget", "retain", "retain", "forget")


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_terms_of_two_kinds_are_divided_by_their_own_counts(split: bool) -> None:
    job = Mixed(KINDS, both=True)
    result, gradients = ours(job, [FULL] * 4, split)
    loss, expected = reference(job, [FULL] * 4)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.counts == {"forget": 10, "retain": 28, "flat": 4}
    assert set(result.means) == {"forget", "retain", "flat"}
    same(gradients, expected)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_where_routes_skip_each_term_is_divided_by_what_has_visited(split: bool) -> None:
    """One of two that are forgotten comes by the layers 1 and 2, and both that are kept: shares of 4/10 and 1."""
    routes = [route((0, 1), (3, 5), (5, 6)), FULL, route((0, 1), (1, 3), (5, 6)), FULL]
    job = Mixed(KINDS)
    result, gradients = ours(job, routes, split)
    loss, expected = reference(job, routes)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    same(gradients, expected)


def test_terms_of_one_microbatch_that_would_need_two_backwards_are_refused() -> None:
    """Of those that are kept, samples and labels are not the same share."""
    job = Mixed(("retain", "retain", "forget", "retain"), both=True)
    job.counts = lambda step, m: {"retain": 14 - m, "flat": 2} if m != 2 else {"forget": 6}  # type: ignore[method-assign]
    routes = [route((0, 1), (3, 5), (5, 6)), FULL, FULL, FULL]
    with pytest.raises(TermError, match=r"terms retain, flat of microbatch 1 have different shares on layer 1"):
        ours(job, routes)


def test_a_microbatch_of_a_term_that_the_job_has_not_is_named() -> None:
    job = Mixed(("forget", "anchor"))
    with pytest.raises(TermError, match=r"microbatch 1 counts for term 'anchor'; the job has forget, retain, flat"):
        StepTerms.of(job, 0, 2)


def test_a_term_of_which_nothing_counts_adds_nothing() -> None:
    job = Mixed(KINDS, masked=SEQUENCE)
    result, gradients = ours(job, [FULL] * 4)
    kept = Mixed(("retain",) * 4)
    kept.batch = lambda step, m, needs: Mixed(KINDS).batch(step, (1, 2)[m % 2], needs)  # type: ignore[method-assign]
    assert result.counts["forget"] == 0
    assert result.means["forget"] == 0
    _, expected = reference(kept, [FULL] * 4)
    same(gradients, expected)


def test_a_label_that_is_ignored_counts_for_nothing_in_the_divisor_either() -> None:
    """As transformers counts: the mean is over the labels that are there."""

    def sample(i: int) -> Any:
        tokens = random_tokens(32, SEQUENCE + 1, i)
        tokens[1 : 2 + i] = IGNORED
        return tokens

    class Job(TextJob):
        def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
            found = super().batch(step, microbatch, needs)
            return Batch(found.sample_ids, {name: _readable(name, t) for name, t in found.tensors.items()})

    job = Job(sample, SEQUENCE, microbatches=2, size=SIZE)
    assert [job.counts(0, m) for m in range(2)] == [{"text": 6 + 5}, {"text": 4 + 3}]
    result, gradients = ours(job, [FULL] * 2)
    whole = LayeredModel(CONFIG).build((0, LAYERS), seed=3)
    batches = [job.batch(0, m, Needs.INPUT | Needs.LOSS) for m in range(2)]
    logits = torch.cat([whole(batch["input_ids"]) for batch in batches])
    loss = functional.cross_entropy(logits.flatten(0, 1), torch.cat([b["labels"] for b in batches]).flatten())
    loss.backward()
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert result.tokens == 18
    same(gradients, {n: p.grad for layer in range(LAYERS) for n, p in whole.named_layer_parameters(layer).items()
                     if p.grad is not None})  # fmt: skip


def _readable(name: str, tensor: Tensor) -> Tensor:
    """Ids that an embedding can look up."""
    return tensor.clamp(min=0) if name == "input_ids" else tensor


def test_a_span_is_given_what_it_computes_with_and_no_more() -> None:
    read: list[int] = []

    def sample(i: int) -> Any:
        read.append(i)
        return random_tokens(32, SEQUENCE + 1, i)

    job = TextJob(sample, SEQUENCE, lambda _: SEQUENCE, microbatches=2, size=SIZE)
    assert job.counts(0, 1) == {"text": SIZE * SEQUENCE}
    assert job.batch(0, 1, Needs.NOTHING).tensors == {}
    assert job.batch(0, 1, Needs.NOTHING).sample_ids == (2, 3)
    assert read == [], "a stage in the middle reads no data"
    assert set(job.batch(0, 1, Needs.INPUT).tensors) == {"input_ids"}
    assert set(job.batch(0, 1, Needs.LOSS).tensors) == {"labels"}


def test_a_term_that_is_told_alone_weighs_nothing() -> None:
    """Its share of a layer may be another one: it has no gradient."""
    counts = ({"a": 2, "told": 1}, {"a": 3, "told": 1}, {"b": 1})
    terms = StepTerms({"a": 1.0, "b": 2.0, "told": 0.0}, counts, {3: frozenset({0, 2}), 4: frozenset({0})})
    assert terms.divisor([3]) is None
    assert terms.factor(3, 0) == pytest.approx(5 / 2)
    assert terms.factor(3, 2) == 1
    assert terms.divisor([4]) == pytest.approx(2 / 5)
    with pytest.raises(TermError, match="terms a, told of microbatch 0 have different shares on layer 3"):
        StepTerms({"a": 1.0, "b": 2.0, "told": 1.0}, counts, {3: frozenset({0, 2})}).factor(3, 0)
