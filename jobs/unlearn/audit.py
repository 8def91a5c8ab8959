"""Looks through a run folder for what the run has forgotten: whatever a request has done is checked by its traces.

Text and tokens are found by the hashes that RUN/forgotten.json keeps, and by texts that the user gives; rows by their
digests; weights by the generation that they say they are of. It is of a run at rest: what is being written meanwhile
says nothing yet. What lies outside the folder is not looked at: the user's own files, the cache of tokens
(jobs.cache), backups. Nothing here can tell what weights know; that is measured, not looked up.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jobs.data import META, TOKENS
from jobs.documents import DOCUMENTS
from jobs.row_data import ROWS
from jobs.unlearn.text_search import Texts, search_text
from jobs.unlearn.update import UPDATE
from pipeline.wire import WireError, checked, parse
from recovery.checkpoint import CheckpointError, read_manifest, source
from recovery.fencing import FENCED
from recovery.forgotten import read_forgotten
from recovery.generation import read_generation

SAID = "unbroken.json"
"""What a folder of weights says of itself: {"generation": g}. Without it, that is 0."""

_WEIGHTS = (".safetensors", ".gguf", ".pt", ".pth", ".ckpt")
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}
_PIECE = 1 << 22
_CLOSED = "its mode is not 0: fence it again, or remove it"


@dataclass(frozen=True)
class Finding:
    """Something that should be gone: where, relative to the run folder; `generation` is that of the request that should
    have ended it, None where it is not known; `how` it was found."""

    path: str
    what: str
    generation: int | None
    how: str


@dataclass
class Audit:
    """What was found. What could not be looked into keeps an audit from being clean: nobody knows what is in it."""

    findings: list[Finding] = field(default_factory=list)
    fenced: list[str] = field(default_factory=list)
    """Checkpoints that are closed, which is as it should be."""
    kept: list[str] = field(default_factory=list)
    """Updates that were kept on purpose: with the weights after them they give back the weights before."""
    unread: list[tuple[str, str]] = field(default_factory=list)
    """(path, why) of what was not looked into."""
    files: int = 0
    """How many were."""

    @property
    def clean(self) -> bool:
        """Whether nothing was found, and everything could be looked into."""
        return not self.findings and not self.unread


def audit(
    run: Path, texts: Sequence[str] = (), progress: Callable[[str, float], None] = lambda what, share: None
) -> Audit:
    """Look into every file under a run folder, not following links, for what its committed requests have forgotten, and
    for `texts` word by word. `progress` is told the file and the share done. Raises ForgottenError or GenerationError
    where nobody can tell what that is."""
    return _Auditor(run, texts, progress).audit()


class _Auditor:
    """One audit: what is searched for, and what was found so far."""

    def __init__(self, run: Path, texts: Sequence[str], progress: Callable[[str, float], None]) -> None:
        self.run, self.progress, self.found = run, progress, Audit()
        self.generation, requests = read_generation(run), read_forgotten(run)
        self.digests = {row.digest: request.generation for request in requests for row in request.rows}
        windows = [(request.generation, each) for request in requests for each in request.windows if len(each.hashes)]
        self.by_tokens = [(generation, each) for generation, each in windows if each.of == "tokens"]
        self.by_words = [(generation, each) for generation, each in windows if each.of == "words"]
        self.texts = Texts(texts)
        self.weights: Counter[tuple[Path, int | None, str]] = Counter()
        self.done, self.end, self.total = 0, 0, 0
        """Bytes: looked into, up to the end of the file that is looked into, and in all."""

    def audit(self) -> Audit:
        sizes = {path: path.lstat().st_size for path in self._walk(self.run, ())}
        self.total = sum(sizes.values())
        for path, size in sizes.items():
            self.end = self.done + size
            try:
                self._file(path)
                self.found.files += 1
            except OSError as error:
                self._unread(path, error.strerror or str(error))
            self._come_on(path, size)
        for (folder, said, how), count in self.weights.items():
            self._old_weights(folder, said, how, count)
        return self.found

    # ---- what there is ----

    def _walk(self, folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
        """Every file to look into. Of what is fenced, leads elsewhere or cannot be listed it tells."""
        if len(parts) == 3 and parts[0] == "requests" and parts[2] == UPDATE:
            self.found.kept.append(self._name(folder))
        if parts == (FENCED,) or (len(parts) == 3 and parts[0] == "requests" and parts[2] == FENCED):
            yield from self._fenced(folder, 0)
            return
        for path in self._listed(folder):
            if path.is_dir():
                yield from self._walk(path, (*parts, path.name))
            else:
                yield path

    def _fenced(self, folder: Path, depth: int) -> Iterator[Path]:
        """RUN/fenced/generation-G holds what is closed; beside it lies what tells of it."""
        for path in self._listed(folder):
            if not stat.S_IMODE(path.stat().st_mode):
                self.found.fenced.append(self._name(path))
            elif depth:
                self._find(path, "a fenced checkpoint that can be read", None, _CLOSED)
            elif path.is_dir():
                yield from self._fenced(path, depth + 1)
            else:
                yield path

    def _listed(self, folder: Path) -> list[Path]:
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            self._unread(folder, error.strerror or str(error))
            return []
        for path in paths:
            if path.is_symlink():
                self._unread(path, f"a link to {os.readlink(path)}, which is not followed")
            elif not path.is_dir() and not path.is_file():
                self._unread(path, "neither a file nor a folder")
        return [path for path in paths if not path.is_symlink() and (path.is_dir() or path.is_file())]

    # ---- what is in a file ----

    def _file(self, path: Path) -> None:
        if path.name.startswith(TOKENS):
            self._search_tokens(path)
        elif path.name.startswith("pytorch_model") or any(part in _WEIGHTS for part in path.suffixes):
            if self._name(path.parent) not in self.found.kept:
                self.weights[path.parent, *_said(path)] += 1
        else:
            if path.name.startswith((ROWS, DOCUMENTS)):
                self._search_rows(path)
            self._search_text(path)

    def _search_tokens(self, path: Path) -> None:
        for dtype in _dtypes(path):
            tokens, step = _tokens(path, dtype), _PIECE // dtype.itemsize
            places: list[list[int]] = [[] for _ in self.by_tokens]
            for start in range(0, len(tokens), step):
                for (_, windows), found in zip(self.by_tokens, places):
                    piece = windows.search(tokens[start : start + step + windows.size - 1])
                    found += (piece + start).tolist()
                self._come_on(path, step * dtype.itemsize)
            for (generation, windows), found in zip(self.by_tokens, places):
                if found:
                    what = f"{len(found)} windows of {windows.size} tokens of forgotten answers, the first: {found[0]}"
                    self._find(path, what, generation, "hashes of windows of tokens")

    def _search_rows(self, path: Path) -> None:
        """A row with a forgotten digest must be blank: no fields, and the same token throughout."""
        beside, tokens = path.with_name(TOKENS), np.zeros(0, np.uint16)
        if beside.is_file():
            tokens = _tokens(beside, _dtypes(beside)[0])
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                with suppress(WireError):
                    row = parse(line, path.name)
                    generation = self.digests.get(str(row.get("digest")))
                    if generation is not None and (left := _left_of(row, tokens)):
                        self._find(path, f"a forgotten row, in line {number}, has {left}", generation, "its digest")

    def _search_text(self, path: Path) -> None:
        with path.open("rb") as file:
            begins = file.read(8)
            if packed := next((name for magic, name in _PACKED.items() if begins.startswith(magic)), None):
                self._unread(path, f"packed by {packed}; what is in it was not searched")
                return
            file.seek(0)
            windows = [each for _, each in self.by_words]
            found = search_text(file, windows, self.texts, lambda num_bytes: self._come_on(path, num_bytes))
        for (generation, each), count in zip(self.by_words, found.windows):
            if count:
                what = f"{count} windows of {each.size} words of forgotten answers"
                self._find(path, what, generation, "hashes of windows of words")
        if found.texts:
            first = ", ".join(map(str, sorted(found.texts)[:5]))
            what = f"{len(found.texts)} of the given texts, the first by number (from 0): {first}"
            self._find(path, what, None, "word by word")

    def _old_weights(self, folder: Path, said: int | None, how: str, count: int) -> None:
        files = f"{count} file{'s' if count > 1 else ''} of weights"
        if said is None and self.generation:
            self._find(folder, f"{files} of no generation that can be read", None, how)
        elif said is not None and said < self.generation:
            what = f"{files} of generation {said}; the run is at generation {self.generation}"
            self._find(folder, what, said + 1, how)

    # ---- telling ----

    def _find(self, path: Path, what: str, generation: int | None, how: str) -> None:
        self.found.findings.append(Finding(self._name(path), what, generation, how))

    def _unread(self, path: Path, why: str) -> None:
        self.found.unread.append((self._name(path), why))

    def _come_on(self, path: Path, num_bytes: int) -> None:
        self.done = min(self.done + num_bytes, self.end)
        self.progress(self._name(path), self.done / max(1, self.total))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.run).as_posix()


def _dtypes(path: Path) -> list[np.dtype[Any]]:
    """Of a file of tokens; where nothing beside it says so, whatever it may be."""
    with suppress(WireError, OSError, TypeError):
        return [np.dtype(checked(parse(path.with_name(META).read_bytes(), META), META, dtype=str)["dtype"])]
    return [np.dtype(np.uint16), np.dtype(np.uint32)]


def _tokens(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """Mapped from the disk, as many as are whole."""
    count = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)


def _left_of(row: Mapping[str, Any], tokens: np.ndarray) -> str:
    """What is left of a row that should be blank; "" for nothing."""
    left = [] if row.get("fields") is None else ["fields"]
    start, end = row.get("start"), row.get("end")
    if type(start) is int and type(end) is int and len(np.unique(tokens[max(0, start) : max(0, end)])) > 1:
        left.append("tokens")
    return " and ".join(left)


def _said(path: Path) -> tuple[int | None, str]:
    """(generation, where it is said) of a file of weights; None where what should say it cannot be read."""
    folder = path.parent
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                if (said := (file.metadata() or {}).get("generation")) is not None:
                    return int(said), "the metadata of the file"
        if folder.name.startswith("step-"):
            return source(folder, read_manifest(folder)).generation, "its manifest"
        return checked(parse((folder / SAID).read_bytes(), SAID), SAID, generation=int)["generation"], SAID
    except FileNotFoundError:
        return 0, f"no {SAID}"
    except (CheckpointError, SafetensorError, WireError, OSError, TypeError, ValueError) as error:
        return None, str(error)
