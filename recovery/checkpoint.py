"""Checkpoints that are whole or not there: one safetensors file per layer, a manifest with checksums written last.

    checkpoints/step-00000100/layer-00003.safetensors
    checkpoints/step-00000100/manifest.json

A file per layer lets any number of workers resume, each reading only its layers. Everything is written into
a folder that ends in `.tmp` and becomes true by one rename; a reader takes the newest directory whose every byte is
what the manifest says, and reports why it skipped others. A step that is saved again sets the one before aside as
`step-00000100.old`, which counts until the new one is there. A *fence* (attempt, view) says who writes: what a later
view has saved or is saving is never touched by one that is over, however late its last writer comes back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from pipeline.state.source import Source, SourceRefused
from pipeline.wire import WireError, checked, parse
from recovery.disk import flush_folder

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})(\.old)?")
_FILE = re.compile(r"layer-\d{5}\.safetensors")
_UNFINISHED = re.compile(r"step-\d{8}\.(\d+)-(\d+)\.tmp")
_CHUNK = 1 << 22
_LOOKS = 3  # at a folder in which something is being saved

Fence = tuple[int, int]
"""(attempt, view): attempts are the starts of a run, one after another; views begin anew in each."""


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
    def from_json(cls, values: Any) -> FileRecord:
        """Raises CheckpointError for what is no record of a layer's file."""
        try:
            found = checked(
                values if isinstance(values, dict) else {}, "a file", name=str, layer=int, size=int, crc32=int
            )
        except WireError as error:
            raise CheckpointError(str(error)) from error
        if not _FILE.fullmatch(found["name"]):
            raise CheckpointError(f"a file is called {found['name']!r}; expected layer-NNNNN.safetensors")
        return cls(**found)


@dataclass(frozen=True)
class Found:
    """The newest valid checkpoint, if any, and what was skipped on the way to it, with reasons."""

    path: Path | None
    manifest: dict[str, Any] | None
    skipped: tuple[tuple[Path, str], ...] = ()


def directory(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return root / f"step-{step:08d}"


def temporary(root: Path, step: int, fence: Fence = (0, 0)) -> Path:
    """Where it is written before it is committed."""
    return root / f"step-{step:08d}.{fence[0]}-{fence[1]}.tmp"


def begin(root: Path, step: int, fence: Fence = (0, 0)) -> Path:
    """An empty temporary directory; what an earlier view left there or beside it is removed.

    Raises CheckpointError where a later view is at work.
    """
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob("step-*.tmp"):
        if (match := _UNFINISHED.fullmatch(stale.name)) and (int(match[1]), int(match[2])) > fence:
            raise CheckpointError(f"{stale.name} is being written by a later view than {fence[1]}, which is over")
        shutil.rmtree(stale, ignore_errors=True)
    path = temporary(root, step, fence)
    path.mkdir()
    return path


def last_attempt(root: Path) -> int:
    """The highest attempt that has saved a checkpoint here that can be read; 0 for none."""
    return max((_fence_of(path)[0] for path in _committed(root)), default=0)


def any_saved(root: Path) -> bool:
    """Whether there is a checkpoint, as far as its manifest says; its layers are not read."""
    for path in _committed(root):
        try:
            read_manifest(path)
        except CheckpointError:
            continue
        return True
    return False


def _fence_of(path: Path) -> Fence:
    """Who has saved a checkpoint; (0, 0) where that cannot be read."""
    try:
        attempt, view = read_manifest(path)["extra"]["fence"]
        return int(attempt), int(view)
    except (CheckpointError, KeyError, TypeError, ValueError):
        return 0, 0


def write_layer(folder: Path, layer: int, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write one layer's state and flush it to the disk. Raises CheckpointError, leaving no partial file."""
    name = f"layer-{layer:05d}.safetensors"
    data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    _write(folder / name, data)
    return FileRecord(name, layer, len(data), zlib.crc32(data))


def commit(
    root: Path, step: int, records: Sequence[FileRecord], extra: Mapping[str, Any], *, fence: Fence = (0, 0)
) -> Path:
    """Make the checkpoint true: manifest, flush, rename, flush; then drop what is newer. Older ones stay: `prune`.

    Raises CheckpointError where a later view has saved one: the view of this one is over.
    """
    folder, final = temporary(root, step, fence), directory(root, step)
    body = {
        "extra": {**extra, "fence": list(fence)},
        "files": [record.as_json() for record in sorted(records, key=lambda r: r.layer)],
    }
    text = json.dumps(body, sort_keys=True)
    _write(folder / MANIFEST, json.dumps({"crc32": zlib.crc32(text.encode()), "body": body}, sort_keys=True).encode())
    flush_folder(folder)
    if later := [path.name for path in _committed(root) if _fence_of(path) > fence]:
        raise CheckpointError(f"{max(later)} was saved by a later view than {fence[1]}, which is over")
    if not (folder / MANIFEST).exists():  # who comes back late sets nothing aside
        raise CheckpointError(f"{folder.name} was removed by a later view than {fence[1]}, which is over")
    aside = final.with_name(f"{final.name}.old")
    if final.exists():
        if aside.exists():
            shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    os.rename(folder, final)
    flush_folder(root)
    drop_newer(root, final, fence)
    return final


def drop_newer(root: Path, than: Path | None, fence: Fence = (0, 0)) -> None:
    """Remove what is newer than a checkpoint, or than the start of the run: it is damaged, or of a future that was
    given up."""
    _remove([path for path in _committed(root) if than is None or _order(path) > _order(than)], fence)


def prune(root: Path, step: int, keep: int, fence: Fence = (0, 0)) -> None:
    """Drop all but the `keep` newest up to that of `step`; call it when nobody can go back to an older one any more."""
    final = directory(root, step)
    past = [path for path in _committed(root) if _order(path) <= _order(final)]
    aside = [path for path in past if path.name.endswith(".old") and path.with_suffix("").exists()]
    whole = sorted(set(past) - set(aside), key=_order, reverse=True)
    _remove(aside + whole[max(1, keep) :], fence)


def _remove(paths: Sequence[Path], fence: Fence) -> None:
    for path in paths:
        if _fence_of(path) <= fence:
            shutil.rmtree(path, ignore_errors=True)


def _order(path: Path) -> tuple[str, bool]:
    """Sorts by step; what was set aside comes before what was to replace it."""
    return path.name.removesuffix(".old"), not path.name.endswith(".old")


def abort(root: Path, step: int, fence: Fence = (0, 0)) -> None:
    """Remove what `begin` made."""
    shutil.rmtree(temporary(root, step, fence), ignore_errors=True)


@dataclass
class Verifier:
    """Finds the newest checkpoint that is whole and of the run's generation. What it has read to the last byte, and is
    still as it was, it does not read again. `came_on_at` (time.monotonic seconds) ascends while it works, from
    whichever thread that is."""

    generation: int = 0
    came_on_at: float = 0.0
    _known: dict[Path, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def find(self, root: Path, before: int | None = None) -> Found:
        """The newest checkpoint under `root` that is whole, every file's length and checksum verified; of a step less
        than `before`, if that is given.

        Where something was saved meanwhile, what was damaged may have been replaced: then it looks again.
        """
        with self._turn:
            looks, listed, found = 1, _listing(root), self._find(root, before)
            while found.skipped and looks < _LOOKS and _listing(root) != listed:
                looks, listed, found = looks + 1, _listing(root), self._find(root, before)
            return found

    def _find(self, root: Path, before: int | None) -> Found:
        skipped: list[tuple[Path, str]] = []
        older = [path for path in _committed(root) if before is None or int(_order(path)[0][5:]) < before]
        for path in sorted(older, key=_order, reverse=True):
            try:
                manifest = read_manifest(path)
                source(path, manifest).require(None, self.generation)
                records = [FileRecord.from_json(values) for values in manifest["files"]]
                known = _identity(path, records)
                if self._known.get(path) != known:
                    for record in records:
                        _verify(path / record.name, record, self._come_on)
                    self._known[path] = known
                return Found(path, manifest, tuple(skipped))
            except (CheckpointError, SourceRefused) as error:
                skipped.append((path, str(error)))
        return Found(None, None, tuple(skipped))

    def _come_on(self) -> None:
        self.came_on_at = time.monotonic()


def find(root: Path, generation: int = 0, before: int | None = None) -> Found:
    """The newest checkpoint of a generation, of a step less than `before` if that is given, that is whole, every file's
    length and checksum verified."""
    return Verifier(generation).find(root, before)


def _listing(root: Path) -> list[tuple[str, int]]:
    """What changes when a checkpoint comes, goes or is replaced: names and inodes."""
    found: list[tuple[str, int]] = []
    for path in sorted(_committed(root)):
        with contextlib.suppress(FileNotFoundError):
            found.append((path.name, path.stat().st_ino))
    return found


def _identity(path: Path, records: Sequence[FileRecord]) -> tuple[tuple[int, ...], ...]:
    """What changes when a file of a checkpoint does: inode, length and time."""
    found: list[tuple[int, ...]] = []
    for name in (MANIFEST, *(record.name for record in records)):
        try:
            stat = (path / name).stat()
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error
        found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def read_manifest(path: Path) -> dict[str, Any]:
    """{"extra": {"step": ..., ...}, "files": [...]}. Raises CheckpointError when it is missing or damaged."""
    try:
        whole = checked(parse((path / MANIFEST).read_bytes(), MANIFEST), MANIFEST, body=dict, crc32=int)
        body = checked(whole["body"], MANIFEST, extra=dict, files=list)
        checked(body["extra"], MANIFEST, step=int)
    except FileNotFoundError as error:
        raise CheckpointError(f"{MANIFEST} is missing") from error
    except (WireError, OSError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged ({error})") from error
    if zlib.crc32(json.dumps(whole["body"], sort_keys=True).encode()) != whole["crc32"]:
        raise CheckpointError(f"{MANIFEST} is damaged (checksum)")
    return body


def source(path: Path, manifest: Mapping[str, Any]) -> Source:
    """What a checkpoint is of. One that says no generation is of the first."""
    extra = manifest["extra"]
    return Source("checkpoint", path.name, int(extra["step"]), int(extra.get("generation", 0)))


def read_layer(path: Path, manifest: Mapping[str, Any], layer: int) -> dict[str, Tensor]:
    """One layer's tensors, verified as they are read. Raises CheckpointError."""
    records = {record.layer: record for record in map(FileRecord.from_json, manifest["files"])}
    if (record := records.get(layer)) is None:
        raise CheckpointError(f"{path} has no layer {layer}; it has {sorted(records)}")
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


def _verify(path: Path, record: FileRecord, came_on: Callable[[], None]) -> None:
    try:
        crc, size = 0, 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                crc, size = zlib.crc32(chunk, crc), size + len(chunk)
                came_on()
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
