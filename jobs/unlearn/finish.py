"""How a request ends: its model becomes the run's, in a new generation, and what still knows is put away.

The new generation is one file that is written in one rename. Before it the run is as it was, and the request can be
given up; after it nothing of an older generation is used by anybody, and all that follows can be repeated until it is
done: rows are erased, checkpoints fenced or shredded, what the request itself kept is shredded, the manifest written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jobs import token_cache
from jobs.cache import Cache, user_folder
from jobs.documents import DOCUMENTS
from jobs.erase import erase, erased_copy
from jobs.forgettable import open_forgettable
from jobs.unlearn.begin import Trained
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.guard import GUARD, GUARDS, is_guarded, plain
from jobs.unlearn.guarding import put_guard, told_of_guard
from jobs.unlearn.jobs import material_of, probed
from jobs.unlearn.manifest import Asked, Hashes, Manifest, ledger_range, versions, weights_hash
from jobs.unlearn.methods.replay import Replay
from jobs.unlearn.neurons import NEURONS
from jobs.unlearn.oracle import FLOOR, ORACLE
from jobs.unlearn.probe import compare
from jobs.unlearn.request import Request, folder_of
from jobs.unlearn.select import described, parts_of, samples_of
from jobs.unlearn.settings import MethodSettings, method_of
from jobs.unlearn.signature import sign
from jobs.unlearn.update import TURNS_BACK, UPDATE, keep_update
from jobs.unlearn.weights import publish, say_generation, states_in, states_of
from pipeline.settings import names_of
from recovery import checkpoint
from recovery.disk import write_flushed
from recovery.fencing import retire, shred_folder
from recovery.forgotten import ForgottenRow, add_forgotten
from recovery.generation import raise_generation, read_generation
from recovery.windows import Windows, forgotten_windows

GRADIENTS = "gradients"
"""Where a request keeps those of its rows."""
REPORT, MANIFEST, SIGNATURE, REPLAY = "report.json", "manifest.json", "manifest.sig", "replay"
Tell = Callable[[str], None]


def measured(config: UnlearnConfig, request: Request, trained: Trained) -> Request:
    """The request, once what is told of it is measured and written: while the model before is still there."""
    put_guard(config, request)
    material, items = material_of(config, request), probed(request, config.evaluate_samples)
    start, model = config.out / "start", config.out / "model"
    folders = {"before": config.run / "model" if is_guarded(config.run / "model") else start, "after": model}
    folders |= {which: path for which, path in ((ORACLE, config.oracle), (FLOOR, config.floor)) if path is not None}
    found = compare(folders, material, items, config.microbatch_size, ORACLE if config.oracle is not None else None)
    if config.keep_update:
        keep_update(config, request)
    gone, dataset = {row["digest"] for row in request.rows}, trained.dataset
    copy = erased_copy(config.run / "data", config.out / "data-after", gone)
    last = max((sample + 1 for sample in _samples(config.run)), default=0)
    rows = [row.index for row in dataset.rows if row.digest in gone]
    seen, learned = samples_of(dataset, rows, last), set(parts_of(dataset, rows, set(request.forget)))
    unseen = described(dataset.rows[row] for row in rows if learned.isdisjoint(dataset.parts(row)))
    report = {
        "generation": request.generation, "number": request.number, "method": request.method,
        "goal": method_of(config).goal, "rows": len(request.rows), "noun": dataset.noun, "parts": len(request.forget),
        "never_trained_on": [row["id"] for row in unseen], **found,
        "hashes": {
            "data_before": dataset.fingerprint, "data_after": open_forgettable(copy).fingerprint,
            "weights_before": weights_hash(start), "weights_after": weights_hash(plain(model)),
        },
        "seen_in_steps": _steps(config.run, seen), "trained": time.time(),
    }  # fmt: skip
    write_flushed(config.out / REPORT, json.dumps(report, indent=1).encode())
    return request.at("trained").write(config.out)


def commit(config: UnlearnConfig, request: Request, trained: Trained) -> Request:
    """Make the request true for the run. Raises CheckpointError, ModelError, GenerationError."""
    report, run = read_report(config.out), config.run
    there = checkpoint.find(run / "checkpoints", request.generation).manifest
    if there is None or there["extra"].get("request") != request.number:  # else that of before is not set aside again
        if request.method == Replay.name:  # moments and all: they never knew
            states = states_in(checkpoint.directory(config.out / REPLAY / "checkpoints", request.step))
        elif request.method in GUARDS:  # the weights are as they were
            states = states_in(trained.saved)
        else:
            states = states_of(trained.model(run), config.out / "model", trained.config.seed)
        changed = {"generation": request.generation, "data": report["hashes"]["data_after"], "job": {}}
        publish(run / "checkpoints", trained.saved, states, **changed, request=request.number)
    raise_generation(run, request.generation)  # this is the moment
    return request.at("committed").write(config.out)


def take_back(run: Path) -> None:
    """Remove what a request has published that was never committed."""
    root, now = run / "checkpoints", read_generation(run)
    for path in sorted(root.glob("step-*")):
        aside = path.with_name(f"{path.name}.old")
        try:
            newer = checkpoint.source(path, checkpoint.read_manifest(path)).generation > now
        except checkpoint.CheckpointError:
            continue
        if newer:
            shred_folder(path)
            if aside.is_dir():
                os.replace(aside, path)


def put_away(config: UnlearnConfig, request: Request, tell: Tell) -> Request:
    """All that follows a commit; interrupted anywhere, it is done again."""
    run, folder = config.run, config.out
    add_forgotten(
        run, request.generation, [ForgottenRow(**row) for row in request.rows], _windows(run, folder, request)
    )
    gone = {row["digest"] for row in request.rows}
    erase(run / "data", gone)
    if (run / "data" / DOCUMENTS).is_file():  # rows are not cached
        for path in token_cache.forget(Cache(user_folder()), gone):
            tell(f"removed from the cache: {path}")
    for old in retire(run, request.generation, config.old_checkpoints):
        tell(f"{'fenced' if config.old_checkpoints == 'fence' else 'shredded'}: {old}")
    for name in ("model", "adapter", "replays", "exports"):
        if name != "model" or (folder / "model").is_dir():
            shred_folder(run / name)
    if (folder / "model").is_dir():
        for model in {folder / "model", plain(folder / "model")}:
            say_generation(model, request.generation)
        os.replace(folder / "model", run / "model")
    kept = ("start", "reference", "checkpoints", "data-after", "adapter", NEURONS, REPLAY, GUARD, GRADIENTS)
    for name in (*kept, *request.others):
        shred_folder(folder / name)
    manifest = _manifest(config, request)
    manifest.write(folder / MANIFEST)
    if config.key is not None:
        sign(folder / MANIFEST, config.key)
    return request.at("complete").write(folder)


def read_report(folder: Path) -> dict[str, Any]:
    """What `measured` has written."""
    return json.loads((folder / REPORT).read_text(encoding="utf-8"))


def _manifest(config: UnlearnConfig, request: Request) -> Manifest:
    report, settings = read_report(config.out), json.loads(json.dumps(asdict(config), default=str))
    of_the_method = {name: settings[name] for name in names_of(MethodSettings) if settings[name] is not None}
    if config.keep_update:
        kept = f"{(config.out / UPDATE).relative_to(config.run)}: {TURNS_BACK}"
        of_the_method["kept"] = {"update": kept, "sha256": weights_hash(config.out / UPDATE)}
    if request.reapplies:
        update = folder_of(config.run, request.reapplies) / UPDATE
        of_the_method["reapplied"] = {"request": request.reapplies, "sha256": weights_hash(update)}
    carried = {name: value for name, value in settings.items() if name not in names_of(MethodSettings)}
    guard = told_of_guard(config.run / "model")
    times = {"trained": float(report["trained"]), "done": time.time()}
    return Manifest(
        request.generation,
        Asked(tuple(ForgottenRow(**row) for row in request.rows), config.retain, request.asked), report["goal"],
        request.method, {"method": of_the_method, "run": carried} | guard, Hashes(**report["hashes"]),
        ledger_range(config.run / "ledger.jsonl"), tuple(report["seen_in_steps"]), versions(), report["before"],
        report["after"], times,
    )  # fmt: skip


def _windows(run: Path, folder: Path, request: Request) -> list[Windows]:
    """What an audit searches for. Once the rows are erased nothing follows from them, and it is told already."""
    dataset = open_forgettable(run / "data") if (run / "data" / "meta.json").exists() else None
    tokenizer, digests = AutoTokenizer.from_pretrained(folder / "tokenizer"), {row["digest"] for row in request.rows}
    rows = [row for row in dataset.rows if not row.blank] if dataset is not None else []
    if dataset is None or all(row.digest not in digests for row in rows):
        return []

    def answers(gone: bool) -> Iterator[np.ndarray]:
        yield from (
            dataset.tokens[row.answer : row.end].astype(np.int64) for row in rows if (row.digest in digests) is gone
        )

    gone, kept_texts = list(answers(True)), (_text(tokenizer, tokens) for tokens in answers(False))
    return list(forgotten_windows(gone, answers(False), [_text(tokenizer, tokens) for tokens in gone], kept_texts))


def _text(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))


def _lines(run: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines() if line.strip()]


def _samples(run: Path) -> list[int]:
    return [int(line["first_sample"]) + int(line["samples"]) - 1 for line in _lines(run)]


def _steps(run: Path, samples: frozenset[int]) -> list[int]:
    """The committed steps that have one of these samples."""
    return sorted(
        {
            int(line["step"]) for line in _lines(run)
            if any(s in samples for s in range(line["first_sample"], line["first_sample"] + line["samples"]))
        }
    )  # fmt: skip


def reached(run: Path, request: Request) -> bool:
    """Whether a request is committed, whatever it says of itself."""
    return read_generation(run) >= request.generation
