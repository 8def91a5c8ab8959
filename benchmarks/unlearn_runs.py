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

import torch

from jobs.row_data import RowDataset
from jobs.unlearn.material import Item, Material, stacked
from jobs.unlearn.method import FORGET, RETAIN
from jobs.unlearn.probe import logits_of, parts_of, probe
from pipeline.runtime.batch import IGNORED, Needs

FORGOTTEN = "author=author-003"
TRAIN = (
    "--model", "llama-2m", "--vocabulary", "512", "--sequence-length", "96", "--workers", "2", "--microbatches", "4",
    "--microbatch-size", "10", "--lr", "3e-3", "--evaluate-every", "0", "--checkpoint-every", "50", "--sample-tokens",
    "0", "--threads", "1", "--json",
)  # fmt: skip


def unbroken(*words: object) -> dict[str, Any]:
    """Run a command to its end; what it prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", *map(str, words)], capture_output=True, text=True, check=False, timeout=1200,
        cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"unbroken {' '.join(map(str, words))} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout[done.stdout.index("{") :]) if "{" in done.stdout else {}


def trained(folder: Path, steps: int) -> Path:
    """A run on 10 authors of 20 questions each."""
    unbroken("authors", "--out", folder / "authors", "--count", 10, "--withheld", 2)
    data, out = folder / "authors" / "train.jsonl", folder / "run"
    unbroken("train", "--out", out, "--data", data, "--steps", steps, *TRAIN)
    return out


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


def divergence(model: Path, oracle: Path, rows: Material, items: Sequence[Item], kind: str) -> float:
    """KL(oracle || model), the mean over the tokens of the answers of a kind, nats."""
    parts = parts_of([item for item in items if item.source == kind], 20)
    inputs = [stacked(rows, part, Needs.INPUT)["input_ids"] for part in parts]
    total, count = 0.0, 0
    for part, ours, theirs in zip(parts, logits_of(model, inputs), logits_of(oracle, inputs), strict=True):
        counted = stacked(rows, part, Needs.LOSS)["labels"] != IGNORED
        p, q = torch.log_softmax(theirs[counted], -1), torch.log_softmax(ours[counted], -1)
        total, count = total + float((p.exp() * (p - q)).sum()), count + int(counted.sum())
    return total / count
