"""The manifest of a request that was carried out: what was asked, what was done, and hashes of everything before and
after, as one canonical JSON text, so that a signature of its bytes is a signature of what it says."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.model.weights import Weights
from pipeline.wire import Kind, WireError, checked, listed, pair, parse, whole
from recovery.disk import write_flushed
from recovery.forgotten import ForgottenRow

_PIECE = 1 << 22
_PACKAGES = ("unbroken", "torch", "transformers")


class ManifestError(RuntimeError):
    """A manifest, or what it is to tell of, that cannot be read or written. Names the file and what is wrong."""


@dataclass(frozen=True)
class Asked:
    """What a request named: the rows to forget, the rows that must stay, and how the first were chosen (a file, ids, a
    field and its value)."""

    rows: tuple[ForgottenRow, ...]
    retain: str
    chosen: str


@dataclass(frozen=True)
class Hashes:
    """Fingerprints of the data, and hashes of the weights (`weights_hash`), before and after."""

    data_before: str
    data_after: str
    weights_before: str
    weights_after: str


@dataclass(frozen=True)
class LedgerRange:
    """The committed steps that a ledger tells of, first and last (0 for none), its lines, and a hash of the file."""

    first_step: int
    last_step: int
    num_lines: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that is signed of a request."""

    generation: int
    """That of the run once the request is committed."""
    request: Asked
    goal: str
    method: str
    settings: Mapping[str, Any]
    """Of the method and of the run that carried it out."""
    hashes: Hashes
    ledger: LedgerRange
    seen_in_steps: tuple[int, ...]
    """The training steps whose samples had rows that were to be forgotten."""
    versions: Mapping[str, str]
    before: Mapping[str, float]
    """What was measured of the model before, by name: mean probabilities of answers to forget and of those to keep."""
    after: Mapping[str, float]
    times: Mapping[str, float]
    """When it was asked, begun and done: name -> unix seconds."""

    def canonical(self) -> bytes:
        """Keys in order, no spaces, UTF-8: the same bytes for the same manifest. Raises ManifestError for what is no
        JSON, such as a loss that is no number."""
        try:
            text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
            return text.encode()
        except (TypeError, ValueError) as error:
            raise ManifestError(f"a manifest cannot be written as JSON: {error}") from error

    def write(self, path: Path) -> None:
        """Write it whole, on the disk before this returns. Raises ManifestError."""
        data = self.canonical()
        try:
            write_flushed(path, data)
        except OSError as error:
            raise ManifestError(f"{path} cannot be written: {error.strerror}") from error

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises ManifestError for a file that `write` has not written."""
        try:
            found = checked(
                parse(path.read_bytes(), path.name), path.name, generation=int, request=dict, goal=str, method=str,
                settings=dict, hashes=dict, ledger=dict, seen_in_steps=list, versions=dict, before=dict, after=dict,
                times=dict,
            )  # fmt: skip
            hashes = checked(
                found["hashes"], "hashes", data_before=str, data_after=str, weights_before=str, weights_after=str
            )
            ledger = checked(found["ledger"], "ledger", first_step=int, last_step=int, num_lines=int, sha256=str)
            asked = checked(found["request"], "request", rows=list, retain=str, chosen=str)
            rows = listed(asked.pop("rows"), "rows", ForgottenRow.from_json)
            found |= {
                "request": Asked(rows, **asked),
                "hashes": Hashes(**hashes),
                "ledger": LedgerRange(**ledger),
                "seen_in_steps": listed(found["seen_in_steps"], "seen_in_steps", lambda step: whole(step, "a step")),
            }
            of: dict[str, Kind] = {"versions": str, "before": float, "after": float, "times": float}
            for name, kind in of.items():
                found[name] = checked(found[name], name, **dict.fromkeys(found[name], kind))
            return cls(**found)
        except (WireError, OSError) as error:
            raise ManifestError(f"{path} is no manifest that can be read: {error}") from error


def versions() -> dict[str, str]:
    """What the request was carried out with. A package that is not installed, but run from its folder, has none."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def ledger_range(path: Path) -> LedgerRange:
    """Of a ledger.jsonl, the lines that are whole; all of its bytes are hashed. Raises ManifestError."""
    steps, digest = list[int](), hashlib.sha256()
    try:
        with path.open("rb") as file:
            for line in file:
                digest.update(line)
                try:
                    steps.append(checked(parse(line, path.name), path.name, step=int)["step"])
                except WireError:
                    continue  # a crash has cut it
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from error
    return LedgerRange(min(steps, default=0), max(steps, default=0), len(steps), digest.hexdigest())


def weights_hash(folder: Path) -> str:
    """sha256 [64 hex digits] over all tensors of a model's safetensors in the order of their names: name, type, shape
    and bytes of each. How they are dealt to files makes no difference. Raises ModelError, or ManifestError where a file
    cannot be read to its end."""
    weights, digest = Weights(folder), hashlib.sha256()
    headers = {path: _header(path) for path in sorted(set(weights.files.values()))}
    for name in sorted(weights.files):
        path = weights.files[name]
        begin, entries = headers[path]
        start, end = entries[name]["data_offsets"]
        about = [name, entries[name]["dtype"], entries[name]["shape"]]
        digest.update(json.dumps(about, separators=(",", ":")).encode() + b"\n")
        try:
            with path.open("rb") as file:
                file.seek(begin + start)
                for piece in _pieces(file, end - start):
                    digest.update(piece)
        except OSError as error:
            raise ManifestError(f"{path} cannot be read to the end of {name}: {error}") from error
    return digest.hexdigest()


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """(where the bytes of tensors begin, tensor -> {dtype, shape, data_offsets}) of a safetensors file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = parse(file.read(length), path.name)
        for name, entry in entries.items():
            if name != "__metadata__":
                pair(checked(entry, name, dtype=str, shape=list, data_offsets=list)["data_offsets"], name)
        return 8 + length, entries
    except (WireError, OSError) as error:
        raise ManifestError(f"{path} is no safetensors file that can be read: {error}") from error


def _pieces(file: BinaryIO, left: int) -> Iterator[bytes]:
    while left:
        if not (piece := file.read(min(left, _PIECE))):
            raise OSError(f"{left} bytes are missing")
        left -= len(piece)
        yield piece
