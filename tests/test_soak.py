"""A short form of benchmarks/soak.py: random kills, then a whole ledger and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest


@pytest.mark.timeout(150)
@pytest.mark.long
def test_nothing_is_missing_and_nothing_is_left_after_random_kills() -> None:
    root = Path(__file__).parent.parent
    command = [
        sys.executable,
        str(root / "benchmarks" / "soak.py"),
        "--minutes",
        "0.25",
        "--every",
        "0.5",
        "--seed",
        "5",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=130)
        finally:
            process.terminate()  # it ends what it has started
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
    assert process.returncode == 0, out + err
    found = json.loads(out)
    assert found["problems"] == []
    assert found["lost"] >= 10, "fewer would hide a descriptor that each leaves open"
    assert found["steps"] > 30
