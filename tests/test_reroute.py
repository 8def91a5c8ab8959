"""Workers are killed in the middle of steps whose microbatches can take other routes: nothing waits or is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.forkserver import ForkServer
from tests.harness import Command, relative_difference, run_command
from tests.test_recovery import POINTS, _eight_blocks, events, exported, metrics, settings, whole_ledger

STAGES = [[0, 1], [2, 3], [4], [5]]
TOKENS = 8 * 32
STEPS = 24  # a worker that is started is there long before


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six nodes; the last two stages have one holder each."""
    hops = [[0.0 if a == b else 0.001 for b in range(6)] for a in range(6)]
    path = tmp_path_factory.mktemp("network") / "network.json"
    path.write_text(json.dumps({"hop_s": hops, "stages": STAGES, "forward_s": 0.002, "contention": False}))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _eight_blocks(tmp_path_factory.mktemp("model"))


def train(forkserver: ForkServer, network: Path, model: Path, out: Path, *more: str, code: int = 0) -> Command:
    flags = ["--scheduler", "skippipe", "--network", str(network), "--workers", "6", "--model", str(model),
             "--search-moves", "300", "--steps", str(STEPS), *more]  # fmt: skip
    done = run_command(forkserver, out.with_suffix(".log"), *settings(out, *flags), timeout_s=60)
    assert done.code == code, done.output
    return done


def every_step_counts_once(out: Path) -> None:
    """Steps, samples and tokens are those of a run without a loss."""
    whole_ledger(out, STEPS)
    assert [line["step"] for line in metrics(out)] == list(range(1, STEPS + 1))
    assert {line["tokens"] for line in metrics(out)} == {TOKENS}


@pytest.fixture(scope="module")
def calm(
    forkserver: ForkServer, network: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs without a loss, by what they skip."""
    root = tmp_path_factory.mktemp("calm")
    for skip in ("0", "0.25"):
        train(forkserver, network, model, root / skip, "--skip", skip)
    return {skip: root / skip for skip in ("0", "0.25")}


@pytest.mark.parametrize("at", [at if at == "backward" else pytest.param(at, marks=pytest.mark.long) for at in POINTS])
def test_a_replica_takes_over_and_the_loss_is_that_of_the_calm_run(
    forkserver: ForkServer, network: Path, model: Path, calm: dict[str, Path], tmp_path: Path, at: str
) -> None:
    worker = POINTS.index(at) % 4
    out = tmp_path / "run"
    done = train(forkserver, network, model, out, "--inject", f"kill:worker={worker},step=7,at={at}")
    assert "its microbatches take other routes" in done.output
    (rerouted,) = events(out, "rerouted")
    (back,) = events(out, "rejoined")
    assert (rerouted["worker"], back["worker"], back["remedy"]) == (worker, worker, "replica")
    assert not events(out, "rolled_back")
    every_step_counts_once(out)
    ours, theirs = ([line["loss"] for line in metrics(run)] for run in (out, calm["0"]))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 2e-5, "sums in another order, no more"
    assert relative_difference(exported(out), exported(calm["0"])) < 1e-4


@pytest.mark.parametrize(
    "at", ["forward", *(pytest.param(at, marks=pytest.mark.long) for at in ("backward", "commit"))]
)
def test_the_last_holder_of_a_stage_is_passed_by_until_it_is_rebuilt(
    forkserver: ForkServer, network: Path, model: Path, calm: dict[str, Path], tmp_path: Path, at: str
) -> None:
    out = tmp_path / "run"
    train(forkserver, network, model, out, "--skip", "0.25", "--inject", f"kill:worker=4,step=7,at={at}")
    (rerouted,) = events(out, "rerouted")
    (back,) = events(out, "rejoined")
    assert (rerouted["worker"], back["worker"], back["remedy"]) == (4, 4, "rehearse")
    every_step_counts_once(out)
    ours, theirs = ([line["loss"] for line in metrics(run)] for run in (out, calm["0.25"]))
    assert ours[:7] == theirs[:7], "before the loss nothing differs"
    assert all(abs(a - b) < 0.5 for a, b in zip(ours, theirs, strict=True))
    assert set(exported(out)) == set(exported(calm["0.25"])), "the whole model is there in the end"


def test_both_replicas_of_a_stage_and_a_node_of_the_first(
    forkserver: ForkServer, network: Path, model: Path, tmp_path: Path
) -> None:
    faults = ";".join(f"kill:worker={w},step={s},at=backward" for w, s in ((2, 5), (3, 5), (0, 9)))
    train(
        forkserver, network, model, out := tmp_path / "run", "--skip", "0.25", "--full-every", "4", "--inject", faults
    )
    assert sorted(event["worker"] for event in events(out, "rerouted")) == [0, 2, 3]
    assert len(events(out, "rejoined")) == 3
    every_step_counts_once(out)


@pytest.mark.parametrize("workers", [(0, 1), pytest.param((5,), marks=pytest.mark.long)])
def test_what_no_route_can_pass_by_comes_back_from_a_checkpoint(
    forkserver: ForkServer, network: Path, model: Path, calm: dict[str, Path], tmp_path: Path, workers: tuple[int, ...]
) -> None:
    """The last node of the first stage, and a stage that no remedy but a checkpoint can rebuild."""
    faults = ";".join(f"kill:worker={w},step=7,at=backward" for w in workers)
    train(forkserver, network, model, out := tmp_path / "run", "--skip", "0.25", "--inject", faults)
    assert [event["to"] for event in events(out, "rolled_back")][-1] == "step-00000005"
    whole_ledger(out, STEPS)
    ours, theirs = ([line["loss"] for line in metrics(run)] for run in (out, calm["0.25"]))
    assert ours[-1] == pytest.approx(theirs[-1], abs=2e-5)


@pytest.mark.long
def test_a_replacement_that_dies_as_it_joins(
    forkserver: ForkServer, network: Path, model: Path, tmp_path: Path
) -> None:
    faults = "kill:worker=4,step=7,at=backward;kill:worker=6,step=7,at=join;kill:worker=6,step=8,at=join"
    train(forkserver, network, model, out := tmp_path / "run", "--skip", "0.25", "--inject", faults)
    every_step_counts_once(out)
    assert events(out, "rejoined")[-1]["worker"] in (4, 6)
    (rerouted, *_), (resumed, *_) = events(out, "rerouted"), events(out, "resumed")
    assert [line["step"] for line in whole_ledger(out, STEPS) if line["view"] == resumed["view"]], (
        "steps without the stage"
    )
    assert rerouted["worker"] == 4


def test_the_end_of_a_run_waits_for_the_stage_that_is_missing(
    forkserver: ForkServer, network: Path, model: Path, calm: dict[str, Path], tmp_path: Path
) -> None:
    """The last step commits without the stage, whose first replacement dies too; what is saved is whole."""
    last = STEPS - 1
    deaths = [f"kill:worker=4,step={last},at=backward", *(f"kill:worker=6,step={s},at=join" for s in (last, STEPS))]
    train(forkserver, network, model, out := tmp_path / "run", "--skip", "0.25", "--inject", ";".join(deaths))
    every_step_counts_once(out)
    ended, back = whole_ledger(out, STEPS)[-1], events(out, "rejoined")[-1]
    assert ended["time"] < back["time"], "the last step did not wait"
    assert events(out, "exported")[-1]["time"] > back["time"], "the export did"
    assert set(exported(out)) == set(exported(calm["0.25"]))


def test_without_recovery_the_loss_ends_the_run_by_name(
    forkserver: ForkServer, network: Path, model: Path, tmp_path: Path
) -> None:
    flags = ["--recovery", "none", "--inject", "kill:worker=2,step=3,at=forward"]
    done = train(forkserver, network, model, tmp_path / "run", *flags, code=1)
    assert "what was lost cannot be brought back: recovery is off" in done.output
