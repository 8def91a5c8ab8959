"""Steps of a run, run again: where that begins, what cannot be repeated, and that a difference is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.config import ConfigError, TrainConfig
from jobs.inexact import changed_at, inexact, told
from jobs.replay import (
    Asked,
    Difference,
    Records,
    check_rates,
    differing_step,
    differing_tensor,
    first_seen,
    settings_of,
)
from launch.forkserver import ForkServer
from launch.past import MARK
from pipeline.state.optimizer import learning_rate
from recovery import checkpoint
from tests.harness import Command, run_command
from tests.test_checkpoint import flip, save
from tests.test_recovery import TEXTS

STEPS = 8


# ---- where it begins ----


def ledger(*steps: int) -> list[dict[str, int]]:
    return [{"step": step, "first_sample": 8 * (step - 1), "samples": 8} for step in steps]


@pytest.mark.parametrize(
    ("samples", "step"), [([0], 1), ([7], 1), ([8], 2), ([40, 17], 3), ([31, 32], 4), ([100], None), ([], None)]
)
def test_the_first_step_that_has_seen_a_sample(samples: list[int], step: int | None) -> None:
    assert first_seen(ledger(1, 2, 3, 4, 5, 6), samples) == step
    assert first_seen(ledger(5, 6), [33]) == 5, "a ledger may begin late"


def test_the_newest_checkpoint_before_a_step(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    found = {before: checkpoint.find(tmp_path, before=before).path for before in (2, 3, 4, 7, 99)}
    names = {before: path and path.name for before, path in found.items()}
    assert names == {2: None, 3: "step-00000002", 4: "step-00000002", 7: "step-00000006", 99: "step-00000006"}
    flip(tmp_path / "step-00000004" / "layer-00000.safetensors", 100)
    older = checkpoint.find(tmp_path, before=6)
    assert older.path == tmp_path / "step-00000002"
    assert [path.name for path, _ in older.skipped] == ["step-00000004"], "what is newer is not looked at"


# ---- with which settings ----

RUN = TrainConfig(workers=4, steps=20, lr=0.002, warmup=2, inject="kill:worker=1,step=3", recovery="checkpoint")


def settings(changes: dict[str, Any], tied: bool = False, **asked: Any) -> TrainConfig:
    return settings_of(replace(RUN, **changes), Asked(**asked), tied, 9, True, Path("elsewhere"))


def test_a_replay_has_the_numbers_of_the_run_and_not_its_faults() -> None:
    now = settings({"snapshot": "off", "spares": 1, "min_workers": 2}, workers=2, scheduler="gpipe")
    assert now == replace(
        RUN, workers=2, scheduler="gpipe", inject="", recovery="exact", evaluate_every=0, sample_tokens=0, until=9,
        resume=True, out=Path("elsewhere"),
    )  # fmt: skip
    assert (now.steps, now.last_step) == (20, 9)
    assert now.optimizer_config() == RUN.optimizer_config()


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, {"workers": 1}),
        ({}, {"scheduler": "zero_bubble"}),
        ({"replicas": 2}, {"workers": 2}),
        ({"exact_sums": True}, {"workers": 2, "replicas": 2}),
        ({"exact_sums": True, "scheduler": "balanced"}, {"scheduler": "gpipe", "workers": 1}),
        ({"scheduler": "roundpipe", "recovery": "auto"}, {"workers": 1}),
        ({"recovery": "checkfree+", "workers": 6}, {}),
    ],
)
def test_what_sums_in_the_same_order_is_allowed(changes: dict[str, Any], asked: dict[str, Any]) -> None:
    now = settings(changes, **asked)
    assert all(getattr(now, name) == value for name, value in asked.items())


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({}, {"replicas": 2}, r"^replicas is 2; allowed: 1, as in the run, which had no --exact-sums"),
        ({"replicas": 2}, {"replicas": 1}, r"^replicas is 1; allowed: 2, as in the run"),
        (
            {},
            {"scheduler": "roundpipe"},
            r"^scheduler is 'roundpipe'; allowed: one_f_one_b, as in the run: roundpipe s",
        ),
        ({"scheduler": "roundpipe"}, {"scheduler": "gpipe"}, r"^scheduler is 'gpipe'; allowed: roundpipe, as in"),
        ({"scheduler": "balanced"}, {"workers": 2}, r"^workers is 2; allowed: 4, as in the run, which had no --exact"),
        ({}, {"scheduler": "balanced"}, r"^scheduler is 'balanced'; allowed: one_f_one_b, as in the run, wh"),
        ({"recovery": "checkfree+"}, {"workers": 5}, r"^workers is 5; allowed: 4, as in the run, .*: routes follow"),
        ({"tied": True}, {"workers": 1}, r"^workers is 1; allowed: 2 or more for each replica, as in the run"),
        (
            {"tied": True, "ends": "home"},
            {"workers": 3},
            r"^workers is 3; allowed: 4, as in the run, .* summed in turn",
        ),
        ({"tied": True, "workers": 1}, {"scheduler": "interleaved"}, r"^scheduler is 'interleaved'; allowed: one_f_on"),
        ({}, {"scheduler": "1f1b"}, r"^scheduler is '1f1b'; allowed: one of"),
    ],
)
def test_what_sums_in_another_order_is_refused(changes: dict[str, Any], asked: dict[str, Any], message: str) -> None:
    tied = changes.pop("tied", False)
    with pytest.raises(ConfigError, match=message):
        settings(changes, tied, **asked)


def test_settings_that_the_run_had_not_at_that_step_are_told() -> None:
    lines = [{"step": step, "lr": learning_rate(RUN.optimizer_config(), step - 1)} for step in (1, 2, 3, 4)]
    check_rates(RUN, Records.of(lines, ()), range(1, 6))
    with pytest.raises(
        ConfigError, match=r"^step 4 had the learning rate .* the run was resumed with other settings s"
    ):
        check_rates(replace(RUN, steps=40), Records.of(lines, ()), range(1, 5))


# ---- what does not follow from the data ----


def event(name: str, step: int, **more: Any) -> dict[str, Any]:
    return {"event": name, "step": step, **more}


LOST = [event("remedy", 4, worker=1, remedy="checkfree", view=2)]
RESUMED = [*LOST, event("resumed", 5, view=2, restores=[[4, "2:4", "checkfree"]])]
ROUTES = [event("rerouted", 3, worker=1, remedy="reroute"), event("rejoined", 6, worker=1, remedy="replica")]
HALVES = {"0": ["0:3"], "1": ["3:6"], "2": ["0:3"], "3": ["3:6"]}


@pytest.mark.parametrize(
    ("events", "start", "step", "found"),
    [
        ([], 0, 9, None),
        ([event("remedy", 4, remedy="checkpoint"), event("remedy", 4, remedy="replica")], 0, 9, None),
        (LOST, 0, 9, "remedy"),
        (LOST, 0, 4, None),
        (LOST, 5, 9, None),
        ([event("shrunk", 4, remedy="checkfree+replica")], 0, 9, "shrunk"),
        ([event("rejoined", 4, worker=1, remedy="checkfree+")], 0, 9, "rejoined"),
        (RESUMED, 0, 5, None),
        (RESUMED, 0, 6, "resumed"),
        (RESUMED, 5, 6, "resumed"),
        ([*RESUMED, event("checkpoint", 5)], 5, 9, None),
        ([event("checkpoint", 5), *RESUMED], 5, 9, "resumed"),
        ([*RESUMED, event("rolled_back", 3)], 0, 9, None),
        ([*RESUMED, event("checkpoint", 5), event("rolled_back", 5)], 0, 9, "resumed"),
        ([*RESUMED, event("started", 2)], 0, 9, None),
        (ROUTES, 4, 5, "rerouted"),
        (ROUTES, 0, 3, None),
        (ROUTES, 7, 9, None),
        (ROUTES[:1], 7, 9, "rerouted"),
        ([*ROUTES[:1], event("started", 5)], 7, 9, None),
        ([event("resized", 4, layers=HALVES)], 0, 9, "resized"),
        ([event("resized", 4, layers={"0": ["0:3"], "1": ["3:6"]})], 0, 9, None),
        ([event("resized", 4, layers=HALVES), event("resized", 6, layers={"0": ["0:6"]})], 7, 9, None),
        ([event("taken_over", 4, worker=1, remedy="redundant")], 0, 9, None),
    ],
)
def test_steps_that_do_not_follow_from_the_data(
    events: list[dict[str, Any]], start: int, step: int, found: str | None
) -> None:
    first = inexact(events, start, step, replicas=1)
    assert (first and first["event"]) == found
    if found == "resized":
        assert inexact(events, start, step) is None, "with exact sums"


def test_a_weight_of_both_ends_is_summed_by_who_has_them() -> None:
    events = [event("taken_over", 4, worker=1, remedy="redundant"), event("rejoined", 6, worker=1, remedy="replica")]
    assert inexact(events, 0, 5, replicas=1, tied=True) == events[0]
    assert inexact(events, 7, 9, replicas=1, tied=True) is None
    assert inexact(events, 0, 9, tied=True) is None, "with exact sums"


def test_what_was_saved_in_the_step_of_a_loss_may_have_it_in_it() -> None:
    lost = changed_at([*RESUMED, event("checkpoint", 5)], 5)
    assert lost is not None
    assert told(lost) == "resumed at step 5 (worker 4 by checkfree)"
    assert told(LOST[0]) == "remedy at step 4 (worker 1, remedy checkfree)"
    assert changed_at(RESUMED, 6) is None


# ---- the comparison ----


def test_the_first_difference_is_named() -> None:
    line = {"step": 3, "loss": 5.0, "grad_norm": 1.0, "lr": 0.1, "tokens": 64}
    was = Records.of([line], ledger(3))
    assert differing_step(was, was, [3]) is None
    again = Records.of([{**line, "grad_norm": 1.0 + 2**-52}], ledger(3))
    found = differing_step(was, again, [3])
    assert str(found) == "step 3: grad_norm was 1.0 and is 1.0000000000000002"
    assert str(differing_step(was, Records.of([], ledger(3)), [3])) == "step 3: loss is not in the replay"
    assert str(differing_step(Records.of([], ledger(3)), was, [3])) == "step 3: loss is only in the replay"
    moved = Records.of([line], [{**ledger(3)[0], "first_sample": 17}])
    assert differing_step(was, moved, [3]) == Difference(3, "first_sample", 16, 17)


def test_tensors_are_compared_by_their_bytes() -> None:
    ours = torch.tensor([1.0, 0.0, float("nan")])
    assert differing_tensor(ours, ours.clone()) is None
    assert differing_tensor(ours, torch.tensor([1.0, -0.0, float("nan")])) == ("0.0 at 1", "-0.0 at 1")
    assert differing_tensor(ours, ours[:2]) == ("torch.float32 (3,)", "torch.float32 (2,)")
    assert differing_tensor(None, ours) == (None, "there")
    assert differing_tensor(torch.tensor(2.0), torch.tensor(2.0)) is None


# ---- whole runs ----


def train(forkserver: ForkServer, out: Path, *more: str) -> Path:
    done = run_command(
        forkserver, out.with_suffix(".log"), "train", "--model", "llama-tiny", "--data", TEXTS, "--tokenizer", "bytes",
        "--max-tokens", "60000", "--sequence-length", "32", "--microbatch-size", "2", "--microbatches", "4",
        "--steps", str(STEPS), "--warmup", "2", "--evaluate-every", "0", "--sample-tokens", "0",
        "--checkpoint-every", "3", "--deadline", "30", "--threads", "1", "--out", str(out), *more,
    )  # fmt: skip
    assert done.code == 0, done.output
    return out


@pytest.fixture(scope="module")
def run(forkserver: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 workers, one of which is killed after the first checkpoint, so that all go back to it."""
    kill = ["--recovery", "checkpoint", "--inject", "kill:worker=2,step=4,at=backward"]
    return train(forkserver, tmp_path_factory.mktemp("run") / "run", "--workers", "4", *kill)


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("replays")))


Replay = Callable[..., Command]


@pytest.fixture
def replay(forkserver: ForkServer, tmp_path: Path) -> Replay:
    def start(run: Path, *more: str) -> Command:
        return run_command(forkserver, tmp_path / "replay.log", "replay", str(run), *more)

    return start


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a run, but for its replays: when it was changed, and its bytes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and "replays" not in path.parts
    }


def test_a_run_that_lost_a_worker_is_repeated_to_the_bit_by_fewer(run: Path, replay: Replay) -> None:
    before = files(run)
    done = replay(run, "--workers", "2", "--scheduler", "gpipe", "--json")
    assert done.code == 0, done.output
    said = json.loads(done.output)
    assert (said["step"], said["from"], said["steps_compared"], said["notes"]) == (8, 6, 2, [])
    assert (said["equal"], said["checkpoint_equal"], said["model_equal"]) == (True, True, True)
    out = run / "replays" / "step-8"
    assert json.loads((out / MARK).read_text()) == said
    middle = replay(run, "--step", "5", "--since", "2", "--workers", "1")
    assert middle.code == 0, middle.output
    assert f"steps 1 to 5 of '{run}' on 1 worker(s), one_f_one_b: the same to the last bit, samples, losses, " in (
        middle.output
    )
    assert (run / "replays" / "step-5" / "checkpoints" / "step-00000005").is_dir(), "it saves itself where it ends"
    assert files(run) == before, "a replay changes nothing of the run"


def test_a_forged_line_and_a_flipped_weight_are_found_and_named(copied: Path, replay: Replay) -> None:
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    true = next(line["loss"] for line in reversed(lines) if line["step"] == 7)
    forged = [{**line, "loss": true - 1e-9} if line["step"] == 7 else line for line in lines]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in forged))
    shard = next((copied / "model").glob("*.safetensors"))
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[3] += 1e-6
    save_file(tensors, shard, {"format": "pt"})
    done = replay(copied, "--step", "8", "--json")
    assert done.code == 1, done.output
    said = json.loads(done.output)
    assert said["first_difference"] == {"step": 7, "what": "loss", "was": true - 1e-9, "now": true}
    assert (said["equal"], said["checkpoint_equal"], said["model_equal"]) == (False, True, False)
    again = replay(copied, "--step", "8")
    assert again.code == 1, "an older replay is replaced"
    assert f"NOT the same. step 7: loss was {true - 1e-9} and is {true}\n" in again.output


def test_other_tokens_take_the_place_of_the_run_s(copied: Path, replay: Replay, tmp_path: Path) -> None:
    other = Path(shutil.copytree(copied / "data", tmp_path / "other"))
    tokens = bytearray((other / "tokens.bin").read_bytes())
    tokens[len(tokens) // 2 :] = bytes(len(tokens) - len(tokens) // 2)
    (other / "tokens.bin").write_bytes(tokens)
    shutil.rmtree(copied / "data")
    done = replay(copied, "--data", str(other), "--since", "4", "--out", str(tmp_path / "new"), "--json")
    assert done.code == 0, done.output
    said = json.loads(done.output)
    assert (said["from"], said["steps_compared"], said["equal"], said["model_equal"]) == (0, 0, None, None)
    assert (tmp_path / "new" / "model" / "model.safetensors.index.json").is_file()
    assert (tmp_path / "new" / "checkpoints" / "step-00000008").is_dir()


def test_what_cannot_be_run_again_is_refused_by_name(copied: Path, replay: Replay, tmp_path: Path) -> None:
    def refused(run: Path, *more: str) -> str:
        done = replay(run, *more)
        assert done.code == 2, done.output
        return done.output

    assert f"run is '{tmp_path}'; allowed: the folder of a run, which has config.toml in it" in refused(tmp_path)
    assert "step is 9; allowed: 1 to 8, the last that the ledger of the run has" in refused(copied, "--step", "9")
    assert "since is 6; allowed: 1 to 5, the step" in refused(copied, "--step", "5", "--since", "6")
    assert "allowed: 1, as in the run, which had no --exact-sums" in refused(copied, "--replicas", "2")
    assert "that the run does not lie in" in refused(copied, "--out", str(copied))
    assert "that is empty, or holds an older replay" in refused(copied, "--out", str(copied / "model"))
    flip(copied / "data" / "tokens.bin", 60_000)
    assert "they are damaged" in refused(copied)
    (copied / "data" / "meta.json").unlink()
    assert f"data is '{copied / 'data'}', whose tokens cannot be read: " in refused(copied)
    assert not (copied / "replays").exists()


def test_what_followed_from_a_loss_is_refused(forkserver: ForkServer, replay: Replay, tmp_path: Path) -> None:
    kill = ["--recovery", "checkfree", "--inject", "kill:worker=2,step=5,at=forward"]
    run = train(forkserver, tmp_path / "free", "--workers", "4", *kill)
    done = replay(run, "--step", "6", "--since", "4")
    assert done.code == 2, done.output
    assert (
        "step is 6, and the run has resumed at step 5 (worker 4 by checkfree): the steps after that do" in done.output
    )
    after = replay(run, "--step", "8", "--json")
    assert after.code == 0, after.output
    assert json.loads(after.output)["from"] == 6, "what a checkpoint has is not repeated"
