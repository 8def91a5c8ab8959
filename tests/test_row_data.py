"""Rows on disk: a sample is a row or several; what is forgotten keeps its place, and leaves the same bytes."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.corpus import CorpusError
from jobs.data import Dataset
from jobs.dataset_files import ERASING
from jobs.erase import erase
from jobs.row_data import RowDataset, Sample, first_fit
from jobs.row_prepare import prepare_rows
from jobs.rows import Row
from jobs.templates import encode_row
from jobs.tokenizer import build_tokenizer
from pipeline.runtime.batch import IGNORED

BYTES = build_tokenizer("bytes", 0, ())
END = 256
LENGTH = 64
FILES = ["meta.json", "rows.jsonl", "tokens.bin"]


def make_row(index: int, size: int = 3, **fields: str) -> Row:
    question = {"role": "user", "content": f"q{index}"}
    return Row(f"row-{index}", (question,), chr(65 + index % 26) * size, fields or {"author": f"a{index // 4}"})


ROWS = [make_row(index, 1 + index % 9) for index in range(40)]


def make(folder: Path, rows: list[Row] = ROWS, **changes: Any) -> RowDataset:
    values: dict[str, Any] = {
        "tokenizer": BYTES, "sequence_length": LENGTH, "held_out_share": 0.1, "folder": folder / "data", "seed": 0,
    }  # fmt: skip
    return prepare_rows(rows, **(values | changes))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def answers(sample: Sample) -> bytes:
    """What is learned of a sample."""
    return bytes(sample.labels[(sample.labels != IGNORED) & (sample.labels != END)].astype(np.uint8))


def key(sample: Sample) -> tuple[bytes, bytes]:
    return sample.input_ids.tobytes(), sample.labels.tobytes()


# ---- samples ----


def test_a_sample_is_a_row_whose_answer_is_learned(tmp_path: Path):
    dataset = make(tmp_path)
    assert sorted(path.name for path in dataset.folder.iterdir()) == FILES
    for index, row in enumerate(ROWS):
        ids, answer = encode_row(row, BYTES)
        sample = dataset.row(index)
        assert sample.position_ids is None
        assert {sample.input_ids.dtype, sample.labels.dtype} == {np.dtype(np.int64)}
        assert sample.input_ids.tolist() == [*ids[:-1], *[END] * (LENGTH - len(ids) + 1)]
        wanted = [*[IGNORED] * (answer - 1), *ids[answer:]]
        assert sample.labels.tolist() == [*wanted, *[IGNORED] * (LENGTH - len(wanted))]
        info = dataset.rows[index]
        assert (info.index, info.id, info.digest, info.fields) == (index, row.id, row.digest, row.fields)
        assert info.num_answer_tokens == len(ids) - answer
        assert dataset.index_of(row.id) == index
    with pytest.raises(CorpusError, match=r"no row has the id 'x'; allowed: 'row-0' and 39 others"):
        dataset.index_of("x")
    with pytest.raises(IndexError, match="row 40; allowed: 0 to 39"):
        dataset.row(40)


@pytest.mark.parametrize("pack", [False, True])
def test_an_epoch_has_every_training_row_once_and_the_next_another_order(tmp_path: Path, pack: bool):
    dataset = make(tmp_path, pack=pack)
    trained = [row.index for row in dataset.rows if not row.held_out]
    assert len(trained) == 36
    n = dataset.num_train
    assert n == 36 if not pack else n < 20
    epochs = [[dataset.rows_of(e * n + i) for i in range(n)] for e in range(3)]
    assert all(sorted(i for rows in epoch for i in rows) == trained for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    far = 10**6 * n + 3
    assert dataset.rows_of(far) in epochs[0]
    for id in (0, 5, n, far):
        assert answers(dataset.train_sample(id)) == b"".join(
            b" " + ROWS[i].answer.encode() for i in dataset.rows_of(id)
        )
        assert dataset.num_labels(id) == int((dataset.train_sample(id).labels != IGNORED).sum())
    assert len(dataset._epochs) <= 3
    with pytest.raises(IndexError, match="training sample -1; allowed: 0 or more"):
        dataset.rows_of(-1)


def test_held_out_rows_are_never_trained_on(tmp_path: Path):
    twins = [Row(f"twin-{row.id}", row.prompt, row.answer) for row in ROWS]
    dataset = make(tmp_path, [*ROWS, *twins], held_out_share=0.2)
    held = {row.digest for row in dataset.rows if row.held_out}
    assert 8 <= len(held) <= 16
    assert not held & {row.digest for row in dataset.rows if not row.held_out}
    assert dataset.num_held_out == 2 * len(held)
    assert dataset.num_train + dataset.num_held_out == 80
    spread = dataset.held_out_spread(4)
    assert key(spread(1)) == key(dataset.held_out_sample(dataset.num_held_out // 4))
    with pytest.raises(IndexError, match=f"held-out sample {dataset.num_held_out}; allowed: 0 to"):
        dataset.held_out_sample(dataset.num_held_out)


def test_without_a_share_the_training_rows_are_held_out(tmp_path: Path):
    dataset = make(tmp_path, held_out_share=0)
    assert not any(row.held_out for row in dataset.rows)
    assert dataset.num_held_out == dataset.num_train == 40
    assert Counter(key(dataset.held_out_sample(i)) for i in range(40)) == Counter(
        key(dataset.train_sample(i)) for i in range(40)
    )


def test_packed_rows_begin_at_position_0_and_lie_apart(tmp_path: Path):
    dataset = make(tmp_path, pack=True)
    for id in range(dataset.num_train):
        sample, at = dataset.train_sample(id), 0
        assert sample.position_ids is not None
        for index in dataset.rows_of(id):
            alone, size = dataset.row(index), dataset.rows[index].end - dataset.rows[index].start - 1
            assert (sample.input_ids[at : at + size] == alone.input_ids[:size]).all()
            assert (sample.labels[at : at + size] == alone.labels[:size]).all()
            assert (sample.position_ids[at : at + size] == np.arange(size)).all()
            at += size
        assert (sample.position_ids[at:] == np.arange(LENGTH - at)).all()
        assert (sample.labels[at:] == IGNORED).all()
    assert len(dataset.rows_of(0)) > 1


@given(st.lists(st.integers(1, 12), max_size=60))
def test_each_item_is_in_the_first_bin_with_room(sizes: list[int]):
    bins: list[list[int]] = []
    for item, size in enumerate(sizes):
        fits = [found for found in bins if sum(sizes[i] for i in found) + size <= 12]
        (fits[0] if fits else bins.append([]) or bins[-1]).append(item)  # type: ignore[func-returns-value]
    assert first_fit(sizes, 12) == bins


def test_another_process_opens_the_same(tmp_path: Path):
    dataset = make(tmp_path, pack=True)
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 1000
    assert [key(copy.train_sample(i)) for i in range(50)] == [key(dataset.train_sample(i)) for i in range(50)]
    assert (copy.fingerprint, copy.rows) == (dataset.fingerprint, dataset.rows)


# ---- re-used or made anew ----


def test_rows_are_made_once(tmp_path: Path):
    shares: list[float] = []
    first = make(tmp_path, progress=lambda what, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    stamp = (first.folder / "tokens.bin").stat().st_ino
    seen: list[str] = []
    assert make(tmp_path, accept=seen.append).fingerprint == first.fingerprint == seen[0]
    assert (first.folder / "tokens.bin").stat().st_ino == stamp


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"sequence_length": 65}, {"held_out_share": 0.2}, {"pack": True}, {"rows": ROWS[:-1]},
        {"forgotten": {ROWS[3].digest}}, {"rows": [*ROWS[:-1], make_row(39, 4, author="another")]},
        {"tokenizer": build_tokenizer("bpe", 300, ["  !!!! ...  "] * 50)},
        {"rows": [*ROWS[:-1], Row("row-39", ROWS[39].prompt, ROWS[39].answer + " ", ROWS[39].fields)]},
    ],
)  # fmt: skip
def test_other_rows_or_settings_make_another_dataset(tmp_path: Path, change: dict[str, Any]):
    first = make(tmp_path)
    before = files(first.folder)
    with pytest.raises(ZeroDivisionError):  # who does not accept the new one keeps the old one
        make(tmp_path, **change, accept=lambda fingerprint: 1 / 0)  # type: ignore[arg-type,return-value]
    assert files(first.folder) == before
    assert make(tmp_path, **change).fingerprint != first.fingerprint


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_dataset_is_named_and_made_anew(tmp_path: Path, name: str):
    first = make(tmp_path)
    before = files(first.folder)
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-2]), lambda path: path.unlink()):
        damage(first.folder / name)
        with pytest.raises(CorpusError, match=r"holds no prepared rows: .*; delete it to make them anew"):
            RowDataset.open(first.folder)
        make(tmp_path)
        assert files(first.folder) == before
    with pytest.raises(CorpusError, match="format rows 1; allowed: 1"):
        Dataset.open(first.folder)


# ---- what is refused ----


def test_a_row_that_is_too_long_is_named_and_leaves_nothing(tmp_path: Path):
    length = len(encode_row(ROWS[8], BYTES)[0])
    with pytest.raises(
        CorpusError,
        match=rf"row 'row-8' has {length} tokens, and 6 other rows are too long; sequence_length {length - 2} allows "
        rf"{length - 1}. Set --sequence-length to {length} or more, or leave them out",
    ):
        make(tmp_path, sequence_length=length - 2)
    assert list((tmp_path / "data").iterdir()) == []
    assert make(tmp_path, sequence_length=length).rows


def test_less_than_a_batch_is_refused(tmp_path: Path):
    message = r"there are 40 rows, 4 of them held out, so 36 samples to train on; needed: 37, one global batch"
    with pytest.raises(CorpusError, match=message):
        make(tmp_path, samples_per_step=37)
    assert list((tmp_path / "data").iterdir()) == []
    assert make(tmp_path, samples_per_step=36).num_train == 36
    with pytest.raises(CorpusError, match=message):
        make(tmp_path, samples_per_step=37)


# ---- forgetting ----


def test_a_row_that_is_forgotten_is_blank_in_its_place(tmp_path: Path):
    before = make(tmp_path, pack=True)
    order = [before.rows_of(i) for i in range(100)]
    victims = {ROWS[5].digest, ROWS[17].digest}
    assert erase(before.folder, victims | {"unknown"}) == 2
    after = RowDataset.open(before.folder)
    assert [after.rows_of(i) for i in range(100)] == order
    assert after.fingerprint != before.fingerprint
    for old, new in zip(before.rows, after.rows, strict=True):
        assert (new.id, new.digest, new.start, new.end, new.held_out) == (
            old.id, old.digest, old.start, old.end, old.held_out,
        )  # fmt: skip
        if old.digest in victims:
            assert (new.blank, dict(new.fields), new.num_answer_tokens) == (True, {}, 0)
            assert (after.tokens[new.start : new.end] == END).all()
            assert (after.row(new.index).labels == IGNORED).all()
        else:
            assert new == old
            assert key(after.row(new.index)) == key(before.row(old.index))
    tokens = files(before.folder)["tokens.bin"]
    assert np.array([*b"q17"], np.uint16).tobytes() not in tokens
    assert np.array([*b"q18"], np.uint16).tobytes() in tokens


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Row], dict[str, Any], list[set[str]]]:
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
    rows = [make_row(index, size, author=f"a{index % 3}") for index, size in enumerate(sizes)]
    twins = draw(st.lists(st.sampled_from(rows), max_size=3))
    rows += [Row(f"twin-{number}", row.prompt, row.answer) for number, row in enumerate(twins)]
    digests = st.sets(st.sampled_from([*(row.digest for row in rows), "unknown"]))
    share = draw(st.sampled_from([0, 0.1, 0.4]))
    how = {"pack": draw(st.booleans()), "seed": draw(st.integers(0, 3)), "held_out_share": share}
    return rows, {**how, "samples_per_step": 0}, draw(st.lists(digests, min_size=1, max_size=3))


@settings(max_examples=25)
@given(cases())
def test_what_is_erased_is_as_if_it_had_been_forgotten_from_the_start(
    case: tuple[list[Row], dict[str, Any], list[set[str]]],
):
    rows, how, requests = case
    with tempfile.TemporaryDirectory() as folder:
        erased = make(Path(folder, "erased"), rows, **how)
        places = [erased.rows_of(i) for i in range(2 * erased.num_train)]
        for request in requests:
            assert erase(erased.folder, request) == sum(row.digest in request for row in rows)
            assert erase(erased.folder, request) == sum(row.digest in request for row in rows)
        forgotten = frozenset[str]().union(*requests)
        anew = make(Path(folder, "anew"), rows, **how, forgotten=forgotten)
        assert files(erased.folder) == files(anew.folder)
        opened = RowDataset.open(erased.folder)
        assert {row.digest for row in opened.rows if row.blank} == forgotten - {"unknown"}
        assert [opened.rows_of(i) for i in range(2 * opened.num_train)] == places
        again = make(Path(folder, "erased"), rows, **how, forgotten=forgotten)  # and it is taken for that
        assert again.fingerprint == anew.fingerprint


class CrashError(Exception):
    """Where a process dies."""


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("other", [False, True])
def test_an_erasure_that_was_cut_off_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, other: bool
):
    """Whichever call it dies at, and whether the next asks for the same or for something else."""
    first, second = {ROWS[2].digest, ROWS[9].digest}, {ROWS[30].digest}
    real = getattr(os, call)
    wanted = {count: files(make(tmp_path / f"w{count}", forgotten=chosen).folder)
              for count, chosen in {1: second, 3: first | second}.items()}  # fmt: skip
    survived = 0
    for number in range(20):
        survived = number
        folder, calls = make(tmp_path / str(number)).folder, iter(range(100))

        def dying(*args: Any, number: int = number, calls: Any = calls) -> Any:
            if next(calls) == number:
                raise CrashError
            return real(*args)

        monkeypatch.setattr(os, call, dying)
        try:
            erase(folder, first)
            break
        except CrashError:
            monkeypatch.setattr(os, call, real)
            if not other:
                erase(folder, first)
                assert not (folder / ERASING).exists()
            erase(folder, second)
            blank = sum(row.blank for row in RowDataset.open(folder).rows)
            left = {name: data for name, data in files(folder).items() if name in FILES}
            assert left == wanted[blank]
            assert other or blank == 3
        finally:
            monkeypatch.setattr(os, call, real)
    assert survived >= (3 if call == "replace" else 5)


def test_a_dataset_that_is_being_erased_from_does_not_open_and_can_be_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("jobs.erase.blank", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            erase(dataset.folder, {ROWS[0].digest})
    with pytest.raises(CorpusError, match="if it was being erased from, erase again"):
        RowDataset.open(dataset.folder)
    again = make(tmp_path, forgotten={ROWS[0].digest})
    assert sorted(path.name for path in again.folder.iterdir()) == FILES
    assert again.rows[0].blank
    with pytest.raises(CorpusError, match="holds no prepared rows"):
        erase(tmp_path / "nowhere", {"x"})
