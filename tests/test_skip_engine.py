"""SkipPipe on real workers, against one process that runs the same routes: losses, gradients and weights to 1e-5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.config import ConfigError, TrainConfig
from jobs.pipelines import layer_costs, plan_layout, stage_at
from jobs.routes import Routes
from launch.forkserver import ForkServer
from pipeline.model.layered import LayeredModel
from pipeline.schedule.ops import F, Schedule
from pipeline.schedule.verify import verify
from recovery.remedy import CannotRestore
from tests.harness import plain_training, run_workers
from tests.test_parity import MODELS, check, reference, settings

LLAMA = MODELS["llama"]
STAGES = [[0, 1], [2], [3, 4], [5]]


def network(folder: Path, **changes: object) -> Path:
    """Six nodes in four stages; what is None is left out."""
    hops = [[0.0 if a == b else 0.001 * (1 + (3 * a + b) % 5) for b in range(6)] for a in range(6)]
    values = {"hop_s": hops, "stages": STAGES, "forward_s": 0.004, "contention": False, **changes}
    path = folder / "network.json"
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return path


def skipping(folder: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "scheduler": "skippipe", "workers": 6, "microbatches": 4, "search_moves": 400,
    }  # fmt: skip
    if "network" not in changes:
        values["network"] = network(folder)
    return settings(**{**values, **changes})


def train_schedule(config: TrainConfig) -> Schedule:
    return plan_layout(config, LayeredModel(LLAMA), config.evaluate_samples)[0].train


@pytest.mark.parametrize(("skip", "swaps"), [(0.25, False), (0.5, True)])
def test_equals_the_same_routes_in_one_process(
    forkserver: ForkServer, tmp_path: Path, skip: float, swaps: bool
) -> None:
    config = skipping(tmp_path, skip=skip, swaps=swaps, seed=3, microbatches=6)
    routes = train_schedule(config).routes
    assert len(set(routes)) > 1, "all microbatches take one route: nothing is shown"
    found = run_workers(forkserver, config, LLAMA, tmp_path)
    check(found, plain_training(config, LLAMA, routes=routes))


def test_without_skips_equals_plain_torch(forkserver: ForkServer, tmp_path: Path) -> None:
    check(run_workers(forkserver, skipping(tmp_path, full_every=2), LLAMA, tmp_path), reference("llama"))


def test_a_stage_that_nobody_holds(tmp_path: Path) -> None:
    """The routes around a lost stage are a model without its blocks: proved, and run by no one who waits for it."""
    config = skipping(tmp_path, skip=0.25, full_every=5)
    routes = Routes(config, layer_costs(LayeredModel(LLAMA), config.sequence_length), 4, 64)
    lost = routes.spans[1]
    made = routes.around({0, 1, 3, 4, 5}).schedules
    assert set(made) == {"train", "evaluate", "full"}
    for schedule in made.values():
        verify(schedule)
        assert lost not in schedule.holders
        assert 2 not in schedule.lanes
    assert made["train"].num_microbatches == made["full"].num_microbatches == 4
    assert {len(route.forward) for route in made["train"].routes} == {4}, "as many stages as before are visited"
    assert {len(route.forward) for route in made["full"].routes} == {4}


def test_replicas_take_over_and_come_back(tmp_path: Path) -> None:
    config = skipping(tmp_path, skip=0.25)
    routes = Routes(config, layer_costs(LayeredModel(LLAMA), config.sequence_length), 4, 64)
    without = routes.around({0, 1, 2, 4, 5}).train
    span = routes.spans[2]
    assert without.holders[span] == (4,)
    took = [m for (kind, s, m), w in without.home.items() if kind == F and s == span and w == 4]
    assert len(took) == sum(span in route.forward for route in without.routes)
    assert routes.around(range(6)).key == routes.layout.key


def test_the_first_stage_cannot_be_passed_by(tmp_path: Path) -> None:
    config = skipping(tmp_path)
    routes = Routes(config, layer_costs(LayeredModel(LLAMA), config.sequence_length), 4, 64)
    assert routes.around({1, 2, 3, 4, 5}).train.holders[routes.spans[-1]] == (1,)
    with pytest.raises(CannotRestore, match="first stage"):
        routes.around({2, 3, 4, 5})


def test_stages_are_found_where_the_file_has_none(tmp_path: Path) -> None:
    config = skipping(tmp_path, network=network(tmp_path, stages=None), replicas=2, microbatches=6, skip=0.33)
    schedule = train_schedule(config)
    assert [len(workers) for workers in schedule.holders.values()] == [2, 2, 2, 2], "three stages and the head"


def test_injected_faults_hit_the_first_holder_of_a_stage(tmp_path: Path) -> None:
    config = skipping(tmp_path)
    holders = train_schedule(config).holders
    assert [stage_at(config, holders, place) for place in range(6)] == [0, None, 1, 2, None, 3]


@pytest.mark.parametrize(
    ("changes", "file", "message"),
    [
        ({"skip": 0.4}, {}, "skip is 0.4, which no route satisfies"),
        ({"workers": 5}, {}, "workers is 5; allowed: 6"),
        ({"microbatches": 1}, {}, "microbatches: 1; allowed: 2 or more"),
        ({"skip": 0.75, "microbatches": 2}, {}, "enough for every worker to be visited"),
        ({}, {"hop_s": [[0, 1], [1]]}, "allowed: 2"),
        ({}, {"hop_s": [[0, -1], [1, 0]]}, "allowed: a number of 0 to 1e"),
        ({}, {"memory_slots": 0}, "memory_slots"),
        ({}, {"stages": [[0, 1], [2, 9]]}, "stages names nodes"),
        ({}, {"stages": [[k] for k in range(6)] + [[]]}, "one or more nodes in each"),
    ],
)
def test_refusals_name_what_cannot_be_met(
    tmp_path: Path, changes: dict[str, object], file: dict[str, object], message: str
) -> None:
    config = skipping(tmp_path, **{"network": network(tmp_path, **file), **changes})
    with pytest.raises(ConfigError, match=message):
        train_schedule(config)


def test_settings_that_belong_to_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="network"):
        skipping(tmp_path, network=None).validate()
    with pytest.raises(ConfigError, match="unless scheduler is skippipe"):
        settings(skip=0.25).validate()
    with pytest.raises(ConfigError, match="recovery"):
        skipping(tmp_path, recovery="redundant").validate()
