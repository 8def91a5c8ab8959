"""What a run forgets from: rows, or the documents of packed text. All that a request needs of either is here.

What is forgotten is a row, as a whole; what a model is given of it are its parts, each a sample of its own. A row of
questions and answers is one part; a document has as many as it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from jobs.files import CorpusError
from jobs.mixture import MIXTURE
from jobs.row_data import ROWS, RowDataset, RowInfo, Said, Sample
from jobs.text_rows import TextRows


class Forgettable(Protocol):
    """Rows by index, and their parts, numbered through."""

    noun: ClassVar[str]
    """What a row is called."""
    questions: ClassVar[bool]
    """Whether a row has a question, which could be answered otherwise."""

    @property
    def rows(self) -> Sequence[RowInfo]: ...

    @property
    def tokens(self) -> np.ndarray:
        """[tokens], those of a row from its start to its end."""
        ...

    @property
    def fingerprint(self) -> str: ...

    # ---- names ----

    def named(self, name: str, /) -> list[int]:
        """The rows that a name means; none where it means none."""
        ...

    @property
    def names(self) -> set[str]:
        """What may be named."""
        ...

    def read(self, path: Path, /) -> Sequence[Said] | None:
        """The rows in a file, to be known again by their content; None where it is one of names, one on each line.
        Raises CorpusError."""
        ...

    # ---- parts ----

    def parts(self, row: int, /) -> Sequence[int]: ...

    def row(self, part: int, /) -> Sample:
        """One part, alone."""
        ...

    # ---- samples of training ----

    @property
    def num_train(self) -> int:
        """Training samples of an epoch, by the place at which each lies."""
        ...

    def place_of(self, sample: int, /) -> int:
        """Where a sample lies, by its global id."""
        ...

    def rows_at(self, place: int, /) -> Sequence[int]:
        """The rows that have labels in the sample at a place."""
        ...

    def parts_at(self, place: int, /) -> Sequence[int]:
        """The parts that have labels there."""
        ...


def open_forgettable(folder: Path) -> Forgettable:
    """The rows, or the documents, of a prepared dataset. Raises CorpusError."""
    if (folder / MIXTURE).is_file():
        raise CorpusError(
            f"{str(folder)!r} holds a mixture of several sources, of which nothing can be forgotten yet; allowed: a "
            "run whose data have no weights"
        )
    return RowDataset.open(folder) if (folder / ROWS).is_file() else TextRows.open(folder)
