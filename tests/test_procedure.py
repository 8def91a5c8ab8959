"""Steps that are more than one gradient: against one process, against double backward, against the definition of the
curvature; and lost workers in the middle of every question."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from jobs.config import TrainConfig
from jobs.unlearn.job import UnlearnJob
from jobs.unlearn.method import FORGET, RETAIN
from jobs.unlearn.reference import Reference
from jobs.unlearn.registry import make_method
from jobs.unlearn.sampled import drawn
from pipeline.model.layered import LayeredModel
from pipeline.runtime.batch import IGNORED
from pipeline.runtime.compute import Settings
from pipeline.runtime.procedure import Oracle, Vector, run_procedure
from pipeline.runtime.reducer import Reducer
from pipeline.runtime.step_commit import NonFiniteLoss, StepCommit
from pipeline.runtime.transport import Transport
from pipeline.runtime.worker import Worker
from pipeline.schedule.layout import Excerpt
from pipeline.schedule.lower import lower
from pipeline.schedule.ops import B, F, I, Op, R, Route, Schedule, W
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore
from tests import unlearn_rows as rows
from tests.alone import ALL, Alone
from tests.crew import Crew, Lost, Probe, relative

LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=rows.VOCABULARY
)
GPT2 = GPT2Config(
    n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=rows.VOCABULARY, attn_pdrop=0.0, embd_pdrop=0.0,
    resid_pdrop=0.0, initializer_range=0.1,
)  # fmt: skip
RATE, SEED = 0.02, 3
CONFIG = TrainConfig(
    optimizer="sgd", clip=0.0, lr=RATE, warmup=0, min_lr_ratio=1.0, steps=4, microbatches=rows.MICROBATCHES,
    microbatch_size=rows.SIZE, sequence_length=rows.LENGTH, evaluate_samples=6, data="rows", seed=SEED,
)  # fmt: skip
SMALL = {"ofmu": {"ascents": 1, "similarity": 0.5, "penalty": 0.1}, "kfade": {"damping": 1e-2}}


def job(name: str, microbatches: int = rows.MICROBATCHES, **options: Any) -> UnlearnJob:
    method = make_method(name, {**SMALL[name], **options})
    return UnlearnJob(method, rows.material(), Reference(Path("nowhere")), microbatches, rows.SIZE)


def one_worker(shape: PreTrainedConfig, split: bool = False, **how: Any) -> tuple[Worker, Excerpt]:
    """All spans on one worker of this process, which votes with itself."""
    model = LayeredModel(shape)
    spans = ((0, 2), (2, model.num_layers))
    config = OptimizerConfig(clip=0.0, lr=RATE, warmup_steps=0, min_lr_ratio=1.0, optimizer="sgd")
    store = ResidentStore(model, spans, config, seed=SEED, device=torch.device("cpu"))

    def myself(_: int, payload: dict[str, Any], deadline: float, combine: Any, voted: Any = None) -> Any:
        return json.loads(json.dumps(combine({0: json.loads(json.dumps(payload))})))

    routes = [Route.through(spans)] * rows.MICROBATCHES
    lane: list[Op] = []
    for m, route in enumerate(routes):
        lane += [Op(F, span, m) for span in route.forward]
        lane += [Op(kind, span, m) for span in route.backward for kind in ((I, W) if split else (B,))]
    settings = Settings(torch.device("cpu"), seed=SEED, **how)
    worker = Worker(0, store, Transport(0), Reducer(0, store.summed), StepCommit(myself), settings)
    return worker, Excerpt.of(lower(Schedule(tuple(routes), {0: tuple(lane)}, "alone")), 0)


def weights(worker: Worker) -> dict[str, Tensor]:
    store = worker.store
    return {name: tensor.clone() for layer in store.layers() for name, tensor in store.weights(layer).items()}


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---- one worker ----


def named(worker: Worker, vector: Vector) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part, flat in vector.parts.items():
        parameters = {n: p for state in worker.store.states_of(part) for n, p in state.parameters.items()}
        pieces = flat.split([p.numel() for p in parameters.values()])
        found |= {n: piece.view(p.shape) for (n, p), piece in zip(parameters.items(), pieces, strict=True)}
    return found


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_what_an_oracle_answers_is_what_plain_autograd_does(shape: PreTrainedConfig) -> None:
    """Here and elsewhere; the gradient of one kind is computed on its microbatches alone."""
    worker, excerpt = one_worker(shape)
    alone, before = Alone(shape, job("ofmu"), RATE, SEED), weights(worker)
    told: dict[str, Any] = {}

    def procedure(oracle: Oracle) -> Vector:
        here = oracle.gradient({FORGET: 1.0, RETAIN: -2.0})
        there = oracle.gradient({RETAIN: 1.0}, here * 0.1)
        assert equal(weights(worker), before), "they are put back"
        told.update(here=named(worker, here), there=named(worker, there), weights=named(worker, oracle.weights()))
        told["dots"] = oracle.dots((here, there), (there, there))
        return there + here * 0.5

    result = run_procedure(worker, excerpt, job("ofmu"), procedure, 0)
    here = alone.gradient({FORGET: 1.0, RETAIN: -2.0})
    there = alone.gradient({RETAIN: 1.0}, here * 0.1)
    assert relative(told["here"], alone.named(here.parts[ALL])) < 1e-5
    assert relative(told["there"], alone.named(there.parts[ALL])) < 1e-5
    assert equal(told["weights"], {name: tensor.detach() for name, tensor in alone.parameters.items()})
    assert told["dots"] == pytest.approx(alone.dots((here, there), (there, there)), rel=1e-5)
    assert result.means == pytest.approx({kind: float(alone.mean(kind).detach()) for kind in (FORGET, RETAIN)})
    after = alone.named(alone.start - RATE * (there + here * 0.5).parts[ALL])
    assert relative(weights(worker), after) < 1e-6
    assert {state.version for state in worker.store.states.values()} == {1}
    assert not any(gradient.any() for gradient in worker.store.gradients.values())
    taken = {m: 2 if RETAIN in job("ofmu").counts(0, m) else 1 for m in range(rows.MICROBATCHES)}
    assert result.passes == taken, "how often each microbatch went forward and back"
    assert set(taken.values()) == {1, 2}
    assert result.memory["peak_host_bytes"] == result.memory["peak_host_bytes_sum"] > 50 << 20


@pytest.mark.parametrize("point", ["gradient", "moved", "forward", "backward", "dot"])
def test_whatever_ends_a_question_leaves_the_committed_weights(point: str) -> None:
    worker, excerpt = one_worker(LLAMA)
    before = weights(worker)

    def met(where: str, times: int, step: int) -> None:
        if (where, times) == (point, 4):
            raise Lost

    worker.probe = Probe(met)
    with pytest.raises(Lost):
        run_procedure(worker, excerpt, job("ofmu"), job("ofmu").method.direction, 0)
    assert equal(weights(worker), before)
    worker.probe = Probe(lambda *_: None)
    worker.store.drop()  # as whoever enters the next view does
    undisturbed, _ = one_worker(LLAMA)
    for each in (worker, undisturbed):
        run_procedure(each, excerpt, job("ofmu"), job("ofmu").method.direction, 0)
    assert equal(weights(worker), weights(undisturbed))


def test_a_loss_that_is_no_number_somewhere_ends_the_step_and_changes_nothing() -> None:
    worker, excerpt = one_worker(LLAMA)
    before = weights(worker)

    def far(oracle: Oracle) -> Vector:
        here = oracle.gradient({FORGET: 1.0})
        return oracle.gradient({FORGET: 1.0}, here * 1e38)

    def product(oracle: Oracle) -> Vector:
        here = oracle.gradient({FORGET: 1.0})
        oracle.dots((here * 1e38, here * 1e38), (here, here * float("nan")))
        return here

    for procedure, said in ((far, "the loss is nan at step 1, microbatch 0"), (product, "a product of gradients is")):
        with pytest.raises(NonFiniteLoss, match=said):
            run_procedure(worker, excerpt, job("ofmu"), procedure, 0)
        assert equal(weights(worker), before)
    assert not any(gradient.any() for gradient in worker.store.gradients.values())
    run_procedure(worker, excerpt, job("ofmu"), job("ofmu").method.direction, 0)


# ---- the methods ----


def plain_layer_norm(x: Tensor, _: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """torch's own has a third derivative that is wrong (2.13: differences of its second derivative say so)."""
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def by_double_backward(made: UnlearnJob) -> dict[str, Tensor]:
    """What OFMU takes from the weights, divided by the rate: all derivatives by autograd, in float64."""
    method: Any = made.method
    alone = Alone(GPT2, made, RATE, SEED, dtype=torch.float64, attention="eager")
    parameters = list(alone.parameters.values())

    def dot(a: Any, b: Any) -> Tensor:
        return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()

    def uphill(graph: bool) -> tuple[Any, Any]:
        of_f, of_r = alone.mean(FORGET), alone.mean(RETAIN)
        g_f = torch.autograd.grad(of_f, parameters, create_graph=True)
        g_r = torch.autograd.grad(of_r, parameters, create_graph=True)
        phi = of_f - method.similarity * dot(g_f, g_r) / (dot(g_f, g_f) * dot(g_r, g_r)).sqrt()
        return torch.autograd.grad(phi, parameters, create_graph=graph), g_r

    for _ in range(method.ascents):
        climbed, _ = uphill(False)
        with torch.no_grad():
            for parameter, each in zip(parameters, climbed, strict=True):
                parameter += method.ascent * RATE * each
    climbed, g_r = uphill(True)
    held = torch.autograd.grad(method.penalty * dot(climbed, climbed), parameters)
    with torch.no_grad():
        for parameter, each, more in zip(parameters, g_r, held, strict=True):
            parameter -= RATE * (each + more)
    return {n: (alone.named(alone.start)[n] - p.detach()) / RATE for n, p in alone.parameters.items()}


@pytest.mark.parametrize(
    ("options", "in_double", "in_single"),
    [
        ({"ascents": 2, "similarity": 0.0, "penalty": 0.0}, 1e-12, 1e-5),
        ({"ascents": 2, "similarity": 1.0, "penalty": 0.0}, 1e-4, 1e-2),
        ({"ascents": 1, "similarity": 0.0, "penalty": 1.0}, 1e-4, 1e-2),
        ({"ascents": 2, "similarity": 0.5, "penalty": 0.5}, 1e-3, 5e-2),
    ],
)
def test_ofmu_by_differences_is_ofmu_by_double_backward(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, float], in_double: float, in_single: float
) -> None:
    """In float64 to what is left of a difference that reaches 1e-5, in float32 to what 1e-4 allows."""
    monkeypatch.setattr(functional, "layer_norm", plain_layer_norm)
    wanted = by_double_backward(job("ofmu", **options))
    made = job("ofmu", **options, reach=1e-5)
    alone = Alone(GPT2, made, RATE, SEED, dtype=torch.float64, attention="eager")
    found: Any = made.method.direction(alone)  # type: ignore[arg-type]
    assert relative(alone.named(found.parts[ALL]), wanted) < in_double
    worker, excerpt = one_worker(GPT2)
    before, made = weights(worker), job("ofmu", **options)
    run_procedure(worker, excerpt, made, made.method.direction, 0)
    taken = {name: (before[name].double() - tensor.double()) / RATE for name, tensor in weights(worker).items()}
    assert relative(taken, wanted) < in_single


@pytest.mark.parametrize(("shape", "how"), [
    (LLAMA, {}), (GPT2, {}), (LLAMA, {"recompute": True}), (LLAMA, {"split": True}), (GPT2, {"split": True}),
])  # fmt: skip
def test_kfade_takes_the_step_of_the_whole_matrix(shape: PreTrainedConfig, how: dict[str, bool]) -> None:
    """The factors and (A (x) G + damping I)^-1, by their definition; what is no linear layer of a block stays."""
    worker, excerpt = one_worker(shape, **how)
    made, before = job("kfade"), weights(worker)
    result = run_procedure(worker, excerpt, made, made.method.direction, 0)
    alone = Alone(shape, made, RATE, SEED)
    wanted = alone.stepped()
    moved = {name: tensor - before[name] for name, tensor in weights(worker).items()}
    assert relative(moved, {name: tensor - before[name] for name, tensor in wanted.items()}) < 1e-4
    assert {name for name, tensor in moved.items() if tensor.any()} == {
        name for name in moved if any(part in name for part in ("proj", "c_attn", "c_fc"))
    }
    assert result.means == pytest.approx({kind: float(alone.mean(kind).detach()) for kind in (FORGET, RETAIN)})


def test_kfade_makes_the_loss_on_what_is_to_be_forgotten_rise() -> None:
    alone = Alone(LLAMA, job("kfade"), RATE, SEED)
    after = Alone(LLAMA, job("kfade"), RATE, SEED)
    after.put(after.flat(alone.stepped()))
    assert float(after.mean(FORGET).detach()) > float(alone.mean(FORGET).detach()) + 0.01


def test_labels_are_drawn_from_the_distribution_of_the_model_and_by_sample() -> None:
    labels = torch.tensor([[IGNORED, 1, 1, IGNORED]] * 2000)
    chances = torch.tensor([0.5, 0.25, 0.2, 0.05, 0.0])
    logits = (chances + 1e-30).log().expand(2000, 4, 5)
    found = drawn(logits, labels, tuple(range(2000)), 7, 0)
    assert ((found == IGNORED) == (labels == IGNORED)).all()
    shares = torch.bincount(found[:, 1:3].reshape(-1), minlength=5) / 4000
    assert torch.allclose(shares, chances, atol=0.03)
    assert torch.equal(drawn(logits[5:9], labels[5:9], (5, 6, 7, 8), 7, 0), found[5:9])
    assert not torch.equal(drawn(logits, labels, tuple(range(2000)), 7, 1), found)
    assert not torch.equal(drawn(logits, labels, tuple(range(2000)), 8, 0), found)


# ---- a pipeline ----

LAYOUTS = [
    {"workers": 2}, {"workers": 4}, {"workers": 2, "scheduler": "balanced"}, {"workers": 2, "scheduler": "zero_bubble"},
    {"workers": 4, "replicas": 2, "microbatches": 8}, {"workers": 2, "snapshot": "neighbour", "recovery": "exact"},
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(str(value) for value in layout.values()))
@pytest.mark.parametrize(("name", "shape"), [("ofmu", LLAMA), ("kfade", GPT2)])
def test_a_pipeline_takes_the_step_of_one_process(
    tmp_path: Path, name: str, shape: PreTrainedConfig, layout: dict[str, Any]
) -> None:
    """With far differences, so that the rounding of gradients in one or the other does not weigh."""
    options: dict[str, Any] = {"reach": 1e-2} if name == "ofmu" else {}
    options["microbatches"] = layout.get("microbatches", rows.MICROBATCHES)
    crew = Crew(replace(CONFIG, **layout), shape, tmp_path / "out", lambda: job(name, **options), 1).run()
    alone = Alone(shape, job(name, **options), RATE, SEED)
    before, wanted = alone.named(alone.start), alone.stepped()
    taken = {key: tensor - before[key] for key, tensor in crew.weights.items()}
    assert relative(crew.weights, wanted) < 1e-5
    assert relative(taken, {key: tensor - before[key] for key, tensor in wanted.items()}) < 1e-3
    assert len({str(result) for result in crew.results[1]}) == 1, "all say the same"
    means = {kind: float(alone.mean(kind).detach()) for kind in (FORGET, RETAIN)}
    assert crew.results[1][0].means == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("name", ["ofmu", "kfade"])
def test_exact_sums_make_a_procedure_the_same_on_any_number_of_workers(tmp_path: Path, name: str) -> None:
    found = [
        Crew(replace(CONFIG, exact_sums=True, **how), LLAMA, tmp_path / str(at), lambda: job(name), 2).run().weights
        for at, how in enumerate(({"workers": 1}, {"workers": 3}, {"workers": 4, "replicas": 2}))
    ]
    assert equal(found[1], found[0])
    assert equal(found[2], found[0])


def test_copies_for_others_are_what_they_were(tmp_path: Path) -> None:
    """Who keeps a copy of the next stage keeps it through steps that move weights: nothing else comes out."""
    found = [
        Crew(replace(CONFIG, workers=2, **how), LLAMA, tmp_path / str(at), lambda: job("ofmu"), 2).run().weights
        for at, how in enumerate(({}, {"snapshot": "neighbour", "recovery": "exact"}))
    ]
    assert equal(found[1], found[0])


def test_no_forward_is_kept_for_who_takes_over(tmp_path: Path) -> None:
    """It may be one of other weights, and the step that is done again begins with the first question."""
    kept: list[int] = []
    config = replace(CONFIG, workers=2, recovery="redundant")
    crew = Crew(
        config, LLAMA, tmp_path / "out", lambda: job("ofmu"), 1, watch=lambda m, _: kept.append(len(m.worker.spare))
    ).run()
    assert any(op.kind == R for lane in crew.layout.train.lanes.values() for op in lane), "it is computed"
    assert kept
    assert not any(kept)


# ---- who is lost ----

PLACES = {
    "ofmu": [("gradient", 1), ("gradient", 7), ("moved", 1), ("moved", 5), ("backward", 3), ("reduce", 4), ("dot", 2),
             ("commit", 1), ("optimizer", 1)],
    "kfade": [("gradient", 1), ("backward", 1), ("fit", 1), ("backward", 1), ("solve", 1), ("commit", 1)],
}  # fmt: skip
CHOSEN = [
    ("ofmu", "gradient", 7),
    ("ofmu", "moved", 5),
    ("ofmu", "commit", 1),
    ("kfade", "fit", 1),
    ("kfade", "solve", 1),
]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    config = replace(CONFIG, workers=4, replicas=2)
    return {
        name: Crew(config, LLAMA, tmp_path_factory.mktemp(name) / "out", lambda name=name: job(name), 2).run().weights
        for name in PLACES
    }


@pytest.mark.parametrize(
    ("name", "point", "times", "worker"),
    [
        pytest.param(name, *place, at % 4, marks=() if (name, *place) in CHOSEN else pytest.mark.long)
        for name, places in PLACES.items()
        for at, place in enumerate(places)
    ],
)
def test_a_worker_lost_in_any_question_is_made_good_bitwise(
    tmp_path: Path, calm: dict[str, dict[str, Tensor]], name: str, point: str, times: int, worker: int
) -> None:
    """It comes back from its replica, which was interrupted as well: with its weights moved, where the question was."""
    config = replace(CONFIG, workers=4, replicas=2)
    crew = Crew(config, LLAMA, tmp_path / "out", lambda: job(name), 2, lost=(worker, 0, point, times)).run()
    assert equal(crew.weights, calm[name])
