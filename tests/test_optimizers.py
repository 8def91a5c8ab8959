"""Learning-rate schedules against their formulas; Muon and SGD against torch's own on a whole model, over workers that
hold state and workers that do not, through a loss and through another optimizer's checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig

from jobs.config import ConfigError, TrainConfig
from launch.forkserver import ForkServer
from pipeline.model.layered import LayeredModel
from pipeline.state.layer_state import LayerState
from pipeline.state.optimizer import OptimizerConfig, learning_rate
from pipeline.state.resident import ResidentStore
from recovery import checkpoint
from tests.harness import plain_training, relative_difference, run_command, run_pool, run_workers
from tests.test_recovery import events, same_weights, settings

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": "muon", "lr": 0.01}, "momentum": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05},
    "sgd": {"optimizer": "sgd", "lr": 0.1},
}  # fmt: skip


# ---- the learning rate ----


def by_hand(name: str, step: int) -> float:
    """Peak 2, floor 0.5, 10 steps of warm-up, 110 in all, WSD decays over the last 22."""
    if step < 10:
        return 2 * (step + 1) / 10
    return {
        "cosine": 0.5 + 1.5 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2,
        "linear": 2 - 1.5 * (step - 10) / 100,
        "wsd": 2.0 if step < 88 else 2 - 1.5 * (step - 88) / 22,
        "constant": 2.0,
    }[name]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_a_schedule_is_its_formula(name: str) -> None:
    config = TrainConfig(lr=2.0, steps=110, warmup=10, min_lr_ratio=0.25, lr_schedule=name, lr_decay_share=0.2)  # type: ignore[arg-type]
    for step in range(110):
        assert learning_rate(config.optimizer_config(), step) == pytest.approx(by_hand(name, step), rel=1e-12)
    assert learning_rate(config.optimizer_config(), 10) == 2.0
    end = 2.0 if name == "constant" else 0.5
    assert learning_rate(config.optimizer_config(), 110) == learning_rate(config.optimizer_config(), 500) == end


@pytest.mark.parametrize(
    ("name", "theirs", "more"),
    [
        ("cosine", "cosine_with_min_lr", {"min_lr_rate": 0.25}),
        ("linear", "linear", {}),
        ("wsd", "warmup_stable_decay", {"num_decay_steps": 22, "min_lr_ratio": 0.25, "decay_type": "linear"}),
        ("constant", "constant_with_warmup", {}),
    ],
)
def test_after_the_warm_up_a_schedule_is_that_of_transformers(name: str, theirs: str, more: dict[str, Any]) -> None:
    """Whose warm-up begins at zero: its first step does nothing."""
    ratio = 0.0 if name == "linear" else 0.25
    config = OptimizerConfig(2.0, 110, 10, ratio, schedule=name, decay_share=0.2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = transformers.get_scheduler(theirs, optimizer, 10, 110, more)
    for step in range(110):
        if step >= 10:
            assert learning_rate(config, step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_a_long_warm_up_leaves_wsd_what_is_left() -> None:
    config = OptimizerConfig(1.0, 10, 9, 0.0, schedule="wsd", decay_share=0.5)
    assert [round(learning_rate(config, step), 3) for step in (8, 9, 10)] == [1.0, 1.0, 0.0]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 0.9}, r"^momentum is 0.9; allowed: unset under optimizer adamw: see beta1$"),
        ({"optimizer": "muon", "workers": 4, "replicas": 2, "shard_optimizer": True}, r"^optimizer is 'muon'; allowed"),
        ({"optimizer": "moun"}, r"^optimizer is 'moun'; allowed: one of adamw, sgd, muon \(did you mean muon\?\)"),
        ({"optimizer": "muon", "momentum": 1.0}, r"^momentum is 1.0; allowed: 0 or more and below 1"),
        ({"lr_decay_share": 0.0}, r"^lr_decay_share is 0.0; allowed: above 0, up to 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes).validate()


# ---- what a state keeps ----


def test_muon_keeps_momentum_of_the_matrices_of_blocks_and_adamw_s_moments_of_the_rest() -> None:
    store = ResidentStore(
        LayeredModel(CONFIG), [(0, 5)], OptimizerConfig(optimizer="muon", momentum=0.95), seed=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    for name, state in store.states.items():
        for key, parameter in state.parameters.items():
            kept = set(state.moments(key))
            muon = name in ("1", "2", "3") and parameter.dim() == 2
            assert kept == ({"momentum_buffer"} if muon else {"step", "exp_avg", "exp_avg_sq"}), key
        assert list(state.tensors()) == state.keys()


@pytest.mark.parametrize("name", ["muon", "momentum"])
def test_a_state_that_was_loaded_goes_on_bit_for_bit_and_one_of_another_optimizer_begins_anew(name: str) -> None:
    drawn = torch.Generator().manual_seed(3)
    config = TrainConfig(**OTHERS[name]).optimizer_config()

    def state(config: OptimizerConfig = config) -> LayerState:
        weights = {"w": torch.nn.Parameter(torch.ones(6, 4)), "b": torch.nn.Parameter(torch.ones(6))}
        return LayerState("1", weights, config, block=True)

    def step(each: LayerState, gradient: torch.Tensor) -> None:
        each.gradient.copy_(gradient)
        each.apply(1.0, 0.1)

    first, other = state(), state()
    gradients = [torch.randn(first.size, generator=drawn) for _ in range(4)]
    for gradient in gradients[:2]:
        step(first, gradient)
    other.load({key: tensor.clone() for key, tensor in first.tensors().items()})
    for gradient in gradients[2:]:
        step(first, gradient)
        step(other, gradient)
    assert all(torch.equal(other.tensors()[key], tensor) for key, tensor in first.tensors().items())
    adamw = state(OptimizerConfig())
    step(adamw, gradients[0])
    other.load(adamw.tensors())
    assert not other.moments("w")["momentum_buffer"].any()
    assert torch.equal(other.weights()["w"], adamw.weights()["w"])
    if name == "muon":  # whose norms and biases AdamW has trained before as well
        assert torch.equal(other.moments("b")["exp_avg"], adamw.moments("b")["exp_avg"])
    other.begin_anew()
    assert not any(t.any() for key in ("w", "b") for t in other.moments(key).values())


# ---- whole runs ----


@pytest.mark.parametrize("name", [n if n == "muon" else pytest.param(n, marks=pytest.mark.long) for n in OTHERS])
def test_workers_and_pools_train_as_torch_does(forkserver: ForkServer, tmp_path: Path, name: str) -> None:
    config = TrainConfig(
        workers=2, microbatches=4, microbatch_size=2, sequence_length=16, steps=3, warmup=0, weight_decay=0.3,
        evaluate_samples=4, **OTHERS[name],
    )  # fmt: skip
    plain = plain_training(config, CONFIG)
    held = run_workers(forkserver, config, CONFIG, tmp_path / "held")
    pool = run_pool(forkserver, config, CONFIG, tmp_path / "pool")
    # Muon's products are of bfloat16: a last bit of a sum may become one of its own
    least = 1e-3 if name == "muon" else 1e-5
    for ours in (held, pool):
        assert ours.losses == pytest.approx(plain.losses, rel=least / 10 if name == "muon" else least)
        assert relative_difference(ours.weights, plain.weights) < least


def run(forkserver: ForkServer, out: Path, *more: str) -> str:
    done = run_command(forkserver, out.with_suffix(".log"), *settings(out, "--steps", "6", *more), timeout_s=60.0)
    assert done.code == 0, done.output
    return done.output


def test_a_killed_worker_under_muon_changes_no_bit(forkserver: ForkServer, tmp_path: Path) -> None:
    flags = ["--optimizer", "muon", "--lr", "0.01", "--workers", "4", "--replicas", "2"]
    run(forkserver, calm := tmp_path / "calm", *flags)
    kills = "kill:worker=1,step=2,at=backward;kill:worker=2,step=4,at=optimizer"
    run(forkserver, out := tmp_path / "run", *flags, "--inject", kills)
    assert [event["remedy"] for event in events(out, "remedy")] == ["replica"] * 2
    assert same_weights(out, calm)


LONG = {
    "rollback": ["--recovery", "checkpoint", "--inject", "kill:worker=1,step=5", "--checkpoint-every", "2"],
    "snapshot": ["--snapshot", "neighbour", "--inject", "kill:worker=1,step=3"],
    "elastic": ["--workers", "2:3", "--snapshot", "neighbour", "--exact-sums", "--inject", "kill:worker=2,step=2"],
    "pool": ["--scheduler", "roundpipe", "--inject", "kill:worker=1,step=3"],
}
CALM = {name: flags[: flags.index("--inject")] for name, flags in LONG.items()}


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
@pytest.mark.parametrize("name", LONG)
def test_every_exact_way_back_is_exact_with_every_optimizer(
    forkserver: ForkServer, tmp_path: Path, name: str, optimizer: str
) -> None:
    flags = ["--workers", "3", "--optimizer", optimizer, "--momentum", "0.9", "--lr", "0.01"]
    run(forkserver, calm := tmp_path / "calm", *flags, *CALM[name])
    run(forkserver, out := tmp_path / "run", *flags, *LONG[name])
    assert same_weights(out, calm)


@pytest.mark.long
def test_checkfree_rebuilds_a_stage_under_muon(forkserver: ForkServer, tmp_path: Path) -> None:
    flags = ["--workers", "4", "--optimizer", "muon", "--lr", "0.01", "--recovery", "checkfree"]
    run(forkserver, out := tmp_path / "run", *flags, "--inject", "kill:worker=2,step=3")
    assert [event["remedy"] for event in events(out, "remedy")] == ["checkfree"]


@pytest.mark.long
def test_a_run_goes_on_with_another_optimizer_scheduler_and_number_of_workers(
    forkserver: ForkServer, tmp_path: Path
) -> None:
    run(forkserver, out := tmp_path / "run", "--workers", "2", "--optimizer", "adamw")
    again = ["--resume", "--change", "--steps", "8", "--optimizer", "muon", "--workers", "3"]
    done = run_command(forkserver, tmp_path / "log", *settings(out), *again, "--scheduler", "roundpipe")
    assert done.code == 0, done.output
    found = checkpoint.find(out / "checkpoints", 0)
    assert found.manifest is not None
    assert found.path is not None
    kinds = {key.split("/")[0] for key in checkpoint.read_layer(found.path, found.manifest, 1)}
    assert kinds == {"param", "momentum_buffer", "step", "exp_avg", "exp_avg_sq", "lr_scale"}
