"""From rows to a dataset on disk. Rows that the run has forgotten are blank: the bytes are those that jobs.erase leaves
behind."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jobs.data import META, TOKENS
from jobs.dataset_files import publish, write_lines
from jobs.files import CorpusError
from jobs.prepare import Progress, _free, _identity
from jobs.row_data import FORMAT, ROWS, RowDataset, RowInfo, read_infos
from jobs.rows import Row
from jobs.templates import encode_row


@dataclass(frozen=True)
class Encoded:
    """A row as tokens, the end token last; `answer` is the place of the first one of its answer."""

    id: str
    digest: str
    ids: Sequence[int]
    answer: int
    fields: Mapping[str, str]

    @classmethod
    def of(cls, row: Row, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """Raises CorpusError for a row that the template refuses."""
        return cls(row.id, row.digest, *encode_row(row, tokenizer), row.fields)


def prepare_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, sequence_length: int, held_out_share: float, folder: Path,
    seed: int, *, pack: bool = False, samples_per_step: int = 1, forgotten: Set[str] = frozenset(),
    progress: Progress | None = None, accept: Callable[[str], None] | None = None,
) -> RowDataset:  # fmt: skip
    """Tokenise `rows` into `folder`, or re-use what is there if neither rows nor settings changed; returns it opened.

    `held_out_share` is a share of the rows, one at least; with 0 none is held out, and the held-out samples are those
    of training. Rows whose digest is in `forgotten` are blank. `accept` is given the fingerprint before anything in
    `folder` changes, and may raise.
    Raises CorpusError for a row that is longer than a sample or that the tokenizer's template refuses, for less than
    one global batch of `samples_per_step` samples, and for rows that cannot be written; then nothing half-written is
    left.
    """
    request = {
        "rows": _chain(rows), "tokenizer": _identity_of(tokenizer), "sequence_length": sequence_length,
        "held_out_share": held_out_share, "seed": seed, "pack": pack,
    }  # fmt: skip
    blank = forgotten & {row.digest for row in rows}
    if not _is_current(folder, request, blank):
        unfinished = {name: folder / f"{name}.tmp" for name in (TOKENS, ROWS)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            encoded, end_token = (Encoded.of(row, tokenizer) for row in rows), int(tokenizer.eos_token_id)  # type: ignore[arg-type]
            kept, report = (len(tokenizer), end_token), progress or (lambda what, share: None)
            meta = _write(unfinished, encoded, len(rows), *kept, request, blank, report)
            _require_batch(_described(folder, unfinished[ROWS], meta), samples_per_step)
            if accept is not None:
                accept(meta["fingerprint"])
            publish(unfinished, folder, meta)
        except OSError as error:
            raise _unwritten(folder, error) from error
        finally:
            for path in unfinished.values():
                path.unlink(missing_ok=True)
    dataset = RowDataset.open(folder)
    if accept is not None:
        accept(dataset.fingerprint)
    _require_batch(dataset, samples_per_step)
    return dataset


def write_encoded(
    rows: Sequence[Encoded], vocabulary: int, end_token: int, sequence_length: int, folder: Path, seed: int
) -> RowDataset:
    """Write rows that are tokens already to `folder`, none of them held out; returns the dataset opened. Raises
    CorpusError for a row that is longer than a sample, and for rows that cannot be written."""
    request = {"sequence_length": sequence_length, "held_out_share": 0.0, "seed": seed, "pack": False}
    unfinished = {name: folder / f"{name}.tmp" for name in (TOKENS, ROWS)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        meta = _write(
            unfinished, rows, len(rows), vocabulary, end_token, request, frozenset(), lambda what, share: None
        )
        publish(unfinished, folder, meta)
    except OSError as error:
        raise _unwritten(folder, error) from error
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
    return RowDataset.open(folder)


def _unwritten(folder: Path, error: OSError) -> CorpusError:
    return CorpusError(
        f"rows cannot be written to {str(folder)!r}: {error.strerror}; {_free(folder)} bytes are free there"
    )


# ---- rows to disk ----


def _write(
    paths: dict[str, Path], rows: Iterable[Encoded], count: int, vocabulary: int, end_token: int,
    request: dict[str, Any], blank: Set[str], report: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Write tokens and rows, `count` of them, to `paths`; returns what meta.json is to say about them."""
    dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
    infos, start = list[RowInfo](), 0
    too_long: list[tuple[str, int]] = []
    with paths[TOKENS].open("wb") as file:
        for index, row in enumerate(rows):
            ids, answer = row.ids, row.answer
            if len(ids) - 1 > request["sequence_length"]:
                too_long.append((row.id, len(ids)))
            forgotten, end = row.digest in blank, start + len(ids)
            file.write(np.array([end_token] * len(ids) if forgotten else ids, dtype).tobytes())
            infos.append(RowInfo(index, row.id, row.digest, start, start + answer, end, row.fields, blank=forgotten))
            start = end
            report("tokenising", 0.99 * (index + 1) / count)
        _require_fit(too_long, request["sequence_length"])
        file.flush()
        os.fsync(file.fileno())
    write_lines(paths[ROWS], (info.line() for info in infos))
    settings = {name: request[name] for name in ("sequence_length", "held_out_share", "seed", "pack")}
    meta = {
        "format": FORMAT, "dtype": dtype.name, "num_tokens": start, "num_rows": count, "end_token": end_token,
        **settings,
    }  # fmt: skip
    report("tokenising", 1.0)
    return {**meta, "fingerprint": fingerprint_of_rows(paths[TOKENS], paths[ROWS], meta), "request": request}


def _is_current(folder: Path, request: dict[str, Any], blank: Set[str]) -> bool:
    """Whether `folder` holds what is asked for, and has forgotten this and no more."""
    try:
        dataset = RowDataset.open(folder)
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except CorpusError:
        return False
    return meta["request"] == request and {row.digest for row in dataset.rows if row.blank} == blank


# ---- what is refused ----


def _require_fit(too_long: Sequence[tuple[str, int]], sequence_length: int) -> None:
    if too_long:
        id, length = too_long[0]
        others = f", and {len(too_long) - 1:,} other rows are too long" if len(too_long) > 1 else ""
        longest = max(length for _, length in too_long)
        raise CorpusError(
            f"row {id!r} has {length} tokens{others}; sequence_length {sequence_length} allows {sequence_length + 1}. "
            f"Set --sequence-length to {longest - 1} or more, or leave them out"
        )


def _require_batch(dataset: RowDataset, samples_per_step: int) -> None:
    if dataset.num_train < samples_per_step:
        held = sum(row.held_out for row in dataset.rows)
        raise CorpusError(
            f"there are {len(dataset.rows)} rows, {held} of them held out, so {dataset.num_train} samples to train on; "
            f"needed: {samples_per_step}, one global batch. Lower microbatches, microbatch_size or held_out, or give "
            "more rows"
        )


def _described(folder: Path, lines: Path, meta: dict[str, Any]) -> RowDataset:
    """The dataset before it is there: what it is made of can be asked, and no sample read."""
    rows = read_infos(lines, meta["held_out_share"], meta["seed"])
    names = ("end_token", "sequence_length", "held_out_share", "seed", "pack", "fingerprint")
    return RowDataset(folder, np.zeros(0, np.uint16), rows, **{name: meta[name] for name in names})


# ---- hashes ----


def _chain(rows: Sequence[Row]) -> str:
    """A hash of all that the rows say, to the letter."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps([row.id, row.prompt, row.answer, dict(row.fields)]).encode() + b"\n")
    return digest.hexdigest()


def _identity_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer makes of rows: of text, and of the special tokens that its template writes."""
    added = sorted((id, token.content) for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    parts = [_identity(tokenizer), tokenizer.chat_template, added]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def row_fingerprint(folder: Path) -> str:
    """What the fingerprint of a prepared folder is now, whatever its meta.json says. Raises OSError."""
    return fingerprint_of_rows(folder / TOKENS, folder / ROWS, json.loads((folder / META).read_text(encoding="utf-8")))


def fingerprint_of_rows(tokens: Path, lines: Path, meta: Mapping[str, Any]) -> str:
    """A hash of everything that decides what sample i is. Raises OSError."""
    parts = [meta[name] for name in ("end_token", "sequence_length", "held_out_share", "seed", "pack")]
    for path in (tokens, lines):
        with path.open("rb") as file:
            parts.append(hashlib.file_digest(file, "blake2b").hexdigest())
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()
