"""Packed tokens on disk, cut into samples, in an order that is a pure function of the seed.

Documents are taken in an order keyed by the seed, joined by the end token, and cut in two: the first share is held
out, the rest is trained on, so that the two never share a token. Training samples have global ids 0, 1, 2, ... without
end: id i is position i % n of epoch i // n, whose order is a permutation keyed by (seed, epoch). So a position in the
data is one number, whoever reads it, and resuming is exact.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jobs.corpus import CorpusError, Texts, documents, permutation
from pipeline.rng import derive

_TOKENS, _META, _FORMAT = "tokens.bin", "meta.json", 1
_PIECE = 1 << 20

Progress = Callable[[str, float], None]
"""(what is being done, share done from 0 to 1)."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Tokens of one corpus under one tokenizer, mapped from disk: the held-out part, then the training part.

    A sample is `sequence_length` + 1 tokens and begins where the one before it in the same part has its last token, so
    that every token but the first is predicted once. Pickled, it is the path, opened anew on the other side.
    """

    folder: Path
    tokens: np.ndarray
    """[tokens], uint16 or uint32."""
    held_out_tokens: int
    train_start: int
    sequence_length: int
    seed: int
    fingerprint: str
    """A hash of everything that decides what sample i is."""
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """The dataset that `prepare` wrote. Raises CorpusError when it is not there or not whole."""
        try:
            meta = json.loads((folder / _META).read_text(encoding="utf-8"))
            if meta["format"] != _FORMAT:
                raise ValueError(f"format {meta['format']}; allowed: {_FORMAT}")
            tokens = np.memmap(folder / _TOKENS, dtype=meta["dtype"], mode="r")
            if len(tokens) != meta["num_tokens"]:
                raise ValueError(f"{_TOKENS} has {len(tokens)} tokens; {_META} says {meta['num_tokens']}")
            return cls(folder, tokens, **{name: meta[name] for name in _FIELDS})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{str(folder)!r} holds no prepared tokens: {error}; delete it to make them anew"
            ) from error

    @property
    def num_train(self) -> int:
        """Training samples of one epoch."""
        return _num_samples(len(self.tokens) - self.train_start, self.sequence_length)

    @property
    def num_held_out(self) -> int:
        """Samples that are never trained on."""
        return _num_samples(self.held_out_tokens, self.sequence_length)

    def train_sample(self, sample: int) -> np.ndarray:
        """Tokens [sequence + 1] int64 of training sample `sample` >= 0; ids go on over epochs. Raises IndexError."""
        if sample < 0:
            raise IndexError(f"training sample {sample}; allowed: 0 or more")
        epoch, position = divmod(sample, self.num_train)
        if epoch not in self._epochs:
            for old in [number for number in self._epochs if abs(number - epoch) > 1]:
                self._epochs.pop(old, None)  # a step may straddle two epochs, so two are kept
            self._epochs[epoch] = permutation(self.num_train, derive(self.seed, "data", "epoch", epoch))
        return self._cut(self.train_start, int(self._epochs[epoch][position]))

    def held_out_sample(self, sample: int) -> np.ndarray:
        """Tokens [sequence + 1] int64 of held-out sample 0 <= `sample` < num_held_out. Raises IndexError."""
        if not 0 <= sample < self.num_held_out:
            raise IndexError(f"held-out sample {sample}; allowed: 0 to {self.num_held_out - 1}")
        return self._cut(0, sample)

    def held_out_spread(self, count: int) -> Callable[[int], np.ndarray]:
        """Sample i of `count` held-out ones, evenly spread: neighbours come from one document, and tell of it alone."""
        return lambda sample: self.held_out_sample(sample * self.num_held_out // count)

    def _cut(self, start: int, sample: int) -> np.ndarray:
        start += sample * self.sequence_length
        return self.tokens[start : start + self.sequence_length + 1].astype(np.int64)

    def __reduce__(self) -> tuple[Callable[[Path], Dataset], tuple[Path]]:
        return Dataset.open, (self.folder,)


_FIELDS = ("held_out_tokens", "train_start", "sequence_length", "seed", "fingerprint")


def _num_samples(tokens: int, sequence_length: int) -> int:
    return max(0, tokens - 1) // sequence_length


# ---- text to tokens ----


def blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Iterator[np.ndarray]:
    """Successive samples [sequence + 1] int64 of the texts, in order, joined by the end token, cut as in a Dataset."""
    left = np.zeros(0, dtype=np.int64)
    for text in texts:
        for ids, _ in _encode(text, tokenizer):
            left = np.concatenate([left, ids])
            while len(left) > sequence_length:
                yield left[: sequence_length + 1]
                left = left[sequence_length:]


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[np.ndarray, float]]:
    """The tokens of a document, the end token last, in pieces of about a megabyte, and the share of it that is done.

    Text that spells a special token is text. Blank documents have no tokens. One call per piece: a batched call would
    start a thread pool in a process that may fork.
    """
    start = 0 if text.strip() else len(text)
    while start < len(text):
        end = start + _PIECE
        end = len(text) if end >= len(text) else (text.rfind("\n", start, end) + 1 or end)
        encoded = tokenizer(text[start:end], add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[int] = encoded["input_ids"]  # type: ignore[assignment]
        start = end
        yield np.array([*ids, tokenizer.eos_token_id] if end == len(text) else ids, dtype=np.int64), end / len(text)


# ---- tokens to disk ----


def prepare(
    spec: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int, held_out: float, folder: Path, seed: int, *,
    max_tokens: int | None = None, text_field: str = "text", samples_per_step: int = 1,
    progress: Progress | None = None, accept: Callable[[str], None] | None = None,
) -> Dataset:  # fmt: skip
    """Tokenise `spec` into `folder`, or re-use what is there if neither text nor settings changed; returns it opened.

    `held_out` is a share of the tokens, one sample at least. With `max_tokens`, documents are taken until there are
    that many. A held-out document that the training part has too, word for word, is dropped from the held-out part.
    `accept` is given the fingerprint before anything in `folder` changes, and may raise.
    Raises CorpusError for text that cannot be read, for less than one global batch of `samples_per_step` samples, and
    for tokens that cannot be written; then nothing half-written is left.
    """
    report = progress or (lambda what, share: None)
    corpus = documents(spec, text_field=text_field)
    order = permutation(len(corpus), derive(seed, "data", "documents"))
    request = {
        "data": spec, "text_field": text_field, "documents": len(corpus), "tokenizer": _identity(tokenizer),
        "sequence_length": sequence_length, "held_out": held_out, "seed": seed, "max_tokens": max_tokens,
    }  # fmt: skip
    if not _is_current(folder, request, corpus, order):
        unfinished = folder / f"{_TOKENS}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            taken = _write(unfinished, corpus, order, tokenizer, max_tokens, report)
            held = max(sequence_length + 1, round(held_out * taken.num_tokens))
            _require_batch(spec, taken.num_tokens, held, sequence_length, samples_per_step)
            kept = _drop_duplicates(unfinished, taken, held)
            if kept <= sequence_length:
                raise CorpusError(
                    f"data {spec!r} leaves {kept} tokens to hold out once documents that training has too are dropped; "
                    f"needed: {sequence_length + 1}. Raise held_out, or remove the duplicates"
                )
            meta = {
                "format": _FORMAT, "request": request, "read": len(taken.digests), "text": _chain(taken.digests),
                "dtype": taken.dtype.name, "num_tokens": taken.num_tokens, "held_out_tokens": kept,
                "train_start": held, "sequence_length": sequence_length, "seed": seed,
                "fingerprint": _fingerprint(unfinished, kept, held, sequence_length, seed),
            }  # fmt: skip
            if accept is not None:
                accept(meta["fingerprint"])
            _publish(unfinished, folder, meta)
        except OSError as error:
            raise CorpusError(
                f"tokens cannot be written to {str(folder)!r}: {error.strerror}; {_free(folder)} bytes are free there"
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)
    dataset = Dataset.open(folder)
    if accept is not None:
        accept(dataset.fingerprint)
    _require_batch(spec, len(dataset.tokens), dataset.train_start, sequence_length, samples_per_step)
    report("tokenising", 1.0)
    return dataset


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
    """What was tokenised, in order: where each document starts, and a digest of its text."""

    dtype: np.dtype[Any]
    num_tokens: int = 0
    starts: array[int] = field(default_factory=lambda: array("q"))
    digests: array[int] = field(default_factory=lambda: array("Q"))


def _write(
    path: Path, corpus: Texts, order: np.ndarray, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None,
    report: Progress,
) -> _Taken:  # fmt: skip
    taken = _Taken(np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32))
    limit = max_tokens or sys.maxsize
    with path.open("wb") as file:
        for number, index in enumerate(order):
            text = corpus[int(index)]
            taken.starts.append(taken.num_tokens)
            taken.digests.append(_digest(text))
            for ids, share in _encode(text, tokenizer):
                ids = ids[: limit - taken.num_tokens]
                file.write(ids.astype(taken.dtype).tobytes())  # tofile would hide the reason of a failure
                taken.num_tokens += len(ids)
                report("tokenising", 0.99 * max((number + share) / len(order), taken.num_tokens / limit))
                if taken.num_tokens == limit:
                    break
            if taken.num_tokens == limit:
                break
        file.flush()
        os.fsync(file.fileno())
    return taken


def _drop_duplicates(path: Path, taken: _Taken, held: int) -> int:
    """Drop what training has too from the first `held` tokens; moves the rest to the start, returns their number."""
    starts, digests = np.array(taken.starts), np.array(taken.digests)
    ends = np.append(starts[1:], taken.num_tokens)
    trained = digests[ends > held]
    drop = np.isin(digests, trained) & (starts < held)
    cut = (starts < held) & (ends > held)  # its two parts are of one document, which is no reason to drop the first
    drop[cut] = np.isin(digests[cut], digests[starts >= held])
    tokens = np.memmap(path, dtype=taken.dtype, mode="r+")
    kept = 0
    for start, end in zip(starts[(starts < held) & ~drop], ends[(starts < held) & ~drop], strict=True):
        size = min(end, held) - start
        if kept != start:
            tokens[kept : kept + size] = tokens[start : start + size].copy()
        kept += int(size)
    tokens.flush()
    return kept


def _publish(unfinished: Path, folder: Path, meta: dict[str, Any]) -> None:
    """A folder without meta.json does not count: it goes first and comes last."""
    (folder / _META).unlink(missing_ok=True)
    os.replace(unfinished, folder / _TOKENS)
    temporary = folder / f"{_META}.tmp"
    try:
        temporary.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, folder / _META)
    finally:
        temporary.unlink(missing_ok=True)


def _is_current(folder: Path, request: dict[str, Any], corpus: Texts, order: np.ndarray) -> bool:
    """Whether `folder` holds the tokens of this request and of the text as it is now, which is read for that."""
    try:
        Dataset.open(folder)
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    except CorpusError:
        return False
    return meta["request"] == request and meta["text"] == _chain(_digest(corpus[int(i)]) for i in order[: meta["read"]])


# ---- hashes ----


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _chain(digests: Iterable[int]) -> str:
    return hashlib.blake2b(array("Q", digests).tobytes(), digest_size=16).hexdigest()


def _fingerprint(path: Path, *numbers: int) -> str:
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "blake2b").hexdigest()
    return hashlib.blake2b(f"{content} {numbers}".encode(), digest_size=8).hexdigest()


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a fast tokenizer does with text, or of a slow one's vocabulary; the same after save and load."""
    parts: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items()), "end": tokenizer.eos_token_id}
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        whole = json.loads(backend.to_str())
        parts |= {name: whole[name] for name in ("normalizer", "pre_tokenizer", "model")}
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.is_dir() else 0
