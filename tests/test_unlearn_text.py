"""A request to forget documents of packed text, from a trained run to a manifest, and what comes after: real runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cache import user_folder
from jobs.data import Dataset
from jobs.documents import DOCUMENTS
from jobs.text_rows import TextRows
from jobs.unlearn.manifest import Manifest, weights_hash
from jobs.unlearn.request import Request, folder_of
from launch.cli import main
from launch.forkserver import ForkServer
from pipeline.model.weights import Weights
from recovery import checkpoint
from recovery.generation import read_generation
from tests.harness import Command, run_command
from tests.test_unlearn import values

Unbroken = Callable[..., Command]
SMALL = ("--steps", "3", "--lr", "3e-3", "--checkpoint-every", "2", "--evaluate-every", "0", "--json")
WORDS = ("amber", "basil", "cedar", "dunes", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "larch")
LENGTH, PER_STEP = 32, 8


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of words that each has for itself in this order."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        mine = np.random.default_rng(number).permutation(len(WORDS) * 6) % len(WORDS)
        (folder / f"text-{number:02d}.txt").write_text(" ".join(f"{WORDS[i]}{number}" for i in mine))
    return folder


@pytest.fixture(scope="module")
def trained(forkserver: ForkServer, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 workers that has seen everything that is not held out."""
    out = tmp_path_factory.mktemp("trained") / "run"
    argv = (
        "train", "--out", str(out), "--data", f"{texts}/*.txt", "--model", "llama-tiny", "--tokenizer", "bpe",
        "--vocabulary", "320", "--sequence-length", str(LENGTH), "--held-out", "0.1", "--workers", "2", "--steps", "16",
        "--microbatches", "4", "--microbatch-size", "2", "--lr", "5e-3", "--checkpoint-every", "4", "--keep", "9",
        "--evaluate-every", "0", "--evaluate-samples", "8", "--sample-tokens", "0", "--threads", "1", "--json",
    )  # fmt: skip
    done = run_command(forkserver, out.parent / "log", *argv)
    assert done.code == 0, done.output
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def unbroken(forkserver: ForkServer, tmp_path: Path) -> Unbroken:
    def command(*argv: object, code: int = 0) -> Command:
        done = run_command(forkserver, tmp_path / "log", *map(str, argv))
        assert done.code == code, done.output
        return done

    return command


def learned(run: Path, count: int) -> list[Path]:
    """Files that the run has in its training part, whole."""
    rows = TextRows.open(run / "data").rows
    found = [Path(row.id) for row in rows if row.start > Dataset.open(run / "data").train_start]
    return found[:count]


def tokens_of(run: Path, path: Path) -> np.ndarray:
    view = TextRows.open(run / "data")
    (row,) = [row for row in view.rows if row.id == str(path)]
    return np.array(view.tokens[row.start : row.end])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_document_is_forgotten_with_all_that_follows(
    run: Path, texts: Path, unbroken: Unbroken, tmp_path: Path
) -> None:
    victim, cached, before = learned(run, 1)[0], user_folder(), TextRows.open(run / "data")
    held = next(row.id for row in before.rows if row.held_out)
    tokens, text = tokens_of(run, victim), victim.read_text()
    assert cached is not None
    entries = [path for path in cached.glob("tokens-*") if tokens.tobytes() in path.read_bytes()]
    assert entries
    asked = ("--forget", f"id:{victim},{held}", "--method", "grad_diff", *SMALL)
    told = values(unbroken("unlearn", run, *asked))
    assert (told["generation"], told["rows"], told["never_trained_on"]) == (1, 2, [held])
    assert told["after"]["forget_probability"] < told["before"]["forget_probability"]
    assert any("removed from the cache" in line for line in told["put_away"])
    assert not any(path.exists() for path in entries)

    manifest = Manifest.read(Path(told["manifest"]))
    assert sorted(row.id for row in manifest.request.rows) == sorted([str(victim), held])
    after = TextRows.open(run / "data")
    assert {row.id for row in after.rows if row.blank} == {str(victim), held}
    assert after.fingerprint == manifest.hashes.data_after != manifest.hashes.data_before
    assert tokens.tobytes() not in (run / "data" / "tokens.bin").read_bytes()
    assert checkpoint.find(run / "checkpoints", 0).path is None
    steps = [line["step"] for line in lines(run / "ledger.jsonl")
             if any(row.id == str(victim) for i in range(line["first_sample"], line["first_sample"] + line["samples"])
                    for row in (before.rows[j] for j in before.rows_at(before.place_of(i))))]  # fmt: skip
    assert list(manifest.seen_in_steps) == steps
    request = Request.read(folder_of(run, 1))
    assert set(request.forget) == set(before.parts(next(r.index for r in before.rows if r.id == str(victim))))
    assert "nothing that was forgotten is left" in unbroken("audit", run, "--forget", victim).output

    # the run goes on, without it, though the file still has it; nobody learns what stands there
    unbroken("train", "--out", run, "--resume", "--change", "--steps", "22", "--json")
    assert Dataset.open(run / "data").fingerprint == after.fingerprint
    data = Dataset.open(run / "data")
    counted = [line["tokens"] for line in lines(run / "metrics.jsonl")[-6:]]
    ids = [range(PER_STEP * step, PER_STEP * (step + 1)) for step in range(16, 22)]
    assert counted == [sum(data.num_labels(i) for i in each) for each in ids]
    assert min(counted) < LENGTH * PER_STEP
    shutil.rmtree(run / "data")  # made anew, it has forgotten all the same
    unbroken("train", "--out", run, "--resume", "--change", "--steps", "23", "--json")
    assert Dataset.open(run / "data").fingerprint == after.fingerprint
    assert "nothing that was forgotten is left" in unbroken("audit", run).output
    equal = values(unbroken("replay", run, "--workers", "1", "--json"))
    assert (equal["equal"], equal["from"], equal["step"]) == (True, 22, 23), "an audit of a step after it"
    scored = values(unbroken("eval", "--model", run / "model", "--samples", "1000", "--json"))
    assert 0 < scored["tokens"] < scored["samples"] * LENGTH, "of what is held out, what is left"

    # what is still somewhere is found: tokens, the index, text
    (run / "copy").mkdir()
    (run / "copy" / "tokens.bin").write_bytes(tokens.tobytes())
    (run / "copy" / "notes.txt").write_text(text[100:300])
    found = [json.loads(line) for line in lines_of(run / "data" / DOCUMENTS)]
    found = [{**line, "fields": {"file": "x"}} if line["id"] == str(victim) else line for line in found]
    (run / "copy" / DOCUMENTS).write_text("".join(json.dumps(line) + "\n" for line in found))
    said = unbroken("audit", run, code=1).output
    for what in ("copy/tokens.bin: ", "copy/notes.txt: ", f"copy/{DOCUMENTS}: a forgotten row"):
        assert what in said


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_replay_is_the_run_of_the_same_packing_without_the_document(
    run: Path, unbroken: Unbroken, tmp_path: Path
) -> None:
    victim = learned(run, 2)[1]
    oracle = ("--without", victim, "--workers", "1", "--out", tmp_path / "oracle", "--json")
    unbroken("replay", run, "--since", "1", *oracle)
    told = values(unbroken("unlearn", run, "--forget", victim, "--method", "replay", "--workers", "3", "--json"))
    assert told["goal"] == "untraining"
    assert weights_hash(run / "model") == weights_hash(tmp_path / "oracle" / "model")
    data = Dataset.open(tmp_path / "oracle" / "data")
    metrics = lines(tmp_path / "oracle" / "metrics.jsonl")
    assert [line["tokens"] for line in metrics] == [
        sum(data.num_labels(i) for i in range(PER_STEP * step, PER_STEP * (step + 1))) for step in range(16)
    ]
    assert read_generation(run) == 1
    assert Weights(run / "model").files


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--forget", "FIRST.md"), "; near: '"),
        (("--forget", "asyncio"), "the run has no document with the id 'asyncio'; allowed: ids of its documents"),
        (
            ("--forget", "FIRST", "--method", "dpo"),
            "method is 'dpo'; allowed: one that asks no questions",
        ),
        (("--forget", "HELD"), "whose 1 documents are in no step of the run's ledger"),
        (("--forget", "FIRST", "--retain", "FIRST"), "forget and retain have 1 documents in common"),
    ],
)
def test_what_is_asked_wrongly_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str], asked: tuple[str, ...], said: str
) -> None:
    rows = TextRows.open(trained / "data").rows
    first, held = str(learned(trained, 1)[0]), next(row.id for row in rows if row.held_out)
    before = sorted(path.name for path in trained.iterdir() if path.name != "requests")
    assert main(["unlearn", str(trained), *(word.replace("FIRST", first).replace("HELD", held) for word in asked)]) == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in trained.iterdir() if path.name != "requests") == before


def test_a_run_that_was_prepared_without_an_index_is_told_how_to_get_one(run: Path, unbroken: Unbroken) -> None:
    victim = learned(run, 1)[0]
    (run / "data" / DOCUMENTS).unlink()
    done = unbroken("unlearn", run, "--forget", victim, code=2)
    assert "does not tell which documents its tokens are made of" in done.output
    unbroken("train", "--out", run, "--resume", "--json")
    assert learned(run, 1) == [victim]
