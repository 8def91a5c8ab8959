"""Runs that lose real processes in the middle of real steps, held against the same run without a failure."""

from __future__ import annotations

import email
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as functional
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.processes import warm_parent
from jobs.data import Dataset
from launch.forkserver import ForkServer
from pipeline.model.weights import preset
from pipeline.state.optimizer import OptimizerConfig, decay_groups, learning_rate
from recovery import checkpoint
from tests.harness import Command, Started, linked, run_command

STEPS = 14
POINTS = ("forward", "backward", "reduce", "commit", "optimizer")
TEXTS = str(Path(email.__file__).with_name("*.py"))
"""A few files of the library: to list all of it is a third of what it takes to start a run."""


def settings(out: Path, *more: str) -> list[str]:
    return [
        "train", "--model", "llama-tiny", "--data", TEXTS, "--tokenizer", "bytes", "--max-tokens", "60000",
        "--sequence-length", "32", "--microbatch-size", "2", "--microbatches", "4", "--steps", str(STEPS),
        "--warmup", "4", "--evaluate-every", "0", "--sample-tokens", "0", "--checkpoint-every", "5", "--deadline", "30",
        "--threads", "1", "--out", str(out), *more,
    ]  # fmt: skip


def events(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event for event in found if kind in (None, event["event"])]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def exported(out: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted((out / "model").glob("*.safetensors")) for name, t in load_file(file).items()}


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = exported(a), exported(b)
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def train(forkserver: ForkServer, out: Path, *more: str, timeout_s: float = 60.0) -> Command:
    done = run_command(forkserver, out.with_suffix(".log"), *settings(out, *more), timeout_s=timeout_s)
    assert done.code == 0, done.output
    return done


def whole_ledger(out: Path, steps: int = STEPS) -> list[dict[str, Any]]:
    """Every step was committed in the end, each on the samples that follow those of the step before: its lines."""
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    last = {line["step"]: line for line in lines}
    assert sorted(last) == list(range(1, steps + 1))
    assert [last[step]["first_sample"] for step in sorted(last)] == [8 * i for i in range(steps)]
    assert {line["samples"] for line in last.values()} == {8}
    return lines


@pytest.fixture(scope="module")
def calm(forkserver: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs without a failure, by layout."""
    root = tmp_path_factory.mktemp("calm")
    layouts = {"line": ["--workers", "4"], "replicas": ["--workers", "4", "--replicas", "2"]}
    layouts["plus"] = ["--workers", "5", "--recovery", "checkfree+", "--model", str(_eight_blocks(root))]
    for name, flags in layouts.items():
        train(forkserver, root / name, *flags)
    return {name: root / name for name in layouts}


def _eight_blocks(root: Path) -> Path:
    config = preset("llama-tiny", vocab_size=258)
    config.num_hidden_layers = 8
    path = root / "eight.json"
    path.write_text(config.to_json_string(use_diff=False))
    return path


def test_killed_replicas_are_replaced_and_nothing_of_the_run_changes(
    forkserver: ForkServer, calm: dict[str, Path], tmp_path: Path
) -> None:
    """One at every point of a step, the last of them one that has taken another's place."""
    kills = ";".join(f"kill:worker={worker},step={3 + 2 * worker},at={at}" for worker, at in enumerate(POINTS))
    done = train(forkserver, out := tmp_path / "run", "--workers", "4", "--replicas", "2", "--inject", kills)
    assert done.output.count("was killed by SIGKILL") == len(POINTS)
    assert [event["remedy"] for event in events(out, "remedy")] == ["replica"] * len(POINTS)
    assert [event["at"] for event in events(out, "fault")] == list(POINTS)
    assert len(metrics(out)) == STEPS, "a step was told twice or not at all"
    whole_ledger(out)
    assert same_weights(out, calm["replicas"])


def test_a_loss_after_the_checkpoint_that_a_run_began_with_is_gone_is_like_any_other(
    forkserver: ForkServer, calm: dict[str, Path], tmp_path: Path
) -> None:
    flags = ["--workers", "4", "--replicas", "2", "--keep", "1"]
    once = ["--max-failures", "0", "--inject", "kill:worker=0,step=7"]
    done = run_command(forkserver, tmp_path / "log", *settings(out := tmp_path / "run", *flags, *once), timeout_s=60.0)
    assert done.code == 1, done.output
    kills = "kill:worker=1,step=9,at=backward;kill:worker=2,step=11,at=forward"
    more = ["--resume", "--checkpoint-every", "2", "--max-failures", "9", "--inject", kills]
    assert "resuming at step 5" in train(forkserver, out, *flags, *more).output
    assert [event["remedy"] for event in events(out, "remedy")][-2:] == ["replica"] * 2
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000014"]
    whole_ledger(out)
    assert same_weights(out, calm["replicas"])


def test_rollbacks_replay_to_the_same_weights(forkserver: ForkServer, calm: dict[str, Path], tmp_path: Path) -> None:
    """To the start of the run and to checkpoints, from every point of a step; one of them comes while they replay."""
    steps = (3, 6, 7, 11, 12)
    kills = ";".join(f"kill:worker={w},step={s},at={at}" for w, (s, at) in enumerate(zip(steps, POINTS, strict=True)))
    done = train(forkserver, out := tmp_path / "run", "--workers", "4", "--recovery", "checkpoint", "--inject", kills)
    to = [event["to"] for event in events(out, "rolled_back")]
    assert to == ["start", "step-00000005", "step-00000005", "step-00000010", "step-00000010"]
    assert done.output.count("timeline.svg") == 1, "a picture that was drawn again is one picture"
    rows = {event["tid"] for event in json.loads((out / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"}
    assert len(rows) == 4, "who has taken a place is drawn in its row"
    again = [line["again"] for line in metrics(out)]
    assert max(again) == 2
    assert again.count(0) == STEPS
    whole_ledger(out)
    assert same_weights(out, calm["line"])


@pytest.mark.parametrize("worker", [0, pytest.param(1, marks=pytest.mark.long)])
def test_the_embedding_and_the_head_come_back_bit_for_bit(
    forkserver: ForkServer, calm: dict[str, Path], tmp_path: Path, worker: int
) -> None:
    """Worker 0 computes them, worker 1 keeps a copy (and its own blocks become those of its twin)."""
    model = str(_eight_blocks(tmp_path))
    flags = ["--workers", "5", "--recovery", "checkfree+", "--model", model]
    train(forkserver, out := tmp_path / "run", *flags, "--inject", f"kill:worker={worker},step=7,at=backward")
    (resumed,) = events(out, "resumed")
    restored = {part: remedy for _, part, remedy in resumed["restores"]}
    assert restored["0:1"] == restored["9:10"] == "replica"
    assert restored.get("1:3") == ("checkfree+" if worker == 1 else None)
    whole_ledger(out)
    assert same_weights(out, calm["plus"]) == (worker == 0)


@pytest.mark.parametrize(
    ("fault", "more", "detected"),
    [
        ("stop:worker=1,step=7,at=backward", ["--heartbeat", "2"], "has given no sign of life for 2 s"),
        ("kill:worker=1,step=7;kill:worker=2,step=0,at=recovery;kill:worker=5,step=0,at=join", [], "SIGKILL"),
        *(
            pytest.param(*case, marks=pytest.mark.long)  # the matrix has them too
            for case in (
                ("exception:worker=1,step=7,at=forward", [], "InjectedFault: injected at forward of step 7"),
                ("nan:worker=1,step=7,at=backward;slow:worker=1,step=9,factor=4", [], None),
                ("kill:worker=1,step=7;kill:worker=0,step=7,at=recovery", [], "was killed by SIGKILL"),
                ("kill:worker=1,step=7;kill:worker=4,step=0,at=join", [], "was killed by SIGKILL"),
            )
        ),
    ],
)
def test_every_fault_ends_in_the_weights_of_the_run_without_it(
    forkserver: ForkServer, calm: dict[str, Path], tmp_path: Path, fault: str, more: list[str], detected: str | None
) -> None:
    flags = ["--workers", "4", "--recovery", "checkpoint", "--inject", fault, *more]
    done = train(forkserver, out := tmp_path / "run", *flags)
    assert len(events(out, "fault")) == fault.count(";") + 1, "not every fault has happened"
    if detected is None:
        assert not events(out, "detected")
    else:
        assert detected in done.output
    whole_ledger(out)
    assert same_weights(out, calm["line"])


@pytest.mark.parametrize(("at", "worker"), [pytest.param("forward", 0, marks=pytest.mark.long), ("commit", 3)])
def test_redundancy_takes_over_without_waiting_and_nothing_of_the_run_changes(
    forkserver: ForkServer, calm: dict[str, Path], tmp_path: Path, at: str, worker: int
) -> None:
    flags = ["--workers", "4", "--recovery", "redundant", "--inject", f"kill:worker={worker},step=7,at={at}"]
    train(forkserver, out := tmp_path / "run", *flags)
    (taken,) = events(out, "taken_over")
    assert taken["worker"] == worker
    assert events(out, "resumed")[0]["restores"] == [], "who takes over had to be given state first"
    assert not events(out, "rolled_back")
    assert len(metrics(out)) == STEPS
    whole_ledger(out)
    assert same_weights(out, calm["line"])


def test_who_was_lost_under_redundancy_is_replaced_while_the_run_goes_on(
    forkserver: ForkServer, tmp_path: Path
) -> None:
    """Twice, the second time the one that took over; the replacement of a replacement; two replicas."""
    flags = ["--workers", "4", "--replicas", "2", "--steps", "60"]
    train(forkserver, calm := tmp_path / "calm", *flags)
    faults = "kill:worker=1,step=7;kill:worker=0,step=25,at=reduce;kill:worker=4,step=43,at=forward"
    train(forkserver, out := tmp_path / "run", *flags, "--recovery", "redundant", "--inject", faults)
    assert [event["worker"] for event in events(out, "taken_over")] == [1, 0, 4]
    assert [(e["worker"], e["replacement"], e["remedy"]) for e in events(out, "rejoined")] == [
        (1, 4, "replica"), (0, 5, "replica"), (4, 6, "replica"),
    ]  # fmt: skip
    steps = [event["step"] for event in events(out, "resumed")]
    assert steps[0] < steps[1], "nobody went on before the replacement was there"
    assert [line["step"] for line in metrics(out)] == list(range(1, 61))
    assert same_weights(out, calm)


def test_a_stage_and_the_one_that_keeps_its_copy_are_restored_from_a_checkpoint(
    forkserver: ForkServer, calm: dict[str, Path], tmp_path: Path
) -> None:
    kills = "kill:worker=1,step=7;kill:worker=2,step=7,at=recovery"  # before anybody has what the first one had
    flags = ["--workers", "4", "--recovery", "redundant", "--inject", kills]
    train(forkserver, out := tmp_path / "run", *flags)
    assert [event["to"] for event in events(out, "rolled_back")] == ["step-00000005"]
    whole_ledger(out)
    assert same_weights(out, calm["line"])


def test_links_that_break_with_nobody_lost_are_built_anew(
    forkserver: ForkServer, calm: dict[str, Path], tmp_path: Path
) -> None:
    flags = ["--workers", "4", "--replicas", "2", "--inject", "cut:worker=1,step=7,at=backward"]
    train(forkserver, out := tmp_path / "run", *flags)
    assert events(out, "link")
    assert not events(out, "detected")
    whole_ledger(out)
    assert same_weights(out, calm["replicas"])


def test_a_spare_worker_takes_a_place_and_the_next_spare_the_next(
    forkserver: ForkServer, calm: dict[str, Path], tmp_path: Path
) -> None:
    flags = ["--workers", "4", "--recovery", "checkpoint", "--spares", "1"]
    flags += ["--inject", "kill:worker=1,step=6;kill:worker=0,step=9"]
    train(forkserver, out := tmp_path / "run", *flags)
    assert {event["worker"] for event in events(out, "remedy")} == {0, 1}
    whole_ledger(out)
    assert same_weights(out, calm["line"])


def test_two_at_once_from_outside(forkserver: ForkServer, calm: dict[str, Path], tmp_path: Path) -> None:
    """Both workers of a stage's neighbours, killed by somebody else in the same moment, at no particular point."""
    out = tmp_path / "run"
    flags = settings(out, "--workers", "4", "--recovery", "checkpoint")
    with Started(forkserver, tmp_path / "log", *flags) as run:
        workers = _workers(run.pid, out, step=6)
        for pid in workers[1:3]:
            os.kill(pid, signal.SIGKILL)
        done = run.wait(60)
    assert done.code == 0, done.output
    assert {event["worker"] for event in events(out, "remedy")} == {1, 2}
    whole_ledger(out)
    assert same_weights(out, calm["line"])


@pytest.mark.parametrize(
    ("blocks", "torchrun"),
    [
        (8, False),
        pytest.param(4, False, marks=pytest.mark.long),
        pytest.param(6, False, marks=pytest.mark.long),
        pytest.param(4, True, marks=pytest.mark.long),
    ],
)
def test_every_kind_of_stage_is_lost_under_checkfree_plus(
    forkserver: ForkServer, tmp_path: Path, blocks: int, torchrun: bool
) -> None:
    """The first block stage, an inner one, the last, and the one with both ends, each at another point of a step."""
    faults = f"kill:stage=1,step=4,at=backward;kill:stage=2,step=6,at=forward;kill:stage={blocks},step=8,at=optimizer"
    flags = ["--workers", str(blocks + 1), "--recovery", "checkfree+", "--model", str(_eight_blocks(tmp_path))]
    flags += ["--checkpoint-every", "0", "--inject", f"{faults};kill:stage=0,step=10,at=reduce"]
    out = tmp_path / "run"
    if torchrun:
        _under_torchrun(blocks + 1, settings(out, *flags), tmp_path)
    else:
        train(forkserver, out, *flags)
    restored = [{(part, remedy) for _, part, remedy in e["restores"]} for e in events(out, "resumed")]
    assert [{remedy for _, remedy in each} for each in restored] == [
        {"checkfree+", "replica"}, {"checkfree"}, {"checkfree+"}, {"replica"},
    ]  # fmt: skip
    assert {part for part, remedy in restored[0] if remedy == "replica"} == {"0:1", "9:10"}
    assert len(metrics(out)) == STEPS
    whole_ledger(out)


def test_under_torchrun_a_killed_worker_is_replaced_and_torchrun_sees_nothing(
    calm: dict[str, Path], tmp_path: Path
) -> None:
    """Each slot is an agent with one worker: torchrun starts nobody again; the weights are those of the calm run."""
    flags = ["--workers", "2", "--recovery", "checkpoint"]
    out = tmp_path / "run"
    _under_torchrun(
        2, settings(out, *flags, "--inject", "kill:worker=1,step=7;kill:worker=0,step=9,at=commit"), tmp_path
    )
    assert [event["worker"] for event in events(out, "remedy")] == [1, 0]
    whole_ledger(out)
    assert same_weights(out, calm["line"])


def _under_torchrun(workers: int, arguments: list[str], folder: Path) -> None:
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers), "--max-restarts", "0",
        "--log-dir", str(folder / "torchrun"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*launcher, "-m", "launch", *linked(arguments)], cwd=Path(__file__).parent.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=90)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    assert said.count("held-out perplexity") == 1, "one slot speaks for all"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_lost_machine_is_replaced_by_the_others(forkserver: ForkServer, tmp_path: Path, torchrun: bool) -> None:
    """Two agents, or two torchruns, with a store of their own; one is killed with all that it has started."""
    flags = ["--workers", "4", "--replicas", "2", "--recovery", "replica", "--steps", "40"]
    train(forkserver, calm := tmp_path / "calm", *flags)
    out = tmp_path / "run"
    flags += ["--nodes", "2", "--store", f"127.0.0.1:{free_port()}", "--heartbeat", "2"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "0"] if torchrun else []
    with _nodes(forkserver, tmp_path, settings(out, *flags), launcher) as nodes:
        _await_steps(out, 8)
        _end_family(nodes[1])  # in no order and without a word, as when the power goes
        code = nodes[0].wait(60)
        said = (tmp_path / "node0.log").read_text()
    assert code == 0, said
    assert {event["worker"] for event in events(out, "remedy")} == {2, 3}
    assert {event["remedy"] for event in events(out, "remedy")} == {"replica"}
    assert [line["step"] for line in metrics(out)] == list(range(1, 41))
    assert same_weights(out, calm)


def test_the_loss_of_the_store_ends_every_machine_by_name(forkserver: ForkServer, tmp_path: Path) -> None:
    """Node 0 hosts it. What is left is whole: a checkpoint that a run on any number of machines goes on from."""
    out = tmp_path / "run"
    flags = ["--workers", "2", "--steps", "100000", "--nodes", "2", "--store", f"127.0.0.1:{free_port()}"]
    with _nodes(forkserver, tmp_path, settings(out, *flags)) as nodes:
        _await_steps(out, 8)
        family = psutil.Process(nodes[1].pid).children(recursive=True)
        _end_family(nodes[0])
        assert nodes[1].wait(30) == 1
        _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    said = (tmp_path / "node1.log").read_text()
    assert "is gone, and with it the coordinator of the run; --resume goes on from the newest valid checkpoint" in said
    assert checkpoint.find(out / "checkpoints").path is not None


class Node:
    """One of the commands that `_nodes` has forked; `codes` keeps what the forkserver has told of any of them."""

    def __init__(self, forkserver: ForkServer, codes: dict[int, int], argv: Sequence[str], log: Path) -> None:
        self._forkserver, self._codes = forkserver, codes
        self.pid = forkserver.start({"argv": list(argv), "log": str(log)})

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.pid not in self._codes:
            assert time.monotonic() < deadline, f"not over after {timeout:g} s"
            self._codes.update((ended.pid, ended.code) for ended in self._forkserver.poll(0.05))
        return self._codes[self.pid]

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


@contextmanager
def _nodes(
    forkserver: ForkServer, folder: Path, arguments: list[str], launcher: Sequence[str] = (),
    ranks: Sequence[int] = (0, 1), codes: dict[int, int] | None = None,
) -> Iterator[list[Node | subprocess.Popen[bytes]]]:  # fmt: skip
    """The same command on two nodes, or one of them, each with a torchrun of its own if `launcher` is one. Whoever
    starts nodes while others run gives them the same `codes`."""
    folder.mkdir(exist_ok=True)
    codes = {} if codes is None else codes
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        nodes: list[Node | subprocess.Popen[bytes]] = []
        for rank in ranks:
            path, argv = folder / f"node{rank}.log", [*arguments, "--node-rank", str(rank)]
            if launcher:
                log = stack.enter_context(path.open("wb"))
                own = ["--master-port", str(free_port()), "--log-dir", str(folder / f"torchrun{rank}")]
                command = [sys.executable, *launcher, *own, "-m", "launch", *linked(argv)]
                nodes.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=Path(__file__).parent.parent,
                        start_new_session=True,
                    )
                )
            else:
                nodes.append(Node(forkserver, codes, argv, path))
            stack.callback(_end_family, nodes[-1])
        yield nodes


def _end_family(process: Node | subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait(10)


def _await_steps(out: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").is_file() or len(metrics(out)) < step:
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.01)


def _workers(pid: int, out: Path, step: int) -> list[int]:
    """The pids of the workers, in the order of their ids, once `step` steps are committed."""
    _await_steps(out, step)
    warm = warm_parent(pid)
    most = int(Path("/proc/sys/kernel/pid_max").read_text())
    return sorted((child.pid for child in warm.children()), key=lambda pid: (pid - warm.pid) % most)  # pids begin anew


def test_events_that_cannot_be_written_cost_the_events_alone(
    forkserver: ForkServer, calm: dict[str, Path], tmp_path: Path
) -> None:
    (out := tmp_path / "run").mkdir()
    (out / "events.jsonl").symlink_to("/dev/full")
    done = train(forkserver, out, "--workers", "4", "--inject", "kill:worker=1,step=7")
    said = "events.jsonl cannot be written: No space left on device; training goes on, and it is tried again"
    assert done.output.count(said) == 1
    whole_ledger(out)
    assert len(metrics(out)) == STEPS


def test_too_many_failures_end_the_run_by_name(forkserver: ForkServer, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = settings(
        out, "--workers", "2", "--max-failures", "1", "--inject", "kill:worker=1,step=5;kill:worker=2,step=6"
    )
    done = run_command(forkserver, tmp_path / "log", *flags)
    assert done.code == 1
    assert "2 workers were lost, the last: worker 2 was killed by SIGKILL; allowed by max_failures: 1" in done.output


def test_what_nothing_brings_back_ends_the_run_with_every_reason(forkserver: ForkServer, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = settings(out, "--workers", "4", "--recovery", "checkfree", "--inject", "kill:worker=0,step=5")
    done = run_command(forkserver, tmp_path / "log", *flags)
    assert done.code == 1
    assert "holds the embedding or the head, which no neighbour resembles" in done.output
    assert events(out, "failed")


# ---- CheckFree against plain PyTorch ----


def test_a_lost_middle_stage_is_the_weighted_mean_of_its_neighbours(forkserver: ForkServer, tmp_path: Path) -> None:
    """Steps 12 and 13 again, by hand: norms, mean, fresh moments and 1.1 times the learning rate for that stage."""
    out = tmp_path / "run"
    flags = ["--workers", "5", "--recovery", "checkfree", "--model", str(_eight_blocks(tmp_path))]
    flags += ["--checkpoint-every", "1", "--keep", "99", "--inject", "kill:worker=3,step=12,at=backward"]
    train(forkserver, out, *flags)
    spans = {2: (3, 5), 3: (5, 7), 4: (7, 9)}
    model = AutoModelForCausalLM.from_pretrained(out / "model").train()
    names = {layer: [n for n, _ in model.named_parameters() if f".layers.{layer - 1}." in n] for layer in range(1, 9)}

    before = load(model, out, 11)
    backward(model, out, 11)
    norms = {
        w: sum(float(model.get_parameter(n).grad.double().square().sum()) for l in range(*span) for n in names[l])
        ** 0.5
        for w, span in spans.items()
    }
    assert before, "there is a state"
    moments = load(model, out, 12)
    a, b = norms[2] + 1e-4, norms[4] + 1e-4
    with torch.no_grad():
        for place in range(2):
            for lost, low, high in zip(*(names[spans[w][0] + place] for w in (3, 2, 4)), strict=True):
                mean = (a * model.get_parameter(low).double() + b * model.get_parameter(high).double()) / (a + b)
                model.get_parameter(lost).copy_(mean)
                moments[lost] = {k: torch.zeros_like(v) for k, v in moments[lost].items()}
    backward(model, out, 12)
    config = OptimizerConfig(lr=2e-3, total_steps=STEPS, warmup_steps=4)
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    rebuilt = {name for layer in range(5, 7) for name in names[layer]}
    for name, parameter in model.named_parameters():
        scale = 1.1 if name in rebuilt else 1.0
        groups = decay_groups({name: parameter}, config.weight_decay)
        adamw = torch.optim.AdamW(groups, lr=scale * learning_rate(config, 12), betas=config.betas, eps=config.eps)  # type: ignore[arg-type]
        adamw.state[parameter] = moments[name]
        adamw.step()
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    load(model, out, 13)
    for name, parameter in model.named_parameters():
        assert float((parameter.detach() - expected[name]).abs().max()) < 1e-6, name
    scales = {k: v for n in range(10) for k, v in layer(out, 13, n).items() if k.startswith("lr_scale/")}
    assert {round(float(v), 6) for k, v in scales.items() if k.removeprefix("lr_scale/") in rebuilt} == {1.1}
    assert {float(v) for k, v in scales.items() if k.removeprefix("lr_scale/") not in rebuilt} == {1.0}


def layer(out: Path, step: int, number: int) -> dict[str, Tensor]:
    path = checkpoint.directory(out / "checkpoints", step)
    return checkpoint.read_layer(path, checkpoint.read_manifest(path), number)


@torch.no_grad()
def load(model: torch.nn.Module, out: Path, step: int) -> dict[str, dict[str, Tensor]]:
    """Fill the model from a checkpoint; returns AdamW's state by name."""
    state = {key: tensor for number in range(10) for key, tensor in layer(out, step, number).items()}
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        parameter.copy_(state[f"param/{name}"])
        found[name] = {kind: state[f"{kind}/{name}"].clone() for kind in ("step", "exp_avg", "exp_avg_sq")}
    return found


def backward(model: torch.nn.Module, out: Path, step: int) -> None:
    """The mean gradient of 0-based `step`."""
    model.zero_grad()
    dataset = Dataset.open(out / "data")
    rows = torch.stack([torch.from_numpy(dataset.train_sample(8 * step + i)) for i in range(8)])
    logits = model(rows[:, :-1], use_cache=False).logits
    functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
