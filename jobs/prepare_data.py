"""From the sources that the settings name to tokens in the run folder: of text, of rows, or of a mixture of several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from jobs.cache import Cache
from jobs.config import TrainConfig
from jobs.corpus import Corpus, documents
from jobs.data import META, TOKENS, Dataset
from jobs.documents import DOCUMENTS
from jobs.files import CorpusError
from jobs.mixture import MIXTURE, Mixture, Source, folder_of, sources_of
from jobs.prepare import HELD_OUT, Progress, prepare
from jobs.row_data import ROWS, RowDataset
from jobs.row_prepare import prepare_rows
from jobs.rows import Row, RowTexts, read_rows
from recovery.disk import write_flushed
from recovery.forgotten import forgotten_digests

Prepared = Dataset | RowDataset | Mixture
"""What samples are read from."""


@dataclass(frozen=True)
class Text:
    """What one `spec` names: its documents, and its rows if it is of rows."""

    corpus: Corpus
    rows: list[Row] | None

    @classmethod
    def read(cls, spec: str, text_field: str, tell: Callable[[str], None] = lambda line: None) -> Text:
        """Raises CorpusError."""
        rows = read_rows(spec)
        if rows is None:
            return cls(documents(spec, text_field=text_field, tell=tell), None)
        return cls(Corpus([RowTexts(rows)], spec, text_field), rows)


def open_data(folder: Path) -> Prepared:
    """What was prepared in a folder. Raises CorpusError."""
    if (folder / MIXTURE).is_file():
        return Mixture.open(folder)
    return RowDataset.open(folder) if (folder / ROWS).is_file() else Dataset.open(folder)


@dataclass(frozen=True)
class Preparation:
    """How text becomes tokens in a run. `accept` is given the fingerprint before anything changes that is there, and
    raises where it may not change."""

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    cache: Cache
    progress: Progress
    accept: Callable[[str], None]

    def run(self, text: Text) -> Prepared:
        """The data of the run. Raises CorpusError, and what `accept` does."""
        config, folder = self.config, self.config.out / "data"
        if sources := sources_of(config.data or ""):
            return self._mixture(sources, folder)
        limit, size = config.max_tokens or None, config.samples_per_step
        found = self._one(text, folder, limit, size, self.accept)
        for old in [*folder.glob("source-*"), folder / MIXTURE]:  # of a run whose data were a mixture before
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        return found

    def _mixture(self, sources: Sequence[Source], folder: Path) -> Mixture:
        config, window, old = self.config, sum(source.count for source in sources), _old(folder)
        same = old is not None and [s.count for s in old.sources] == [s.count for s in sources]
        if old is None or not same or old.seed != config.seed:
            self.accept("of another mixture")
            (folder / MIXTURE).unlink(missing_ok=True)
            old = None
        parts: list[Dataset | RowDataset] = []
        for number, source in enumerate(sources):
            had = None if old is None else old.parts[number].fingerprint

            def accept(fingerprint: str, had: str | None = had) -> None:
                if fingerprint != had:
                    self.accept(fingerprint)

            limit = max(1, config.max_tokens * source.count // window) if config.max_tokens else None
            text = Text.read(source.spec, config.text_field)
            parts.append(self._one(text, folder_of(folder, number), limit, 1, accept))
        found = Mixture(folder, tuple(sources), tuple(parts), config.seed)
        self.accept(found.fingerprint)
        write_flushed(folder / MIXTURE, (json.dumps(found.said, indent=1) + "\n").encode())
        for name in (META, TOKENS, DOCUMENTS, ROWS):  # of a run whose data were of one source before
            (folder / name).unlink(missing_ok=True)
        return found

    def _one(
        self, text: Text, folder: Path, max_tokens: int | None, samples: int, accept: Callable[[str], None]
    ) -> Dataset | RowDataset:
        config, forgotten = self.config, forgotten_digests(self.config.out)
        if text.rows is not None:
            return prepare_rows(
                text.rows, self.tokenizer, config.sequence_length, config.held_out or 0.0, folder, config.seed,
                pack=config.pack, samples_per_step=samples, forgotten=forgotten, progress=self.progress, accept=accept,
            )  # fmt: skip
        return prepare(
            text.corpus, self.tokenizer, config.sequence_length, config.held_out or HELD_OUT, folder, config.seed,
            max_tokens=max_tokens, samples_per_step=samples, progress=self.progress, accept=accept, cache=self.cache,
            forgotten=forgotten,
        )  # fmt: skip


def _old(folder: Path) -> Mixture | None:
    try:
        return Mixture.open(folder)
    except CorpusError:
        return None
