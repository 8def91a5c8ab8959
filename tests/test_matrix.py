"""The fault matrix: cells that no other test has, and that a wrong one is told from a right one. All: `make matrix`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import matrix, matrix_cells
from benchmarks.matrix_cells import GOOD, KINDS, POINTS, ROWS, SAMPLES, STEPS, Cell, Found, Running, cells
from launch.forkserver import ForkServer
from recovery import inject

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def calm(forkserver: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return matrix_cells.calm(forkserver, tmp_path_factory.mktemp("calm"))


@pytest.mark.parametrize(
    ("row", "at", "verdict"),
    [
        pytest.param("segfault", "copy", "correct", marks=pytest.mark.long),
        pytest.param("gil", "snapshot", "correct", marks=pytest.mark.long),
        ("flip-other-lost", "backward", "correct"),
        pytest.param("nan-in-a-save", "optimizer", "named", marks=pytest.mark.long),
    ],
)
def test_a_cell(forkserver: ForkServer, calm: Weights, tmp_path: Path, row: str, at: str, verdict: str) -> None:
    (cell,) = cells([row], [at])
    found = matrix_cells.run_cell(forkserver, cell, tmp_path, calm)
    assert found.verdict == verdict, found


def test_the_matrix_has_every_kind_at_every_point() -> None:
    every = list(cells())
    assert set(KINDS) == set(inject.FAULTS)
    assert set(POINTS) == set(inject.POINTS) - {"exchange"}, (
        "that one is of --shard-optimizer: tests/test_shard_runs.py"
    )
    assert {(c.row, c.at) for c in every if c.row in KINDS} == {(kind, at) for kind in KINDS for at in POINTS}
    assert {c.row for c in every} | {matrix_cells.STORE} == set(ROWS)
    for cell in every:
        inject.parse_faults(cell.inject, inject.Ground(103, None))


# ---- that a wrong one is told from a right one ----


class Told:
    """A run that has ended, as its folder tells it; `resumed` is what --resume ends with."""

    def __init__(self, folder: Path, said: str = "", resumed: int = 0) -> None:
        self.out, self._said, self._resumed = folder / "run", said, resumed
        self.ledger: list[dict[str, Any]] = [
            {"step": s, "view": 1, "first_sample": SAMPLES * (s - 1), "samples": SAMPLES, "time": 10.0 + s}
            for s in range(1, STEPS + 1)
        ]
        self.events: list[dict[str, Any]] = [{"event": "fault", "time": 18.5}]
        (self.out / "model").mkdir(parents=True)
        save_file({"w": torch.ones(3)}, self.out / "model" / "model.safetensors")

    def lines(self, name: str) -> list[dict[str, Any]]:
        return {"ledger": self.ledger, "events": self.events}[name]

    def said(self) -> str:
        return self._said

    def start(self, *flags: str) -> int:
        assert flags[-1] == "--resume"
        return 1

    def wait(self, pid: int, timeout_s: float) -> int:
        return self._resumed


CELL = Cell("kill", "forward", (), "kill:worker=1,step=8")


def verdict(told: Any, code: int | None, cell: Cell = CELL, wanted: float = 1.0) -> str:
    seconds = matrix_cells.measure(told, cell, ended=20.0)
    return matrix_cells.judge(told, cell, code, seconds, told.said(), {"w": torch.full((3,), wanted)})[0]


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path, "unbroken train: worker 1 was killed by SIGKILL")


def test_a_run_that_ends_well_is_correct_if_it_is_the_calm_one(told: Told) -> None:
    assert verdict(told, 0) == "correct"
    assert verdict(told, 0, wanted=1.0000001) == "WRONG", "the weights are others"
    assert verdict(told, 0, replace(CELL, inject="kill:worker=1,step=8;kill:worker=0,step=8")) == "WRONG", "one fault"
    assert verdict(told, None) == "HANG"


@pytest.mark.parametrize("wrong", [{"view": 1, "step": 8}, {"first_sample": 8}, {"samples": 4}])
def test_a_ledger_with_a_hole_or_a_repetition_is_wrong(told: Told, wrong: dict[str, int]) -> None:
    told.ledger[30] |= wrong
    assert verdict(told, 0) == "WRONG"


def test_an_error_has_to_name_what_it_is_about_and_to_leave_what_can_be_resumed(told: Told, tmp_path: Path) -> None:
    assert verdict(told, 1) == verdict(told, 93) == "named"
    assert verdict(told, 75) == "saved"
    assert verdict(told, 2) == verdict(told, -9) == "WRONG"
    assert verdict(Told(tmp_path / "silent", "Traceback: it is what it is"), 1) == "WRONG"
    assert verdict(Told(tmp_path / "again", "worker 1 was lost", resumed=1), 1) == "WRONG"


def test_a_fault_with_nothing_after_it_hangs(told: Told) -> None:
    told.ledger[8:] = [line | {"time": line["time"] + 60} for line in told.ledger[8:]]
    assert verdict(told, 0) == "HANG"


def test_what_is_left_behind_is_wrong(forkserver: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Running, "start", lambda *_: 1)
    monkeypatch.setattr(Running, "wait", lambda *_: 0)
    monkeypatch.setattr(Running, "left", lambda *_: [17])
    found = matrix_cells.run_cell(forkserver, CELL, tmp_path, {})
    assert (found.verdict, found.said) == ("WRONG", "1 processes were left behind")


def test_the_table_and_the_exit_code(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Found("kill", "forward", "correct", 0.25, 0), Found("flip", "forward", "named", 0.5, 1)]
    monkeypatch.setattr(matrix, "matrix", lambda *_: found)
    monkeypatch.setattr("sys.argv", ["matrix.py", "--only", "kill,flip", "--out", str(tmp_path)])
    assert matrix.main() == 0
    said = capsys.readouterr().out
    assert "0.25" in said
    assert "0.50 n" in said
    assert [cell["row"] for cell in json.loads((tmp_path / "matrix.json").read_text())["cells"]] == ["kill", "flip"]
    found[:] = [Found("kill", "forward", "HANG", None, None)]
    assert matrix.main() == 1
    cells = json.loads((tmp_path / "matrix.json").read_text())["cells"]
    assert [(cell["row"], cell["verdict"]) for cell in cells] == [("kill", "HANG"), ("flip", "named")], "others stay"
    assert "HANG" not in GOOD
