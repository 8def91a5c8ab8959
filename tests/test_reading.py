"""Files that a command reads: one that cannot be read, or holds what is no number, is named, and the field with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jobs.config import ConfigError, TrainConfig
from jobs.network import read_network
from jobs.pipelines import find_routes
from launch.cli import main
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import preset
from pipeline.reading import FileError, numbers, read_json, read_toml
from pipeline.schedule.costs import CostError, Costs, Network
from schedulers.roundpipe_search.problem import rounds_from_json as costs_problem
from schedulers.skippipe_search.problem import NetworkError
from schedulers.skippipe_search.problem import routing_from_json as network_problem
from tests.test_cli import exported

DEEP = "[" * 100_000
TRAIN = ["train", "--workers", "2", "--model", "llama-tiny", "--data", "nowhere.txt", "--out", "run"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["simulate", "--network"], "network.json"),
        (["simulate", "--costs"], "costs.json"),
        (["draw", "--costs"], "costs.json"),
        (["plan", "--network"], "network.json"),
        (["plan", "--scheduler", "roundpipe", "--model", "8B", "--costs"], "costs.json"),
        ([*TRAIN, "--network"], "network.json"),
        ([*TRAIN, "--scheduler", "skippipe", "--network"], "network.json"),
        ([*TRAIN, "--model"], "shape.json"),
        ([*TRAIN, "--model"], "shape.toml"),
        *[([command, "--config"], "settings.toml") for command in ("train", "eval", "generate", "simulate", "plan",
                                                                   "draw", "doctor")],
    ],
    ids=lambda value: " ".join(value[:1] + value[-1:]) if isinstance(value, list) else "",
)  # fmt: skip
@pytest.mark.parametrize("form", ["deep", "long", "latin", "absent"])
def test_a_file_that_cannot_be_read_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str],
    name: str, form: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    toml = "x = " if name.endswith("toml") else ""
    contents = {"deep": toml + DEEP, "long": toml + "9" * 5000, "latin": "\xe9"}
    if form in contents:
        (tmp_path / name).write_text(contents[form], encoding="latin-1")
    assert main([*arguments, name]) == 2
    err = capsys.readouterr().err
    assert name in err
    assert err.count("\n") == 1
    assert form != "deep" or "nested too deeply" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_the_files_of_a_model_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = exported(tmp_path / "model", "llama-tiny")
    (model / file).write_text(DEEP)
    for arguments in ([*TRAIN, "--model"], ["eval", "--model"], ["generate", "--model"]):
        assert main([*arguments, str(model)]) == 2
        err = capsys.readouterr().err
        assert str(model) in err
        assert arguments[0] != "train" or f"{model / file}" in err
        assert "Traceback" not in err


def test_what_is_no_finite_number_is_refused_with_the_field_it_is_in(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for text, where in (("NaN", "nan at its top"), ('{"a": [1, -Infinity]}', r"-inf at a\[1\]"),
                        ('{"a": {"b": [[0], [0, 1e999]]}}', r"inf at a\.b\[1\]\[1\]")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(FileError, match=rf"^holds {where}; allowed: finite numbers$"):
            read_json(path)
    path.write_text('{"a": [1, true, null, "NaN"]}')
    assert read_json(path) == {"a": [1, True, None, "NaN"]}
    assert list(numbers({"a": [1, {"b": 2.5}], "c": True, "d": -1})) == [("a[0]", 1), ("a[1].b", 2.5), ("d", -1)]


def test_nesting_is_limited_by_the_parser_alone(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("[" * 500 + "]" * 500)
    read_json(path)
    (tmp_path / "file.toml").write_text("a = " + DEEP)
    with pytest.raises(FileError, match="nested too deeply"):
        read_toml(tmp_path / "file.toml")


@pytest.mark.parametrize(
    "lines",
    [
        "route 0-99999999999: 0:1 | 0:1\nlane 0: F[0:1]#0 B[0:1]#0",
        "route 0-0: 0:9999999999 | 0:9999999999\nlane 0: F[0:9999999999]#0 B[0:9999999999]#0",
        "route 0-0: 0:1 | 0:1\nlane 99999999999999999999: F[0:1]#0 B[0:1]#0",
    ],
    ids=["microbatches", "layers", "workers"],
)
def test_a_line_of_a_schedule_cannot_fill_the_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, lines: str
) -> None:
    (tmp_path / "schedule.txt").write_text(f"unbroken schedule 1 large\n{lines}\n")
    assert main(["simulate", "--schedule", str(tmp_path / "schedule.txt")]) == 2
    assert "the number 9999999" in capsys.readouterr().err


# ---- networks and costs ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latency_s": [[0, math.nan], [0, 0]]}, r"latency_s\[0\]\[1\] is nan; allowed: a number of 0 to 1e"),
        ({"latency_s": [[0, "x"], [0, 0]]}, r"latency_s\[0\]\[1\] is 'x'; allowed"),
        ({"latency_s": [[0, True], [0, 0]]}, r"latency_s\[0\]\[1\] is True; allowed"),
        ({"latency_s": [[0, 10**400], [0, 0]]}, r"latency_s\[0\]\[1\] is 1000"),
        ({"latency_s": [[0, 1e300], [0, 0]]}, r"latency_s\[0\]\[1\] is 1e\+300"),
        ({"latency_s": [[0, [1]], [0, 0]]}, r"latency_s\[0\]\[1\] is \[1\]"),
        ({"bandwidth": [[None, 0], [1, None]]}, r"bandwidth\[0\]\[1\] is 0; allowed: a number of 1e-06 to"),
        ({"bandwidth": [[None, 1e-300], [1, None]]}, r"bandwidth\[0\]\[1\] is 1e-300; allowed: a number of 1e-06 to"),
        ({"hop_s": [[0, -1], [1, 0]]}, r"latency_s\[0\]\[1\] is -1"),
        ({"hop_s": 3}, r"hop_s is 3; allowed: a list"),
    ],
)
def test_a_matrix_is_refused_by_entry(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CostError, match=message):
        Network.from_json(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"forward": [1, math.nan]}, r"forward\[1\] is nan"),
        ({"forward": 1, "speed": [0, 1]}, r"speed\[0\] is 0; allowed: a number of 1e-06 to 1e\+06"),
        ({"forward": 1, "output_bytes": 10**30}, r"output_bytes is 1000"),
        ({"forward": 1, "host_bandwidth": 0}, r"host_bandwidth is 0; allowed"),
        ({"forward": {"0:" + "9" * 5000: 1}}, r"forward has the entry '0:999"),
        ({"forward": 1, "speed": {"9" * 5000: 1}}, r"speed is \{'999"),
    ],
)
def test_costs_are_refused_by_entry(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CostError, match=message):
        Costs.from_json(values)


HOPS = [[0.0, 0.1, 0.1, 0.1]] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hop_s": [[0, math.nan], [0, 0]]}, r"hop_s\[0\]\[1\] is nan"),
        ({"stages": []}, r"stages is \[\]; allowed: a list of lists"),
        ({"forward_s": math.inf}, r"forward_s is inf; allowed: seconds, 0 to 1e\+09"),
        ({"forward_s": 1e300}, r"forward_s is 1e\+300"),
        ({"speed": [1, 1, 1, 0]}, r"speed is \[1, 1, 1, 0\]; allowed: a list of numbers of 1e-06"),
        (
            {"microbatches_per_first_stage_node": 10**12},
            r"node is 1000000000000; allowed: a whole number of 0 to 65536",
        ),
        ({"microbatches_per_first_stage_node": 60_000}, r"microbatches: 120000; allowed: at most 65536"),
        ({"path_length": -1}, r"path_length is -1; allowed"),
    ],
)
def test_a_network_of_routes_is_refused_by_entry(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        network_problem({"hop_s": HOPS, "stages": [[0, 1], [2, 3]], **changes})


@pytest.mark.parametrize("value", [None, "x", [], {}, True, 1e300])
def test_times_in_a_network_that_are_none_are_refused_when_training_reads_them(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "network.json"
    path.write_text(json.dumps({"hop_s": HOPS, "stages": [[0, 1], [2, 3]], "forward_s": value}))
    config = TrainConfig(scheduler="skippipe", network=path)
    read_network(path, 4)
    with pytest.raises(ConfigError, match=r"network '.*network.json' with scheduler skippipe: forward_s is "):
        find_routes(config, LayeredModel(preset("llama-tiny")), 4)


@pytest.mark.parametrize(("name", "value"), [("layers", 10**9), ("gpus", 10**9), ("microbatches", 2**20)])
def test_counts_in_costs_are_bounded(name: str, value: int) -> None:
    model = {"layers": 4, "forward_ms": 1, "backward_ms": 2, "head_forward_ms": 1, "head_backward_ms": 2}
    values = {"gpus": 2, "microbatches": 4, "round": 2, "models": {"x": model}}
    (model if name == "layers" else values)[name] = value
    with pytest.raises(CostError, match=rf"{name} of 'x' is {value}; allowed: a whole number of 0 to 65536"):
        costs_problem(values, "x")
