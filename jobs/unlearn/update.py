"""What a request has changed about the weights, kept to be applied again: theta after - theta before, layer by layer.

    requests/0001/update/model-00001-of-00006.safetensors      the files of the model of the request, as differences

Training that follows a request may bring back what it took; its update, applied to the weights as they are by then,
takes it again without a step (K-FADE, arXiv 2602.10568). It is a key that turns both ways: who has the update and the
weights after it has the weights before it, and all that these knew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from jobs.config import require
from jobs.unlearn.begin import Trained
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.request import Request, folder_of, lay_out
from jobs.unlearn.weights import begin_with, by_file, rewrite
from pipeline.model.weights import ModelError, Weights
from recovery.generation import read_generation

UPDATE = "update"
TURNS_BACK = "with the weights after the request it gives back the weights before it"


def keep_update(config: UnlearnConfig, request: Request) -> None:
    """Keep what a request is about to change, while the model before is still there. Raises ModelError."""
    before, after, into = Weights(config.out / "start"), Weights(config.out / "model"), config.out / UPDATE
    unfinished = into.with_name(f"{UPDATE}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for file, names in by_file(after):
        old, new = before.read(names), after.read(names)
        difference = {name: new[name] - old[name] for name in names}
        save_file(difference, unfinished / file.name, metadata={"generation": str(request.generation)})
    index = {"weight_map": {name: where.name for name, where in after.files.items()}}
    (unfinished / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.rmtree(into, ignore_errors=True)
    os.replace(unfinished, into)


def kept_by(requests: Sequence[Request], run: Path) -> list[int]:
    """The requests of a run that are complete and have kept their update, by number."""
    return [
        each.number
        for each in requests
        if each.status == "complete" and (folder_of(run, each.number) / UPDATE).is_dir()
    ]


def begin_again(config: UnlearnConfig, trained: Trained, number: int, before: Sequence[Request]) -> Request:
    """A request that applies the update of another one again: it has the rows of that, which the run has no more.
    Raises ConfigError where that has kept none."""
    allowed = kept_by(before, config.run)
    told = ", ".join(map(str, allowed)) or "none of this run; --keep-update keeps one"
    require(config.reapply in allowed, "reapply", config.reapply, f"a request that has kept its update: {told}")
    (again,) = (each for each in before if each.number == config.reapply)
    folder = lay_out(config.run, number)
    begin_with(trained.model(config.run), trained.saved, folder / "start", config.run / "tokenizer")
    retain = [index for index in again.retain if not trained.dataset.rows[index].blank]
    return Request(
        number, read_generation(config.run) + 1, trained.step, f"the update of request {again.number}, again",
        again.method, (), tuple(retain), again.rows, reapplies=again.number,
    ).write(folder)  # fmt: skip


def apply_again(config: UnlearnConfig, request: Request) -> None:
    """Write the model of such a request: the weights that it begins with, and the update. Raises ModelError for an
    update of another model."""
    kept = Weights(folder_of(config.run, request.reapplies) / UPDATE)
    start = config.out / "start"
    if odd := set(Weights(start).files) ^ set(kept.files):
        raise ModelError(f"{kept.directory} and the model of the run do not both have {sorted(odd)[0]}")

    def applied(now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        difference = kept.read({name: (name,) for name in now})
        for name, tensor in difference.items():
            if tensor.shape != now[name].shape:
                shapes = f"{tuple(tensor.shape)}; that of the run has {tuple(now[name].shape)}"
                raise ModelError(f"{kept.files[name]}: the update of {name} has shape {shapes}")
        return {name: now[name] + tensor for name, tensor in difference.items()}

    rewrite(start, config.out / "model", config.run / "tokenizer", applied)
