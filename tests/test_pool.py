"""Workers that hold nothing: equal to plain torch, to each other bit for bit, and after every kind of death."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.processes import warm_parent
from jobs.config import TrainConfig
from launch.forkserver import ForkServer
from pipeline.model.flops import ModelFlops
from pipeline.model.layered import LayeredModel
from recovery.pool import NoWorkerLeft
from tests.harness import Outcome, Started, plain_training, run_command, run_pool, run_workers
from tests.test_parity import MODELS, check, settings
from tests.test_recovery import TEXTS

STEPS = 8


def config(**changes: Any) -> TrainConfig:
    return settings(**{"steps": STEPS, "scheduler": "roundpipe", "at_once": 2, **changes})


@cache
def reference(model: str, behind: bool = False) -> Outcome:
    return plain_training(settings(steps=STEPS), MODELS[model], behind=behind)


_calm: dict[tuple[Any, ...], Outcome] = {}


def calm(forkserver: ForkServer, out: Path, model: str = "llama", **changes: Any) -> Outcome:
    """The run without failures, made once."""
    key = (model, *sorted(changes.items()))
    if key not in _calm:
        _calm[key] = run_pool(forkserver, config(**changes), MODELS[model], out / "calm")
    return _calm[key]


def same_bits(a: Outcome, b: Outcome) -> bool:
    return (
        a.losses == b.losses and a.norms == b.norms and all(torch.equal(a.weights[n], t) for n, t in b.weights.items())
    )


CHOSEN = {(1, "llama"), (2, "gpt2")}


@pytest.mark.parametrize(
    ("workers", "model"),
    [
        pytest.param(workers, model, marks=() if (workers, model) in CHOSEN else pytest.mark.long)
        for workers in (1, 2, 4)
        for model in MODELS
    ],
)
def test_equals_plain_torch_and_every_other_number_of_workers(
    forkserver: ForkServer, tmp_path: Path, workers: int, model: str
) -> None:
    found = run_pool(forkserver, config(workers=workers), MODELS[model], tmp_path / "run")
    check(found, reference(model))
    assert same_bits(found, calm(forkserver, tmp_path, model))
    assert found.details[0]["most_held"] <= 2


def test_steps_say_what_was_computed_and_the_memory_of_workers_and_host(forkserver: ForkServer, tmp_path: Path) -> None:
    settings = config(workers=2, peak_tflops=0.25)
    found = run_pool(forkserver, settings, MODELS["llama"], tmp_path)
    steps = [event for event in found.details[0]["events"] if event["event"] == "step"]
    each = ModelFlops.of(LayeredModel(MODELS["llama"]), settings.microbatch_size, settings.sequence_length)
    flops = settings.microbatches * each.microbatch(range(len(each.layers)))
    assert len(steps) == STEPS
    for step in steps:
        assert 1e12 * step["tflops"] * step["tokens"] / step["tokens_per_s"] == pytest.approx(flops)
        assert step["tflops"] / step["mfu"] == pytest.approx(0.25 * 2), "each worker has its own threads"
        assert 2 * step["peak_host_bytes"] < step["peak_host_bytes_sum"] <= 3 * step["peak_host_bytes"]


@pytest.mark.parametrize("workers", [1, 3])
def test_one_step_behind_equals_a_delayed_reference(forkserver: ForkServer, tmp_path: Path, workers: int) -> None:
    found = run_pool(forkserver, config(workers=workers, optimizer_async=True), MODELS["llama"], tmp_path)
    check(found, reference("llama", behind=True))
    steps = [event for event in found.details[0]["events"] if event["event"] == "step"]
    assert [event["version"] for event in steps] == [max(0, step - 1) for step in range(STEPS)]


POINTS = ("order", "upload", "uploaded", "forward", "backward", "commit", "committed")


@pytest.mark.parametrize("behind", [pytest.param(False, marks=pytest.mark.long), True])
def test_killed_workers_change_no_bit(forkserver: ForkServer, tmp_path: Path, behind: bool) -> None:
    """One at every point of its work, each in a step of its own; the later ones have taken the places of others."""
    kills = ";".join(f"kill:worker={w},step={3 * w + 1},at={at}" for w, at in enumerate(POINTS))
    changes: dict[str, Any] = {"steps": 3 * len(POINTS) + 1, "optimizer_async": behind}
    killed = config(workers=3, rule="round_robin", inject=kills, **changes)
    found = run_pool(forkserver, killed, MODELS["llama"], tmp_path / "killed")
    events = found.details[0]["events"]
    assert [event["at"] for event in events if event["event"] == "fault"] == list(POINTS)
    assert sum(event["event"] == "detected" for event in events) == len(POINTS)
    assert same_bits(found, calm(forkserver, tmp_path, **changes))


@pytest.mark.parametrize(
    ("inject", "reason"),
    [
        ("exception:worker=1,step=3,at=backward", "InjectedFault"),
        ("stop:worker=1,step=3,at=forward", "has not answered for 4 s"),
        ("cut:worker=1,step=3,at=forward", "closed its connection"),
    ],
)
def test_other_ways_to_be_lost_change_no_bit(forkserver: ForkServer, tmp_path: Path, inject: str, reason: str) -> None:
    lost = config(workers=3, rule="round_robin", inject=inject, deadline=4.0)
    found = run_pool(forkserver, lost, MODELS["llama"], tmp_path / "lost")
    detected = [event for event in found.details[0]["events"] if event["event"] == "detected"]
    assert len(detected) == 1
    assert reason in detected[0]["reason"]
    assert same_bits(found, calm(forkserver, tmp_path))


def test_two_at_once_and_the_last_one_but_one(forkserver: ForkServer, tmp_path: Path) -> None:
    kills = ";".join(f"kill:worker={w},step={2 + w // 2},at=backward" for w in range(3))
    found = run_pool(
        forkserver, config(workers=4, rule="round_robin", inject=kills), MODELS["llama"], tmp_path / "killed"
    )
    assert sum(event["event"] == "detected" for event in found.details[0]["events"]) == 3
    assert same_bits(found, calm(forkserver, tmp_path))


def test_a_gradient_that_is_not_a_number_is_computed_again(forkserver: ForkServer, tmp_path: Path) -> None:
    poisoned = config(workers=2, rule="round_robin", inject="nan:worker=1,step=3,at=backward")
    found = run_pool(forkserver, poisoned, MODELS["llama"], tmp_path / "poisoned")
    assert "not_finite" in [event["event"] for event in found.details[0]["events"]]
    assert same_bits(found, calm(forkserver, tmp_path))


def test_who_joins_is_used_from_the_next_iteration(forkserver: ForkServer, tmp_path: Path) -> None:
    killed = config(
        workers=2, rule="round_robin", steps=60, inject="kill:worker=1,step=2,at=forward", data="random-tokens, late"
    )
    found = run_pool(forkserver, killed, MODELS["llama"], tmp_path)
    events = found.details[0]["events"]
    names = [event["event"] for event in events]
    first = names.index("joined")
    used = [set(event["lanes"]) for event in events[first:] if event["event"] == "timeline"]
    assert used[-1] == {"0", "1"}, "rows are places: who follows has that of whom it follows"
    assert {"0"} in [set(event["lanes"]) for event in events[:first] if event["event"] == "timeline"]


def test_with_no_worker_left_the_run_ends_by_name(forkserver: ForkServer, tmp_path: Path) -> None:
    kills = "kill:worker=0,step=2,at=forward;kill:worker=1,step=2,at=forward"
    lost = config(workers=2, rule="round_robin", max_failures=0, inject=kills)
    with pytest.raises(NoWorkerLeft, match=r"no worker is left: the last one, \d, was killed by SIGKILL; --resume"):
        run_pool(forkserver, lost, MODELS["llama"], tmp_path)


def test_a_slow_worker_is_known_and_changes_no_bit(forkserver: ForkServer, tmp_path: Path) -> None:
    slow = config(workers=3, inject="slow:worker=2,step=0,at=order,factor=12")
    found = run_pool(forkserver, slow, MODELS["llama"], tmp_path / "slow")
    speeds = found.details[0]["speeds"]
    assert speeds[2] < 0.5 * max(speeds[0], speeds[1])  # one of them may have shared its core
    assert same_bits(found, calm(forkserver, tmp_path))


def test_bfloat16_and_many_small_spans(forkserver: ForkServer, tmp_path: Path) -> None:
    small = config(workers=2, dtype="bfloat16", span_mib=1, at_once=1)
    found = run_pool(forkserver, small, MODELS["gpt2"], tmp_path, evaluate=True)
    plain = reference("gpt2")
    assert found.losses == pytest.approx(plain.losses, rel=2e-2)
    held_out = [event for event in found.details[0]["events"] if event["event"] == "evaluation"]
    assert held_out[-1]["loss"] > 0


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 3])
def test_weights_and_hidden_states_travel_narrow_and_change_no_bit(
    forkserver: ForkServer, tmp_path: Path, workers: int
) -> None:
    """What autocast would have made of fp32 weights on a worker that holds them: with all microbatches in one round,
    gradients are summed in the order of a pipeline of one worker, so all bits are its own."""
    half: dict[str, Any] = {"dtype": "bfloat16", "steps": 3}
    plan = settings(**half, workers=1, scheduler="gpipe")
    held = run_workers(forkserver, plan, MODELS["llama"], tmp_path / "held")
    found = run_pool(
        forkserver, config(workers=workers, at_once=plan.microbatches, span_mib=1, **half), MODELS["llama"], tmp_path
    )
    assert found.losses == held.losses
    assert [n for n, weight in held.weights.items() if not torch.equal(found.weights[n], weight)] == []


def test_gradients_come_back_narrow(forkserver: ForkServer, tmp_path: Path) -> None:
    """In bfloat16 a round's sum is rounded once: near the fp32 run, not equal, and the same for every number."""
    one, two = (
        run_pool(
            forkserver, config(workers=n, gradient_dtype="bfloat16", optimizer_async=True), MODELS["llama"],
            tmp_path / str(n),
        )
        for n in (1, 3)
    )  # fmt: skip
    assert same_bits(one, two)
    plain = reference("llama", behind=True)
    assert one.losses != plain.losses
    assert one.losses == pytest.approx(plain.losses, rel=2e-3)


# ---- the command line ----


def arguments(out: Path, *more: str) -> list[str]:
    return [
        "train", "--scheduler", "roundpipe", "--workers", "2", "--steps", "12", "--microbatches", "4",
        "--microbatch-size", "2", "--sequence-length", "32", "--data", TEXTS, "--max-tokens", "40000",
        "--vocabulary", "300", "--evaluate-samples", "10", "--evaluate-every", "6",
        "--checkpoint-every", "4", "--sample-tokens", "0", "--device", "cpu", "--out", str(out), *more,
    ]  # fmt: skip


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(out / "model").state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(forkserver: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of the run without failures, made once for the same flags."""
    root = tmp_path_factory.mktemp("whole")

    @cache
    def made(*flags: str) -> Path:
        out = root / "-".join(["run", *flags])
        done = run_command(forkserver, root / "log", *arguments(out, *flags))
        assert done.code == 0, done.output
        return out

    return made


@pytest.mark.parametrize("behind", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_run_is_lost_resumed_and_ends_in_the_same_bits(
    forkserver: ForkServer, whole: Callable[..., Path], tmp_path: Path, behind: bool
) -> None:
    flags = ["--optimizer-async"] if behind else []
    kills = ";".join(f"kill:worker={w},step=6,at=order" for w in range(2))
    lost = arguments(tmp_path / "lost", *flags, "--rule", "round_robin", "--max-failures", "0")
    ended = run_command(forkserver, tmp_path / "log", *lost, "--inject", kills)
    assert ended.code == 1
    assert "no worker is left" in ended.output
    again = run_command(forkserver, tmp_path / "log", *lost, "--resume")
    assert again.code == 0, again.output
    assert equal(weights_of(whole(*flags)), weights_of(tmp_path / "lost"))
    metrics = [json.loads(line) for line in (tmp_path / "lost" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 13))
    ledger = [json.loads(line) for line in (tmp_path / "lost" / "ledger.jsonl").read_text().splitlines()]
    assert [line["version"] for line in ledger] == [max(0, step - behind) for step in range(12)]
    assert [line["first_sample"] for line in ledger] == [8 * step for step in range(12)]
    assert (tmp_path / "lost" / "timeline.svg").is_file()


def test_checkpoints_are_those_of_every_scheduler(
    forkserver: ForkServer, whole: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for number, scheduler in enumerate(("roundpipe", "one_f_one_b", "roundpipe")):
        flags = arguments(out, "--scheduler", scheduler, "--steps", str(4 * (number + 1)))
        done = run_command(forkserver, tmp_path / "log", *flags, *(["--resume"] if number else []))
        assert done.code == 0, done.output
    ours, theirs = weights_of(out), weights_of(whole())
    # the rate's schedule depends on the steps that were asked for, so the weights are near and not the same
    assert all((ours[name] - theirs[name]).abs().max() < 0.05 for name in ours)


def test_sigterm_saves_and_resume_goes_on(forkserver: ForkServer, tmp_path: Path) -> None:
    flags = arguments(tmp_path / "run", "--steps", "400", "--checkpoint-every", "0", "--evaluate-every", "0")
    with Started(forkserver, tmp_path / "log", *flags) as started:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.0)
        os.kill(started.pid, signal.SIGTERM)
        ended = started.wait()
    assert ended.code == 75, ended.output
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(saved) == 1
    step = int(saved[0].name.split("-")[1])
    flags[flags.index("400")] = str(step + 2)
    again = run_command(forkserver, tmp_path / "log", *flags, "--resume")
    assert again.code == 0, again.output


def test_the_end_of_the_forkserver_ends_the_run_by_name(forkserver: ForkServer, tmp_path: Path) -> None:
    flags = arguments(tmp_path / "run", "--steps", "400", "--checkpoint-every", "0", "--evaluate-every", "0")
    with Started(forkserver, tmp_path / "log", *flags) as started:
        deadline = time.monotonic() + 60
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        warm_parent(started.pid).kill()
        ended = started.wait()
    assert ended.code == 1, ended.output
    assert "the forkserver has ended unexpectedly" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replicas", "2"], "replicas is 2; allowed: 1 under scheduler roundpipe"),
        (["--recovery", "checkfree"], "recovery is 'checkfree'; allowed: auto under scheduler roundpipe"),
        (["--at-once", "5"], r"at_once is 5; allowed: 0 to microbatches (4)"),
        (["--scheduler", "gpipe", "--optimizer-async"], "optimizer_async is True; allowed: False"),
        (["--span-mib", "1", "--vocabulary", "2048", "--model", "llama-2m"], "span_mib is 1; allowed: "),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    forkserver: ForkServer, tmp_path: Path, flags: list[str], said: str
) -> None:
    refused = run_command(forkserver, tmp_path / "log", *arguments(tmp_path / "run", *flags))
    assert refused.code == 2
    assert said in refused.output
    assert not (tmp_path / "run").exists()


def test_deepspeeds_adam_equals_plain_torch(forkserver: ForkServer, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    check(run_pool(forkserver, config(workers=2, cpu_adam="deepspeed"), MODELS["llama"], tmp_path), reference("llama"))
