"""Where text comes from: every door, in a fixed order, and a message by name for whatever is not text."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jobs.pieces
import jobs.text_file
from jobs.corpus import CorpusError, documents, permutation, standard_library
from jobs.rows import normal
from jobs.text_hashes import digests


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- what is read ----


def test_standard_library_is_large_ordered_and_without_tests():
    paths = standard_library()
    root = Path(os.__file__).parent
    names = [path.relative_to(root).as_posix() for path in paths]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(names)
    assert not [n for n in names if {"test", "tests", "idle_test", "site-packages", "__pycache__"} & set(n.split("/"))]
    corpus = documents("stdlib")
    assert len(corpus) == sum(path.stat().st_size > 0 for path in paths)
    assert sum(map(len, corpus)) > 5_000_000
    assert corpus[[n for n, p in zip(names, paths, strict=True) if p.stat().st_size].index("os.py")] == (
        (root / "os.py").read_text(encoding="utf-8")
    )


def test_files_globs_and_lines_are_read_in_order(tmp_path: Path):
    (tmp_path / "b.txt").write_text("second, é 漢\r\n", encoding="utf-8", newline="")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    jsonl(tmp_path / "c.jsonl", {"text": "x", "body": "one"}, {"body": "two\nlines", "text": "y"})
    assert list(documents(f"{tmp_path}/*.txt")) == ["first", "second, é 漢\r\n", "with a mark"]
    assert list(documents(f"{tmp_path}/c.jsonl, {tmp_path / 'a.txt'}")) == ["x", "y", "first"]
    assert list(documents(f"{tmp_path}/c.jsonl", text_field="body")) == ["one", "two\nlines"]
    corpus = documents(f"{tmp_path}/c.jsonl,{tmp_path}/[ab].txt,{tmp_path}/c.jsonl")
    assert [corpus[i] for i in (5, 0, 3, 2)] == ["y", "x", "second, é 漢\r\n", "first"]
    for index in (-1, 6):
        with pytest.raises(IndexError):
            corpus[index]


def test_globs_go_into_folders_and_a_name_with_a_comma_is_a_name(tmp_path: Path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "z.txt").write_text("down here")
    (tmp_path / "a,b.txt").write_text("one file")
    assert list(documents(f"{tmp_path}/**/z.txt")) == ["down here"]
    assert list(documents(str(tmp_path / "a,b.txt"))) == ["one file"]


def test_lines_are_not_held_in_memory(tmp_path: Path):
    path = jsonl(tmp_path / "big.jsonl", *({"text": "x" * 100_000} for _ in range(20)))
    corpus = documents(str(path))
    path.write_bytes(path.read_bytes().replace(b"xxxx", b"yyyy"))  # what is read now is what lies there now
    assert corpus[7] == "y" * 100_000


def test_datasets_are_loaded_by_name_config_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "number": [1, 2]})

    def load(*name: str | None, split: str) -> Any:
        asked.append((*name, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(documents("hf:owner/name")) == ["a", "b"]
    assert list(documents("hf:owner/name:test[:10%]")) == ["a", "b"]
    assert list(documents("hf:wikitext@wikitext-2-raw-v1:validation")) == ["a", "b"]
    assert asked == [
        ("owner/name", None, "train"),
        ("owner/name", None, "test[:10%]"),
        ("wikitext", "wikitext-2-raw-v1", "validation"),
    ]
    with pytest.raises(CorpusError, match=r"no field 'body'; allowed for text_field: text, number"):
        documents("hf:owner/name", text_field="body")
    with pytest.raises(CorpusError, match=r"hf:owner/name, row 0: field 'number' is int; allowed: text"):
        documents("hf:owner/name", text_field="number")[0]


def test_a_dataset_folder_is_really_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "folder" / "train.jsonl", {"text": "one"}, {"text": "two"})
    assert list(documents(f"hf:{tmp_path / 'folder'}")) == ["one", "two"]
    with pytest.raises(CorpusError, match=r"cannot load: ValueError: Unknown split .*nosuch"):
        documents(f"hf:{tmp_path / 'folder'}:nosuch")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.txt", r"'.*nowhere.txt', which does not exist; allowed: stdlib"),
        ("*.nothing", r"'.*\*.nothing', which matches no file; allowed: stdlib"),
        (".", r"a folder; allowed: a glob, such as '.*\*\*/\*\.txt'"),
        ("void.txt", r"void.txt', which holds no text"),
        ("void.jsonl", r"void.jsonl', which holds no text"),
    ],
)
def test_what_is_not_there_or_empty_is_refused_at_once(tmp_path: Path, spec: str, message: str):
    (tmp_path / "void.txt").touch()
    (tmp_path / "void.jsonl").write_text("\n \n")
    with pytest.raises(CorpusError, match=message):
        documents(str(tmp_path / spec))


@pytest.mark.parametrize("spec", ["x" * 300, "a/" * 3000, "~nosuchuser/x", "a\0b"])
@pytest.mark.parametrize("magic", ["", "*.txt", "/**/*"])
def test_a_name_that_no_file_can_have_is_one_that_is_not_there(spec: str, magic: str):
    what = "which matches no file" if magic else "which does not exist"
    with pytest.raises(CorpusError, match=rf"^data is {re.escape(repr(spec + magic))}, {what}; allowed: stdlib"):
        documents(spec + magic)


def test_a_list_may_be_longer_than_a_name(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    assert list(documents(",".join([str(tmp_path / "a.txt")] * 400))) == ["one"] * 400


@pytest.mark.parametrize("spec", ["", "stdlib,", "stdlib,,stdlib"])
def test_a_list_with_a_hole_is_refused(spec: str):
    with pytest.raises(CorpusError, match="names nothing"):
        documents(spec)


def test_a_dataset_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(CorpusError, match=r"'hf:a/b', which .* ConnectionError: Couldn't reach the hub; allowed"):
        documents("hf:a/b")


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    with pytest.raises(CorpusError, match=r"bad.txt' is not UTF-8: byte 0xff at offset 5; allowed"):
        documents(str(tmp_path / "bad.txt"))[0]
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(CorpusError, match=r"bad.jsonl' is not UTF-8: byte 0xe9 at offset 24"):
        documents(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.json").write_bytes(b'["\xc3\xa9", "\xe9"]')
    for pieces in (1, 6, 100):
        monkeypatch.setattr("jobs.json_array._PIECE", pieces)
        with pytest.raises(CorpusError, match=r"bad.json' is not UTF-8: byte 0xe9 at offset 8"):
            documents(str(tmp_path / "bad.json"))


# ---- JSON, known by its content ----

ROWS = [{"text": "first, é 漢", "body": "1"}, {"text": "second\n", "body": "2"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
NAMES = ["a.json", "a.jsonl", "a.ndjson", "a.JSON", "a.txt", "a.py", "plain"]
DEEP = "[" * 100_000


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "content",
    [
        LINES, LINES.rstrip("\n"), LINES.replace("\n", "\r\n"), f"\ufeff{LINES}",
        f"\n \t\n{LINES}\n\n", f"\ufeff\n{LINES}",
        json.dumps(ROWS), json.dumps(ROWS, indent=4, ensure_ascii=False), f"\ufeff\n {json.dumps(ROWS)} \n",
        f" [\n{json.dumps(ROWS[0])}\n,\n{json.dumps(ROWS[1])}]",
    ],
    ids=[
        "lines", "no last line break", "two characters a break", "mark", "blank lines", "mark and blank line",
        "array on one line", "array over many", "array after mark", "array of lines",
    ],
)  # fmt: skip
def test_json_is_known_by_what_a_file_holds(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert list(documents(str(tmp_path / name))) == ["first, é 漢", "second\n"]
    corpus = documents(str(tmp_path / name), text_field="body")
    assert [corpus[i] for i in (1, 0)] == ["2", "1"]


@pytest.mark.parametrize("name", NAMES)
def test_an_array_of_strings_holds_documents(tmp_path: Path, name: str):
    (tmp_path / name).write_text('["one", "t\\u0077o\\n", "\\ud83c\\udf89"]')
    assert list(documents(str(tmp_path / name))) == ["one", "two\n", "🎉"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_empty_has_no_documents(tmp_path: Path, name: str):
    jsonl(tmp_path / "full.txt", {"text": "full"})
    (tmp_path / name).write_text("[ ]")
    assert list(documents(f"{tmp_path / name},{tmp_path}/full.txt")) == ["full"]
    with pytest.raises(CorpusError, match="holds no text"):
        documents(str(tmp_path / name))


@pytest.mark.parametrize(
    "content",
    [
        '"a JSON string"\nand prose\n', '"a JSON string"', "12\n", "{braces} are prose\n",
        '{\n "text": "over lines"\n}\n',
        "[1, 2, 3]\n", "[]\nprint(1)\n", '["a", "b"]\nx = 1\n', '["a", 1]', '[{"text": "a"}, "b"]',
        '["quoted", he said',
        '[{"a": None}]\n', '[{"text": 7}, None]\n', '["open', "[", '[{"text": "a"},]', DEEP, " \n", '[{"text": "\\x"}]',
    ],
)  # fmt: skip
def test_other_text_stays_text_however_it_begins(tmp_path: Path, content: str):
    (tmp_path / "a.py").write_text(content)
    assert list(documents(str(tmp_path / "a.py"))) == [content]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n "text": "over lines"\n}\n', r"line 1 is not JSON by itself: Expecting property name.*, column 2; all"),
        ("prose", r"line 1 is not JSON by itself: Expecting value, column 1; allowed: .*; other text under an ending"),
        ('"text"', r"line 1 is a JSON str; allowed: an object with the field 'text'"),
        ("[1, 2]", r"item 1: '1' where an object or a string should begin, at byte 1; allowed: an object on each line"),
        ('["é", ["a"]]', r"item 2: '\[' where an object or a string should begin, at byte 7"),
        ('["a", {"text": "b"}]', r"item 2 is an object among strings"),
        ('[{"text": "b"}, "a"]', r"item 2 is a string among objects"),
        ('["a" "b"]', r"item 1: '\"' where a comma or the end of the array should follow, at byte 5"),
        ('["a", ]', r"item 2: '\]' where an object or a string should begin"),
        ('["a"', r"item 1: the end of the file where a comma or the end of the array should follow"),
        ('["a', r"item 1 is not JSON: Unterminated string"),
        ('[{"text": tru}]', r"item 1 is not JSON: Expecting value"),
        ('["a"]\n["b"]\n', r"a.json' goes on after its array, with '\[', at byte 6"),
        (f'{{"text": {"9" * 5000}}}', r"line 1 is not JSON by itself: Exceeds the limit"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["json", "jsonl", "ndjson"])
def test_a_name_that_promises_json_is_held_to_it(tmp_path: Path, ending: str, content: str, message: str):
    (tmp_path / f"a.{ending}").write_text(content)
    with pytest.raises(CorpusError, match=message.replace("a.json", f"a.{ending}")):
        documents(str(tmp_path / f"a.{ending}"))


@pytest.mark.parametrize("pieces", [1, 2, 7, 64])
def test_an_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int):
    monkeypatch.setattr("jobs.json_array._PIECE", pieces)
    rows = [{"text": f'é漢🎉\\"{i}' * i, "n": -float("inf"), "deep": [[{}], True, 1.5e-7]} for i in range(40)]
    for text in (json.dumps(rows), json.dumps(rows, indent=3, ensure_ascii=False)):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        assert list(documents(str(tmp_path / "a.txt"))) == [row["text"] for row in rows]


def test_a_large_array_is_not_held_in_memory(tmp_path: Path):
    with (tmp_path / "a.json").open("w") as file:
        file.write("[" + ",".join([json.dumps({"text": "x" * 100_000})] * 400) + "]")  # 40 MB
    tracemalloc.start()
    try:
        assert documents(str(tmp_path / "a.json"))[399] == "x" * 100_000
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


# ---- faults of a file of JSON ----


def faulty(tmp_path: Path, *lines: str) -> str:
    """A file of good lines, then these."""
    (tmp_path / "rows.txt").write_text("\n".join(['{"text": "a"}', "", '{"text": "b"}', *lines]) + "\n")
    return str(tmp_path / "rows.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "{broken",
            r"line 4 is not JSON by itself: Expecting property name.*column 2; allowed: an object on each line",
        ),
        (
            '{"body": "x", "n": 1, "title": "y"}',
            r"line 4 has no field 'text', .*; allowed for text_field: body, title$",
        ),
        ('{"n": 1}', r"line 4 has no field 'text', .*; allowed for text_field: none, as no field holds text"),
        ('{"text": 7}', r"line 4: field 'text' is int; allowed: text"),
        ('{"text": null}', r"line 4: field 'text' is NoneType; allowed: text"),
        ('["text"]', r"line 4 is a JSON list; allowed: an object with the field 'text'"),
        (
            '{"text": "a \\ud800"}',
            r"line 4 holds a lone surrogate, \\ud800, at character 2 of its text; allowed: text that",
        ),
        ('{"text": "\\udf89\\ud83c"}', r"line 4 holds a lone surrogate, \\udf89, at character 0"),
        ('{"\\ud800": "a"}', r"line 4 has no field 'text', .*; allowed for text_field: \\ud800"),
        (f'{{"text": "a", "more": {DEEP}}}', r"line 4 is nested too deeply to be read; allowed"),
        (DEEP, r"line 4 is nested too deeply to be read; allowed"),
    ],
    ids=lambda value: value[:40],
)
def test_the_first_bad_line_is_named_before_anything_is_read(tmp_path: Path, line: str, message: str):
    for lines in ([line], [line, '{"text": "c"}', "{worse"], [line, '{"text": 0}', '{"text": "\\udfff"}']):
        with pytest.raises(CorpusError, match=rf"rows.txt', {message}"):
            documents(faulty(tmp_path, *lines))


def test_how_many_lines_lack_the_field_is_said(tmp_path: Path):
    rows = [{"body": str(n)} if n % 100 == 37 else {"text": str(n)} for n in range(1500)]
    for content in ("".join(json.dumps(row) + "\n" for row in rows), json.dumps(rows)):
        (tmp_path / "rows").write_text(content)
        unit = "item" if content.startswith("[") else "line"
        message = rf"rows', {unit} 38 has no field 'text', which 15 of 1,500 {unit}s lack; allowed for text_field: body"
        with pytest.raises(CorpusError, match=message):
            documents(str(tmp_path / "rows"))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ('{"body": "x"}', r"item 3 has no field 'text', which 1 of 3 items lack; allowed for text_field: body"),
        ('{"text": "\\ud800"}', r"item 3 holds a lone surrogate, \\ud800, at character 0"),
        (f'{{"text": {DEEP}', r"item 3 is nested too deeply to be read"),
    ],
    ids=lambda value: value[:40],
)
def test_a_bad_item_is_named(tmp_path: Path, item: str, message: str):
    (tmp_path / "rows.txt").write_text(f'[{{"text": "a"}}, {{"text": "b"}},\n{item}]')
    with pytest.raises(CorpusError, match=rf"rows.txt', {message}"):
        documents(str(tmp_path / "rows.txt"))
    (tmp_path / "strings.json").write_text('["a", "\\udc00"]')
    with pytest.raises(CorpusError, match=r"strings.json', item 2 holds a lone surrogate"):
        documents(str(tmp_path / "strings.json"))


def test_a_first_line_that_is_nested_too_deeply_is_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text('{"a":' * 100_000)
    with pytest.raises(CorpusError, match=r"a.txt', line 1 is nested too deeply to be read"):
        documents(str(tmp_path / "a.txt"))


def test_text_may_begin_with_a_line_that_is_an_object_and_is_told(tmp_path: Path):
    lines = ("prose", "{broken", '"text"', "[1]", "é" * 99_999)
    texts = [f'\ufeff\n{{"text": "a"}}\n\n{line}\n' for line in lines]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    told: list[str] = []
    assert list(documents(f"{tmp_path}/*.txt", tell=told.append)) == [text.removeprefix("\ufeff") for text in texts]
    read_as = "0.txt' is read as text: its first line is a JSON object, and the one after it is none; so are 4 others"
    assert len(told) == 1
    assert told[0].endswith(read_as)
    jsonl(tmp_path / "one.txt", {"text": "alone"})
    assert list(documents(f"{tmp_path}/one.txt", tell=told.append)) == ["alone"]
    (tmp_path / "0.jsonl").write_text(texts[0], encoding="utf-8")
    with pytest.raises(CorpusError, match=r"line 4 is not JSON by itself: .*; other text under an ending of its own$"):
        documents(f"{tmp_path}/0.jsonl", tell=told.append)
    assert len(told) == 1


def test_what_is_advised_where_text_begins_like_json_is_true(tmp_path: Path):
    text = '{"text": "a"}\n{"text": "b"}\nprose\n'
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(CorpusError, match=r"line 3 .*; other text whose first two lines are not both objects$"):
        documents(f"{tmp_path}/a.txt")
    (tmp_path / "a.txt").write_text(f"rows:\n{text}")
    assert list(documents(f"{tmp_path}/a.txt")) == [f"rows:\n{text}"]


def test_a_field_that_has_no_effect_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.json").write_text('["plain", "too"]')
    rows = jsonl(tmp_path / "c.jsonl", {"body": "x"})
    for spec in ("stdlib", f"{tmp_path}/a.txt", f"{tmp_path}/b.json", f"stdlib,{tmp_path}/*.txt"):
        with pytest.raises(
            CorpusError, match=r"text_field is 'body', which has no effect: nothing in data '.*' has fields"
        ):
            documents(spec, text_field="body")
        assert len(documents(spec, text_field="text")) >= 1
    assert list(documents(f"{tmp_path}/a.txt,{rows}", text_field="body")) == ["plain", "x"]


def test_a_file_that_changes_later_is_named(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    corpus = documents(str(path))
    path.write_text(path.read_text().replace('"two"', "'two'"))
    assert corpus[0] == "one"
    with pytest.raises(CorpusError, match="line 2 is not JSON"):
        corpus[1]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    path = tmp_path / "gone.txt"
    path.write_text("here")
    corpus = documents(str(path))
    path.unlink()
    with pytest.raises(CorpusError, match=r"gone.txt' cannot be read: No such file"):
        corpus[0]


# ---- order ----


def test_permutation_is_a_keyed_shuffle_that_never_changes():
    order = permutation(1000, key=5)
    assert sorted(order) == list(range(1000))
    assert (order == permutation(1000, key=5)).all()
    assert (order != permutation(1000, key=6)).mean() > 0.9
    assert permutation(0, key=1).size == 0
    assert permutation(8, key=1).tolist() == PINNED
    displaced = np.abs(order - np.arange(1000)).mean()
    assert 280 < displaced < 390  # a third of the size for a uniform shuffle


PINNED = [3, 5, 2, 7, 0, 6, 1, 4]
"""What 8 and key 1 gave when this was written: a resumed run relies on it."""


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("ab \n\t\u00a0\u0301\u00e9\U0001f600"), max_size=80), size=st.integers(1, 9),
    read=st.integers(1, 7),
)  # fmt: skip
def test_a_text_is_cut_alike_in_memory_and_in_a_file_and_its_digests_do_not_depend_on_that(
    text: str, size: int, read: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (path := tmp_path_factory.mktemp("text") / "a.txt").write_bytes(f"\ufeff{text}".encode())
    with pytest.MonkeyPatch.context() as patch:
        for module in (jobs.pieces, jobs.text_file):
            patch.setattr(module, "PIECE", size)
        patch.setattr(jobs.text_file, "_BYTES", read)
        found = [piece for piece, _ in jobs.pieces.cut(text)]
        assert "".join(found) == text
        assert all(0 < len(piece) <= size for piece in found) or found == [""]
        assert all(piece.endswith("\n") or "\n" not in piece for piece in found[:-1])
        pieces = list(jobs.text_file.TextFile(path).pieces(0))
        assert [piece for piece, _ in pieces] == found
        assert [share == 1 for _, share in pieces] == [False] * (len(found) - 1) + [True]
    said = hashlib.blake2b(json.dumps([normal(text)]).encode(), digest_size=16).hexdigest()
    letters = hashlib.blake2b(text.encode(), digest_size=8).digest()
    assert digests(found) == digests([text]) == (int.from_bytes(letters, "little"), said)
