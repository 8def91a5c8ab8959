"""A run as its folder tells of it, and a folder for a replay of it: what is read, what is checked, what is copied."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.config import ConfigError, TrainConfig
from jobs.data import META, Dataset
from jobs.files import CorpusError
from jobs.prepare import text_fingerprint
from jobs.replay import Records
from jobs.row_data import ROWS, RowDataset
from jobs.row_prepare import row_fingerprint
from launch.resume import kept_values
from launch.run_folder import LEDGER, read_jsonl, standing, write_whole
from launch.run_lock import RunLock
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import ModelError, read_config
from pipeline.settings import require
from recovery import checkpoint

MARK = "replay.json"
"""Says that a folder is of a replay, and what came of it."""

_NEEDED = ("config.toml", "ledger.jsonl", "metrics.jsonl", "model-config/config.json", "tokenizer")


@dataclass(frozen=True)
class Past:
    """A run as its folder tells of it."""

    folder: Path
    config: TrainConfig
    records: Records
    events: list[dict[str, Any]]
    tied: bool

    @classmethod
    def read(cls, folder: Path) -> Past:
        """Raises ConfigError for what is no run folder."""
        for name in _NEEDED:
            require((folder / name).exists(), "run", str(folder), f"the folder of a run, which has {name} in it")
        config = TrainConfig(**kept_values(folder)).resolved()
        try:
            tied = LayeredModel(read_config(folder / "model-config")).tied
        except ModelError as error:
            raise ConfigError(f"run is {str(folder)!r}, whose model is not known: {error}") from error
        records = Records.of(read_metrics(folder), read_ledger(folder))
        return cls(folder, config, records, read_jsonl(folder / "events.jsonl", event=str, step=int), tied)

    def started(self) -> list[dict[str, Any]]:
        """The starts of the run, in order."""
        return [event for event in self.events if event["event"] == "started"]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that stand."""
    kinds = {"step": int, "loss": float, "grad_norm": float, "lr": float, "tokens": int}
    return standing(read_jsonl(folder / "metrics.jsonl", **kinds))


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """The lines of ledger.jsonl that stand."""
    kinds = dict.fromkeys(set(LEDGER) - {"version", "sources"}, int)
    return standing(read_jsonl(folder / "ledger.jsonl", **kinds))


def check_tokens(past: Past, tokens: Path, manifest: dict[str, Any] | None) -> None:
    """Raise ConfigError for tokens that are damaged, or are none for this run."""
    own, name = past.folder / "data", str(tokens)
    dataset = _open(tokens)
    if tokens == own:
        require(
            _fingerprint(dataset) == dataset.fingerprint, "data", name,
            f"tokens whose fingerprint is {dataset.fingerprint}, as {META} says: they are damaged",
        )  # fmt: skip
        had = None if manifest is None else manifest["extra"].get("data")
        require(
            had in (None, dataset.fingerprint), "data", name,
            f"those that the checkpoint was made with, of fingerprint {had}: the run was given others since",
        )  # fmt: skip
        return
    wanted = past.config.sequence_length, past.config.seed
    require(
        (dataset.sequence_length, dataset.seed) == wanted, "data", name,
        f"tokens of sequence_length {wanted[0]} and seed {wanted[1]}, as in the run",
    )  # fmt: skip
    if own.is_dir():
        count = _open(own).num_train
        require(dataset.num_train == count, "data", name, f"{count} samples, as in the run; it has {dataset.num_train}")


def _fingerprint(dataset: Dataset | RowDataset) -> str:
    """As it is now."""
    if isinstance(dataset, RowDataset):
        return row_fingerprint(dataset.folder)
    return text_fingerprint(dataset)


def _open(folder: Path) -> Dataset | RowDataset:
    try:
        return RowDataset.open(folder) if (folder / ROWS).is_file() else Dataset.open(folder)
    except CorpusError as error:
        raise ConfigError(f"data is {str(folder)!r}, whose tokens cannot be read: {error.__cause__}") from error


# ---- the folder ----


def lay_out(past: Past, out: Path, tokens: Path, start: int, saved: Path | None) -> None:
    """Make `out` the folder of a replay on `tokens` that begins after step `start`, with the checkpoint `saved` if
    there is one, and with all else that a run has then. Raises ConfigError where something else is in it."""
    inside = out.resolve() in (past.folder.resolve(), *past.folder.resolve().parents)
    require(not inside, "out", str(out), "a folder that the run does not lie in")
    claim = RunLock(out)
    try:
        there = [path for path in out.iterdir() if path.name != ".lock"]
        require(
            not there or (out / MARK).is_file(), "out", str(out), "a folder that is empty, or holds an older replay"
        )
        for path in there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_whole(out / MARK, json.dumps({"run": str(past.folder), "from": start}) + "\n")
        _copy(tokens, out / "data")
        for name in ("tokenizer", "model-config", "config.toml", "generation.json"):
            if (past.folder / name).exists():
                _copy(past.folder / name, out / name)
        if saved is not None:
            _copy(saved, checkpoint.directory(out / "checkpoints", start))
        for name, lines in (("metrics", read_metrics(past.folder)), ("ledger", read_ledger(past.folder))):
            write_whole(out / f"{name}.jsonl", _text(line for line in lines if line["step"] <= start))
    except OSError as error:
        raise ConfigError(f"out is {str(out)!r}, where the replay cannot be laid out: {error}") from error
    finally:
        claim.release()


def _text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _copy(source: Path, target: Path) -> None:
    """A file or a folder. Large files share their bytes where both lie on one disk: nobody writes them in place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_copy_file)
    else:
        _copy_file(str(source), str(target))


def _copy_file(source: str, target: str) -> None:
    if source.endswith((".bin", ".safetensors")):
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)
