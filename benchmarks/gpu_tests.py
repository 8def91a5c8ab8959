"""The CUDA tests, for section a of benchmarks/gpu.py: parity with plain PyTorch in fp32 is among them.

pytest runs in this process, over the files that have such tests, and every test is told as it ends.
"""

from __future__ import annotations

import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_case import Case, require

ROOT = Path(__file__).resolve().parent.parent
MARK = "pytest.mark.cuda"
_AT_ONCE = 6


class Recorder:
    """A pytest plugin: how many tests have ended how, by file, and what failed."""

    def __init__(self, case: Case) -> None:
        self._case, self.count, self.failed = case, dict[str, Counter[str]](), list[str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """See pytest. A test is over with its call, or where its set-up does not pass."""
        if report.when != "call" and report.outcome == "passed":
            return
        name = Path(report.nodeid.partition("::")[0]).stem
        if report.failed:
            said = str(report.longrepr).strip().splitlines()
            self.failed.append(f"{report.nodeid}: {said[-1][:300] if said else ''}")
        self._add(name, report.outcome)

    def pytest_collectreport(self, report: Any) -> None:
        """See pytest: a file that cannot be imported is a failure too."""
        if report.failed:
            self.failed.append(f"{report.nodeid}: {str(report.longrepr).strip()[-300:]}")
            self._add(Path(report.nodeid).stem, "failed")

    def _add(self, name: str, outcome: str) -> None:
        counts = self.count.setdefault(name, Counter())
        counts[outcome] += 1
        told = {each: counts[each] for each in ("passed", "failed", "skipped")}
        failures = [each for each in self.failed if f"{name}.py" in each]
        self._case.say(f"pytest -m cuda, {name}", **told, failures=failures)


def cuda_files() -> list[Path]:
    """The test files that have tests for CUDA."""
    return sorted(path for path in (ROOT / "tests").glob("test_*.py") if MARK in path.read_text(errors="replace"))


def cuda_tests(values: dict[str, Any]) -> None:
    """Run them. Raises Missing where what they need is not there, RuntimeError where one fails."""
    case = Case.from_json(values)
    require("pytest", "pytest_timeout", "hypothesis")
    import pytest

    files = [path for path in cuda_files() if not case.dry or path.stem == "test_rng"]
    several = [f"-n{_AT_ONCE}", "--dist=load"] if not case.dry and find_spec("xdist") is not None else ["-pno:xdist"]
    recorder = Recorder(case)
    os.chdir(ROOT)
    arguments = ["-m", "cuda and not long", "-pno:cacheprovider", f"--basetemp={case.folder / 'pytest'}", *several]
    code = pytest.main([*arguments, *map(str, files)], plugins=[recorder])
    if recorder.failed:
        raise RuntimeError(f"{len(recorder.failed)} failed, first {recorder.failed[0]}")
    if int(code) != 0:
        raise RuntimeError(f"pytest ended with {int(code)}")
