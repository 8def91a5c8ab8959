"""Runs that shrink and grow under real kills: what comes out is, bit for bit, the run that nobody disturbed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import psutil
import pytest

from launch.forkserver import ForkServer
from tests.harness import run_command
from tests.test_recovery import (
    POINTS,
    _await_steps,
    _end_family,
    _nodes,
    events,
    free_port,
    metrics,
    same_weights,
    settings,
    train,
    whole_ledger,
)

BETWEEN = 30  # losses; a worker that is started is there after some twenty
SHORT = 50  # where nobody is awaited
SMALL = ["--checkpoint-every", "50", "--replicas", "2", "--exact-sums", "--workers"]


@pytest.fixture(scope="module")
def calm(forkserver: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run of another size that nothing has happened to, by its steps."""
    root = tmp_path_factory.mktemp("calm")

    @cache
    def made(steps: int) -> Path:
        train(forkserver, root / str(steps), *SMALL, "2", "--replicas", "1", "--steps", str(steps))
        return root / str(steps)

    return made


def sizes(out: Path) -> list[int]:
    return [event["workers"] for event in events(out, "resized")]


@pytest.mark.parametrize(
    "points", [("backward", "reduce", "commit"), pytest.param(POINTS, marks=pytest.mark.long, id="all")]
)
def test_a_run_that_shrinks_at_any_point_of_a_step_and_grows_is_bitwise_the_calm_run(
    forkserver: ForkServer, calm: Callable[[int], Path], tmp_path: Path, points: Sequence[str]
) -> None:
    steps = 10 + BETWEEN * len(points)
    kills = ";".join(f"kill:worker={worker},step={8 + BETWEEN * worker},at={at}" for worker, at in enumerate(points))
    flags = [
        *SMALL,
        "1:4",
        "--steps",
        str(steps),
        "--cooldown",
        "0",
        "--no-shift",
        "--migration-mib",
        "0",
        "--recovery",
        "replica",
        "--peak-tflops",
        "0.25",
    ]
    done = train(forkserver, out := tmp_path / "run", *flags, "--inject", kills)
    assert done.output.count("was killed by SIGKILL") == len(points)
    assert sizes(out).count(4) >= len(points) - 2, "it has grown again"
    assert {event["remedy"] for event in events(out, "shrunk")} == {"replica"}
    assert not events(out, "rolled_back")
    assert len(metrics(out)) == steps, "a step was told twice or not at all"
    workers = {1: 4} | {event["view"]: event["workers"] for event in events(out, "resized")}
    found = {line["view"]: round(line["tflops"] / line["mfu"] / 0.25, 6) for line in metrics(out)}
    assert {view: found[view] for view in workers if view in found} == {v: n for v, n in workers.items() if v in found}
    assert len(set(found.values())) > 1, "the devices of a view are its workers'"
    flops = [line["tflops"] * line["tokens"] / line["tokens_per_s"] for line in metrics(out)]
    assert flops == pytest.approx([flops[0]] * steps), "a step is the same work on any number of workers"
    whole_ledger(out, steps)
    assert same_weights(out, calm(steps))


def test_with_nobody_let_in_it_goes_on_smaller_and_with_nothing_lost(
    forkserver: ForkServer, calm: Callable[[int], Path], tmp_path: Path
) -> None:
    kills = "kill:worker=3,step=12,at=commit;kill:worker=0,step=30,at=forward"
    out = tmp_path / "run"
    flags = [*SMALL, "2:4", "--steps", str(SHORT), "--cooldown", "3600", "--recovery", "checkpoint"]
    train(forkserver, out, *flags, "--inject", kills)
    assert sizes(out) == [3, 2]
    whole_ledger(out, SHORT)
    assert same_weights(out, calm(SHORT))


def test_layers_leave_a_worker_that_is_slow_and_the_run_is_bitwise_the_calm_run(
    forkserver: ForkServer, calm: Callable[[int], Path], tmp_path: Path
) -> None:
    flags = [*SMALL, "3:3", "--replicas", "1", "--steps", str(SHORT), "--cooldown", "0"]
    train(forkserver, out := tmp_path / "run", *flags, "--inject", "slow:worker=1,step=10,factor=6")
    shifted = events(out, "shifted")
    assert "1" in shifted[0]["speeds"], shifted
    held = {place: len(spans) and sum(int(s.split(":")[1]) - int(s.split(":")[0]) for s in spans)
            for place, spans in shifted[0]["layers"].items()}  # fmt: skip
    assert held.get("1", 0) < max(held.values()), held
    whole_ledger(out, SHORT)
    assert same_weights(out, calm(SHORT))


def test_too_few_workers_save_themselves_and_the_run_is_resumed(
    forkserver: ForkServer, calm: Callable[[int], Path], tmp_path: Path
) -> None:
    kills = "kill:worker=3,step=12,at=backward;kill:worker=0,step=22,at=forward"
    out = tmp_path / "run"
    flags = [*SMALL, "3:4", "--steps", str(SHORT), "--cooldown", "3600"]
    done = run_command(forkserver, out.with_suffix(".log"), *settings(out, *flags, "--inject", kills))
    assert done.code == 75, done.output
    assert "2 worker(s) are left, and 3 are the fewest: the run saves itself and stops" in done.output
    train(forkserver, out, *flags, "--resume")
    whole_ledger(out, SHORT)
    assert same_weights(out, calm(SHORT))


@pytest.mark.timeout(150)
def test_a_machine_that_goes_and_comes_back(forkserver: ForkServer, tmp_path: Path) -> None:
    """The others go on at once without its workers, and with them again once its agent is there."""
    out = tmp_path / "run"
    flags = ["--workers", "2:4", "--nodes", "2", "--store", f"127.0.0.1:{free_port()}", "--heartbeat", "2"]
    flags += ["--steps", "100000", "--cooldown", "0.5", "--checkpoint-every", "20"]

    def until(holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline, (tmp_path / "node0.log").read_text()[-3000:]
            time.sleep(0.1)

    def of_size(size: int) -> bool:
        """One worker after the other may go or come."""
        return sizes(out)[-1:] == [size]

    def goes_on() -> None:
        before = metrics(out)[-1]["step"]
        until(lambda: metrics(out)[-1]["step"] >= before + 5)

    codes: dict[int, int] = {}
    with _nodes(forkserver, tmp_path, settings(out, *flags), codes=codes) as nodes:
        _await_steps(out, 25)
        _end_family(nodes[1])
        until(lambda: of_size(2))
        goes_on()
        with _nodes(forkserver, tmp_path / "again", settings(out, *flags), ranks=(1,), codes=codes) as (back,):
            until(lambda: of_size(4))
            goes_on()
            before = len(events(out, "rolled_back")), len(events(out, "shrunk"))
            back.send_signal(signal.SIGUSR1)  # it is told that it goes, and hands over
            assert back.wait(30) == 75
            until(lambda: of_size(2))
            goes_on()
            assert len(events(out, "rolled_back")) == before[0], "nothing was lost"
            assert {event["remedy"] for event in events(out, "shrunk")[before[1] :]} == {"handed over"}
            psutil.Process(nodes[0].pid).terminate()
            assert nodes[0].wait(60) == 75
    assert [line["step"] for line in metrics(out)][-1] > 25
