"""Writes what is kept, together: checkpoints, and the model at the end. A disk that fails costs a checkpoint, not the
run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from jobs.engine import Engine, ReportSink
from jobs.unlearn.weights import say_generation
from pipeline.model.hub import cached
from pipeline.model.layered import LayeredModel
from pipeline.model.lora import Lora, is_adapter, save_adapter
from pipeline.model.weights import ModelError, Weights, finish_export, write_shard
from recovery import checkpoint

_ADAPTERS = "adapters"
_FILE_BYTES = 2 << 30
"""Of an exported file: a worker that writes many gigabytes is seen to come on."""


def save(engine: Engine, root: Path, done: int, about: Mapping[str, Any], keep: int, reports: ReportSink) -> str | None:
    """Write a checkpoint of `done` steps under `root`; returns why it is not whole, or None. `about` goes into the
    manifest beside step, generation and layout."""
    fence = engine.fence
    error, records = None, []
    try:
        if engine.leads:
            checkpoint.begin(root, done, fence)
    except (OSError, checkpoint.CheckpointError) as problem:
        error = str(problem)
    error = _first_error(engine.gather({"error": error}))
    if error is None:
        whole = engine.whole_moments()
        try:
            records = _write_layers(engine, checkpoint.temporary(root, done, fence), done, whole)
        except (OSError, checkpoint.CheckpointError) as problem:
            error = str(problem)
    votes = engine.gather({"error": error, "records": [record.as_json() for record in records]})
    error = _first_error(votes)
    if error is None and engine.leads:
        try:
            written = [checkpoint.FileRecord.from_json(r) for vote in votes.values() for r in vote["records"]]
            # what a checkpoint contains is in the ledger, always
            if missing := reports.save_ledger(done, fence[1]):
                raise checkpoint.CheckpointError(missing)
            manifest = {"step": done, "generation": engine.generation, "layout": engine.layout(), **about}
            checkpoint.commit(root, done, written, manifest, fence=fence)
        except (OSError, checkpoint.CheckpointError) as problem:
            error = str(problem)
    error = _first_error(engine.gather({"error": error}))
    if error is not None and engine.leads:
        checkpoint.abort(root, done, fence)
    elif engine.leads:  # all know of the new one: whatever is lost now, nobody goes back to what is dropped
        checkpoint.prune(root, done, keep, fence)
    return error


def _first_error(votes: Mapping[int, Mapping[str, Any]]) -> str | None:
    """Everyone's first error, so that all go the same way."""
    return next((vote["error"] for vote in votes.values() if vote["error"]), None)


def _write_layers(engine: Engine, folder: Path, done: int, whole: Mapping[str, Tensor]) -> list[checkpoint.FileRecord]:
    records: list[checkpoint.FileRecord] = []
    for layer, owner in sorted(engine.owners().items()):
        if owner == engine.me:
            if (found := engine.states.stamp(layer)) != (wanted := (done, engine.generation)):
                raise checkpoint.CheckpointError(
                    f"layer {layer} is of step {found[0]}, generation {found[1]}; the checkpoint is to be of "
                    f"step {wanted[0]}, generation {wanted[1]}"
                )
            tensors = {key: whole.get(key, tensor) for key, tensor in engine.states.tensors(layer).items()}
            for name, tensor in tensors.items():  # else no run could go on from what is the newest checkpoint
                if not torch.isfinite(tensor).all():
                    raise checkpoint.CheckpointError(f"layer {layer} has values in {name} that are no numbers")
            records.append(checkpoint.write_layer(folder, layer, tensors))
            engine.pulse()
    return records


def export(engine: Engine, path: Path, tokenizer: Path, base: str) -> None:
    """Write the model together, as a directory that transformers loads; adapters are merged into it, and kept in
    `adapter` beside it, for the model `base`. Raises ModelError on all alike where one cannot write its part, OSError
    or ModelError on who leads for what only that one writes."""
    unfinished = path.with_name(path.name + ".tmp")
    if engine.leads:
        shutil.rmtree(unfinished, ignore_errors=True)
    engine.gather({})
    files = _files(engine)
    shards: dict[str, str] = {}
    error = None
    try:
        for number, (writer, layers) in enumerate(files, 1):
            if writer == engine.me:
                shards |= _write_file(engine, unfinished, number, len(files), layers)
    except (OSError, ModelError) as problem:
        error = str(problem)
    votes = engine.gather({"shards": shards, "error": error})
    try:
        if (told := _first_error(votes)) is not None:
            raise ModelError(told)
        if engine.leads:
            _finish(engine, unfinished, votes, path, tokenizer, base)
    except (OSError, ModelError):
        if engine.leads:  # by now nobody writes any more
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_file(
    engine: Engine, folder: Path, number: int, count: int, layers: Sequence[int]
) -> dict[str, str]:  # fmt: skip
    """One file of an export; returns tensor -> file. Adapters are merged, and kept beside it for `_finish`."""
    model = engine.states.model
    tensors = {name: tensor for layer in layers for name, tensor in engine.states.weights(layer).items()}
    if model.lora is not None:
        if adapters := {name: tensor for name, tensor in tensors.items() if is_adapter(name)}:
            write_shard(folder / _ADAPTERS, number, count, adapters)
        tensors = model.lora.merged(tensors, model.module)
    if not tensors:
        return {}
    written = write_shard(folder, number, count, tensors)
    engine.pulse()
    return written


def _finish(
    engine: Engine, unfinished: Path, votes: Mapping[int, Mapping[str, Any]], path: Path, tokenizer: Path, base: str
) -> None:  # fmt: skip
    """All files are there: the index, the tokenizer, and the place where the model is to be."""
    model = engine.states.model
    if model.lora is not None:
        block, lora = model.module(model.paths(1)["block"]), model.lora
        config = lora.config(block, whole=True) if isinstance(lora, Lora) else None
        adapters: dict[str, Tensor] = {}
        for file in sorted((unfinished / _ADAPTERS).glob("*.safetensors")):
            adapters |= load_file(file)
        named = Path(base).is_dir() or cached(base) is not None
        save_adapter(path.with_name("adapter"), config, adapters, base if named else None)
        shutil.rmtree(unfinished / _ADAPTERS)
    weight_map = {tensor: name for vote in votes.values() for tensor, name in vote["shards"].items()}
    weight_map |= _add_rest(model, Path(base), unfinished)
    every = [key for layer in range(model.num_layers) for key in model.keys(layer) if not is_adapter(key)]
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    if engine.generation:  # who looks for what was forgotten finds that this is of after it
        say_generation(unfinished, engine.generation)
        if model.lora is not None:
            say_generation(path.with_name("adapter"), engine.generation)
    finish_export(unfinished, model.config, weight_map, keys=every, tokenizer=loaded, into=path)


def _add_rest(model: LayeredModel, source: Path, folder: Path) -> dict[str, str]:
    """Write the layers after the last one of a model that ends early, as they are in `source`; returns tensor ->
    file."""
    if model.headed:
        return {}
    whole, known = LayeredModel(model.config), Weights(source)
    rest = [key for layer in range(model.num_layers, whole.num_layers) for key in whole.keys(layer)]
    return write_shard(folder, whole.num_layers, whole.num_layers, known.read({key: (key,) for key in rest}))


def _files(engine: Engine) -> list[tuple[int, list[int]]]:
    """(writer, its layers) of every file of an export, the same for all; the layers of one writer are in one file,
    unless that would be too large."""
    owned: dict[int, list[int]] = {}
    for layer, owner in sorted(engine.owners().items()):
        owned.setdefault(owner, []).append(layer)
    files: list[tuple[int, list[int]]] = []
    for writer, layers in sorted(owned.items()):
        size = math.inf
        for layer in layers:
            if size + engine.states.model.parameter_bytes(layer) > _FILE_BYTES:
                files.append((writer, []))
                size = 0
            files[-1][1].append(layer)
            size += engine.states.model.parameter_bytes(layer)
    return files
