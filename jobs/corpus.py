"""Text to train on: the Python standard library, files, globs, JSON lines, or a `datasets` name.

A corpus is a sequence of documents that are read when they are asked for, so that a job may take a shuffled part of a
corpus that is larger than memory. The standard library (12 MB of code and prose) is on every machine that runs this.
"""

from __future__ import annotations

import glob
import os
import sysconfig
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jobs.files import ALLOWED, CorpusError
from jobs.json_documents import field_text, open_json
from jobs.pieces import Texts, pieces
from jobs.text_file import TextFile

TEXT_FIELD = "text"
"""The field that holds the text unless another is asked for."""
_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class TextSource(Texts, Protocol):
    """The documents of one file or dataset."""

    has_fields: bool
    """Whether a document is one field of several, so that `text_field` says something."""

    @property
    def num_bytes(self) -> int | None:
        """What the documents take where they lie, which is no less than they are long; None if it is not known."""
        ...

    def about(self, index: int, /) -> tuple[str, Mapping[str, str]]:
        """What a document is called, and what else is known of it by name."""
        ...


def permutation(size: int, key: int) -> np.ndarray:
    """The numbers 0 to size - 1 [size] int64, shuffled by `key`.

    Sorted words of a Philox stream (Salmon et al.: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011): numpy keeps
    that stream the same in every version, which it does not promise of its own shuffles.
    """
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


class Corpus:
    """The documents of one or more sources, end to end. `corpus[i]` reads document i, and may raise CorpusError.

    `spec` and `text_field` are what was asked for.
    """

    def __init__(self, sources: Sequence[TextSource], spec: str, text_field: str) -> None:
        self.spec, self.text_field = spec, text_field
        self._sources = [source for source in sources if len(source)]
        self._ends = list(accumulate(map(len, self._sources)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int, /) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        source, place = self._place(index)
        return source[place]

    def pieces(self, index: int, /) -> Iterator[tuple[str, float]]:
        """See jobs.pieces."""
        source, place = self._place(index)
        return pieces(source, place)

    def about(self, index: int) -> tuple[str, Mapping[str, str]]:
        """What document `index` is called, such as the name of a module or PATH:LINE, and its fields."""
        source, place = self._place(index)
        return source.about(place)

    def _place(self, index: int) -> tuple[TextSource, int]:
        source = bisect_right(self._ends, index)
        return self._sources[source], index - (self._ends[source - 1] if source else 0)

    @property
    def most_tokens(self) -> int | None:
        """One for each byte, and one that ends each document; None if it is not known."""
        sizes = [source.num_bytes for source in self._sources]
        return None if None in sizes else sum(size or 0 for size in sizes) + len(self)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def documents(spec: str, *, text_field: str = TEXT_FIELD, tell: Callable[[str], None] = lambda line: None) -> Corpus:
    """The documents that `spec` names, in an order that does not depend on the machine. None may be blank, not all.

    `spec` is a list separated by commas of: `stdlib`; `hf:NAME`, `hf:NAME@CONFIG:SPLIT` for a dataset that `datasets`
    loads (a hub name or a folder; split train unless given); paths and globs. A file of JSON lines, or of one array,
    is known by its content (see jobs.json_documents) and has its texts in `text_field`; every other file is one
    document. Raises CorpusError for what is not there or empty, for a fault of a file of JSON, and for a `text_field`
    where nothing has fields; what is wrong inside another document is raised when that document is read. `tell` takes a
    line about files that may not have been meant to be text.
    """
    doubtful: list[str] = []
    parts = [spec] if os.path.isfile(os.path.expanduser(spec)) else [part.strip() for part in spec.split(",")]
    sources = [source for part in parts for source in _sources(part, text_field, doubtful.append)]
    if doubtful:
        others = f"; so are {len(doubtful) - 1:,} others" if len(doubtful) > 1 else ""
        tell(doubtful[0] + others)
    if text_field != TEXT_FIELD and not any(source.has_fields for source in sources):
        raise CorpusError(
            f"text_field is {text_field!r}, which has no effect: nothing in data {spec!r} has fields, it is all plain "
            "text; allowed: files of JSON objects (lines or an array) or hf:NAME as data, or no text_field"
        )
    corpus = Corpus(sources, spec, text_field)
    if not len(corpus):
        raise CorpusError(f"data is {spec!r}, which holds no text: every file is empty; allowed: {ALLOWED}")
    return corpus


def _sources(part: str, text_field: str, tell: Callable[[str], None]) -> list[TextSource]:
    if part == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return [TextFile(path, *_module(path.relative_to(root))) for path in standard_library()]
    if part.startswith("hf:"):
        return [_Rows(part, text_field)]
    opened = [(path, open_json(path, text_field, tell)) for path in _match(part)]
    return [TextFile(path) if found is None else found for path, found in opened]


def standard_library() -> list[Path]:
    """The sources of the running interpreter's library without its tests, by name. Raises CorpusError."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _NOT_LIBRARY]
        # _sysconfigdata tells how and where this interpreter was built, which is nobody else's text.
        paths += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    if not paths:
        raise CorpusError(f"data is 'stdlib', but {str(root)!r} holds no sources; allowed: {ALLOWED}")
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _module(path: Path) -> tuple[str, Mapping[str, str]]:
    """The dotted name of a module of the library, and its fields, by its path there."""
    parts = [*path.parts[:-1], *([] if path.stem == "__init__" else [path.stem])]
    return ".".join(parts), {"module": ".".join(parts), "package": parts[0], "file": path.as_posix()}


def _match(part: str) -> list[Path]:
    if not part:
        raise CorpusError(f"data names nothing between two commas, or nothing at all; allowed: {ALLOWED}")
    path = os.path.expanduser(part)  # os.path, which takes a name that no file can have for one that is not there
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        raise CorpusError(f"data is {part!r}, a folder; allowed: a glob, such as {os.path.join(path, '**', '*.txt')!r}")
    names = [] if "\0" in path else glob.glob(path, recursive=True)
    found = sorted(Path(name) for name in names if os.path.isfile(name))
    if not found:
        what = "which matches no file" if glob.has_magic(part) else "which does not exist"
        raise CorpusError(f"data is {part!r}, {what}; allowed: {ALLOWED}")
    return found


class _Rows:
    """A split of a dataset that the `datasets` library loads."""

    has_fields = True
    num_bytes = None

    def __init__(self, spec: str, field: str) -> None:
        import datasets  # slow to import, and most runs read files

        name, _, split = spec.removeprefix("hf:").partition(":")
        name, _, config = name.partition("@")
        split = split or "train"
        try:
            rows: Any = datasets.load_dataset(name, config or None, split=split)
        except Exception as error:  # the library has an error of its own for each of the many ways to be unavailable
            told = (str(error).strip() or "no reason given").splitlines()[0]
            raise CorpusError(
                f"data is {spec!r}, which `datasets` cannot load: {type(error).__name__}: {told}; allowed: {ALLOWED}"
            ) from error
        if field not in rows.column_names:
            found = ", ".join(rows.column_names)
            raise CorpusError(f"data is {spec!r}, which has no field {field!r}; allowed for text_field: {found}")
        self._rows, self._spec, self._field = rows, spec, field

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> str:
        return field_text(self._rows[index], self._field, f"{self._spec}, row {index}")

    def about(self, index: int, /) -> tuple[str, Mapping[str, str]]:
        return f"{self._spec}:{index}", {"data": self._spec, "row": str(index)}
