"""From text to a dataset on disk: documents are tokenised in the order of the seed and packed, once for each text.

Documents are taken in an order keyed by the seed, joined by the end token, and cut in two: the first share is held
out, the rest is trained on, so that the two never share a token. Of documents that the run has forgotten only the
places are left, in both: the bytes are those that jobs.erase leaves behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jobs import token_cache
from jobs.cache import Cache
from jobs.corpus import Corpus, permutation
from jobs.data import FORMAT, META, TOKENS, Dataset
from jobs.dataset_files import blank, publish, write_lines
from jobs.documents import DOCUMENTS, blank_spans, has_forgotten, infos_of, places_of
from jobs.files import CorpusError
from jobs.pieces import Texts, pieces
from jobs.row_data import RowInfo
from jobs.text_hashes import Letters, chain, document_digests, letters_of
from pipeline.model.rng import derive

HELD_OUT = 0.02
"""The share of a text that is held out unless another is asked for."""

Progress = Callable[[str, float], None]
"""(what is being done, share done from 0 to 1)."""


# ---- text to tokens ----


def blocks(texts: Texts, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Iterator[np.ndarray]:
    """Successive samples [sequence + 1] int64 of the texts, in order, joined by the end token, cut as in a Dataset."""
    left = np.zeros(0, dtype=np.int64)
    for index in range(len(texts)):
        for ids, _ in _encode(pieces(texts, index), tokenizer):
            left = np.concatenate([left, ids])
            while len(left) > sequence_length:
                yield left[: sequence_length + 1]
                left = left[sequence_length:]


def _encode(
    document: Iterable[tuple[str, float]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, float]]:
    """The tokens of the pieces of a document, the end token last, and the share of it that is done.

    Text that spells a special token is text. Blank documents have no tokens. One call per piece: a batched call would
    start a thread pool in a process that may fork.
    """
    begun, waiting = False, list[tuple[str, float]]()
    for piece in document:
        begun = begun or bool(piece[0].strip())
        waiting.append(piece)
        for text, share in waiting if begun else ():
            encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
            ids: list[int] = encoded["input_ids"]  # type: ignore[assignment]
            yield np.array([*ids, tokenizer.eos_token_id] if share == 1 else ids, dtype=np.int64), share
        if begun:
            waiting.clear()


# ---- tokens to disk ----


def prepare(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, sequence_length: int, held_out: float, folder: Path, seed: int,
    *, max_tokens: int | None = None, samples_per_step: int = 1, progress: Progress | None = None,
    accept: Callable[[str], None] | None = None, cache: Cache | None = None, forgotten: Set[str] = frozenset(),
) -> Dataset:  # fmt: skip
    """Tokenise `corpus` into `folder`, or re-use what is there if neither text nor settings changed; returns it opened.

    `held_out` is a share of the tokens, one sample at least. With `max_tokens`, documents are taken until there are
    that many. A held-out document that the training part has too, word for word, is dropped from the held-out part.
    Documents whose digest is in `forgotten` are blank. Without any, tokens that another run has made of the same text
    are copied from `cache`, and what is made is kept there.
    `accept` is given the fingerprint before anything in `folder` changes, and may raise.
    Raises CorpusError for text that cannot be read, for less than one global batch of `samples_per_step` samples, and
    for tokens that cannot be written; then nothing half-written is left.
    """
    report = progress or (lambda what, share: None)
    order = permutation(len(corpus), derive(seed, "data", "documents"))
    settings = {
        "documents": len(corpus), "tokenizer": _identity(tokenizer), "sequence_length": sequence_length,
        "held_out": held_out, "seed": seed, "max_tokens": max_tokens,
    }  # fmt: skip
    request = {"data": corpus.spec, "text_field": corpus.text_field, **settings}

    def require_batch(tokens: int, held: int) -> None:
        _require_batch(corpus.spec, tokens, held, sequence_length, samples_per_step)

    if not _is_current(folder, request, corpus, order, forgotten):
        cache = Cache() if forgotten else token_cache.usable(cache, tokenizer)
        key, unfinished = token_cache.key_of(settings), {name: folder / f"{name}.tmp" for name in (TOKENS, DOCUMENTS)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            cached = token_cache.take(cache, key, corpus, order, unfinished[TOKENS])
            meta, places = cached or _make(
                unfinished[TOKENS], corpus, order, tokenizer, settings, require_batch, report, forgotten
            )
            require_batch(meta["num_tokens"], meta["train_start"])
            infos, gone = infos_of(places, corpus, order, forgotten), list[RowInfo]()
            write_lines(unfinished[DOCUMENTS], (_line(info, gone) for info in infos))
            meta = with_blank(meta, gone, unfinished[TOKENS])
            if accept is not None:
                accept(meta["fingerprint"])
            if cached is None:
                token_cache.keep(cache, key, unfinished[TOKENS], meta, places)
                report("tokenising", 1.0)
            publish(unfinished, folder, {**meta, "request": request})
        except OSError as error:
            raise CorpusError(
                f"tokens cannot be written to {str(folder)!r}: {error.strerror}; {_free(folder)} bytes are free there"
            ) from error
        finally:
            for path in unfinished.values():
                path.unlink(missing_ok=True)
    dataset = Dataset.open(folder)
    if accept is not None:
        accept(dataset.fingerprint)
    require_batch(len(dataset.tokens), dataset.train_start)
    return dataset


def _make(
    path: Path, corpus: Corpus, order: np.ndarray, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any],
    require_batch: Callable[[int, int], None], report: Progress, forgotten: Set[str],
) -> tuple[dict[str, Any], np.ndarray]:  # fmt: skip
    """Write the tokens to `path`; returns what meta.json is to say about them, but for the request and what is blank,
    and where documents lie."""
    sequence_length, seed = settings["sequence_length"], settings["seed"]
    taken = _write(path, corpus, order, tokenizer, settings["max_tokens"], report, forgotten)
    held = max(sequence_length + 1, round(settings["held_out"] * taken.num_tokens))
    require_batch(taken.num_tokens, held)
    moved, kept = _drop_duplicates(path, taken, held)
    if kept <= sequence_length:
        raise CorpusError(
            f"data {corpus.spec!r} leaves {kept} tokens to hold out once documents that training has too are dropped; "
            f"needed: {sequence_length + 1}. Raise held_out, or remove the duplicates"
        )
    places = places_of(np.array(taken.starts), taken.num_tokens, taken.contents, held, moved)
    meta = {
        "format": FORMAT, "read": len(taken.digests), "text": chain(taken.digests), "dtype": taken.dtype.name,
        "num_tokens": taken.num_tokens, "held_out_tokens": kept, "train_start": held,
        "sequence_length": sequence_length, "seed": seed, "end_token": tokenizer.eos_token_id,
        "num_documents": len(places),
    }  # fmt: skip
    return meta, places


def with_blank(meta: Mapping[str, Any], documents: Sequence[RowInfo], tokens: Path) -> dict[str, Any]:
    """What meta.json is to say where some documents are blank, whose tokens are overwritten here. Raises OSError."""
    held, start = meta["held_out_tokens"], meta["train_start"]
    spans = blank_spans(documents, held, start)
    blank(tokens, spans, meta)
    fingerprint = _fingerprint(tokens, (held, start, meta["sequence_length"], meta["seed"]), spans)
    return {**meta, "blank": spans, "fingerprint": fingerprint}


def _line(info: RowInfo, gone: list[RowInfo]) -> str:
    """What tells of a document; it is noted where it is blank."""
    if info.blank:
        gone.append(info)
    return info.line()


def _require_batch(spec: str, tokens: int, held: int, sequence_length: int, samples_per_step: int) -> None:
    needed = samples_per_step * sequence_length + 1
    if tokens - held < needed:
        raise CorpusError(
            f"data {spec!r} has {tokens} tokens, {held} of them held out, so {max(0, tokens - held)} to train on; "
            f"needed: {needed}, one global batch of {samples_per_step} samples of sequence_length {sequence_length}. "
            "Lower microbatches, microbatch_size, sequence_length or held_out, raise max_tokens, or give more text"
        )


@dataclass
class _Taken:
    """What was tokenised, in order: where each document starts, a hash of its text to the letter, and its digest."""

    dtype: np.dtype[Any]
    num_tokens: int = 0
    starts: array[int] = field(default_factory=lambda: array("q"))
    digests: array[int] = field(default_factory=lambda: array("Q"))
    contents: list[bytes] = field(default_factory=list)


def _write(
    path: Path, corpus: Texts, order: np.ndarray, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None,
    report: Progress, forgotten: Set[str],
) -> _Taken:  # fmt: skip
    taken = _Taken(np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32))
    limit = max_tokens or sys.maxsize
    with path.open("wb") as file:
        for number, index in enumerate(order):
            taken.starts.append(taken.num_tokens)
            letters, content = document_digests(corpus, int(index))
            taken.digests.append(letters)
            taken.contents.append(bytes.fromhex(content))
            again = Letters()
            for ids, share in _encode(again.through(pieces(corpus, int(index))), tokenizer):
                ids = ids[: limit - taken.num_tokens]
                ids = np.full_like(ids, tokenizer.eos_token_id) if content in forgotten else ids
                file.write(ids.astype(taken.dtype).tobytes())  # tofile would hide the reason of a failure
                taken.num_tokens += len(ids)
                report("tokenising", 0.99 * max((number + share) / len(order), taken.num_tokens / limit))
                if taken.num_tokens == limit:
                    break
            else:
                if again.digest != letters:
                    raise CorpusError(f"document {index} of the data has changed while it was read; read it again")
            if taken.num_tokens == limit:
                break
        file.flush()
        os.fsync(file.fileno())
    return taken


def _drop_duplicates(path: Path, taken: _Taken, held: int) -> tuple[dict[int, int], int]:
    """Drop what training has too from the first `held` tokens; moves the rest to the start. Returns where each document
    that is kept begins there, by its number, and how many tokens are kept."""
    starts, digests = np.array(taken.starts), np.array(taken.digests)
    ends = np.append(starts[1:], taken.num_tokens)
    trained = digests[ends > held]
    drop = np.isin(digests, trained) & (starts < held)
    cut = (starts < held) & (ends > held)  # its two parts are of one document, which is no reason to drop the first
    drop[cut] = np.isin(digests[cut], digests[starts >= held])
    tokens = np.memmap(path, dtype=taken.dtype, mode="r+")
    kept, moved = 0, dict[int, int]()
    for number in np.flatnonzero((starts < held) & ~drop).tolist():
        start, moved[number] = int(starts[number]), kept
        size = min(int(ends[number]), held) - start
        if kept != start:
            tokens[kept : kept + size] = tokens[start : start + size].copy()
        kept += size
    tokens.flush()
    return moved, kept


def _is_current(
    folder: Path, request: dict[str, Any], corpus: Texts, order: np.ndarray, forgotten: Set[str]
) -> bool:  # fmt: skip
    """Whether `folder` holds the tokens of this request and of the text as it is now, which is read for that, and has
    forgotten this and no more."""
    try:
        Dataset.open(folder)
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["request"] != request or not has_forgotten(folder, forgotten):
            return False
    except CorpusError:
        return False
    return meta["text"] == chain(letters_of(corpus, int(i)) for i in order[: meta["read"]])


# ---- hashes ----


def text_fingerprint(dataset: Dataset) -> str:
    """What the fingerprint of a dataset is now, whatever its meta.json says. Raises OSError."""
    numbers = dataset.held_out_tokens, dataset.train_start, dataset.sequence_length, dataset.seed
    return _fingerprint(dataset.folder / TOKENS, numbers, dataset.blank)


def _fingerprint(path: Path, numbers: tuple[int, ...], blank: Iterable[tuple[int, int]]) -> str:
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "blake2b").hexdigest()
    numbers += tuple(number for span in blank for number in span)
    return hashlib.blake2b(f"{content} {numbers}".encode(), digest_size=8).hexdigest()


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a fast tokenizer does with text, or of a slow one's vocabulary; the same after save and load."""
    parts: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items()), "end": tokenizer.eos_token_id}
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        whole = json.loads(backend.to_str())
        parts |= {name: whole[name] for name in ("normalizer", "pre_tokenizer", "model")}
        parts["added"] = [token for token in whole["added_tokens"] if not token["special"]]  # special ones are text
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.is_dir() else 0
