"""A part of the weights is trained and the rest is frozen: equal to torch in one process, on the pipeline and on the
pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.config import ConfigError, TrainConfig
from jobs.plan import identity
from launch.forkserver import ForkServer
from pipeline.model.layered import TIED, LayeredModel, ModelError
from pipeline.runtime.batch import Needs
from pipeline.runtime.compute import Settings
from pipeline.runtime.footprint import measure, state_bytes
from pipeline.schedule.lower import lower
from pipeline.schedule.ops import Route
from schedulers import build
from tests.harness import Outcome, make_job, plain_training, relative_difference, run_pool, run_workers
from tests.test_lora import weights_at_first
from tests.test_parity import MODELS, TOLERANCE, settings
from tests.test_skip_engine import skipping, train_schedule

RMU = "*.layers.[45].mlp.down_proj.weight"


def config(**changes: Any) -> TrainConfig:
    return settings(**{"steps": 6, "lr": 3e-2, "weight_decay": 0.0, **changes})


def check(found: Outcome, chosen: TrainConfig, model: str, routes: Sequence[Route] = ()) -> None:
    expected = plain_training(chosen, MODELS[model], routes=routes)
    first = weights_at_first(MODELS[model], None, seed=chosen.seed)
    assert found.replicas_equal
    assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    assert found.norms == pytest.approx(expected.norms, rel=10 * TOLERANCE)
    assert relative_difference(found.gradients, expected.gradients) <= TOLERANCE
    trained = {name: tensor for name, tensor in found.weights.items() if name in expected.weights}
    assert relative_difference(trained, expected.weights) <= TOLERANCE
    assert expected.losses[-1] < expected.losses[0]
    assert set(found.weights) == set(first)
    frozen = set(first) - set(trained)
    assert all(torch.equal(found.weights[name], first[name]) for name in frozen), "a frozen weight moved"
    assert not any(torch.equal(tensor, first[name]) for name, tensor in trained.items())


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("llama", {"trained": RMU, "scheduler": "zero_bubble", "workers": 4, "replicas": 2, "shard_optimizer": True}),
        ("gpt2", {"trained": "*.wte.weight", "scheduler": "one_f_one_b", "workers": 4}),
        pytest.param("llama", {"trained": "lm_head.weight, model.norm.*", "scheduler": "balanced", "exact_sums": True},
                     marks=pytest.mark.long),
    ],
    ids=["down_proj", "shared embedding", "head"],
)  # fmt: skip
def test_a_pipeline_equals_plain_torch(
    forkserver: ForkServer, tmp_path: Path, model: str, changes: dict[str, Any]
) -> None:
    chosen = config(**changes)
    chosen.validate()
    check(run_workers(forkserver, chosen, MODELS[model], tmp_path), chosen, model)


def test_the_pool_equals_plain_torch(forkserver: ForkServer, tmp_path: Path) -> None:
    chosen = config(trained=RMU, scheduler="roundpipe", at_once=2)
    check(run_pool(forkserver, chosen, MODELS["llama"], tmp_path), chosen, "llama")


def test_where_routes_skip_stages_without_a_gradient_are_passed_as_well(forkserver: ForkServer, tmp_path: Path) -> None:
    more: dict[str, Any] = {"skip": 0.5, "swaps": True, "seed": 3, "microbatches": 6, "steps": 6, "lr": 3e-2}
    chosen = skipping(tmp_path, trained="*.layers.[25].*", weight_decay=0.0, **more)
    routes = train_schedule(chosen).routes
    assert len(set(routes)) > 1
    check(run_workers(forkserver, chosen, MODELS["llama"], tmp_path), chosen, "llama", routes)


def test_states_say_what_of_them_is_trained() -> None:
    model = LayeredModel(MODELS["gpt2"], trained=("*.h.2.mlp.*", "lm_head.weight"))
    trained = {state.name: state.keys[: state.trained] for state in model.states if state.trained}
    assert trained == {
        TIED: ("transformer.wte.weight",),
        "3": tuple(f"transformer.h.2.mlp.{part}.{kind}" for part in ("c_fc", "c_proj") for kind in ("weight", "bias")),
    }
    assert model.learning == {0, 3, 7}
    assert state_bytes(model, [(1, 2)]) == model.parameter_bytes(1)
    assert state_bytes(model, [(0, 1)]) == model.parameter_bytes(0) + 12 * 96 * 32


def test_below_what_is_trained_nothing_is_kept_for_a_backward() -> None:
    """And nothing is computed there: the forward leaves its output, and the backward sends zeros on."""
    schedule = lower(build("one_f_one_b", [(0, 3), (3, 5), (5, 8)], 2))
    job, found = make_job(config(), 96), {}
    for patterns in ((), ("*.layers.5.*",), ("*.layers.0.*",)):
        found[patterns] = measure(
            LayeredModel(MODELS["llama"], trained=patterns), schedule, job, Settings(torch.device("cpu"))
        )
    size = 4 * job.batch(0, 0, Needs.INPUT)["input_ids"].numel() * 32
    every, top, bottom = found.values()
    assert top[0, 3].activation <= size < every[0, 3].activation
    assert top[3, 5].activation <= 3 * size < every[3, 5].activation
    assert bottom[3, 5].activation > 3 * size, "what is below is to learn"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trained": ""}, "trained is ''; allowed: all, or patterns separated by commas"),
        ({"trained": "*.mlp.*,"}, "trained is .*; allowed: all, or patterns"),
        ({"trained": "*.mlp.*", "lora_rank": 2}, "trained is .*; allowed: all with lora_rank"),
        ({"trained": "*.mlp.*", "recovery": "checkfree"}, "recovery is 'checkfree'; allowed: .* which it would change"),
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**changes).validate()


def test_a_pattern_that_matches_nothing_is_refused_with_what_is_near() -> None:
    with pytest.raises(ModelError, match=r"trained has 'model.layers.1.mlp.down_prj.weight', which matches none of the "
                       r"model's 57 parameters \(did you mean model.layers.1.mlp.down_proj.weight\?\)"):  # fmt: skip
        LayeredModel(MODELS["llama"], trained=("*.mlp.*", "model.layers.1.mlp.down_prj.weight"))
    with pytest.raises(ModelError, match=r"trained has '\*.layers.4.*', which matches none"):
        LayeredModel(MODELS["llama"], trained=("*.layers.4.*",), depth=3)


def test_a_checkpoint_is_of_what_was_trained() -> None:
    assert "trained" not in identity(config())
    assert identity(config(trained=RMU))["trained"] == RMU
