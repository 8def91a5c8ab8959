"""Checkpoints that are whole or not there: one safetensors file per layer, a manifest with checksums written last.

    checkpoints/step-00000100/layer-00003.safetensors
    checkpoints/step-00000100/manifest.json

A file per layer lets any number of workers resume, each reading only its layers. Everything is written into
`step-N.tmp` and becomes true by one rename; a reader takes the newest directory whose every byte is what the manifest
says, and reports why it skipped others.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")
_CHUNK = 1 << 22


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used for this run: names the path, what was found and allowed."""


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written. `crc32` is zlib's: at 2 GB/s it costs less than the read, and it catches every flip."""

    name: str
    layer: int
    size: int
    crc32: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FileRecord:
        return cls(**values)


@dataclass(frozen=True)
class Found:
    """The newest valid checkpoint, if any, and what was skipped on the way to it, with reasons."""

    path: Path | None
    manifest: dict[str, Any] | None
    skipped: tuple[tuple[Path, str], ...] = ()


def directory(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return root / f"step-{step:08d}"


def temporary(root: Path, step: int) -> Path:
    """Where it is written before it is committed."""
    return root / f"step-{step:08d}.tmp"


def begin(root: Path, step: int) -> Path:
    """An empty temporary directory; what an earlier crash left there or beside it is removed."""
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob("step-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    path = temporary(root, step)
    path.mkdir()
    return path


def write_layer(folder: Path, layer: int, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write one layer's state and flush it to the disk. Raises CheckpointError, leaving no partial file."""
    name = f"layer-{layer:05d}.safetensors"
    data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    _write(folder / name, data)
    return FileRecord(name, layer, len(data), zlib.crc32(data))


def commit(root: Path, step: int, records: Sequence[FileRecord], extra: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Make the checkpoint true: manifest, flush, rename, flush; then drop all but the `keep` newest."""
    folder, final = temporary(root, step), directory(root, step)
    body = {"extra": dict(extra), "files": [record.as_json() for record in sorted(records, key=lambda r: r.layer)]}
    text = json.dumps(body, sort_keys=True)
    _write(folder / MANIFEST, json.dumps({"crc32": zlib.crc32(text.encode()), "body": body}, sort_keys=True).encode())
    _flush_directory(folder)
    if final.exists():
        shutil.rmtree(final)
    os.rename(folder, final)
    _flush_directory(root)
    others = sorted(_committed(root), reverse=True)
    # Newer ones are damaged, or of a future that a rollback gave up: this one was written after them.
    for old in [p for p in others if p > final] + [p for p in others if p <= final][max(1, keep) :]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def abort(root: Path, step: int) -> None:
    """Remove what `begin` made."""
    shutil.rmtree(temporary(root, step), ignore_errors=True)


def find(root: Path) -> Found:
    """The newest checkpoint that is whole, every file's length and checksum verified."""
    skipped: list[tuple[Path, str]] = []
    for path in sorted(_committed(root), reverse=True):
        try:
            manifest = read_manifest(path)
            for record in map(FileRecord.from_json, manifest["files"]):
                _verify(path / record.name, record)
            return Found(path, manifest, tuple(skipped))
        except CheckpointError as error:
            skipped.append((path, str(error)))
    return Found(None, None, tuple(skipped))


def read_manifest(path: Path) -> dict[str, Any]:
    """{"extra": ..., "files": [...]}. Raises CheckpointError when it is missing or damaged."""
    try:
        whole = json.loads((path / MANIFEST).read_bytes())
        body = whole["body"]
        valid = zlib.crc32(json.dumps(body, sort_keys=True).encode()) == whole["crc32"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged ({type(error).__name__})") from error
    if not valid:
        raise CheckpointError(f"{MANIFEST} is damaged (checksum)")
    return body


def read_layer(path: Path, manifest: Mapping[str, Any], layer: int) -> dict[str, Tensor]:
    """One layer's tensors, verified as they are read. Raises CheckpointError."""
    record = next((FileRecord.from_json(r) for r in manifest["files"] if r["layer"] == layer), None)
    if record is None:
        raise CheckpointError(f"{path} has no layer {layer}; it has {sorted(r['layer'] for r in manifest['files'])}")
    try:
        data = (path / record.name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path / record.name} cannot be read: {error.strerror}") from error
    _compare(record, len(data), zlib.crc32(data))
    return load(data)


def check_compatible(manifest: Mapping[str, Any], **now: Any) -> None:
    """Refuse a checkpoint of another model, corpus or seed: each of `now` must equal the manifest's `extra`.

    For mappings (the model's shape) the message names the fields that differ. Raises CheckpointError.
    """
    for name, value in now.items():
        saved = json.loads(json.dumps(manifest["extra"].get(name)))
        value = json.loads(json.dumps(value))
        if saved == value:
            continue
        if isinstance(saved, dict) and isinstance(value, dict):
            fields = sorted(k for k in saved.keys() | value.keys() if saved.get(k) != value.get(k))
            told = "; ".join(f"{k} was {saved.get(k)!r} and is {value.get(k)!r}" for k in fields[:5])
        else:
            told = f"it was {saved!r} and is {value!r}"
        raise CheckpointError(f"cannot resume with another {name}: {told}. Use the same {name}, or another --out")


def _committed(root: Path) -> list[Path]:
    return [p for p in root.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()] if root.is_dir() else []


def _verify(path: Path, record: FileRecord) -> None:
    try:
        crc, size = 0, 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    except OSError as error:
        raise CheckpointError(f"{record.name} cannot be read: {error.strerror}") from error
    _compare(record, size, crc)


def _compare(record: FileRecord, size: int, crc: int) -> None:
    if size != record.size:
        raise CheckpointError(f"{record.name} has {size} bytes, written were {record.size}")
    if crc != record.crc32:
        raise CheckpointError(f"{record.name} has checksum {crc:08x}, written was {record.crc32:08x}")


def _write(path: Path, data: bytes) -> None:
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}): {len(data)} bytes are needed, {free} are free"
        ) from error


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
