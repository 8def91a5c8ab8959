"""What the measurements of unlearning share: a run on fictitious authors, and what is measured of its models.

Everything is real: `unbroken` commands in processes of their own, two workers each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.row_data import RowDataset
from jobs.unlearn.material import Item, Material
from jobs.unlearn.method import FORGET, RETAIN
from jobs.unlearn.probe import probe

FORGOTTEN = "author=author-003"
TRAIN = (
    "--model", "llama-2m", "--sequence-length", "96", "--workers", "2", "--microbatches", "4",
    "--microbatch-size", "10", "--lr", "3e-3", "--evaluate-every", "0", "--checkpoint-every", "50", "--sample-tokens",
    "0", "--threads", "1", "--json",
)  # fmt: skip
SIZES = ("--vocabulary", "512")


def unbroken(*words: object) -> dict[str, Any]:
    """Run a command to its end; what it prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", *map(str, words)], capture_output=True, text=True, check=False, timeout=1200,
        cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"unbroken {' '.join(map(str, words))} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout[done.stdout.index("{") :]) if "{" in done.stdout else {}


def trained(folder: Path, steps: int, seed: int = 0) -> Path:
    """A run on 10 authors of 20 questions each. The authors are the same whatever the seed."""
    out, data = folder / "run", folder / "authors" / "train.jsonl"
    if not (out / "model").is_dir():
        shutil.rmtree(out, ignore_errors=True)
        unbroken("authors", "--out", folder / "authors", "--count", 10, "--withheld", 2)
        unbroken("train", "--out", out, "--data", data, "--steps", steps, "--seed", seed, *TRAIN, *SIZES)
    return out


def oracles(run: Path, steps: int, seed: int) -> tuple[Path, Path]:
    """Two models that never saw the rows: the run without them, and one of another seed on the rows that are left."""
    folder, kept = run.parent, run.parent / "kept.jsonl"
    if not (folder / "oracle" / "model").is_dir():
        unbroken("replay", run, "--since", 1, "--without", FORGOTTEN, "--out", folder / "oracle", "--json")
    if not (folder / "floor" / "model").is_dir():
        shutil.rmtree(folder / "floor", ignore_errors=True)
        field, _, value = FORGOTTEN.partition("=")
        lines = (folder / "authors" / "train.jsonl").read_text().splitlines(keepends=True)
        kept.write_text("".join(line for line in lines if json.loads(line)[field] != value))
        more = ("--tokenizer", run / "tokenizer", "--steps", steps, "--seed", 1000 + seed)
        unbroken("train", "--out", folder / "floor", "--data", kept, *more, *TRAIN)
    return folder / "oracle" / "model", folder / "floor" / "model"


def forgotten(run: Path, name: str, *asked: object) -> dict[str, Any]:
    """What a request on a copy of a run tells; the copy is gone after it."""
    copy = copied(run, f"by-{name}")
    told = unbroken(
        "unlearn", copy, "--forget", FORGOTTEN, *asked, "--evaluate-every", 0, "--checkpoint-every", 0,
        "--evaluate-samples", 1000, "--json",
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
