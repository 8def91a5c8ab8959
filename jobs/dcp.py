"""Models in and out of PyTorch's distributed checkpoints (DCP), under the state names of transformers.

What is written is a folder that `torch.distributed.checkpoint.load` reads into a transformers model's state dict, with
config and tokenizer beside it. What is read is such a folder, also where the state dict lies under `model.` in it, as
trainers write who save optimizer and model together; its config.json must lie in it. Only tensors are read, and a
pickle that has more in it than the metadata of tensors is refused before PyTorch meets it.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from transformers import AutoTokenizer

from pipeline.model.layered import LayeredModel
from pipeline.model.weights import ModelError, Weights, finish_export, read_config, write_shard

METADATA = ".metadata"
_WRAPPED = "model."
_SHARD_BYTES = 2 << 30


def is_dcp(folder: Path) -> bool:
    """Whether a folder is a distributed checkpoint."""
    return (folder / METADATA).is_file()


def save_dcp(model: Path, folder: Path) -> None:
    """Write the model in directory `model`, as `export` leaves it, as a distributed checkpoint in `folder`, which must
    not be there. Needs memory for the model once. Raises ModelError."""
    if folder.exists():
        raise ModelError(f"{folder} is there already; allowed: a folder that is not")
    known = Weights(model)
    state: dict[str, Any] = dict(known.read({name: (name,) for name in known.files}, dtype=None))
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        dcp.save(state, checkpoint_id=unfinished, no_dist=True)
        for path in model.iterdir():
            if path.is_file() and ".safetensors" not in path.name:
                shutil.copy(path, unfinished / path.name)
        unfinished.rename(folder)
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load_dcp(folder: Path, into: Path) -> Path:
    """A directory of safetensors made of a distributed checkpoint that has a config.json beside it; the same one where
    it was made before. Raises ModelError for what lacks a weight, or has one of another shape."""
    target = into / f"{folder.resolve().name}-dcp"
    if (target / "config.json").is_file():
        return target
    config = read_config(folder)
    model = LayeredModel(config)
    shapes = {name: shape for layer in range(model.num_layers) for name, shape in model.shapes(layer).items()}
    wanted = {key: shapes[key] for layer in range(model.num_layers) for key in model.keys(layer)}
    held, prefix = _tensors(folder), ""
    if wanted.keys() - held.keys() and wanted.keys() <= {name.removeprefix(_WRAPPED) for name in held}:
        prefix = _WRAPPED
    if absent := sorted(key for key in wanted if prefix + key not in held):
        raise ModelError(
            f"{folder}: a distributed checkpoint without {len(absent)} of the weights, the first: {absent[0]}; it has "
            f"{', '.join(sorted(held)[:3])} ...; allowed: the state names of transformers, for {config.model_type}"
        )
    for key, shape in wanted.items():
        if tuple(held[prefix + key].size) != tuple(shape):
            raise ModelError(
                f"{folder}: {key} is {tuple(held[prefix + key].size)}; config.json asks for {tuple(shape)}"
            )
    unfinished = target.with_name(target.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    files = list(_parts(wanted.items()))
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(files, 1):
        state: dict[str, Any] = {
            prefix + key: torch.empty(held[prefix + key].size, dtype=held[prefix + key].properties.dtype)
            for key in keys
        }
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        weight_map |= write_shard(unfinished, number, len(files), {key: state[prefix + key] for key in keys})
    named = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if named else None
    return finish_export(unfinished, config, weight_map, keys=wanted, tokenizer=tokenizer, into=target)


def _parts(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[list[str]]:
    """Names by file, none of which is larger than it need be."""
    parts: list[list[str]] = []
    size = _SHARD_BYTES
    for name, shape in shapes:
        if size >= _SHARD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += 4 * torch.Size(shape).numel()
    return parts


_CHECKPOINT = "torch.distributed.checkpoint"
_KNOWN = {
    f"{_CHECKPOINT}.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo"}, "torch": {"Size"}, "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"}, "collections": {"OrderedDict"},
}  # fmt: skip
"""What the metadata of tensors is made of, by module."""


class _Reader(pickle.Unpickler):
    """Loads that and dtypes, and nothing else: a checkpoint may be a stranger's."""

    def find_class(self, module: str, name: str, /) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it has {module}.{name}, which is no part of it")


def _tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Name -> size and dtype of the tensors in a distributed checkpoint. Raises ModelError."""
    try:
        with (folder / METADATA).open("rb") as file:
            found = _Reader(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError("it is no metadata")
    except Exception as error:  # a damaged pickle raises errors of many kinds
        raise ModelError(f"{folder}: its {METADATA} cannot be read: {error}") from error
    return {name: each for name, each in found.state_dict_metadata.items() if isinstance(each, TensorStorageMetadata)}
