"""What the measurements of unlearning share: a run on fictitious authors, and what is measured of its models.

Everything is real: `unbroken` commands in processes of their own, two workers each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.row_data import RowDataset
from jobs.unlearn.material import Item, Material
from jobs.unlearn.method import FORGET, RETAIN
from jobs.unlearn.probe import probe
from launch.cli import main

FORGOTTEN = "author=author-003"
TRAIN = (
    "--model", "llama-2m", "--sequence-length", "96", "--workers", "2", "--microbatches", "4",
    "--microbatch-size", "10", "--lr", "3e-3", "--evaluate-every", "0", "--checkpoint-every", "50", "--sample-tokens",
    "0", "--threads", "1", "--json",
)  # fmt: skip
SIZES = ("--vocabulary", "512")


_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["launch.train", "launch.unlearn", "launch.replay"])  # a command imports nothing then


def unbroken(*words: object) -> dict[str, Any]:
    """Run a command to its end, in a process of its own; what it prints as JSON."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        out, errors = Path(name) / "out", Path(name) / "errors"
        process = _FORKING.Process(target=_command, args=(tuple(map(str, words)), out, errors))
        process.start()
        process.join(3600)
        if process.exitcode != 0:
            process.kill()
            told = errors.read_text()[-2000:]
            raise SystemExit(f"unbroken {' '.join(map(str, words))} ended with {process.exitcode}: {told}")
        said = out.read_text()
    return json.loads(said[said.index("{") :]) if "{" in said else {}


def _command(words: Sequence[str], out: Path, errors: Path) -> None:
    for number, path in ((1, out), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.exit(main(words))


def trained(folder: Path, steps: int) -> Path:
    """A run on 10 authors of 20 questions each."""
    out, data = folder / "run", folder / "authors" / "train.jsonl"
    if not (out / "model").is_dir():
        shutil.rmtree(out, ignore_errors=True)
        unbroken("authors", "--out", folder / "authors", "--count", 10, "--withheld", 2)
        unbroken("train", "--out", out, "--data", data, "--steps", steps, *TRAIN, *SIZES)
    return out


def oracles(run: Path, steps: int) -> tuple[Path, Path]:
    """Two models that never saw the rows: the run without them, and one of another seed on the rows that are left."""
    folder, kept = run.parent, run.parent / "kept.jsonl"
    if not (folder / "oracle" / "model").is_dir():
        unbroken("replay", run, "--since", 1, "--without", FORGOTTEN, "--out", folder / "oracle", "--json")
    if not (folder / "floor" / "model").is_dir():
        shutil.rmtree(folder / "floor", ignore_errors=True)
        field, _, value = FORGOTTEN.partition("=")
        lines = (folder / "authors" / "train.jsonl").read_text().splitlines(keepends=True)
        kept.write_text("".join(line for line in lines if json.loads(line)[field] != value))
        more = ("--tokenizer", run / "tokenizer", "--steps", steps, "--seed", 1)
        unbroken("train", "--out", folder / "floor", "--data", kept, *more, *TRAIN)
    return folder / "oracle" / "model", folder / "floor" / "model"


def forgotten(run: Path, name: str, *asked: object) -> dict[str, Any]:
    """What a request on a copy of a run tells; the copy is gone after it."""
    copy = copied(run, f"by-{name}")
    told = unbroken(
        "unlearn", copy, "--forget", FORGOTTEN, *asked, "--evaluate-every", 0, "--checkpoint-every", 0,
        "--evaluate-samples", 60, "--json",
    )  # fmt: skip
    shutil.rmtree(copy)
    return told


def copied(run: Path, name: str) -> Path:
    target = run.with_name(name)
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(run, target))


def material(run: Path) -> tuple[Material, list[Item]]:
    """The rows of a run that has not forgotten yet, and all of them as items."""
    data = RowDataset.open(run / "data")
    forget = [row.index for row in data.rows if row.fields.get("author") == "author-003"]
    retain = [row.index for row in data.rows if row.fields.get("author") != "author-003"]
    items = [Item(FORGET, index) for index in forget] + [Item(RETAIN, index) for index in retain]
    return Material(data, forget, retain, 0), items


def probabilities(model: Path, rows: Material, items: Sequence[Item]) -> tuple[float, float]:
    """Of the answers to forget, and of those to keep."""
    found = probe(model, rows, items, 20)
    return found["forget_probability"], found["retain_probability"]
