"""What is published: a wheel, built from the sdist, is installed into an empty environment and used elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "schedulers", "recovery", "jobs", "launch", "unbroken")
USE = """
import json, unbroken
run = unbroken.Run(model="llama-tiny", data="stdlib", tokenizer="bytes", workers=2, steps=10, sequence_length=32,
                   max_tokens=30_000, sample_tokens=0, threads=1, out="runs/api")
steps = [record["step"] for record in run.start()]
print(json.dumps({"at": unbroken.__file__, "steps": steps, "loss": run.evaluate()["loss"],
                  "held_out": run.result().held_out_loss, "text": run.generate("def ", tokens=4)}))
"""

pytestmark = [pytest.mark.long, pytest.mark.timeout(500)]


def build(kind: str, source: Path, into: Path) -> Path:
    """Build by what pyproject.toml names, in the folder of the source; what is left there is the caller's to remove."""
    program = f"from setuptools import build_meta as b; b.build_{kind}({str(into)!r})"
    into.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(into.glob("*.tar.gz" if kind == "sdist" else "*.whl"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("built")
    skipped = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "runs", "__pycache__", "results")
    shutil.copytree(ROOT, folder / "source", ignore=skipped)
    sdist = build("sdist", folder / "source", folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return sdist, build("wheel", next((folder / "unpacked").iterdir()), folder / "wheel")


def test_the_wheel_has_all_that_is_used_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        metadata = BytesParser().parsebytes(archive.read(next(name for name in names if name.endswith("/METADATA"))))
    info = next(name.split("/")[0] for name in names if name.endswith("/METADATA"))
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert not [name for name in names if name.startswith("launch/public")]
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {path.removeprefix("launch/public/") for path in listed.stdout.split()}
    assert ours == {name for name in names if not name.startswith(info)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Name"] == "unbroken"
    assert metadata["Version"] == project["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra") or ()) == set(project["optional-dependencies"])
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or ())
    assert f"{info}/licenses/LICENSE" in names
    with tarfile.open(built[0]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "launch/public/unbroken/__init__.py"} <= inside
    assert not [name for name in inside if name.startswith("benchmarks/")]


def test_it_trains_and_is_imported_outside_the_checkout(built: tuple[Path, Path], tmp_path: Path) -> None:
    """The environment is new, and takes torch and its like from the present one, though not what is installed there in
    place: a .pth in a folder that a .pth names is not read."""
    environment, work = tmp_path / "environment", tmp_path / "work"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    install = ("-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(built[1]))
    subprocess.run([sys.executable, *install], check=True, env=clean())
    packages = next((environment / "lib").glob("python*/site-packages"))
    (packages / "others.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    work.mkdir()

    def said(*command: object) -> str:
        done = subprocess.run(
            [str(word) for word in command], cwd=work, env=clean(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    unbroken = environment / "bin" / "unbroken"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert said(unbroken, "--version") == f"unbroken {version}\n"
    assert json.loads(said(unbroken, "doctor", "--json"))["ok"]
    trained = json.loads(said(
        unbroken, "train", "--model", "llama-tiny", "--data", "stdlib", "--tokenizer", "bytes", "--workers", "2",
        "--steps", "10", "--sequence-length", "32", "--max-tokens", "30000", "--sample-tokens", "0", "--json",
    ))  # fmt: skip
    assert (trained["exit_code"], trained["step"]) == (0, 10)
    assert said(unbroken, "export", "runs/default", "--out", "exported").startswith("model     exported")
    used = json.loads(said(python, "-c", USE).splitlines()[-1])
    assert used["steps"] == list(range(1, 11))
    assert used["loss"] == pytest.approx(used["held_out"], rel=1e-5)
    assert used["text"].startswith("def ")
    assert Path(used["at"]).is_relative_to(environment)
    assert {path.name for path in work.iterdir()} == {"runs", "exported"}


def clean() -> dict[str, str]:
    """The environment without what leads to the checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
