"""`unbroken export RUN --out DIR`: a checkpoint of a run as a model, of whichever step, while the run goes on or after
it. Adapters are merged into the weights, as at the end of a run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from jobs.config import ConfigError, TrainConfig
from jobs.dcp import save_dcp
from jobs.unlearn.guard import is_guarded
from jobs.unlearn.request import require_complete
from jobs.unlearn.weights import begin_with, say_generation
from launch.commands import Result
from launch.resume import kept_values
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import read_config
from pipeline.settings import MOST_STEPS, Within, check_bounds, require
from pipeline.state.source import SourceRefused
from recovery import checkpoint
from recovery.generation import read_generation


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint as a model directory, which AutoModelForCausalLM.from_pretrained loads, or for PyTorch."""

    run: Path = Path("runs/default")
    """The run folder, or one of the checkpoints in it."""
    out: Path = Path("exported")
    """The model directory that is written; it must not be there, or be empty."""
    step: Annotated[int | None, Within(0, MOST_STEPS)] = None
    """Of which step; unset, the newest checkpoint that is whole."""
    to: Literal["transformers", "dcp"] = "transformers"
    """The form: a model directory of transformers, or a distributed checkpoint of PyTorch under the same names."""
    json: bool = False
    """Print one JSON object."""


def export(config: ExportConfig) -> Result:
    """What was written. Raises ConfigError for what is no checkpoint that may be used, CheckpointError for one that is
    damaged, ModelError for what cannot be written."""
    check_bounds(config)
    run, saved = _find(config)
    out = config.out
    require(
        not out.exists() or (out.is_dir() and not any(out.iterdir())), "out", str(out), "a folder that is new or empty"
    )  # fmt: skip
    settings, generation = TrainConfig(**kept_values(run)), read_generation(run)
    model = LayeredModel(read_config(run / "model-config"), lora=settings.lora(), trained=settings.patterns())
    made = out if config.to == "transformers" else out.with_name(f".{out.name}.transformers")
    try:
        begin_with(model, saved, made, run / "tokenizer")
        if generation:
            say_generation(made, generation)
        if made != out:
            if out.is_dir():
                out.rmdir()  # empty
            save_dcp(made, out)
    finally:
        if made != out:
            shutil.rmtree(made, ignore_errors=True)
    step = int(checkpoint.read_manifest(saved)["extra"]["step"])
    values = {
        "model": str(out), "form": config.to, "run": str(run), "checkpoint": str(saved), "step": step,
        "generation": generation,
    }  # fmt: skip
    return values, f"model     {out}, of step {step} of {str(run)!r}"


def _find(config: ExportConfig) -> tuple[Path, Path]:
    """The run folder, and the checkpoint. One of an older generation than the run's is none: it knows what is
    forgotten."""
    given = config.run
    named = (given / checkpoint.MANIFEST).is_file()
    run = given.resolve().parents[1] if named else given
    for name in ("config.toml", "checkpoints", "model-config/config.json", "tokenizer"):
        require((run / name).exists(), "run", str(given), f"the folder of a run, which has {name} in it")
    require_complete(run)
    require(
        not is_guarded(run / "model"), "run", str(given),
        f"{str(run / 'model')!r} itself, which has its guard: without it the weights say what is forgotten",
    )  # fmt: skip
    generation, root = read_generation(run), run / "checkpoints"
    if not named and config.step is None:
        found = checkpoint.find(root, generation)
        if found.path is None:
            told = "".join(f"; {path.name} is skipped: {reason}" for path, reason in found.skipped)
            raise ConfigError(f"run is {str(given)!r}, which holds no valid checkpoint{told}")
        return run, found.path
    require(not named or config.step is None, "step", config.step, "nothing with a checkpoint, which has its own")
    saved = given if named else checkpoint.directory(root, config.step or 0)
    there = sorted(path.name for path in root.glob("step-*") if (path / checkpoint.MANIFEST).is_file())
    require(saved.is_dir(), "step", config.step, f"that of a checkpoint: {', '.join(there) or 'there is none'}")
    try:
        checkpoint.source(saved, checkpoint.read_manifest(saved)).require(None, generation)
    except SourceRefused as error:
        raise ConfigError(f"run is {str(given)!r}: {error}") from error
    return run, saved
