"""Every number in the settings has a least and a most, and what is beyond them is refused before anything starts."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from jobs.config import TrainConfig
from launch.cli import COMMANDS, main
from launch.machine import check_machine
from pipeline.settings import ConfigError, Within, bounds_of, check_bounds, declared, groups, names_of

SETTINGS = {name: command.load() for name, command in COMMANDS.items()}


def numbers(settings: type) -> dict[str, type]:
    """The numeric fields of a dataclass of settings, and whether they are whole."""
    kinds = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(settings).items()}
    return {name: int if int in each else float for name, each in kinds.items() if {int, float} & set(each)}


EVERY = {command: found for command, (settings, _) in SETTINGS.items() if (found := numbers(settings))}


def test_there_are_many_numbers() -> None:
    assert sum(map(len, EVERY.values())) > 60
    assert EVERY.keys() == set(COMMANDS) - {"audit", "clean"}, "which take none"


@pytest.mark.parametrize("command", EVERY)
def test_every_number_of_every_command_has_finite_bounds(command: str) -> None:
    bounds = bounds_of(SETTINGS[command][0])
    assert set(EVERY[command]) <= bounds.keys(), "a number without bounds can exhaust the machine"
    assert [name for name in EVERY[command] if not -math.inf < bounds[name].low < bounds[name].high < math.inf] == []


@pytest.mark.parametrize("command", EVERY)
def test_what_is_out_of_bounds_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    settings, function = SETTINGS[command]
    for name in EVERY[command]:
        bounds = bounds_of(settings)[name]
        beyond = [bounds.low - 1, bounds.high + 1, 10**400, math.nan, math.inf, -math.inf]
        beyond += [bounds.low] if bounds.above else []
        beyond += [bounds.high] if bounds.below else []
        for value in beyond:
            with pytest.raises(ConfigError) as refused:
                function(replace(settings(), **{name: value}))
            assert str(refused.value) == f"{name} is {value!r}; allowed: {bounds}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", EVERY)
def test_defaults_are_within_bounds(command: str) -> None:
    settings, _ = SETTINGS[command]
    check_bounds(settings())
    bounds, found = bounds_of(settings), {name: getattr(settings(), name) for name in EVERY[command]}
    assert [name for name, value in found.items() if value is not None and value not in bounds[name]] == []


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [
        (Within(1, 1024), "1 to 1024", [1, 1024], [0, 1025]),
        (Within(0, 1, above=True, below=True), "between 0 and 1", [0.5], [0, 1]),
        (Within(0, 1, below=True), "0 or more and below 1", [0], [1, -1e-9]),
        (Within(0, 100, above=True), "above 0, up to 100", [100, 1e-9], [0]),
        (Within(2, 9, note=" (seconds)"), "2 to 9 (seconds)", [2, 9], [1.9]),
    ],
)
def test_bounds_say_what_they_hold(bounds: Within, text: str, inside: list[float], outside: list[float]) -> None:
    assert str(bounds) == text
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in (*outside, math.nan, math.inf, -math.inf))


# ---- as a person meets it ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--workers", "100000"], "workers is 100000; allowed: 1 to 1024"),
        (["train", "--threads", "1000000"], "threads is 1000000; allowed: 0 to 1024"),
        (["train", "--lr", "nan"], "lr is nan; allowed: above 0, up to 100"),
        (["train", "--clip", "inf"], "clip is inf; allowed: 0 to 1000000"),
        (["train", "--microbatches", "65536", "--workers", "32"], "microbatches is 65536; allowed: 1 to 32768 for 32"),
        (["generate", "--temperature", "nan"], "temperature is nan; allowed: 0 to 100"),
        (["simulate", "--stages", "1000000"], "stages is 1000000; allowed: 1 to 1024"),
        (["simulate", "--stages", "1024", "--microbatches", "65536"], "microbatches is 65536; allowed: 1 to 1024 for"),
        (["simulate", "--stages", "1024", "--replicas", "1024"], "replicas is 1024; allowed: 1 to 16 with 1024 stages"),
        (["plan", "--budget", "inf"], "budget is inf; allowed: above 0, up to 604800 (a week)"),
        (["plan", "--skip", "nan"], "skip is nan; allowed: 0 or more and below 1"),
        (["draw", "--chunks", "-1"], "chunks is -1; allowed: 1 to 1024"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_number_that_is_out_of_bounds_is_answered_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- what a machine holds ----


@pytest.mark.parametrize(
    ("changes", "here", "cores", "message"),
    [
        ({"workers": 33}, 33, 2, r"workers is 33; allowed: at most 32 on a machine of 2 core"),
        ({"workers": 1024}, 1024, 32, r"workers is 1024; allowed: at most 512 on a machine of 32"),
        ({"workers": 20, "spares": 13}, 20, 2, r"spares is 13; allowed: at most 12 beside 20 workers"),
        ({"threads": 9}, 4, 2, r"threads is 9; allowed: 0 to 8 on a machine of 2 core"),
    ],
)
def test_a_machine_is_not_given_more_than_it_can_hold(
    changes: dict[str, Any], here: int, cores: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_machine(TrainConfig(**changes), here, cores)


@pytest.mark.parametrize("workers", [8, 20])
def test_small_machines_run_tests_of_many_workers(workers: int) -> None:
    check_machine(TrainConfig(workers=workers, spares=2, threads=4), workers, cores=1)


def test_workers_on_other_machines_do_not_count() -> None:
    check_machine(TrainConfig(workers=1024, nodes=64), 16, cores=2)


def test_every_setting_has_one_owner() -> None:
    owned = [name for group in groups(TrainConfig) for name in declared(group)]
    assert len(owned) == len(set(owned))
    assert names_of(TrainConfig) == owned
    assert {f.name for f in fields(TrainConfig)} == set(owned)


def test_a_setting_that_its_scheduler_does_not_read_is_refused_by_its_owner() -> None:
    with pytest.raises(ConfigError, match=r"skip is 0\.5; allowed: 0\.0 unless scheduler is skippipe"):
        TrainConfig(skip=0.5).validate()
    with pytest.raises(ConfigError, match=r"cpu_adam is 'deepspeed'; allowed: torch unless scheduler is roundpipe"):
        TrainConfig(cpu_adam="deepspeed").validate()
