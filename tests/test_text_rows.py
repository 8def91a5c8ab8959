"""Documents of packed text: where each lies, what is read of it, how it is named, and that nothing is left of it once
it is erased. Compared with the texts themselves."""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import token_cache
from jobs.cache import Cache
from jobs.config import ConfigError
from jobs.corpus import documents
from jobs.data import Dataset
from jobs.documents import DOCUMENTS, digest_of, open_documents
from jobs.erase import erase
from jobs.files import CorpusError
from jobs.prepare import prepare, text_fingerprint
from jobs.text import TEXT, TextJob
from jobs.text_rows import TextRows
from jobs.tokenizer import build_tokenizer
from jobs.unlearn.select import parts_of, require_forgettable, rest_of, samples_of, seen_parts, select
from pipeline.runtime.batch import IGNORED, Needs

BYTES = build_tokenizer("bytes", 0, ())
END, LENGTH = 256, 8


def make(folder: Path, texts: list[str], **changes: Any) -> Dataset:
    path = folder / "texts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    how: dict[str, Any] = {"held_out": 0.2, "seed": 0, "samples_per_step": 0, "sequence_length": LENGTH}
    return prepare(documents(str(path)), BYTES, folder=folder / "data", **(how | changes))


def said(tokens: np.ndarray) -> str:
    return bytes(np.asarray(tokens)[np.asarray(tokens) != END].astype(np.uint8)).decode(errors="replace")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


WORDS = st.text("abc ", min_size=1, max_size=30).map(lambda text: f"{text}x")
CASES = st.tuples(
    st.lists(WORDS, min_size=4, max_size=14), st.integers(0, 3), st.sampled_from([0.1, 0.3, 0.6]),
    st.sampled_from([None, 60]),
)  # fmt: skip


def case(folder: str, drawn: tuple[list[str], int, float, int | None], name: str = "one", **more: Any) -> Dataset:
    texts, seed, held_out, most = drawn
    long = [*texts, "y" * 40, "z" * 30, "w" * 50]  # so that there is something to train on, and to hold out
    return make(Path(folder, name), long, seed=seed, held_out=held_out, max_tokens=most, **more)


# ---- the index ----


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_every_token_is_of_one_document_and_tells_its_text(drawn: tuple[list[str], int, float, int | None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            dataset = case(folder, drawn)
        except CorpusError:
            return  # nothing is left to hold out
        corpus, rows = documents(str(Path(folder, "one", "texts.jsonl"))), TextRows.open(dataset.folder).rows
        texts = {corpus.about(index)[0]: corpus[index] for index in range(len(corpus))}
        covered = np.zeros(len(dataset.tokens), int)
        for row in rows:
            covered[row.start : row.end] += 1
            assert said(dataset.tokens[row.start : row.end]) in texts[row.id]
            assert row.digest == digest_of(texts[row.id])
            assert row.fields["file"].endswith("texts.jsonl")
            assert row.held_out == (row.end <= dataset.train_start)
        assert (covered[: dataset.held_out_tokens] == 1).all()
        assert (covered[dataset.train_start :] == 1).all()
        assert not covered[dataset.held_out_tokens : dataset.train_start].any()
        whole = [row for row in rows if said(dataset.tokens[row.start : row.end]) == texts[row.id]]
        assert len(whole) >= len(rows) - 3  # the one that is cut in two, and the one at the end


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_parts_predict_every_token_of_a_document_once(drawn: tuple[list[str], int, float, int | None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            dataset = case(folder, drawn)
        except CorpusError:
            return
        view = TextRows.open(dataset.folder)
        where: dict[int, int] = {}
        """Token -> the part that predicts it."""
        for row in view.rows:
            found = [view.row(part) for part in view.parts(row.index)]
            labels = np.concatenate([each.labels for each in found])
            inputs = np.concatenate([each.input_ids[each.labels != IGNORED] for each in found])
            tokens = dataset.tokens[row.start : row.end].astype(np.int64)
            assert (labels[labels != IGNORED] == tokens).all()
            assert inputs.tolist() == [END, *tokens[:-1].tolist()]
            assert {each.labels.shape for each in found} == {(LENGTH,)}
            at = np.arange(row.start, row.end)
            where |= {int(token): view.parts(row.index)[(int(token) - row.start) // LENGTH] for token in at}
        assert view.parts(len(view.rows) - 1)[-1] + 1 == len(set(where.values()))
        for place in range(view.num_train):
            first = dataset.train_start + place * LENGTH + 1
            wanted = {where[token] for token in range(first, first + LENGTH)}
            assert set(view.parts_at(place)) == wanted
            rows = {row.index for row in view.rows if wanted & set(view.parts(row.index))}
            assert set(view.rows_at(place)) == rows
        with pytest.raises(IndexError, match="allowed: 0 to"):
            view.row(view.parts(len(view.rows) - 1)[-1] + 1)


# ---- erasing ----


@settings(max_examples=40, deadline=None)
@given(CASES, st.lists(st.sets(st.integers(0, 16), max_size=3), min_size=1, max_size=2))
def test_what_is_erased_is_as_if_it_had_been_forgotten_from_the_start(
    drawn: tuple[list[str], int, float, int | None], requests: list[set[int]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            before = case(folder, drawn)
        except CorpusError:
            return
        texts = [*drawn[0], "y" * 40, "z" * 30, "w" * 50]
        digests = [{digest_of(texts[number % len(texts)]) for number in each} for each in requests]
        old = [before.train_sample(i) for i in range(2 * before.num_train)]
        for each in digests:
            erase(before.folder, each)
            erase(before.folder, each)
        forgotten = frozenset[str]().union(*digests)
        anew = case(folder, drawn, "anew", forgotten=forgotten)
        assert {**files(before.folder), DOCUMENTS: b""} == {**files(anew.folder), DOCUMENTS: b""} | {
            "meta.json": files(anew.folder)["meta.json"].replace(b"/anew/", b"/one/")
        }
        after, view = Dataset.open(before.folder), TextRows.open(before.folder)
        assert text_fingerprint(after) == after.fingerprint
        gone = [row for row in view.rows if row.digest in forgotten]
        assert gone == [row for row in view.rows if row.blank]
        assert all(not row.fields for row in gone)
        mine = np.zeros(len(after.tokens), bool)
        for row in gone:
            mine[row.start : row.end] = True
            assert (view.row(view.parts(row.index)[0]).labels == IGNORED).all()
        assert (after.tokens[mine] == END).all()
        if gone:
            assert (after.tokens[after.held_out_tokens : after.train_start] == END).all()
        for i, was in enumerate(old):
            start = after.train_start + after.place_of(i) * LENGTH
            where = mine[start : start + LENGTH + 1]
            assert (after.train_sample(i) == np.where(where, IGNORED, was)).all()
            assert after.num_labels(i) == int((~where[1:]).sum())
        again = case(folder, drawn, "one", forgotten=forgotten)  # and it is taken for that
        assert again.fingerprint == after.fingerprint


def test_no_token_of_a_forgotten_document_is_left_anywhere_in_the_file(tmp_path: Path) -> None:
    """Also where documents were moved away from, when others were dropped before them."""
    texts = ["the same words " * 4, "kept words here " * 4, "Forget me please! " * 4, *(f"{i} " * 20 for i in range(9))]
    for seed in range(12):
        twice = make(tmp_path / str(seed), [*texts, *texts[:1] * 3], seed=seed, held_out=0.5)
        raw = np.frombuffer(b"Forget me", np.uint8).astype(np.uint16).tobytes()
        assert raw in (twice.folder / "tokens.bin").read_bytes()
        erase(twice.folder, {digest_of("Forget me please! " * 4)})
        assert raw not in (twice.folder / "tokens.bin").read_bytes()
        assert "Forget" not in (twice.folder / DOCUMENTS).read_text()


class CrashError(Exception):
    """Where a process dies."""


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_erasure_that_was_cut_off_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    texts = [f"{i} " * 20 for i in range(9)]
    first, second = {digest_of(texts[2]), digest_of(texts[5])}, {digest_of(texts[7])}
    wanted = files(make(tmp_path / "w", texts, forgotten=first | second).folder)["tokens.bin"]
    real, survived = getattr(os, call), 0
    for number in range(20):
        folder, calls = make(tmp_path / str(number), texts).folder, iter(range(100))

        def dying(*args: Any, number: int = number, calls: Any = calls) -> Any:
            if next(calls) == number:
                raise CrashError
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, dying)
            try:
                erase(folder, first)
                break
            except CrashError:
                survived += 1
        if not (folder / "meta.json").exists():
            with pytest.raises(CorpusError, match="if it was being erased from, erase again"):
                TextRows.open(folder)
        erase(folder, first)
        erase(folder, second)
        assert files(folder)["tokens.bin"] == wanted
        assert len(Dataset.open(folder).blank) >= 2
        assert text_fingerprint(Dataset.open(folder)) == Dataset.open(folder).fingerprint
    assert survived >= (3 if call == "replace" else 5)


def test_nobody_learns_what_stands_where_something_was(tmp_path: Path) -> None:
    dataset = make(tmp_path, [chr(97 + i) * 30 for i in range(20)])
    erase(dataset.folder, {digest_of(chr(97 + i) * 30) for i in (3, 4, 11)})
    after = Dataset.open(dataset.folder)
    job = TextJob(after.train_sample, LENGTH, after.num_labels, after.end_token, microbatches=4, size=5)
    blank = counted = 0
    for step in range(4):
        for m in range(4):
            batch = job.batch(step, m, Needs.INPUT | Needs.LOSS)
            labels, inputs = batch["labels"], batch["input_ids"]
            assert job.counts(step, m) == {TEXT: int((labels != IGNORED).sum())}
            assert inputs.min() >= 0
            assert not {3 + 97, 4 + 97, 11 + 97} & set(inputs.flatten().tolist())
            blank, counted = blank + int((labels == IGNORED).sum()), counted + job.counts(step, m)[TEXT]
            same = (inputs[:, 1:] == labels[:, :-1]) | (labels[:, :-1] == IGNORED)
            assert bool(same.all())
    assert blank
    assert counted > blank


# ---- which documents a request means ----


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> TextRows:
    """Some of the library under the names of its modules, and files of the user's."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "own.txt").write_text("What one's own text says. " * 9)
    (folder / "two.jsonl").write_text("".join(json.dumps({"text": f"line {i} " * 9}) + "\n" for i in range(2)))
    corpus = documents(f"stdlib,{folder}/own.txt,{folder}/two.jsonl")
    some = {"asyncio", "json", "bisect", "keyword"}
    order = [i for i in range(len(corpus)) if corpus.about(i)[0].split(".")[0] in some]
    order += [*range(len(corpus) - 3, len(corpus))]

    class Some:
        """A corpus of these documents alone."""

        spec, text_field = corpus.spec, corpus.text_field

        def __len__(self) -> int:
            return len(order)

        def __getitem__(self, index: int) -> str:
            return corpus[order[index]][:400]

        def about(self, index: int) -> tuple[str, Any]:
            return corpus.about(order[index])

    prepare(Some(), BYTES, 16, 0.05, folder / "data", 1)  # type: ignore[arg-type]
    return TextRows.open(folder / "data")


def named(library: TextRows, asked: str) -> set[str]:
    return {library.rows[index].id for index in select(library, asked, "forget")}


def test_modules_packages_and_files_are_named(library: TextRows, tmp_path: Path) -> None:
    folder = library.dataset.folder.parent
    assert named(library, "json.decoder") == {"json.decoder"} == named(library, "module=json.decoder")
    json_too = {row.id for row in library.rows if row.id.split(".")[0] == "json"}
    assert named(library, "json") == json_too > {"json", "json.decoder", "json.scanner"}
    assert named(library, "asyncio") == named(library, "package=asyncio") > {"asyncio", "asyncio.tasks"}
    assert named(library, "module=json") == {"json"}
    assert named(library, "json/decoder.py") == {"json.decoder"}
    assert named(library, "id:bisect, keyword") == {"bisect", "keyword"}
    assert named(library, str(folder / "own.txt")) == {str(folder / "own.txt")}
    lines = {f"{folder}/two.jsonl:{i}" for i in (1, 2)}
    assert named(library, f"{folder}/two.jsonl") == lines
    assert named(library, f"{folder}/two.jsonl:2") == {f"{folder}/two.jsonl:2"}
    (tmp_path / "ids").write_text("bisect\njson.scanner\n")
    assert named(library, str(tmp_path / "ids")) == {"bisect", "json.scanner"}
    (tmp_path / "copy.txt").write_text("What one's own  text\nsays. " * 9)  # the same by its content
    assert named(library, str(tmp_path / "copy.txt")) == {str(folder / "own.txt")}
    (tmp_path / "copy.jsonl").write_text(json.dumps({"text": "line 1 " * 9}) + "\n")
    assert named(library, str(tmp_path / "copy.jsonl")) == {f"{folder}/two.jsonl:2"}
    digest = next(row.digest for row in library.rows if row.id == "json")
    assert named(library, f"digest:{digest}") == {"json"}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("asyncoi", r"no document with the id 'asyncoi'; near: 'asyncio'"),
        ("json.decodr", r"no document with the id 'json.decodr'; near: 'json.decoder'"),
        ("modul=json", r"no document has a field 'modul'; their fields: file, line, module, package"),
        ("package=asyncoi", r"no document says so in its field 'package'; near: 'asyncio'"),
        ("digest:00", r"which means no document; allowed: at least one"),
        ("OTHER", r"of whose 1 documents 1 are none of the run's, by their content; the first: 'Nobody knows this"),
    ],
)
def test_what_names_nothing_is_refused(library: TextRows, tmp_path: Path, asked: str, told: str) -> None:
    (tmp_path / "other.txt").write_text("Nobody knows this text.\n" * 9)
    with pytest.raises(ConfigError, match=told):
        select(library, asked.replace("OTHER", str(tmp_path / "other.txt")), "forget")


def test_documents_that_say_the_same_are_forgotten_together(tmp_path: Path) -> None:
    make(tmp_path, ["the same " * 9, *(f"{i} " * 20 for i in range(9)), "the  same\n" * 9])
    view = TextRows.open(tmp_path / "data")
    path = tmp_path / "texts.jsonl"
    assert named(view, f"{path}:1") == named(view, f"{path}:11") == {f"{path}:1", f"{path}:11"}


def test_what_was_forgotten_is_not_named_again(tmp_path: Path) -> None:
    make(tmp_path, [f"{i} " * 20 for i in range(9)])
    view = TextRows.open(tmp_path / "data")
    name = next(row.id for row in view.rows if not row.held_out)
    erase(tmp_path / "data", {row.digest for row in view.rows if row.id == name})
    view = TextRows.open(tmp_path / "data")
    with pytest.raises(ConfigError, match="has been forgotten before; allowed: other rows"):
        select(view, name, "forget")
    assert name not in {view.rows[index].id for index in select(view, str(tmp_path / "texts.jsonl"), "forget")}


def test_what_the_run_has_learned_follows_from_its_samples(tmp_path: Path) -> None:
    make(tmp_path, [f"{i} " * 20 for i in range(30)])
    view = TextRows.open(tmp_path / "data")
    ledger = [{"first_sample": 4 * step, "samples": 4} for step in range(5)]
    seen = seen_parts(view, ledger)
    brute = {part for i in range(20) for part in view.parts_at(view.place_of(i))}
    assert seen == brute < set(parts_of(view, range(len(view.rows))))
    assert seen_parts(view, [{"first_sample": 0, "samples": 9 * view.num_train}]) == {
        part for place in range(view.num_train) for part in view.parts_at(place)
    }
    known = [row.index for row in view.rows if seen & set(view.parts(row.index))]
    other = [row.index for row in view.rows if row.index not in known]
    assert rest_of(view, known[:1], seen) == known[1:]
    assert set(parts_of(view, known, seen)) == seen
    mine = samples_of(view, known[:1], 20)
    assert mine == {i for i in range(20) if known[0] in view.rows_at(view.place_of(i))} != set()
    require_forgettable(view, [known[0], other[0]], known[1:], seen, "x")  # of one it has learned something
    for forget, retain, told in (
        (other[:2], known, r"whose 2 documents are in no step of the run's ledger: .*, and cannot forget the others"),
        (known, [], r"which is all that the run has been trained on"),
        ([row.index for row in view.rows], [], r"which means all \d+ documents of the run"),
        (known[:2], known[1:], r"have 1 documents in common"),
    ):
        with pytest.raises(ConfigError, match=told):
            require_forgettable(view, forget, retain, seen, "x")


def test_text_that_was_prepared_without_an_index_is_told_how_to_get_one(tmp_path: Path) -> None:
    texts = [f"{i} " * 20 for i in range(9)]
    before = make(tmp_path, texts)
    (tmp_path / "data" / DOCUMENTS).unlink()
    with pytest.raises(CorpusError, match=r"does not tell which documents .* `unbroken train --resume` on the run"):
        TextRows.open(tmp_path / "data")
    assert make(tmp_path, texts).fingerprint == before.fingerprint
    assert len(open_documents(tmp_path / "data")) >= 9
    (tmp_path / "data" / DOCUMENTS).write_text("{}\n")
    with pytest.raises(CorpusError, match="cannot be read"):
        TextRows.open(tmp_path / "data")


# ---- the cache ----


def test_the_cache_forgets_a_document_in_every_entry_that_has_it(tmp_path: Path) -> None:
    texts, others = [f"{i} " * 20 for i in range(9)], [f"{i} " * 20 for i in range(20, 29)]
    cache = Cache(tmp_path / "cache")
    for name, what, length in (("a", texts, 8), ("b", [*texts[3:], *others], 6), ("c", others, 8)):
        make(tmp_path / name, what, cache=cache, sequence_length=length)
    cache.put("tokens", "0" * 32 + "-9-00", {"an older": "form"}, io.BytesIO(b"\1\2" * 50))
    assert len(cache.keys("tokens", "")) == 4
    kept = files(tmp_path / "c" / "data")
    assert len(token_cache.forget(cache, {digest_of(texts[4])})) == 3
    assert len(cache.keys("tokens", "")) == 1
    told: list[str] = []
    again = make(tmp_path / "d", others, cache=Cache(cache.folder, told.append))
    assert told == ["tokens taken from the cache"]
    assert (again.folder / "tokens.bin").read_bytes() == kept["tokens.bin"]
    assert [row.digest for row in open_documents(again.folder)] == [
        row.digest for row in open_documents(tmp_path / "c" / "data")
    ]
    assert token_cache.forget(cache, {digest_of("nobody")}) == []


def test_a_run_that_has_forgotten_leaves_nothing_of_it_in_the_cache(tmp_path: Path) -> None:
    texts = [f"{i} " * 20 for i in range(9)]
    cache = Cache(tmp_path / "cache")
    make(tmp_path, texts, cache=cache, forgotten={digest_of(texts[4])})
    assert cache.keys("tokens", "") == []
    make(tmp_path / "other", texts, cache=cache)
    make(tmp_path / "third", texts, cache=cache, forgotten={digest_of(texts[4])})
    assert any(row.blank for row in open_documents(tmp_path / "third" / "data"))
