"""What a name may have meant: by what other trainers call it, or by its spelling; nothing where neither is near."""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import version

import pytest

from jobs.config import TrainConfig
from launch.cli import COMMANDS, main
from pipeline.names import _ELSEWHERE, did_you_mean, nearest
from schedulers import ENGINES

SETTINGS = tuple(field.name for field in fields(TrainConfig))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learning-rate", "lr"), ("learning_rate", "lr"), ("LR", "lr"), ("max_steps", "steps"), ("epochs", "steps"),
        ("per_device_train_batch_size", "microbatch_size"), ("gradient_accumulation_steps", "microbatches"),
        ("block_size", "sequence_length"), ("max_grad_norm", "clip"), ("output_dir", "out"), ("bf16", "dtype"),
        ("wrokers", "workers"), ("sequnce_length", "sequence_length"), ("evaluate", "evaluate_every"), ("xyzzy", None),
    ],
)  # fmt: skip
def test_a_setting_by_another_name(name: str, meant: str | None) -> None:
    assert nearest(name, SETTINGS) == meant


@pytest.mark.parametrize(
    ("name", "meant"),
    [("1f1b", "one_f_one_b"), ("1F1B", "one_f_one_b"), ("interleaved_1f1b", "interleaved"), ("ZBH1", "zero_bubble"),
     ("zero-bubble", "zero_bubble"), ("skip-pipe", "skippipe"), ("magic", None)],
)  # fmt: skip
def test_a_scheduler_by_another_name(name: str, meant: str | None) -> None:
    assert nearest(name, ENGINES) == meant


def test_only_what_is_allowed_is_suggested() -> None:
    assert nearest("learning_rate", ("workers", "steps")) is None
    assert did_you_mean("learning_rate", ["lr"], "--") == " (did you mean --lr?)"
    assert did_you_mean("seqence_length", ["sequence_length"], "--") == " (did you mean --sequence-length?)"
    assert did_you_mean("xyzzy", SETTINGS) == ""


def test_the_names_of_others_lead_somewhere_and_are_not_ours() -> None:
    every = {name for command in COMMANDS.values() for name in (f.name for f in fields(command.load()[0]))}
    assert set(_ELSEWHERE) <= every | set(ENGINES)
    theirs = [name for names in _ELSEWHERE.values() for name in names.split()]
    assert len(theirs) == len(set(theirs)), "a name leads to two of ours"
    assert not {name for ours in SETTINGS for name in _ELSEWHERE.get(ours, "").split()} & set(SETTINGS)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"unbroken {version('unbroken')}\n"
