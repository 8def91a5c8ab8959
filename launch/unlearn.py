"""`unbroken unlearn RUN --forget ...`: a request from its rows to its manifest. The steps are a run of their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.config import ConfigError, require
from jobs.resume import differences
from jobs.row_data import RowDataset
from jobs.unlearn.begin import Trained, begin
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.finish import MANIFEST, REPLAY, SIGNATURE, commit, measured, put_away, reached, read_report, take_back
from jobs.unlearn.jobs import reference_job
from jobs.unlearn.method import FORGET, RETAIN, TRACE
from jobs.unlearn.methods.first_epoch import FirstEpoch
from jobs.unlearn.methods.grpo import REWARD
from jobs.unlearn.methods.matching import OracleMatching
from jobs.unlearn.methods.replay import Replay
from jobs.unlearn.oracle import FLOOR, ORACLE, check_oracles
from jobs.unlearn.probe import divergence, read_oracle
from jobs.unlearn.probe_job import probability
from jobs.unlearn.request import Request, folder_of, next_number, requests_of
from jobs.unlearn.settings import method_of
from jobs.unlearn.signature import SignatureError, read_key
from jobs.unlearn.traces import TraceConfig, traces_of
from jobs.unlearn.update import TURNS_BACK, UPDATE, apply_again, begin_again
from launch.config import to_toml
from launch.first_epoch import take_first_epoch_back
from launch.page.keeper import draw_last
from launch.past import Past, read_ledger, read_metrics
from launch.replay import ReplayConfig, replay
from launch.resume import kept_values
from launch.run_folder import write_whole
from launch.run_lock import RunLock
from launch.train import train
from pipeline.settings import check_bounds
from recovery.checkpoint import CheckpointError, any_saved
from recovery.disk import write_flushed
from recovery.fencing import KEPT_ELSEWHERE, shred_folder

OF_THE_RUN = (
    "sequence_length", "seed", "dtype", "device", "threads", "peak_tflops", "recompute", "workers", "replicas",
    "scheduler", "chunks", "balanced_memory", "balanced_shape", "microbatches", "microbatch_size", "at_once",
    "network", "lora_rank", "lora_alpha", "lora_targets", "lora_blocks", "trained", "exact_sums", "tokenizer",
    "vocabulary", "deadline", "heartbeat",
)  # fmt: skip
"""The settings of a run that its requests begin with."""
CHOSEN_ONCE = ("neighbours", "neurons", "concept_words", "group_by")
"""What a request makes beforehand, and keeps, follows from these."""


def of_the_run(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a request has without being told: the settings of its run, or with --resume those that it began with."""
    run = Path(asked.get("run", UnlearnConfig().run))
    if asked.get("resume"):
        return kept_values(open_request(run)[1], UnlearnConfig)
    own: dict[str, Any] = {"checkpoint_every": 20, "evaluate_every": 20, "sample_tokens": 0}
    own |= {"epochs": None} if "steps" in asked else {}
    return {name: value for name, value in kept_values(run).items() if name in OF_THE_RUN} | own


def unlearn(config: UnlearnConfig, as_json: bool = False, abandon: bool = False) -> tuple[dict[str, Any], str] | int:
    """The report, or STOPPED. Raises ConfigError for what is refused, before anything changes, and as `train` does."""
    check_bounds(config)
    require("LOCAL_RANK" not in os.environ, "unlearn", "torchrun", "one process that starts its own workers")
    past = Past.read(config.run)
    check_key(config)
    with locked(config.run):
        trained_on = (past.config, read_ledger(config.run))
        if config.resume or abandon:
            request, folder = open_request(config.run)
            if abandon:
                return abandon_request(config.run, request, folder)
            _require_kept(config, folder)
            if request.status == "open":  # later ones have been measured
                check_oracles(config)
        else:
            config, request = _begun(config, Trained.read(config.run, *trained_on))
            folder = config.out
        config = replace(config, out=folder, model=str(folder / "start"), resume=any_saved(folder / "checkpoints"))
        if not reached(config.run, request):
            trained = Trained.read(config.run, *trained_on)
            require(
                trained.step == request.step, "resume", True,
                f"--abandon: the run has gone on to step {trained.step} since request {request.number} began at step "
                f"{request.step}",
            )  # fmt: skip
            if request.status == "open":
                if (code := _steps(config, request, as_json)) != 0:
                    return code  # it has been said how to go on
                request = measured(config, request, trained)
            request = commit(config, request, trained)
        said: list[str] = []
        request = put_away(config, request, said.append)
        draw_last(config.run)
    return told(config, request, said)


def check_key(config: UnlearnConfig) -> None:
    """Raise ConfigError for a key that cannot sign."""
    if config.key is not None:
        try:
            read_key(config.key)
        except SignatureError as error:
            raise ConfigError(f"key is {str(config.key)!r}: {error}") from error


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Inside, nobody else works in the run folder. Raises ConfigError where somebody does."""
    claim = RunLock(run)
    try:
        yield
    finally:
        claim.release()


def _begun(config: UnlearnConfig, trained: Trained) -> tuple[UnlearnConfig, Request]:
    """A new request. Raises ConfigError where another one is not complete."""
    before = refuse_unfinished(config.run)
    number = next_number(before)
    config = replace(config, out=folder_of(config.run, number), model=str(folder_of(config.run, number) / "start"))
    config.resolved().validate()
    check_oracles(config)
    if config.reapply:
        request = begin_again(config, trained, number, before)
        config = replace(config, method=request.method)  # of which it is the update
    else:
        request = begin(config, trained, number)
        config = config.with_steps(len(request.forget))
    write_whole(config.out / "config.toml", to_toml(config))
    return config, request


def refuse_unfinished(run: Path) -> Sequence[Request]:
    """The requests of a run. Raises ConfigError where one is not complete."""
    before = requests_of(run)
    for each in before:
        if each.status != "complete":
            raise ConfigError(
                f"request {each.number} of {str(run)!r} ({each.asked!r}, {each.method}) is not complete; allowed: "
                f"`unbroken unlearn {run} --resume` to complete it"
                + ("" if reached(run, each) else ", or --abandon to give it up")
            )
    return before


def open_request(run: Path) -> tuple[Request, Path]:
    """The request that is not complete. Raises ConfigError where there is none."""
    found = [each for each in requests_of(run) if each.status != "complete"]
    require(bool(found), "resume", True, f"a request that is not complete; {str(run)!r} has none")
    return found[0], folder_of(run, found[0].number)


def _require_kept(config: UnlearnConfig, folder: Path) -> None:
    """Raise ConfigError where a request is to go on with other settings than those that what it keeps was made by."""
    before = UnlearnConfig(**kept_values(folder, UnlearnConfig))
    if told := differences(before, config, CHOSEN_ONCE):
        raise ConfigError(f"cannot resume: {', '.join(told)}; allowed: what the request began with, or --abandon")


def abandon_request(run: Path, request: Request, folder: Path) -> tuple[dict[str, Any], str]:
    """Give a request up; what is told of it. Raises ConfigError for one that is committed."""
    require(
        not reached(run, request), "abandon", True, f"--resume: request {request.number} is committed, and stays so"
    )  # fmt: skip
    take_back(run)
    shred_folder(folder)
    return {"abandoned": request.number}, f"request {request.number} is given up: the run is as it was"


def _steps(config: UnlearnConfig, request: Request, as_json: bool) -> int:
    """Have the model of the request in its folder. Returns the exit code."""
    if request.reapplies:
        apply_again(config, request)
        return 0
    if request.method == OracleMatching.name and not (job := reference_job(config, request)).reference.complete:
        assert config.oracle is not None
        read_oracle(config.oracle, job)
    if request.method == FirstEpoch.name:
        take_first_epoch_back(config, request, as_json)
        return 0
    if request.method != Replay.name:
        return _write_traces(config, as_json) or _train(config, as_json)
    if not (config.out / "model").is_dir():
        out = config.out / REPLAY
        ids = "digest:" + ",".join(row["digest"] for row in request.rows)
        replay(ReplayConfig(config.run, request.step, workers=config.workers, without=ids, out=out, json=as_json))
        shutil.copytree(out / "model", config.out / "model.tmp", dirs_exist_ok=True)
        os.replace(config.out / "model.tmp", config.out / "model")
    return 0


def _write_traces(config: UnlearnConfig, as_json: bool) -> int:
    """Have the model's own traces in the folder, where the method takes them. Returns the exit code. Raises
    CheckpointError where they are gone and the model has changed."""
    if config.trace is not None or TRACE not in method_of(config).kinds:
        return 0
    traces = traces_of(config, RowDataset.open(config.run / "data"))
    if traces.complete:
        return 0
    if config.resume:
        raise CheckpointError(f"{traces.folder} is gone, and with it what the model wrote before step 1")
    return _train(TraceConfig.of(config), as_json)


def _train(config: UnlearnConfig, as_json: bool) -> int:
    with contextlib.redirect_stdout(io.StringIO()) if as_json else contextlib.nullcontext():
        return train(config, as_json, prepared=True)


def told(config: UnlearnConfig, request: Request, said: list[str]) -> tuple[dict[str, Any], str]:
    """What --json prints, and what a person reads."""
    report, manifest = read_report(config.out), config.out / MANIFEST
    values = {
        "generation": request.generation, "method": request.method, "goal": report["goal"], "rows": len(request.rows),
        "never_trained_on": report["never_trained_on"],
        **{name: report[name] for name in ("before", "after", ORACLE, FLOOR) if name in report},
        "manifest": str(manifest), "signature": str(config.out / SIGNATURE) if config.key else None,
        "model": str(config.run / "model"), "put_away": said,
    }  # fmt: skip
    if rewards := [line["means"][REWARD] for line in read_metrics(config.out) if REWARD in line.get("means", {})]:
        values["rewards"] = rewards
    write_flushed(config.out / "result.json", json.dumps(values, indent=1).encode())

    noun, never = f"{report['noun']}s", report["never_trained_on"]
    lines = [
        f"{len(request.rows):,} {noun} are forgotten by {request.method} ({report['goal']}): generation "
        f"{request.generation} of {str(config.run)!r}",
        *([f"{len(never):,} of them were in no step of the run, and have left its data alone"] if never else []),
        *_table(report),
        *([f"mean reward of a step's answers: {rewards[0]:.3f} first, {rewards[-1]:.3f} last"] if rewards else []),
        *said,
        *([f"kept      {config.out / UPDATE}: {TURNS_BACK}"] if config.keep_update else []),
        *([KEPT_ELSEWHERE] if config.old_checkpoints == "shred" and said else []),
        f"model     {values['model']}",
        f"manifest  {manifest}" + (f", signed: {values['signature']}" if config.key else ", not signed (--key)"),
    ]
    return values, "\n".join(lines)


def _table(report: Mapping[str, Any]) -> list[str]:
    """What was measured, a line for each model."""
    measures = {f"probability of {'an answer' if report['noun'] == 'row' else 'a token'}": probability}
    if ORACLE in report:
        measures["KL from the oracle, nats"] = divergence
    models = {"before": "before", "after": "after", ORACLE: "oracle", FLOOR: "noise floor"}
    lines = [" " * 12 + "".join(f"{title:^30}" for title in measures).rstrip()]
    lines.append(" " * 12 + f"{'to forget':>14}{'to keep':>14}  " * len(measures))
    for which, called in models.items():
        if (found := report.get(which)) is not None:
            numbers = [[found.get(measure(kind), 0.0) for kind in (FORGET, RETAIN)] for measure in measures.values()]
            lines.append(f"{called:<12}" + "".join(f"{forget:14.4f}{retain:14.4f}  " for forget, retain in numbers))
    return [line.rstrip() for line in lines]
