"""Our packages have names that others use too: what lies where the command is run is never imported in their place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.whose import PACKAGES, foreign

ROOT = Path(__file__).parents[1]


def start(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`, with ours on the path of imports, after that folder where the command puts it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_ours_are_ours() -> None:
    assert foreign() is None


@pytest.mark.parametrize("name", [name for name in PACKAGES if name != "launch"])
@pytest.mark.parametrize("form", ["{}/__init__.py", "{}.py"])
def test_a_package_of_the_user_is_refused_by_its_path(tmp_path: Path, name: str, form: str) -> None:
    path = tmp_path / form.format(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("print('not ours')\n")
    done = start(tmp_path, sys.executable, "-m", "launch", "simulate")
    assert (done.returncode, done.stdout) == (2, "")
    found = path.parent if path.name == "__init__.py" else path
    assert done.stderr.startswith(
        f"unbroken: package {name!r} would be taken from '{found}', and not from '{ROOT / name}'"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("torchrun", [False, True], ids=["as it is", "under torchrun"])
def test_the_command_does_not_look_where_it_is_run(tmp_path: Path, torchrun: bool) -> None:
    """A script has its own folder first on the path, and not the working one: there even launch.py does no harm."""
    command = Path(sys.executable).with_name("unbroken")
    if not command.exists():
        pytest.skip("the project is not installed here")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--log-dir", "logs", "--no-python")
    before = launcher if torchrun else ()
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not ours')\n")
    (tmp_path / "launch.py").write_text("raise SystemExit('not ours')\n")
    done = start(tmp_path, *before, str(command), "simulate")
    assert done.returncode == 0, done.stderr
    assert "simulated: makespan" in done.stdout
