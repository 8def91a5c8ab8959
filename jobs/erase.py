"""A prepared dataset forgets rows, or documents of packed text.

To forget is to make blank: the tokens become end tokens, the fields go, and place, id and digest stay. What is erased
on disk and what is forgotten when the dataset is made leave the same bytes, so that a run over the one is a run over
the other.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.data import META, TOKENS
from jobs.dataset_files import ERASING, blank, write_lines, write_meta
from jobs.documents import DOCUMENTS, open_documents, read_documents
from jobs.files import CorpusError
from jobs.prepare import with_blank
from jobs.row_data import ROWS, RowDataset, RowInfo, read_infos
from jobs.row_prepare import fingerprint_of_rows
from recovery.disk import flush_folder


def erase(folder: Path, digests: Set[str]) -> int:
    """Make the rows or documents with these digests blank in a prepared dataset; returns how many have them, blank
    before or not.

    What is left is, byte for byte, what preparing the same with these and all that were erased before as `forgotten`
    makes, and it is on disk when this returns. After a crash in between, the dataset does not open until this is called
    again: with the same digests, to have them all erased. Raises CorpusError where there is no dataset, or where it
    cannot be written.
    """
    lines = DOCUMENTS if (folder / DOCUMENTS).is_file() else ROWS
    if (folder / META).exists() or not (folder / ERASING).exists():
        there = RowDataset.open(folder).rows if lines == ROWS else open_documents(folder)
        chosen = [each for each in there if each.digest in digests]
        if all(each.blank for each in chosen):
            (folder / ERASING).unlink(missing_ok=True)  # all was done but this
            return len(chosen)
    try:
        if (folder / META).exists():
            os.replace(folder / META, folder / ERASING)
            flush_folder(folder)
        meta = json.loads((folder / ERASING).read_text(encoding="utf-8"))
        infos = [replace(each, blank=each.blank or each.digest in digests) for each in _read(folder / lines, meta)]
        # first: whoever comes after a crash reads there what is to be blank
        write_lines(folder / f"{lines}.tmp", (each.line() for each in infos))
        os.replace(folder / f"{lines}.tmp", folder / lines)
        flush_folder(folder)
        write_meta(folder, _blanked(folder, lines, infos, meta))
        (folder / ERASING).unlink()
    except OSError as error:
        raise CorpusError(f"rows in {str(folder)!r} cannot be erased: {error.strerror}; erase them again") from error
    return sum(each.digest in digests for each in infos)


def erased_copy(folder: Path, into: Path, digests: Set[str]) -> Path:
    """A copy of a prepared dataset in which these are erased, in place of what lies there. Raises as `erase` does."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(folder, into)
    erase(into, digests)
    return into


def _read(path: Path, meta: Mapping[str, Any]) -> tuple[RowInfo, ...]:
    if path.name == ROWS:
        return read_infos(path, meta["held_out_share"], meta["seed"])
    return read_documents(path, meta["held_out_tokens"])


def _blanked(folder: Path, lines: str, infos: Sequence[RowInfo], meta: dict[str, Any]) -> dict[str, Any]:
    """Overwrite the tokens of what is blank; returns what meta.json is to say then."""
    if lines == DOCUMENTS:
        return with_blank(meta, infos, folder / TOKENS)
    blank(folder / TOKENS, [(each.start, each.end) for each in infos if each.blank], meta)
    return {**meta, "fingerprint": fingerprint_of_rows(folder / TOKENS, folder / ROWS, meta)}
