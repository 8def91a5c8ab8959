"""`unbroken unlearn RUN --method s3t`: a run of slices forgets rows by leaving out what has seen their slices.

Nothing is trained. The request has the stages of any other one: until the new generation is written the run is as it
was; after it the stages that have seen the rows are shredded, whatever interrupts it. Who has never seen them stays, to
the last bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.config import ConfigError, TrainConfig, require
from jobs.erase import erased_copy
from jobs.plan import find_model
from jobs.row_data import RowDataset
from jobs.s3t import best, left, name_of
from jobs.slices import STAGES, Slices, folder_of
from jobs.unlearn import request as requests
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.finish import REPORT, put_away, reached, read_report
from jobs.unlearn.jobs import material_of, probed
from jobs.unlearn.manifest import weights_hash
from jobs.unlearn.methods.s3t import S3T
from jobs.unlearn.probe import compare
from jobs.unlearn.request import Request
from jobs.unlearn.select import AUTO, described, require_forgettable, rest_of, select
from jobs.unlearn.weights import say_generation
from launch.config import to_toml
from launch.page.keeper import draw_last
from launch.resume import kept_values
from launch.run_folder import read_jsonl, write_whole
from launch.slices import in_words, publish
from launch.unlearn import abandon_request, check_key, locked, open_request, refuse_unfinished, told
from pipeline.settings import check_bounds
from recovery.disk import write_flushed
from recovery.fencing import shred_folder
from recovery.generation import raise_generation, read_generation


def forget_slices(config: UnlearnConfig, as_json: bool = False, abandon: bool = False) -> tuple[dict[str, Any], str]:
    """The report. Raises ConfigError for what is refused, before anything changes."""
    check_bounds(config)
    require(config.method == S3T.name, "method", config.method, f"{S3T.name} for a run of slices")
    require(config.oracle is None, "oracle", str(config.oracle), f"unset with method {S3T.name}, which is exact")
    check_key(config)
    run = config.run
    known, trained = Slices.read(run), TrainConfig(**kept_values(run))
    with locked(run):
        if config.resume or abandon:
            request, folder = open_request(run)
            if abandon:
                return abandon_request(run, request, folder)
        else:
            request, folder = _begun(config, known)
        config = replace(config, out=folder)
        if not reached(run, request):
            request = _measured(config, request, known, trained)
            raise_generation(run, request.generation)  # this is the moment
            request = request.at("committed").write(folder)
        said: list[str] = []
        known = _drop(run, request, Slices.read(run), said.append)
        request = put_away(config, request, said.append)
        draw_last(run)
    values, text = told(config, request, said)
    values |= {"stages": {name_of(stage): hash for stage, hash in known.stages.items()}}
    return values, f"{text}\n{in_words(known)}"


# ---- before the commit ----


def _begun(config: UnlearnConfig, known: Slices) -> tuple[Request, Path]:
    """A new request. Raises ConfigError, CorpusError."""
    run = config.run
    before = refuse_unfinished(run)
    require(
        not known.missing, "run", str(run), f"a run of slices that is trained: `unbroken slices --resume --out {run}`"
    )
    require(bool(config.forget), "forget", config.forget, "rows of the run: an id, FIELD=VALUE, or a file")
    dataset = RowDataset.open(run / "data")
    said = {dataset.rows[index].digest for index in select(dataset, config.forget, "forget")}
    forget = [row.index for row in dataset.rows if row.digest in said]  # whoever says the same is erased as well
    seen = frozenset(range(len(dataset.rows)))
    retain = rest_of(dataset, forget, seen)
    if config.retain != AUTO:
        retain = select(dataset, config.retain, "retain")
    require_forgettable(dataset, forget, retain, seen, config.forget)
    hit = {known.slice_of[row] for row in forget}
    if not left(known.stages, hit):
        raise ConfigError(
            f"forget is {config.forget!r}, in slices {', '.join(map(str, sorted(hit)))} of {known.slices}, without "
            f"which no stage is left of the {len(known.stages)} that there are; allowed: rows of fewer slices, or "
            "training again: `unbroken slices` on data without the rows, to another --out; then remove this run"
        )
    number = requests.next_number(before)
    folder = requests.lay_out(run, number)
    write_whole(folder / "config.toml", to_toml(replace(config, out=folder)))
    rows = tuple(described(dataset.rows[index] for index in forget))
    request = Request(
        number, read_generation(run) + 1, 0, config.forget, config.method, tuple(forget), tuple(retain), rows
    )  # fmt: skip
    return request.write(folder), folder


def _measured(config: UnlearnConfig, request: Request, known: Slices, trained: TrainConfig) -> Request:
    """The request with its model, once what is told of it is measured and written."""
    run, folder = config.run, config.out
    _, source = find_model(replace(trained, out=run))
    if source is None or weights_hash(source) != known.base:
        raise ConfigError(f"model is {trained.model!r}; allowed: the weights that {str(run)!r} began with, unchanged")
    hit = {known.slice_of[row] for row in request.forget}
    stage = best(left(known.stages, hit))
    assert stage is not None, "refused when it began"
    publish(run, trained, stage, source, folder / "model")
    material, items = material_of(config, request), probed(request, config.evaluate_samples)
    found = compare({"before": run / "model", "after": folder / "model"}, material, items, config.microbatch_size)
    copy = erased_copy(run / "data", folder / "data-after", {row["digest"] for row in request.rows})
    forget = set(request.forget)
    lines = read_jsonl(run / "ledger.jsonl", step=int, rows=list)
    report = {
        "generation": request.generation, "number": request.number, "method": request.method, "goal": S3T.goal,
        "rows": len(request.forget), "noun": RowDataset.noun, "never_trained_on": [], **found,
        "hashes": {
            "data_before": RowDataset.open(run / "data").fingerprint, "data_after": RowDataset.open(copy).fingerprint,
            "weights_before": weights_hash(run / "model"), "weights_after": weights_hash(folder / "model"),
        },
        "seen_in_steps": [line["step"] for line in lines if forget.intersection(line["rows"])],
        "trained": time.time(), "slices": sorted(hit), "stage": name_of(stage),
        "kept": {name_of(each): known.stages[each] for each in left(known.stages, hit)},
    }  # fmt: skip
    write_flushed(folder / REPORT, json.dumps(report, indent=1).encode())
    return request.at("trained").write(folder)


# ---- after it ----


def _drop(run: Path, request: Request, known: Slices, tell: Callable[[str], None]) -> Slices:
    """Have the run without the stages that have seen the slices; interrupted anywhere, it is done again."""
    known = known.without(set(read_report(requests.folder_of(run, request.number))["slices"])).write(run)
    for folder in sorted(path for path in (run / STAGES).iterdir() if path.is_dir()):
        if folder not in {folder_of(run, stage) for stage in known.stages}:
            shred_folder(folder)
            tell(f"shredded: {folder}")
    for stage in known.stages:
        say_generation(folder_of(run, stage) / "adapter", request.generation)
    if (run / "converted").is_dir():
        for folder in (run / "converted").iterdir():
            say_generation(folder, request.generation)
    return known
