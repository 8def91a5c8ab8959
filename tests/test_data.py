"""The order of the data: keyed by the seed, one integer, the same everywhere; and a cache that is whole or absent."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from jobs.corpus import CorpusError, documents
from jobs.data import Dataset
from jobs.prepare import blocks, prepare
from jobs.tokenizer import build_tokenizer

BYTES = build_tokenizer("bytes", 0, ())
END = 256
LENGTH = 8


def corpus(folder: Path, count: int = 60, size: int = 40) -> str:
    """A JSONL corpus: document d is `size` bytes, each of them d + 32 and so known by its tokens."""
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": chr(32 + d) * size + "."}) + "\n" for d in range(count)))
    return str(path)


def make(folder: Path, spec: str | None = None, **changes: Any) -> Dataset:
    settings: dict[str, Any] = {
        "corpus": documents(spec or corpus(folder)), "tokenizer": BYTES, "sequence_length": LENGTH, "held_out": 0.1,
        "folder": folder / "data", "seed": 0, "samples_per_step": 4,
    }  # fmt: skip
    return prepare(**(settings | changes))


def train_tokens(dataset: Dataset) -> np.ndarray:
    """Every training token, put together from one epoch's samples in the order of the file."""
    samples = sorted((dataset.train_sample(i) for i in range(dataset.num_train)), key=lambda s: s.tobytes())
    return np.concatenate(samples)


def fingerprints(tmp_path: Path, **changes: Any) -> str:
    return make(tmp_path, **changes).fingerprint


# ---- samples ----


def test_every_token_is_kept_once_and_documents_end(tmp_path: Path):
    dataset = make(tmp_path)
    tokens = np.asarray(dataset.tokens)
    assert len(tokens) == 60 * 42
    texts = [bytes(part.astype(np.uint8)).decode() for part in np.split(tokens, np.flatnonzero(tokens == END) + 1)]
    assert sorted(text[:-1] for text in texts if text) == sorted(documents(corpus(tmp_path)))
    assert [text[0] for text in texts if text] != sorted(text[0] for text in texts if text)  # shuffled


def test_samples_are_windows_that_predict_each_token_once(tmp_path: Path):
    dataset = make(tmp_path)
    part = np.asarray(dataset.tokens[dataset.train_start :]).astype(np.int64)
    assert dataset.num_train == (len(part) - 1) // LENGTH
    samples = [dataset.train_sample(i) for i in range(dataset.num_train)]
    assert {(s.dtype, s.shape) for s in samples} == {(np.dtype(np.int64), (LENGTH + 1,))}
    predicted = [part[1 + i * LENGTH : 1 + (i + 1) * LENGTH].tobytes() for i in range(dataset.num_train)]
    assert Counter(s[1:].tobytes() for s in samples) == Counter(predicted)


def test_training_and_held_out_share_no_token(tmp_path: Path):
    for fraction in (0.02, 0.1, 0.5):
        dataset = make(tmp_path, held_out=fraction)
        held = np.concatenate([dataset.held_out_sample(i) for i in range(dataset.num_held_out)])
        assert dataset.held_out_tokens == round(fraction * 60 * 42)
        assert dataset.train_start == dataset.held_out_tokens
        train = np.concatenate([dataset.train_sample(i) for i in range(dataset.num_train)])
        both = (set(held.tolist()) & set(train.tolist())) - {END, ord(".")}
        assert len(both) <= 1  # the one document that is cut in two


def test_one_document_is_cut_at_its_own_tokens(tmp_path: Path):
    text = "".join(chr(33 + i % 90) for i in range(3000))
    (tmp_path / "one.txt").write_text(text)
    dataset = make(tmp_path, str(tmp_path / "one.txt"))
    assert bytes(np.asarray(dataset.tokens[:-1]).astype(np.uint8)).decode() == text
    assert (dataset.held_out_tokens, dataset.train_start) == (300, 300)


def test_what_training_has_too_is_not_held_out(tmp_path: Path):
    path = tmp_path / "twice.jsonl"
    rows = [chr(32 + d % 30) * 40 + "." for d in range(60)]  # every document twice
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    for seed in range(5):
        dataset = make(tmp_path, str(path), seed=seed, held_out=0.5)
        held = {int(t) for i in range(dataset.num_held_out) for t in dataset.held_out_sample(i)} - {END, ord(".")}
        train = {int(t) for i in range(dataset.num_train) for t in dataset.train_sample(i)} - {END, ord(".")}
        assert held
        assert len(held & train) <= 1  # the document that is cut, if its twin is not in training
        assert dataset.train_start == 30 * 42
        assert dataset.held_out_tokens < dataset.train_start
    path.write_text(
        json.dumps({"text": "the same " * 9}) + "\n" + "".join([json.dumps({"text": "same" * 20}) + "\n"] * 60)
    )
    with pytest.raises(CorpusError, match=r"leaves 0 tokens to hold out .* Raise held_out, or remove the duplicates"):
        make(tmp_path, str(path), seed=3)


def test_epochs_are_different_orders_of_the_same_samples(tmp_path: Path):
    dataset = make(tmp_path)
    n = dataset.num_train
    epochs = [[dataset.train_sample(e * n + i).tobytes() for i in range(n)] for e in range(3)]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    far = 10**6 * n + 3
    assert dataset.train_sample(far).tobytes() in epochs[0]


def test_any_position_can_be_asked_for_at_once(tmp_path: Path):
    dataset = make(tmp_path)
    n = dataset.num_train
    ids = [5 * n + 3, 0, 5 * n - 1, 5 * n, 2 * n + 1, 5 * n + 3, n - 1]
    expected = [make(tmp_path).train_sample(i) for i in ids]
    for sample, want in zip(ids, expected, strict=True):
        assert (dataset.train_sample(sample) == want).all()
    assert len(dataset._epochs) <= 3
    for wrong in (-1, dataset.num_held_out):
        with pytest.raises(IndexError, match=f"held-out sample {wrong}; allowed: 0 to"):
            dataset.held_out_sample(wrong)
    with pytest.raises(IndexError, match="training sample -1"):
        dataset.train_sample(-1)


def test_another_process_sees_the_same_samples(tmp_path: Path):
    dataset = make(tmp_path)
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 1000  # a path, not the tokens
    assert isinstance(copy.tokens, np.memmap)
    program = (
        "import sys; from pathlib import Path; from jobs.data import Dataset\n"
        "d = Dataset.open(Path(sys.argv[1])); print([d.train_sample(i).tolist() for i in (0, 7, 5000)])"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, str(dataset.folder)], capture_output=True, text=True, check=True
    )
    for samples in (json.loads(other.stdout), [copy.train_sample(i).tolist() for i in (0, 7, 5000)]):
        assert samples == [dataset.train_sample(i).tolist() for i in (0, 7, 5000)]


def test_the_seed_decides_split_and_order(tmp_path: Path):
    same, other = make(tmp_path), make(tmp_path, seed=1)
    assert (same.held_out_sample(0) != other.held_out_sample(0)).any()
    again = make(tmp_path)
    assert same.fingerprint == again.fingerprint != other.fingerprint
    assert (same.train_sample(11) == again.train_sample(11)).all()


def test_max_tokens_takes_part_of_the_whole_corpus(tmp_path: Path):
    dataset = make(tmp_path, max_tokens=1000)
    assert len(dataset.tokens) == 1000
    seen = set(np.asarray(dataset.tokens).tolist()) - {END, ord(".")}
    assert max(seen) > 32 + 50  # not the first 24 of 60 documents
    assert min(seen) < 32 + 10


def test_large_vocabularies_need_four_bytes(tmp_path: Path):
    class Large:
        eos_token_id = 70_000

        def __len__(self) -> int:
            return 70_001

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [60_000 + ord(c) for c in text]}

        def get_vocab(self) -> dict[str, int]:
            return {}

    dataset = make(tmp_path, tokenizer=Large())
    assert dataset.tokens.dtype == np.uint32
    assert make(tmp_path).tokens.dtype == np.uint16
    assert int(dataset.tokens.max()) == 70_000


def test_text_that_spells_a_special_token_is_text(tmp_path: Path):
    (tmp_path / "spell.txt").write_text("a<|endoftext|>b" * 100)
    dataset = make(tmp_path, str(tmp_path / "spell.txt"))
    assert (np.asarray(dataset.tokens) == END).sum() == 1


def test_long_documents_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jobs.pieces.PIECE", 50)
    monkeypatch.setattr("jobs.text_file.PIECE", 50)
    text = "".join(f"line {i} {'é' * (i % 70)}\n" for i in range(200)) + "x" * 170
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    pieces: list[int] = []

    class Counting:
        eos_token_id = END

        def __len__(self) -> int:
            return 258

        def __call__(self, text: str, **how: Any) -> Any:
            pieces.append(len(text))
            return BYTES(text, **how)

        def get_vocab(self) -> dict[str, int]:
            return {}

    dataset = make(tmp_path, str(tmp_path / "long.txt"), tokenizer=Counting())
    assert bytes(np.asarray(dataset.tokens[:-1]).astype(np.uint8)).decode() == text
    assert max(pieces) == 50
    assert dataset.tokens[-1] == END


def test_blocks_are_the_samples_of_texts_in_order():
    found = list(blocks(["abcdef", " \n", "ghij"], BYTES, 4))
    assert [f.tolist() for f in found] == [[*b"abcde"], [*b"ef", END, *b"gh"]]
    assert {f.dtype for f in found} == {np.dtype(np.int64)}


def test_progress_rises_to_one(tmp_path: Path):
    for cap in (None, 1000):
        shares: list[float] = []
        make(tmp_path, max_tokens=cap, progress=lambda what, share, shares=shares: shares.append(share))
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        assert len(shares) > 10


# ---- the cache ----


def test_tokens_are_made_once(tmp_path: Path):
    first = make(tmp_path)
    stamp = (first.folder / "tokens.bin").stat().st_mtime_ns
    assert make(tmp_path).fingerprint == first.fingerprint
    assert (first.folder / "tokens.bin").stat().st_mtime_ns == stamp
    assert sorted(p.name for p in first.folder.iterdir()) == ["documents.jsonl", "meta.json", "tokens.bin"]


def test_a_saved_and_loaded_tokenizer_is_the_same(tmp_path: Path):
    texts = ["some words and more words"] * 20
    tokenizer = build_tokenizer("bpe", 270, texts)
    first = make(tmp_path, tokenizer=tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    stamp = (first.folder / "tokens.bin").stat().st_ino
    make(tmp_path, tokenizer=build_tokenizer("model", 0, (), tmp_path / "saved"))
    assert (first.folder / "tokens.bin").stat().st_ino == stamp


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"sequence_length": 9}, {"held_out": 0.2}, {"max_tokens": 1500},
        {"tokenizer": build_tokenizer("bpe", 300, ["  !!!! ...  "] * 50)},
    ],
)  # fmt: skip
def test_other_settings_make_other_tokens(tmp_path: Path, change: dict[str, Any]):
    first = make(tmp_path)
    assert make(tmp_path, **change).fingerprint != first.fingerprint


def test_changed_text_is_seen_even_with_the_old_time(tmp_path: Path):
    spec = corpus(tmp_path)
    first = make(tmp_path, spec)
    status = os.stat(spec)
    Path(spec).write_text(Path(spec).read_text().replace("AAAA", "AABA"))
    os.utime(spec, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(spec).st_size == status.st_size
    assert make(tmp_path, spec).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "tokens.bin").write_bytes((d / "tokens.bin").read_bytes()[:-2]),
        lambda d: (d / "tokens.bin").unlink(),
        lambda d: (d / "meta.json").write_text("{"),
        lambda d: (d / "meta.json").write_text('{"format": 0}'),
        lambda d: (d / "meta.json").write_text("[]"),
    ],
)
def test_a_damaged_cache_is_named_and_made_anew(tmp_path: Path, damage: Any):
    first = make(tmp_path)
    damage(first.folder)
    with pytest.raises(CorpusError, match="holds no prepared tokens"):
        Dataset.open(first.folder)
    assert make(tmp_path).fingerprint == first.fingerprint


# ---- what is refused ----


def test_less_than_a_batch_is_refused_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "short.txt").write_text("x" * 99)
    with pytest.raises(
        CorpusError,
        match=r"has 100 tokens, 10 of them held out, so 90 to train on; needed: 97, one global batch of 12 samples of "
        r"sequence_length 8\. Lower microbatches, microbatch_size, sequence_length or held_out",
    ):
        make(tmp_path, str(tmp_path / "short.txt"), samples_per_step=12)
    assert list((tmp_path / "data").iterdir()) == []
    dataset = make(tmp_path, str(tmp_path / "short.txt"), samples_per_step=11)
    assert dataset.num_train == 11
    with pytest.raises(CorpusError, match="needed: 97"):  # the cache is no way around
        make(tmp_path, str(tmp_path / "short.txt"), samples_per_step=12)
    (tmp_path / "blank.txt").write_text(" \n\t")
    with pytest.raises(CorpusError, match="has 0 tokens"):
        make(tmp_path, str(tmp_path / "blank.txt"))


def test_a_bad_document_leaves_nothing(tmp_path: Path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(CorpusError, match="not UTF-8: byte 0xff"):
        make(tmp_path, f"{corpus(tmp_path)},{tmp_path}/bad.txt")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path):
    spec = corpus(tmp_path, size=4000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores SIGXFSZ: writes fail with EFBIG
    try:
        with pytest.raises(CorpusError, match=r"cannot be written to '.*data': File too large; \d+ bytes are free"):
            make(tmp_path, spec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "data").iterdir()) == []


def test_a_real_tokenizer_type_is_expected(tmp_path: Path):
    assert isinstance(BYTES, PreTrainedTokenizerBase)


def test_a_large_file_of_text_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("PIECE", "_BYTES"):
        monkeypatch.setattr(f"jobs.text_file.{name}", 1 << 14)
    (tmp_path / "a.txt").write_text("so much text in a line, all of it in one document\n" * 60_000)  # 3 MB
    tracemalloc.start()
    try:
        made = make(tmp_path, str(tmp_path / "a.txt"), max_tokens=10_000)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert made.num_train + made.num_held_out > 1_200


def test_a_document_that_changes_while_it_is_read_is_refused(tmp_path: Path):
    class Changing(list[str]):
        """A text that is another one each time."""

        def __getitem__(self, index: Any) -> Any:
            self[:] = [each + "x" for each in self]
            return super().__getitem__(index)

    text = documents(corpus(tmp_path))
    text._sources = [Changing(["a text that grows " * 40])]  # type: ignore[list-item]
    text._ends = [1]
    with pytest.raises(CorpusError, match="document 0 of the data has changed while it was read"):
        make(tmp_path, corpus=text)
    assert not list((tmp_path / "data").iterdir())
