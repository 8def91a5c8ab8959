"""A run that is resumed goes on with its own settings: what a flag changes is said, and another run is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from jobs.config import ConfigError, TrainConfig
from jobs.resume import FIXED, NUMBERS, OF_THE_DATA, OF_THE_START, check_resumed
from launch.config import config_from_toml
from launch.forkserver import ForkServer
from launch.resume import kept
from pipeline.state.optimizer import learning_rate
from tests.harness import Command, run_command

FREE = {
    "peak_tflops",
    "workers", "replicas", "scheduler", "search_moves", "at_once", "rule", "cpu_adam", "span_mib", "chunks", "steps",
    "device", "threads", "recompute", "compile", "ends", "model", "checkpoint_every", "keep", "evaluate_every",
    "evaluate_samples", "tensorboard", "sample_tokens", "recovery", "checkfree_weights", "rehearse_mib", "heartbeat",
    "checkfree_moments", "checkfree_lr_scale",
    "spares", "max_failures", "network", "links", "deadline", "min_workers", "cooldown", "wait", "preempt_signal",
    "grace", "snapshot", "shift", "migration_mib", "max_preemptions", "shard_optimizer",
    "patience", "export_every", "track", "balanced_memory", "balanced_shape",
}  # fmt: skip


def test_every_setting_is_of_one_kind() -> None:
    """A new setting has to be thought of here: does it change what a run computes?"""
    numbers = {*NUMBERS, "microbatches", "microbatch_size"} - {"samples_per_step"}
    kinds = [set(OF_THE_START), set(FIXED), numbers, set(OF_THE_DATA) - numbers - set(FIXED), FREE]
    names = [name for kind in kinds for name in kind]
    assert sorted(names) == sorted(field.name for field in fields(TrainConfig))


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "samples_per_step"])
def test_a_number_of_the_run_is_changed_only_by_who_says_so(name: str) -> None:
    before = TrainConfig(lr=0.002, warmup=20, optimizer="adamw", clip=1.0, momentum=0.9)
    value = getattr(before, name)
    words = {"dtype": "bfloat16", "gradient_dtype": "bfloat16", "optimizer": "sgd", "lr_schedule": "linear"}
    other = words[name] if name in words else not value if isinstance(value, bool) else value + 1
    now = replace(before, resume=True, **{name: other})
    with pytest.raises(
        ConfigError, match=rf"^cannot resume: {name} was {value} and is {other}, which would make it ano"
    ):
        check_resumed(before, now)
    assert check_resumed(before, replace(now, change=True)) == [f"{name} {value} -> {other}"]


@pytest.mark.parametrize("name", FIXED)
def test_what_the_weights_are_made_for_never_changes(name: str) -> None:
    before = TrainConfig()
    others: dict[str, Any] = {
        "tokenizer": "bpe", "lora_targets": "q_proj", "lora_blocks": "0:1", "trained": "*.mlp.*", "dropout": 0.5,
    }  # fmt: skip
    now = replace(before, change=True, **{name: others[name] if name in others else getattr(before, name) + 1})
    with pytest.raises(ConfigError, match=rf"^cannot resume: {name} was .*, which the weights are made for"):
        check_resumed(before, now)


def test_the_same_global_batch_may_be_cut_otherwise() -> None:
    before = TrainConfig(microbatches=4, microbatch_size=2)
    changed = check_resumed(before, replace(before, microbatches=8, microbatch_size=1))
    assert changed == ["microbatches 4 -> 8", "microbatch_size 2 -> 1"]
    with pytest.raises(ConfigError, match=r"the global batch \(microbatches x microbatch_size\) was 8 and is 16"):
        check_resumed(before, replace(before, microbatches=8))


# ---- whole runs ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    words = ["a", "pipeline", "of", "workers", "that", "may", "die", "at", "any", "moment"]
    rows = [" ".join(words[(d * k + d // 7) % 10] for k in range(1, 19)) for d in range(120)]
    path.write_text("".join(json.dumps({"text": f"{n} {row}"}) + "\n" for n, row in enumerate(rows)))
    return path


@pytest.fixture(scope="module")
def first(forkserver: ForkServer, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 4 steps, few of whose settings are defaults."""
    out = tmp_path_factory.mktemp("first") / "run"
    done = run_command(
        forkserver, out.with_name("log"), "train", "--model", "llama-tiny", "--data", str(corpus),
        "--tokenizer", "bytes",
        "--workers", "2", "--scheduler", "gpipe", "--microbatches", "4", "--microbatch-size", "2", "--sequence-length",
        "32", "--steps", "4", "--lr", "0.001", "--warmup", "3", "--held-out", "0.1", "--max-tokens", "6000",
        "--threads", "1", "--checkpoint-every", "2", "--evaluate-every", "0", "--sample-tokens", "0", "--device", "cpu",
        "--inject", "slow:worker=0,step=1,factor=1", "--out", str(out),
    )  # fmt: skip
    assert done.code == 0, done.output
    return out


@pytest.fixture
def resume(forkserver: ForkServer, first: Path, tmp_path: Path) -> Callable[..., Command]:
    """Resumes a copy of that run, in tmp_path / "run", with some flags."""
    shutil.copytree(first, tmp_path / "run")

    def start(*flags: str) -> Command:
        return run_command(
            forkserver, tmp_path / "log", "train", "--resume", "--out", str(tmp_path / "run"), *flags
        )  # fmt: skip

    return start


def settings(folder: Path) -> TrainConfig:
    return config_from_toml(folder / "run" / "config.toml", TrainConfig)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_resumed_with_nothing_but_its_folder(
    resume: Callable[..., Command], first: Path, tmp_path: Path
) -> None:
    done = resume("--steps", "6")
    assert done.code == 0, done.output
    assert "changed since the last start: steps 4 -> 6\n" in done.output
    before, now = config_from_toml(first / "config.toml", TrainConfig), settings(tmp_path)
    assert (now.lr, now.warmup, now.scheduler, now.workers, now.max_tokens) == (0.001, 3, "gpipe", 2, 6000)
    assert now == replace(before, steps=6, resume=True, out=tmp_path / "run", inject="")
    assert [m["lr"] for m in metrics(tmp_path)[4:]] == [learning_rate(now.optimizer_config(), step) for step in (4, 5)]
    again = resume()
    assert again.code == 0, again.output
    assert "changed" not in again.output
    assert settings(tmp_path) == now


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "0.5"], "cannot resume: lr was 0.001 and is 0.5, which would make it another run; allowed: the s"),
        (["--lr", "0.002"], "cannot resume: lr was 0.001 and is 0.002"),
        (["--warmup", "20"], "warmup was 3 and is 20"),
        (["--microbatches", "8"], "the global batch (microbatches x microbatch_size) was 8 and is 16"),
        (["--sequence-length", "16", "--seed", "3"], "sequence_length was 32 and is 16, seed was 0 and is 3"),
        (["--tokenizer", "bpe"], "tokenizer was bytes and is bpe, which the weights are made for; allowed: the same"),
        (["--max-tokens", "4000"], "cannot resume with another data: max_tokens was 6000 and is 4000. Use the same"),
        (["--held-out", "0.3"], "cannot resume with another data: held_out was 0.1 and is 0.3. Use the same"),
        (["--model", "gpt2-tiny"], "cannot resume with another model"),
        (["--steps", "3"], "steps is 3; allowed: 4 or more: step-00000004 is at step 4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_another_run_is_refused_and_the_settings_stay(
    resume: Callable[..., Command], first: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    refused = resume(*flags)
    assert refused.code in (1, 2)
    assert message in refused.output
    for name in ("config.toml", "metrics.jsonl", "data/meta.json"):
        assert (tmp_path / "run" / name).read_bytes() == (first / name).read_bytes()


def test_a_start_may_end_before_the_run_which_then_goes_on(resume: Callable[..., Command], tmp_path: Path) -> None:
    refused = resume("--steps", "7", "--until", "3")
    assert refused.code == 2
    assert "until is 3; allowed: 4 or more: step-00000004 is at step 4" in refused.output
    done = resume("--steps", "7", "--until", "5")
    assert done.code == 0, done.output
    assert "changed since the last start: steps 4 -> 7\n" in done.output
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    again = resume()
    assert again.code == 0, again.output
    assert "changed" not in again.output, "it is of the one start"
    rates = [learning_rate(settings(tmp_path).optimizer_config(), step) for step in (4, 5, 6)]
    assert [m["lr"] for m in metrics(tmp_path)[4:]] == rates, "of the whole run"


def test_text_that_has_changed_is_told_from_settings_that_have(
    resume: Callable[..., Command], corpus: Path, tmp_path: Path
) -> None:
    shutil.copy(corpus, tmp_path / "same.jsonl")
    other = resume("--data", str(tmp_path / "same.jsonl"))
    assert other.code == 0, "the same text elsewhere is the same data"
    text = corpus.read_text()
    try:
        corpus.write_text(text.replace("pipeline", "queue"))
        changed = resume("--data", str(corpus))
        assert changed.code == 2
        assert "cannot resume with another data: data was" in changed.output
        shutil.copy(corpus, tmp_path / "same.jsonl")
        changed = resume()
        assert changed.code == 2
        assert f"the text that data '{tmp_path / 'same.jsonl'}' names has changed" in changed.output
    finally:
        corpus.write_text(text)


def test_a_change_that_is_meant_is_made_and_said(resume: Callable[..., Command], tmp_path: Path) -> None:
    done = resume("--change", "--lr", "0.5", "--max-tokens", "4000", "--steps", "5", "--seed", "9")
    assert done.code == 0, done.output
    assert "changed since the last start: seed 0 -> 9, steps 4 -> 5, max_tokens 6000 -> 4000, lr 0.001 -> 0.5\n" in (
        done.output
    )
    now = settings(tmp_path)
    assert (now.lr, now.max_tokens, now.seed, now.warmup) == (0.5, 4000, 9, 3)
    assert metrics(tmp_path)[4]["lr"] == learning_rate(now.optimizer_config(), 4)


def test_a_file_goes_before_what_was_kept_and_flags_before_the_file(
    resume: Callable[..., Command], tmp_path: Path
) -> None:
    (tmp_path / "more.toml").write_text("steps = 7\nworkers = 3\nkeep = 1\n")
    done = resume("--config", str(tmp_path / "more.toml"), "--steps", "5")
    assert done.code == 0, done.output
    assert "changed since the last start: workers 2 -> 3, steps 4 -> 5, keep 2 -> 1\n" in done.output
    assert (settings(tmp_path).scheduler, settings(tmp_path).lr) == ("gpipe", 0.001)


def test_settings_that_were_not_kept_or_are_no_settings_are_told(
    resume: Callable[..., Command], corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "config.toml"
    path.write_text("wrokers = 2\n")
    refused = resume()
    assert refused.code == 2
    assert f"'{path}' does not hold the settings of a run: wrokers (did you mean workers?): no such" in refused.output
    path.unlink()
    done = resume(
        "--model", "llama-tiny", "--data", str(corpus), "--tokenizer", "bytes", "--sequence-length", "32", "--steps",
        "4", "--held-out", "0.1", "--max-tokens", "6000", "--workers", "2", "--sample-tokens", "0",
    )  # fmt: skip
    assert done.code == 0, done.output
    assert f"'{path}' is not there: what was not given now has its default" in done.output


def test_what_says_how_one_start_goes_is_not_kept(first: Path) -> None:
    before = kept(TrainConfig(resume=True, out=first))
    assert before is not None
    assert (before.inject, before.resume, before.out) == ("", False, TrainConfig().out)
    assert kept(TrainConfig(out=first)) is None
    assert kept(TrainConfig(resume=True, out=first / "nowhere")) is None
