"""`unbroken slices --data ROWS --slices N --sequences B`: trains every stage of S3T (jobs.s3t), one after another.

Each stage is an ordinary run in a folder of its own, in a process that is forked for it: workers may die, and a run
that is stopped goes on with --resume. What is left of a stage is its adapters; its tokens, checkpoints and merged
weights go once nobody needs them any more.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from jobs.config import ConfigError, TrainConfig, require
from jobs.early import set_dropout
from jobs.plan import find_model
from jobs.row_data import RowDataset
from jobs.row_prepare import prepare_rows
from jobs.rows import Row, read_rows
from jobs.s3t import (
    Prefix,
    best,
    deal,
    expected_deletions,
    name_of,
    prefixes,
    rows_of,
    simulated_deletions,
    spans,
    steps_of,
)  # fmt: skip
from jobs.slice_weights import assemble
from jobs.slices import FILE, Slices, SlicesConfig, SliceSettings, adapter_hash, folder_of
from jobs.unlearn.manifest import weights_hash
from jobs.unlearn.request import require_complete
from jobs.unlearn.weights import say_generation
from launch.config import config_from_dict, to_toml
from launch.forkserver import ForkServer
from launch.page.keeper import draw_last
from launch.past import read_ledger
from launch.resume import kept_values
from launch.run_folder import read_jsonl, write_whole
from launch.run_lock import RunLock
from launch.signals import stop_signals
from launch.train import train
from launch.warm import warm_up
from pipeline.exit_codes import STOPPED, exit_code
from pipeline.schedule.ops import span_text
from pipeline.settings import check_bounds, declared, of_kind
from recovery.checkpoint import any_saved
from recovery.generation import read_generation

_TRIED = 2000  # seeded runs of deletions, to hold the formula against


def of_the_slices(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a run of slices that is resumed has without being told."""
    out = Path(asked.get("out", SlicesConfig().out))
    if not asked.get("resume") or not (out / FILE).is_file():
        return {}
    known = Slices.read(out)
    rates = "" if len(set(known.rates)) == 1 else ",".join(map(repr, known.rates))
    own = {"slices": known.slices, "sequences": len(known.sequences), "deletion_rates": rates}
    return {**kept_values(out), **own}


def slices(config: SlicesConfig, as_json: bool = False) -> tuple[dict[str, Any], str] | int:
    """The report, or the exit code of a stage that has not come to its end. Raises ConfigError, CorpusError or
    ModelError for what is refused, before anything is trained."""
    check_bounds(config)
    config.validate()
    require("LOCAL_RANK" not in os.environ, "slices", "torchrun", "one process that starts its own workers")
    warm_up(config)
    forkserver = ForkServer(_stage)  # forked now: nothing below has started a thread yet
    try:
        claim = RunLock(config.out)
        try:
            known, source, rows = _begun(config)
        except BaseException:
            claim.undo()
            raise
        try:
            for stage in known.missing:
                if (code := _train(config, known, stage, source, rows, forkserver, as_json)) != 0:
                    return code
                known = _kept(config, known, stage)
            _publish(config, known, source)
            draw_last(config.out)
        finally:
            claim.release()
    finally:
        forkserver.close()
    return told(config, known)


def plain(config: SlicesConfig) -> TrainConfig:
    """The settings that its stages have in common."""
    return of_kind(TrainConfig, config)


# ---- before ----


def _begun(config: SlicesConfig) -> tuple[Slices, Path, list[Row]]:
    """The run, where the weights lie that it begins with, and its rows."""
    out, there = config.out, (config.out / FILE).is_file()
    require(
        there == config.resume, "out" if there else "resume", str(out) if there else True,
        "--resume to go on, or another folder" if there else f"unset: {str(out)!r} holds no run of slices",
    )  # fmt: skip
    require_complete(out)
    shape, source = find_model(config)
    rows = read_rows(config.data or "")
    if source is None or rows is None:
        raise ConfigError(f"data is {config.data!r}, which holds no rows; allowed: JSON of questions and answers")
    if there:
        known, dataset = Slices.read(out), RowDataset.open(out / "data")
        same = [row.digest for row in rows] == [row.digest for row in dataset.rows]
        require(same or not known.missing, "data", config.data, "the rows that the run was dealt")
        require(weights_hash(source) == known.base, "model", config.model, "the weights that the run began with")
        for name, wanted in of_the_slices({"resume": True, "out": out}).items():
            if name in declared(SliceSettings):
                found = getattr(config, name)
                require(found == wanted, name, found, f"{wanted!r}, with which the run began")
        return known, source, rows
    blocks = int(shape.num_hidden_layers)
    require(config.slices <= blocks, "slices", config.slices, f"2 to {blocks}, the decoder blocks of the model")
    least = len(rows) // config.slices
    require(
        least >= config.samples_per_step, "slices", config.slices,
        f"few enough that each has a global batch of {config.samples_per_step} rows; of {len(rows):,} it has {least}",
    )  # fmt: skip
    if config.dropout is not None:
        set_dropout(shape, config)
    tokenizer = AutoTokenizer.from_pretrained(source)
    prepare_rows(rows, tokenizer, config.sequence_length, 0.0, out / "data", config.seed)
    tokenizer.save_pretrained(out / "tokenizer")
    shape.save_pretrained(out / "model-config")
    write_whole(out / "config.toml", to_toml(plain(config)))
    known = Slices(
        config.slices, config.chosen(), config.rates(), spans(blocks, config.slices),
        tuple(deal(len(rows), config.slices, config.seed)), weights_hash(source),
    )  # fmt: skip
    return known.write(out), source, rows


# ---- a stage ----


def _train(
    config: SlicesConfig, known: Slices, stage: Prefix, source: Path, rows: list[Row], forkserver: ForkServer,
    quiet: bool,
) -> int:  # fmt: skip
    """Train a stage to its end. Returns the exit code of its run."""
    folder, out = folder_of(config.out, stage), config.out
    own = replace(
        plain(config), out=folder, data=config.data, lora_blocks=span_text(known.spans[len(stage) - 1]),
        steps=steps_of(config.steps, stage, known.slices), resume=any_saved(folder / "checkpoints"), sample_tokens=0,
        model=str(source if len(stage) == 1 else folder_of(out, stage[:-1]) / "model"),
    )  # fmt: skip
    for name in ("tokenizer", "model-config"):
        shutil.copytree(out / name, folder / name, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    mine = [rows[row] for row in rows_of(known.slice_of, stage)]
    prepare_rows(
        mine, tokenizer, own.sequence_length, own.held_out or 0.0, folder / "data", own.seed, pack=own.pack,
        samples_per_step=own.samples_per_step,
    )  # fmt: skip
    number, count = 1 + len(known.stages), len(known.stages) + len(known.missing)
    if not quiet:
        print(f"stage {number} of {count}: slices {name_of(stage)}, blocks {own.lora_blocks}", file=sys.stderr)  # noqa: T201
    values = json.loads(json.dumps(asdict(own), default=str))
    pid = forkserver.start({"config": values, "quiet": quiet})
    with stop_signals(partial(_tell, pid)):
        while not (ended := forkserver.poll(3600.0)):
            pass
    return ended[0].code if ended[0].code >= 0 else STOPPED


def _tell(pid: int, signum: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signum)


def _stage(payload: dict[str, Any]) -> int:
    """What a process does that is forked for a stage: an ordinary run."""
    os.setpgrp()  # what a terminal sends comes by who started it
    config, quiet = config_from_dict(TrainConfig, payload["config"]), bool(payload["quiet"])
    try:
        with redirect_stdout(io.StringIO()) if quiet else nullcontext():
            return train(config, quiet, prepared=True)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"unbroken slices: {error}", file=sys.stderr)  # noqa: T201
        return exit_code(error)
    except KeyboardInterrupt:  # before its first step
        return STOPPED


def _kept(config: SlicesConfig, known: Slices, stage: Prefix) -> Slices:
    """The run with a stage that has come to its end: its steps are in the ledger, and its adapters are all that is
    left of it, with the weights with which the stages after it begin."""
    folder, out = folder_of(config.out, stage), config.out
    dataset, mine = RowDataset.open(folder / "data"), rows_of(known.slice_of, stage)
    before = read_jsonl(out / "ledger.jsonl", step=int, stage=str)
    first = max((int(line["step"]) for line in before), default=0)
    own = [
        {**line, "step": first + line["step"], "stage": name_of(stage),
         "rows": sorted({mine[row] for sample in range(line["first_sample"], line["first_sample"] + line["samples"])
                         for row in dataset.rows_of(sample)})}
        for line in read_ledger(folder)
    ]  # fmt: skip
    lines = [line for line in before if line["stage"] != name_of(stage)] + own
    write_whole(out / "ledger.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if (generation := read_generation(out)) > 0:
        say_generation(folder / "adapter", generation)
    found = replace(known, stages={**known.stages, stage: adapter_hash(folder / "adapter")}).write(out)
    ahead = {other[:-1] for other in found.missing}
    for done in found.stages:
        for name in ("checkpoints", "data", *(() if done in ahead else ("model",))):
            shutil.rmtree(folder_of(out, done) / name, ignore_errors=True)
    return found


def _publish(config: SlicesConfig, known: Slices, source: Path) -> None:
    """The model of the stage that has seen the most."""
    stage = best(known.stages)
    if stage is not None and not (config.out / "model").is_dir():
        publish(config.out, plain(config), stage, source, config.out / "model")


def publish(run: Path, config: TrainConfig, stage: Prefix, source: Path, into: Path) -> None:
    """Write the model of a stage."""
    lora = config.lora()
    assert lora is not None
    folders = [folder_of(run, part) / "adapter" for part in prefixes([stage])]
    assemble(source, lora, folders, run / "tokenizer", into)


# ---- after ----


def counted(known: Slices) -> dict[str, float]:
    """How many deletions what there is survives, by the formula and by trying."""
    stages = list(known.stages)
    return {
        "expected": expected_deletions(stages, known.rates),
        "simulated": simulated_deletions(stages, known.rates, _TRIED, 0),
    }  # fmt: skip


def told(config: SlicesConfig, known: Slices) -> tuple[dict[str, Any], str]:
    """What --json prints, and what a person reads."""
    values = {
        "slices": known.slices, "sequences": [list(each) for each in known.sequences],
        "blocks": [span_text(span) for span in known.spans],
        "stages": {name_of(stage): said for stage, said in known.stages.items()}, "deletions": counted(known),
        "model": str(config.out / "model"),
    }  # fmt: skip
    lines = [
        f"{len(known.slice_of):,} rows in {known.slices} slices; {len(known.stages)} stages of {len(known.sequences)} "
        f"sequences: {', '.join(map(name_of, known.sequences))}",
        in_words(known),
        f"model     {values['model']}",
        f"forget    unbroken unlearn {config.out} --method s3t --forget ROWS",
    ]
    return values, "\n".join(lines)


def in_words(known: Slices) -> str:
    """How many deletions are survived, for a person."""
    found = counted(known)
    return (
        f"deletions until nothing is left: {found['expected']:.1f} on average (tried {_TRIED:,} times: "
        f"{found['simulated']:.1f})"
    )
