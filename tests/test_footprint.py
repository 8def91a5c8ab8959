"""Bytes of a worker: each kind against an account of its own, links as they are, and real workers as a whole."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from jobs.config import TrainConfig
from pipeline.model.backward import WeightGradients, defer_weights
from pipeline.model.layered import LayeredModel
from pipeline.model.rng import RngKey
from pipeline.runtime.batch import Needs
from pipeline.runtime.compute import Settings
from pipeline.runtime.footprint import Live, footprints, measure, num_slots, slot_bytes, state_bytes
from pipeline.runtime.terms import StepTerms
from pipeline.runtime.transport import HEADER_BYTES
from pipeline.schedule.graph import compiled
from pipeline.schedule.holdings import bounds
from pipeline.schedule.lower import add_redundant, lower
from pipeline.schedule.ops import Span
from pipeline.state.optimizer import OPTIMIZERS, OptimizerConfig
from pipeline.state.resident import ResidentStore
from schedulers import build, evaluation, gpipe, head_with_embedding, one_f_one_b, zero_bubble
from tests.harness import make_job

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=64, tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=0),
}  # fmt: skip
"""The GPT-2 has dropout everywhere and a tied head."""
SPANS: list[Span] = [(0, 2), (2, 4), (4, 6)]
BATCH, SEQUENCE, HIDDEN = 2, 16, 32
SIZE = 4 * BATCH * SEQUENCE * HIDDEN
JOB = make_job(TrainConfig(microbatches=4, microbatch_size=BATCH, sequence_length=SEQUENCE), 96)
CPU = Settings(torch.device("cpu"))


@cache
def model(name: str) -> LayeredModel:
    return LayeredModel(CONFIGS[name])


def unique_bytes(tensors: list[Tensor], but: list[Tensor]) -> int:
    known = {t.untyped_storage()._cdata for t in but}
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors) if s._cdata not in known}.values())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("span", SPANS)
def test_activations_are_what_autograd_says_it_saves(name: str, span: Span, split: bool) -> None:
    """Unique storages of saved tensors, with the span's input and output; and what an I leaves for its W."""
    schedule = lower((zero_bubble if split else one_f_one_b)(SPANS, 4))
    found = measure(model(name), schedule, JOB, CPU, "gloo")[span]
    terms = StepTerms.of(JOB, 0, 4)
    module, saved = model(name).build(span, seed=0), list[Tensor]()
    batch, later = JOB.batch(0, 0, Needs.INPUT | Needs.LOSS), WeightGradients()
    x = batch["input_ids"] if span[0] == 0 else torch.zeros(BATCH, SEQUENCE, HIDDEN, requires_grad=True)
    with saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t), defer_weights(later):
        y = module(x, rng=RngKey(0, 0, batch.sample_ids))
        y = terms.scaled(JOB.loss(y, batch)) if span[1] == 6 else y
    kept = [*module.parameters(), *module.buffers(), batch["input_ids"], batch["labels"]]
    received = HEADER_BYTES if span[0] else 0
    assert found.activation == pytest.approx(unique_bytes([*saved, x, y], kept) + received, abs=64)
    if split:
        y.backward(None if span[1] == 6 else torch.ones_like(y))
        pending = [t for _, *pair in later._pending for t in pair]
        assert found.half == pytest.approx(unique_bytes([*pending, x, y], kept) + received, abs=64)
        assert found.working["W"] <= SIZE
    else:
        assert found.half == 0


def test_recomputing_leaves_the_inputs_of_blocks_alone() -> None:
    whole, again = (measure(model("llama"), lower(gpipe(SPANS, 4)), JOB,
                            Settings(torch.device("cpu"), recompute=each), "gloo")
                    for each in (False, True))  # fmt: skip
    small = 8192  # rotations and positions, which the blocks of a span share
    assert 3 * SIZE < again[2, 4].activation < 3 * SIZE + HEADER_BYTES + small
    assert whole[2, 4].activation > 4 * again[2, 4].activation
    assert again[2, 4].working["B"] > whole[2, 4].working["B"], "a block is there again while it is gone back through"


@pytest.mark.parametrize("trained", [(), ("*.mlp.*",)], ids=["all", "mlp"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spans", [[(0, 2)], [(2, 4)], [(4, 6)], [(0, 2), (4, 6)], [(0, 6)]])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_is_what_a_store_holds(name: str, spans: list[Span], trained: tuple[str, ...], optimizer: str) -> None:
    model = LayeredModel(CONFIGS[name], trained=trained)
    config = OptimizerConfig(optimizer=optimizer, momentum=0.5 if optimizer == "muon" else 0.0)
    store = ResidentStore(model, spans, config, seed=0, device=torch.device("cpu"))
    held: list[Tensor] = [p for module in store.modules.values() for p in module.parameters()]
    held += store.gradients.values()
    for each in store.states.values():
        held += [t for n in each.parameters for k, t in each.moments(n).items() if k != "step"]
    assert state_bytes(model, spans, config) == unique_bytes(held, [])
    alone = sum(state_bytes(model, [(layer, layer + 1)], config) for span in spans for layer in range(*span))
    assert state_bytes(model, spans, config) <= alone, "what both ends share is there once"
    assert alone == state_bytes(model, spans, config) or model.tied


def test_live_storages_count_once_and_until_they_are_freed() -> None:
    before = torch.ones(1000)
    with Live() as live:
        before.add_(1)
        view = before[:10]
        assert (live.now, live.peak) == (0, 0), "what was there before is none of ours"
        x = torch.zeros(100, dtype=torch.float64)
        halves = x.view(2, 50).unbind()
        assert live.now == 800
        del x
        assert live.now == 800, "views hold it"
        del halves
        assert (live.now, live.peak) == (0, 800)
        assert live.rise(lambda: torch.zeros(50).exp_().sum().item()) == 204
    assert view.sum() == 20


def test_a_worker_is_the_sum_of_its_kinds() -> None:
    schedule = lower(one_f_one_b(SPANS, 4))
    found = footprints(model("llama"), schedule, JOB, CPU, links="gloo")
    spans = measure(model("llama"), schedule, JOB, CPU, "gloo")
    count = {w: bound.most for w, bound in bounds(compiled(schedule)).items()}
    for w, span in enumerate(SPANS):
        each, message = found[w], SIZE + HEADER_BYTES
        assert each.most.activations == count[w].activations * spans[span].activation
        assert each.most.sent == count[w].sent * message
        assert each.most.received == count[w].received * message
        assert each.most.posted == 2 * message * (2 if w == 1 else 1)
        assert each.most.working == max(spans[span].working.values())
        assert each.tokens == (w != 1) * 4 * 8 * BATCH * SEQUENCE, "ids, labels, and nothing between"
        assert each.activations_alone < each.total == each.state + each.tokens + each.held.total


def test_what_is_kept_in_case_a_neighbour_is_lost_counts() -> None:
    """One side of the span beside, two in the middle; and of the step under way, where that is less than the limit."""
    schedule = lower(one_f_one_b(SPANS, 4))
    step = 4 * SIZE // 2  # bfloat16
    without = footprints(model("llama"), schedule, JOB, CPU)
    for limit, under_way in ((10 * step, step), (step // 2, step // 2), (0, 0)):
        found = footprints(model("llama"), schedule, JOB, CPU, boundary=limit)
        assert [found[w].boundaries for w in range(3)] == [sides * (limit + under_way) for sides in (1, 2, 1)]
        assert all(found[w].total == without[w].total + found[w].boundaries for w in range(3))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_over_shared_memory_what_was_received_lies_in_slots_and_nowhere_else(split: bool) -> None:
    schedule = lower((zero_bubble if split else one_f_one_b)(SPANS, 4))
    shared, sent = (footprints(model("llama"), schedule, JOB, CPU, links=links) for links in ("shm", "gloo"))
    apart, within = (measure(model("llama"), schedule, JOB, CPU, links) for links in ("shm", "gloo"))
    proved = bounds(compiled(schedule))
    for w, span in enumerate(SPANS):
        inputs = (SIZE + HEADER_BYTES) * (w > 0)
        assert apart[span].activation == within[span].activation - inputs
        assert not split or apart[span].half <= within[span].half - inputs
        assert shared[w].most.received == 0
        slots = sum(max(2, most) for most in proved[w].slots.values())
        assert num_slots(proved[w]) == slots
        assert shared[w].most.posted == shared[w].held.posted == slots * SIZE, "a payload is a whole page here"
        assert shared[w].most.sent == sent[w].most.sent
        assert shared[w].total < sent[w].total
    assert slot_bytes(1) == slot_bytes(4096) == 4096
    assert slot_bytes(4097) == 8192


def test_an_input_that_is_the_workers_own_lies_in_no_slot() -> None:
    """The head is with the embedding, and what it works on was never sent."""
    schedule = lower(head_with_embedding([(0, 2), (2, 6)], 4))
    shared, sent = (measure(model("llama"), schedule, JOB, CPU, links) for links in ("shm", "gloo"))
    assert shared == sent


def test_schedules_of_every_kind_have_a_footprint() -> None:
    interleaved = build("interleaved", [(0, 2), (2, 3), (3, 5), (5, 6)], 4)
    redundant = add_redundant(one_f_one_b(SPANS, 4), [((2, 4), 0), ((4, 6), 1), ((0, 2), 2)])
    for schedule in (interleaved, redundant, evaluation(SPANS, 4), one_f_one_b(SPANS, 4, 2)):
        found = footprints(model("llama"), lower(schedule), JOB, CPU)
        assert set(found) == set(schedule.lanes)
        trains = bool(schedule.routes[0].backward)
        assert all(bool(each.most.activations) == trains and each.held.total > 0 for each in found.values())
    with pytest.raises(ValueError, match="no SEND and RECV"):
        footprints(model("llama"), interleaved, JOB, CPU)


@pytest.mark.timeout(300)
def test_real_workers_take_what_is_proved_and_no_more(tmp_path: Path) -> None:
    """A short form of benchmarks/memory.py."""
    root = Path(__file__).parent.parent
    command = [sys.executable, str(root / "benchmarks" / "memory.py"), "--quick", "--only", "zero_bubble",
               "--workers", "2", "--recompute", "yes", "--malloc", "straight", "--out", str(tmp_path)]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-3000:]
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["workers"] == 2
    assert (found["above_proved"], found["counts_above_proved"]) == (0, 0)
    assert found["above_alone_and_work"] == 2, "activations are not all that is held"
    assert found["measured_over_proved"][0] > 0.8, "the bound says something"
