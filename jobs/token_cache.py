"""Tokens in the user's cache (jobs.cache): found by the text that they were made of, and removed when it is forgotten.

An entry is the tokens of a text under some settings and, after them, where its documents lie. So whoever takes it can
name them, and a document that a run forgets is found in every entry that has it, whatever the settings were.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Set
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from jobs.cache import Cache
from jobs.data import FORMAT
from jobs.documents import PLACES, digests_of
from jobs.pieces import Texts
from jobs.text_hashes import chain, letters_of

_KIND = "tokens"
_WITH_PLACES = 1


def usable(cache: Cache | None, tokenizer: PreTrainedTokenizerBase) -> Cache:
    """The cache, if the tokenizer's identity says all that it does: a slow one's is its vocabulary alone."""
    return Cache() if cache is None or getattr(tokenizer, "backend_tokenizer", None) is None else cache


def key_of(settings: dict[str, Any]) -> str:
    """How the keys of all texts under these settings begin; the number of documents read and their hash follow."""
    values = {**settings, "format": FORMAT, "places": _WITH_PLACES, "tokenizers": tokenizers.__version__}
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def take(
    cache: Cache, key: str, corpus: Texts, order: np.ndarray, path: Path
) -> tuple[dict[str, Any], np.ndarray] | None:
    """Write to `path` the tokens that were made of this text before; returns what meta.json says and where documents
    lie, None without any.

    No more of the corpus is read than those who made such tokens have read of theirs.
    """
    digests = array("Q")
    names = [re.fullmatch(rf"{key}-(\d+)-[0-9a-f]+", name) for name in cache.keys(_KIND, key)]
    reads = {name[0]: int(name[1]) for name in names if name is not None}
    for name in sorted(reads, key=lambda name: reads[name]):
        digests.extend(letters_of(corpus, int(index)) for index in order[len(digests) : reads[name]])
        if name == f"{key}-{reads[name]}-{chain(digests)}":
            with path.open("w+b") as file:
                meta = cache.take(_KIND, name, file)
                if meta is not None:
                    places = _places(file, meta)
                    file.truncate(file.seek(0, os.SEEK_END) - places.nbytes)
                    return meta, places
    return None


def keep(cache: Cache, key: str, path: Path, meta: dict[str, Any], places: np.ndarray) -> None:
    """Keep the tokens in `path`, of which meta.json says `meta`, for other runs. The file is as it was, afterwards."""
    if cache.folder is None:
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        try:
            file.write(places.tobytes())
            file.flush()
            cache.put(_KIND, f"{key}-{meta['read']}-{meta['text']}", meta, file)
        except OSError as error:
            cache.tell(f"tokens not kept in the cache {str(cache.folder)!r}: {error.strerror}")
        finally:
            file.truncate(size)


def forget(cache: Cache, digests: Set[str]) -> list[Path]:
    """Take every entry out of the cache that has one of these documents, or does not tell which it has."""

    def has_one(meta: dict[str, Any], file: BinaryIO) -> bool:
        return not digests.isdisjoint(digests_of(_places(file, meta)))

    return cache.remove(_KIND, has_one)


def _places(file: BinaryIO, meta: dict[str, Any]) -> np.ndarray:
    """Where documents lie, from the end of an entry. Raises KeyError, ValueError or OSError where it does not tell."""
    file.seek(-int(meta["num_documents"]) * PLACES.itemsize, os.SEEK_END)
    return np.frombuffer(file.read(), PLACES)
