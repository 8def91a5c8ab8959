"""`unbroken unlearn RUN --forget ...`: a request from its rows to its manifest. The steps are a run of their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.config import ConfigError, require
from jobs.unlearn.begin import Trained, begin
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.finish import MANIFEST, REPLAY, SIGNATURE, commit, measured, put_away, reached, read_report, take_back
from jobs.unlearn.jobs import reference_job
from jobs.unlearn.method import FORGET, RETAIN
from jobs.unlearn.methods.matching import OracleMatching
from jobs.unlearn.methods.replay import Replay
from jobs.unlearn.probe import read_oracle
from jobs.unlearn.probe_job import probability
from jobs.unlearn.request import Request, folder_of, requests_of
from jobs.unlearn.signature import SignatureError, read_key
from jobs.unlearn.update import TURNS_BACK, UPDATE, apply_again, begin_again
from launch.config import to_toml
from launch.past import Past, read_ledger
from launch.replay import ReplayConfig, replay
from launch.resume import kept_values
from launch.run_folder import write_whole
from launch.run_lock import RunLock
from launch.train import train
from pipeline.settings import check_bounds
from recovery.checkpoint import any_saved
from recovery.disk import write_flushed
from recovery.fencing import KEPT_ELSEWHERE, shred_folder

OF_THE_RUN = (
    "sequence_length", "seed", "dtype", "device", "threads", "recompute", "workers", "replicas", "scheduler", "chunks",
    "microbatches", "microbatch_size", "at_once", "network", "lora_rank", "lora_alpha", "lora_targets", "exact_sums",
    "tokenizer", "vocabulary", "deadline", "heartbeat",
)  # fmt: skip
"""The settings of a run that its requests begin with."""


def of_the_run(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a request has without being told: the settings of its run, or with --resume those that it began with."""
    run = Path(asked.get("run", UnlearnConfig().run))
    if asked.get("resume"):
        return kept_values(_open_request(run)[1], UnlearnConfig)
    own: dict[str, Any] = {"checkpoint_every": 20, "evaluate_every": 20, "sample_tokens": 0}
    own |= {"epochs": None} if "steps" in asked else {}
    return {name: value for name, value in kept_values(run).items() if name in OF_THE_RUN} | own


def unlearn(config: UnlearnConfig, as_json: bool = False, abandon: bool = False) -> tuple[dict[str, Any], str] | int:
    """The report, or STOPPED. Raises ConfigError for what is refused, before anything changes, and as `train` does."""
    check_bounds(config)
    require("LOCAL_RANK" not in os.environ, "unlearn", "torchrun", "one process that starts its own workers")
    past = Past.read(config.run)
    if config.key is not None:
        try:
            read_key(config.key)
        except SignatureError as error:
            raise ConfigError(f"key is {str(config.key)!r}: {error}") from error
    with _locked(config.run):
        trained_on = (past.config, read_ledger(config.run))
        if config.resume or abandon:
            request, folder = _open_request(config.run)
            if abandon:
                return _abandon(config.run, request, folder)
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
    return _told(config, request, said)


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    claim = RunLock(run)
    try:
        yield
    finally:
        claim.release()


def _begun(config: UnlearnConfig, trained: Trained) -> tuple[UnlearnConfig, Request]:
    """A new request. Raises ConfigError where another one is not complete."""
    before = requests_of(config.run)
    if unfinished := [each for each in before if each.status != "complete"]:
        each = unfinished[0]
        raise ConfigError(
            f"request {each.number} of {str(config.run)!r} ({each.asked!r}, {each.method}) is not complete; allowed: "
            f"`unbroken unlearn {config.run} --resume` to complete it"
            + ("" if reached(config.run, each) else ", or --abandon to give it up")
        )
    number = max((each.number for each in before), default=0) + 1
    config = replace(config, out=folder_of(config.run, number), model=str(folder_of(config.run, number) / "start"))
    config.resolved().validate()
    if config.reapply:
        request = begin_again(config, trained, number, before)
        config = replace(config, method=request.method)  # of which it is the update
    else:
        request = begin(config, trained, number)
        config = config.with_steps(len(request.forget))
    write_whole(config.out / "config.toml", to_toml(config))
    return config, request


def _open_request(run: Path) -> tuple[Request, Path]:
    """The request that is not complete. Raises ConfigError where there is none."""
    found = [each for each in requests_of(run) if each.status != "complete"]
    require(bool(found), "resume", True, f"a request that is not complete; {str(run)!r} has none")
    return found[0], folder_of(run, found[0].number)


def _abandon(run: Path, request: Request, folder: Path) -> tuple[dict[str, Any], str]:
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
    if request.method != Replay.name:
        return _train(config, as_json)
    if not (config.out / "model").is_dir():
        out = config.out / REPLAY
        ids = "id:" + ",".join(row["id"] for row in request.rows)
        replay(ReplayConfig(config.run, request.step, workers=config.workers, without=ids, out=out, json=as_json))
        shutil.copytree(out / "model", config.out / "model.tmp", dirs_exist_ok=True)
        os.replace(config.out / "model.tmp", config.out / "model")
    return 0


def _train(config: UnlearnConfig, as_json: bool) -> int:
    with contextlib.redirect_stdout(io.StringIO()) if as_json else contextlib.nullcontext():
        return train(config, as_json, prepared=True)


def _told(config: UnlearnConfig, request: Request, said: list[str]) -> tuple[dict[str, Any], str]:
    """What --json prints, and what a person reads."""
    report, manifest = read_report(config.out), config.out / MANIFEST
    values = {
        "generation": request.generation, "method": request.method, "goal": report["goal"], "rows": len(request.rows),
        **{name: report[name] for name in ("before", "after", "oracle") if name in report},
        "manifest": str(manifest), "signature": str(config.out / SIGNATURE) if config.key else None,
        "model": str(config.run / "model"), "put_away": said,
    }  # fmt: skip
    write_flushed(config.out / "result.json", json.dumps(values, indent=1).encode())

    def row(which: str) -> str:
        told = [report[which].get(probability(kind)) for kind in (FORGET, RETAIN)]  # of an update no rows are left
        return " ".join([f"{which:<8}", *(f"{'-':>12}" if each is None else f"{each:>12.4f}" for each in told)])

    lines = [
        f"{len(request.rows):,} rows are forgotten by {request.method} ({report['goal']}): generation "
        f"{request.generation} of {str(config.run)!r}",
        "probability of an answer   to forget      to keep",
        *(" " * 15 + row(which) for which in ("before", "after", "oracle") if which in report),
        *said,
        *([f"kept      {config.out / UPDATE}: {TURNS_BACK}"] if config.keep_update else []),
        *([KEPT_ELSEWHERE] if config.old_checkpoints == "shred" and said else []),
        f"model     {values['model']}",
        f"manifest  {manifest}" + (f", signed: {values['signature']}" if config.key else ", not signed (--key)"),
    ]
    return values, "\n".join(lines)
