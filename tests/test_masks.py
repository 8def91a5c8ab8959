"""Where only some weights are updated, all others keep their bits: in a state, on a pipeline, on the pool."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from jobs.config import TrainConfig
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.job import UnlearnJob, still_known
from jobs.unlearn.method import FORGET, PAIR, RETAIN, row_nll
from jobs.unlearn.neurons import NEURONS, masks_of
from launch.config import to_toml
from launch.forkserver import ForkServer
from launch.unlearn import _require_kept
from pipeline.model.layered import LayeredModel, ModelError
from pipeline.model.weights import preset
from pipeline.runtime.batch import IGNORED, Needs
from pipeline.settings import ConfigError
from pipeline.state.layer_state import LayerState
from pipeline.state.masks import mask_file
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore
from pipeline.state.shard import Share
from pipeline.state.sharded import ShardedState
from tests import unlearn_rows
from tests.harness import relative_difference, run_pool, run_workers

DECAYING = OptimizerConfig(lr=0.1, warmup_steps=0, weight_decay=1.0)
MASKS = {"w": torch.tensor([[True], [False], [True]] * 100), "b": torch.tensor([False] * 7 + [True] * 293)}


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(2)
    return {"w": nn.Parameter(torch.randn(300, 8)), "b": nn.Parameter(torch.randn(300)),
            "untold": nn.Parameter(torch.randn(5, 5))}  # fmt: skip


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: before[name] != after[name] for name in before}


def step(state: LayerState, number: int) -> None:
    state.gradient.normal_(generator=torch.Generator().manual_seed(number))
    if isinstance(state, ShardedState):
        state.prepare(0.5, 0.1, state.gradient.view(torch.int32))
    state.apply(0.5, 0.1)


# ---- a state ----


@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_masked_keeps_its_bits_and_the_rest_is_updated_as_ever(sharded: bool) -> None:
    def made(masks: dict[str, Tensor] | None) -> LayerState:
        if sharded:
            return ShardedState("1", parameters(), DECAYING, Share(0, 1), masks=masks)
        return LayerState("1", parameters(), DECAYING, masks=masks)

    masked, free = made(MASKS), made(None)
    before = {name: weight.clone() for name, weight in masked.weights().items()}
    for number in range(3):
        step(masked, number)
        step(free, number)
    moved = changed(before, masked.weights())
    for name, mask in MASKS.items():
        assert torch.equal(moved[name], mask.expand(moved[name].shape)), name
        inside = mask.expand(moved[name].shape)
        assert torch.equal(masked.weights()[name][inside], free.weights()[name][inside]), name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not masked.moments(name)[moment][~inside].any()
    assert not moved["untold"].any()
    assert changed(before, free.weights())["untold"].all()


def test_the_norm_is_that_of_what_is_applied_and_a_fault_elsewhere_is_still_seen() -> None:
    state = LayerState("1", parameters(), DECAYING, masks=MASKS)
    state.gradient.fill_(2.0)
    assert float(state.norm()) ** 2 == pytest.approx(4.0 * (200 * 8 + 293))
    state.gradient[8] = float("nan")
    assert state.norm().isnan()


def test_a_state_that_is_sharded_is_the_one_that_is_not() -> None:
    one = LayerState("1", parameters(), DECAYING, masks=MASKS)
    other = ShardedState("1", parameters(), DECAYING, Share(0, 1), masks=MASKS)
    for number in range(2):
        step(one, number)
        step(other, number)
    assert all(torch.equal(weight, other.weights()[name]) for name, weight in one.weights().items())


# ---- whoever holds a layer ----

SHAPE = {"llama": preset("llama-tiny", vocab_size=64), "gpt2": preset("gpt2-tiny", vocab_size=64)}
CHOSEN = torch.arange(256) % 3 == 0


def write_masks(model: LayeredModel, out: Path) -> dict[str, Tensor]:
    """Every third neuron of block 2; what may change, by parameter."""
    (out / NEURONS).mkdir(parents=True)
    found: dict[str, Tensor] = {}
    for layer in range(model.num_layers):
        width = 128 if model.config.model_type == "llama" else 256
        masks = dict(masks_of(model, layer, CHOSEN[:width])) if layer == 2 else {}
        save_file(masks, mask_file(out / NEURONS, layer))
        found |= masks
    return found


@pytest.fixture
def config(tmp_path: Path) -> UnlearnConfig:
    return UnlearnConfig(
        neurons=0.1, forget="x", workers=2, microbatches=2, microbatch_size=2, sequence_length=16, steps=2, epochs=None,
        lr=1e-2, warmup=0, weight_decay=0.5, evaluate_samples=2, recovery="exact", data="random-tokens", out=tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize("name", SHAPE)
def test_the_pipeline_and_the_pool_change_the_neurons_alone(
    forkserver: ForkServer, config: UnlearnConfig, tmp_path: Path, name: str
) -> None:
    """Also under a tied head, with weight decay, clipping, and exact sums."""
    model = LayeredModel(SHAPE[name])
    module = model.build((0, model.num_layers), seed=config.seed)
    before = {
        n: p.detach() for layer in range(model.num_layers) for n, p in module.named_layer_parameters(layer).items()
    }
    found: dict[str, dict[str, Tensor]] = {}
    for how in ("pipeline", "pool"):
        out = tmp_path / how
        masks = write_masks(model, out)
        here = replace(config, out=out, **({"exact_sums": True} if how == "pipeline" else {"recovery": "auto"}))
        run = run_workers if how == "pipeline" else run_pool
        found[how] = run(forkserver, here, SHAPE[name], out).weights
        assert set(found[how]) == set(before)
        for key, moved in changed(before, found[how]).items():
            allowed = masks[key].expand(moved.shape) if key in masks else torch.zeros_like(moved)
            assert not (moved & ~allowed).any(), f"{how}: {key} has changed where it may not"
            assert not allowed.any() or (moved & allowed).sum() > 0.9 * allowed.sum(), key
    assert relative_difference(found["pipeline"], found["pool"]) < 1e-6


def test_a_layer_that_is_held_later_is_masked_too_and_a_mask_that_is_gone_is_told(tmp_path: Path) -> None:
    model = LayeredModel(SHAPE["gpt2"])
    masks = write_masks(model, tmp_path)
    store = ResidentStore(model, [(0, 2)], DECAYING, seed=0, device=torch.device("cpu"), masks=tmp_path / NEURONS)
    prepared = store.prepare([2])["2"]
    store.adopt(["2"])
    store.hold([(0, 3)])
    assert store.states["2"] is prepared
    store.start_again([prepared], None)  # others fill it
    before = {name: weight.clone() for name, weight in prepared.weights().items()}
    step(prepared, 0)
    moved = changed(before, prepared.weights())
    assert {name for name, each in moved.items() if each.any()} == set(masks)
    (mask_file(tmp_path / NEURONS, 3)).unlink()
    with pytest.raises(ModelError, match=r"layer-00003\.safetensors cannot be read.* says which weights may change"):
        store.hold([(0, 4)])


# ---- what may be asked ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neurons": 0.1, "method": "replay"}, "neurons is 0.1; allowed: 0 for method replay, which has no steps"),
        (
            {"neurons": 0.1, "scheduler": "roundpipe", "recovery": "auto", "lora_rank": 2},
            "neurons is 0.1; allowed: 0 with lora_rank",
        ),
        ({"neurons": 0.1, "recovery": "checkfree"}, "recovery is 'checkfree'; allowed: exact, replica, checkpoint"),
        ({"neurons": 0.1, "recovery": "auto"}, "recovery is 'auto'; allowed: exact, replica, checkpoint"),
        ({"neurons": 1.5}, "neurons is 1.5; allowed: 0 to 1"),
        ({"neighbours": 2, "method": "grad_ascent"}, "neighbours is 2; allowed: 0 for method grad_ascent, which takes"),
        ({"forgotten_below": 0.1, "method": "rmu"}, "forgotten_below is 0.1; allowed: 0 for method rmu"),
        ({"forgotten_below": 0.1, "method": "concept"}, "forgotten_below is 0.1; allowed: 0 for method concept"),
        ({"concept_words": 3}, "concept_words is 3; allowed: nothing for method npo"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(config: UnlearnConfig, changes: dict[str, object], message: str) -> None:
    given = {"data": "rows", "neurons": 0.0, **changes}
    with pytest.raises(ConfigError) as told:
        replace(config, **given).validate()
    assert message in str(told.value)
    assert TrainConfig().masks is None


def test_what_was_made_beforehand_is_not_asked_for_otherwise_later(config: UnlearnConfig, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(to_toml(config))
    _require_kept(replace(config, resume=True, lr=1.0, forgotten_below=0.5), tmp_path)
    with pytest.raises(
        ConfigError, match=r"cannot resume: neighbours was 0 and is 3, neurons was 0\.1 and is 0\.2; al"
    ):
        _require_kept(replace(config, neurons=0.2, neighbours=3), tmp_path)


# ---- only what is not forgotten yet ----


@pytest.mark.parametrize("name", ["npo", "dpo", "grad_diff", "ceu"])
def test_a_row_whose_answer_is_forgotten_adds_nothing(name: str, tmp_path: Path) -> None:
    job = unlearn_rows.job(name, tmp_path, blank=())
    kind = job.method.kinds[0]
    material = job.material
    items = material.items(kind, 0, 8)
    labels = torch.stack([torch.from_numpy(material.sample(item).labels) for item in items])
    torch.manual_seed(0)
    logits = (3 * torch.randn(*labels.shape, unlearn_rows.VOCABULARY)).requires_grad_()
    mine = labels.chunk(2)[0] if kind == PAIR else labels
    sure = torch.exp(-row_nll(logits.detach()[: len(mine)], mine) / (mine != IGNORED).sum(dim=1))
    below = float(sure.median()) * 1.0001
    gone = [row for row, p in enumerate(sure.tolist()) if p < below]
    assert 0 < len(gone) < len(mine)
    left = still_known(kind, logits, labels, below)
    assert [row for row in range(len(labels)) if not (left[row] == labels[row]).all()] == gone
    assert all((left[row] == IGNORED).all() for row in gone)
    before = torch.rand(len(labels)) * 9
    (value,) = job.method.loss(kind, logits, left, before).values()
    (gradient,) = torch.autograd.grad(value, logits)
    pairs = [*gone, *(len(mine) + row for row in gone)] if kind == PAIR else gone
    assert not gradient[pairs].any()
    assert gradient[[row for row in range(len(labels)) if row not in pairs]].any()
    assert torch.equal(still_known(RETAIN, logits, labels, 1.0), labels)
    assert still_known(kind, logits, labels, 0.0) is labels


def test_the_steps_of_a_request_leave_them_out_and_count_them(tmp_path: Path) -> None:
    plain, kept = unlearn_rows.job("grad_diff", tmp_path), unlearn_rows.job("grad_diff", tmp_path)
    strict = UnlearnJob(
        kept.method, kept.material, kept.reference, unlearn_rows.MICROBATCHES, unlearn_rows.SIZE, forgotten_below=1.0
    )
    for microbatch, kind in enumerate(plain.method.kinds):
        batch = plain.batch(0, microbatch, Needs.LOSS)
        logits = torch.randn(*batch["labels"].shape, unlearn_rows.VOCABULARY)
        (mine,), (theirs,) = (job.loss(logits, batch).values() for job in (strict, plain))
        assert float(theirs) > 0
        assert (float(mine) == 0) == (kind == FORGET)
        assert strict.counts(0, microbatch) == plain.counts(0, microbatch)
