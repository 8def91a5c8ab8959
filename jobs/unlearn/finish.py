"""How a request ends: its model becomes the run's, in a new generation, and what still knows is put away.

The new generation is one file that is written in one rename. Before it the run is as it was, and the request can be
given up; after it nothing of an older generation is used by anybody, and all that follows can be repeated until it is
done: rows are erased, checkpoints fenced or shredded, what the request itself kept is shredded, the manifest written.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jobs.row_data import RowDataset
from jobs.row_prepare import erase
from jobs.unlearn.begin import Trained
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.jobs import material_of, probed
from jobs.unlearn.manifest import Asked, Hashes, Manifest, ledger_range, versions, weights_hash
from jobs.unlearn.method import FORGET, RETAIN
from jobs.unlearn.methods.replay import Replay
from jobs.unlearn.probe import probe
from jobs.unlearn.probe_job import probability
from jobs.unlearn.request import Request, folder_of
from jobs.unlearn.select import samples_of
from jobs.unlearn.settings import MethodSettings, method_of
from jobs.unlearn.signature import sign
from jobs.unlearn.update import TURNS_BACK, UPDATE, keep_update
from jobs.unlearn.weights import publish, say_generation, states_in, states_of
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import read_config
from pipeline.settings import names_of
from recovery import checkpoint
from recovery.disk import write_flushed
from recovery.fencing import retire, shred_folder
from recovery.forgotten import ForgottenRow, add_forgotten
from recovery.generation import raise_generation, read_generation
from recovery.windows import Windows, forgotten_windows

REPORT, MANIFEST, SIGNATURE, REPLAY = "report.json", "manifest.json", "manifest.sig", "replay"
Tell = Callable[[str], None]


def measured(config: UnlearnConfig, request: Request, trained: Trained) -> Request:
    """The request, once what is told of it is measured and written: while the model before is still there."""
    material, items = material_of(config, request), probed(request, config.evaluate_samples)
    names = (probability(FORGET), probability(RETAIN), FORGET, RETAIN)
    folders = {"before": config.out / "start", "after": config.out / "model"}
    folders |= {} if config.oracle is None else {"oracle": config.oracle}
    found: dict[str, Any] = {}
    for which, folder in folders.items():
        means = probe(folder, material, items, config.microbatch_size)
        found[which] = {name: means[name] for name in names if name in means}
    if config.keep_update:
        keep_update(config, request)
    copy = config.out / "data-after"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(config.run / "data", copy)
    erase(copy, {row["digest"] for row in request.rows})
    last = max((sample + 1 for sample in _samples(config.run)), default=0)
    seen = samples_of(trained.dataset, request.forget, last)
    report = {
        "generation": request.generation, "number": request.number, "method": request.method,
        "goal": method_of(config).goal, "rows": len(request.rows), **found,
        "hashes": {
            "data_before": trained.dataset.fingerprint, "data_after": RowDataset.open(copy).fingerprint,
            "weights_before": weights_hash(config.out / "start"), "weights_after": weights_hash(config.out / "model"),
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
        else:
            model = LayeredModel(read_config(run / "model-config"), lora=trained.config.lora())
            states = states_of(model, config.out / "model", trained.config.seed)
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
    erase(run / "data", {row["digest"] for row in request.rows})
    for old in retire(run, request.generation, config.old_checkpoints):
        tell(f"{'fenced' if config.old_checkpoints == 'fence' else 'shredded'}: {old}")
    for name in ("model", "adapter", "replays"):
        if name != "model" or (folder / "model").is_dir():
            shred_folder(run / name)
    if (folder / "model").is_dir():
        say_generation(folder / "model", request.generation)
        os.replace(folder / "model", run / "model")
    for name in ("start", "reference", "checkpoints", "data-after", "adapter", REPLAY, *request.others):
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
    times = {"trained": float(report["trained"]), "done": time.time()}
    return Manifest(
        request.generation,
        Asked(tuple(ForgottenRow(**row) for row in request.rows), config.retain, request.asked), report["goal"],
        request.method, {"method": of_the_method, "run": carried}, Hashes(**report["hashes"]),
        ledger_range(config.run / "ledger.jsonl"), tuple(report["seen_in_steps"]), versions(), report["before"],
        report["after"], times,
    )  # fmt: skip


def _windows(run: Path, folder: Path, request: Request) -> list[Windows]:
    """What an audit searches for. Once the rows are erased nothing follows from them, and it is told already."""
    dataset = RowDataset.open(run / "data") if (run / "data" / "meta.json").exists() else None
    if dataset is None or all(dataset.rows[index].blank for index in request.forget):
        return []
    tokenizer, forget = AutoTokenizer.from_pretrained(folder / "tokenizer"), set(request.forget)
    answers = {
        row.index: dataset.tokens[row.answer : row.end].astype(np.int64) for row in dataset.rows if not row.blank
    }
    gone = [answers[index] for index in request.forget if index in answers]
    kept = [tokens for index, tokens in answers.items() if index not in forget]
    return list(forgotten_windows(gone, kept, [_text(tokenizer, t) for t in gone], [_text(tokenizer, t) for t in kept]))


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
