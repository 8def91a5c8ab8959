"""What one run has made of its text is there for the next, whole or not at all; and no trouble with it is a run's."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import prepare as module
from jobs.cache import Cache, user_folder
from jobs.config import TrainConfig
from jobs.corpus import documents
from jobs.data import Dataset
from jobs.files import CorpusError
from jobs.plan import make_plan
from jobs.prepare import prepare
from jobs.tokenizer import build_tokenizer

BYTES = build_tokenizer("bytes", 0, ())
KEY = "0" * 32


# ---- where it is ----


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "/home/me/.cache/unbroken"),
        ({"XDG_CACHE_HOME": "/var/fast"}, "/var/fast/unbroken"),
        ({"XDG_CACHE_HOME": "not/absolute"}, "/home/me/.cache/unbroken"),  # which the XDG specification says to ignore
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/unbroken"),
        ({"UNBROKEN_CACHE": "/mine", "XDG_CACHE_HOME": "/var/fast"}, "/mine"),
        ({"UNBROKEN_CACHE": "~/mine"}, "/home/me/mine"),
        ({"UNBROKEN_CACHE": ""}, "/home/me/.cache/unbroken"),
        ({"UNBROKEN_CACHE": "off", "XDG_CACHE_HOME": "/var/fast"}, None),
        ({"UNBROKEN_CACHE": "~nobody-of-this-name/cache"}, None),
    ],
)
def test_the_environment_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str | None
) -> None:
    for name in ("UNBROKEN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert user_folder() == (None if expected is None else Path(expected))


# ---- entries ----


class Kept:
    """A cache in a folder, and what it has told."""

    def __init__(self, folder: Path | None, **settings: Any) -> None:
        self.told: list[str] = []
        self.cache = Cache(folder, self.told.append, **settings)

    def put(self, key: str, content: bytes) -> None:
        self.cache.put("tokens", key, {"key": key}, io.BytesIO(content))

    def take(self, key: str) -> bytes | None:
        into = io.BytesIO()
        about = self.cache.take("tokens", key, into)
        assert about in (None, {"key": key})
        return None if about is None else into.getvalue()


def test_what_is_put_is_taken(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "deep" / "cache")
    assert kept.take(KEY) is None
    assert kept.cache.keys("tokens", "") == []
    content = os.urandom(3_000_000)
    kept.put(KEY, content)
    kept.put("01", b"")
    assert Kept(tmp_path / "deep" / "cache").take(KEY) == content
    assert kept.take("01") == b""
    assert kept.cache.keys("tokens", "") == [KEY, "01"]
    assert kept.cache.keys("tokens", "00") == [KEY]
    assert kept.cache.keys("tokenizer", "") == []
    assert kept.told == ["tokens taken from the cache"]
    assert (tmp_path / "deep" / "cache").stat().st_mode & 0o077 == 0


def test_without_a_folder_nothing_is_kept() -> None:
    kept = Kept(None)
    kept.put(KEY, b"content")
    assert kept.take(KEY) is None
    assert kept.cache.keys("tokens", "") == []
    assert kept.told == []


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty"])
def test_a_damaged_entry_is_told_and_written_anew(tmp_path: Path, damage: str) -> None:
    kept = Kept(tmp_path)
    content = bytes(range(200))
    kept.put(KEY, content)
    path = tmp_path / f"tokens-{KEY}"
    whole = path.read_bytes()
    for at in range(0, len(whole), 7) if damage == "flip" else [0]:
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        path.write_bytes({"flip": flipped, "cut": whole[:-1], "grow": whole + b"\n", "empty": b""}[damage])
        assert kept.take(KEY) is None, at
        assert kept.told.pop() == f"tokens in the cache damaged and made anew: {path}"
        kept.put(KEY, content)
        assert kept.take(KEY) == content
        assert kept.told.pop() == "tokens taken from the cache"


def test_a_cache_that_cannot_be_written_is_told_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    kept = Kept(tmp_path / "file" / "cache")
    kept.put(KEY, b"content")
    assert kept.take(KEY) is None
    assert kept.told == [f"tokens not kept in the cache '{tmp_path}/file/cache': Not a directory"]
    full = Kept(tmp_path / "full")
    full.put("aa", b"x" * 40_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # Python ignores SIGXFSZ: writes fail with EFBIG
    try:
        full.put("bb", b"x" * 60_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.told == [f"tokens not kept in the cache '{tmp_path}/full': File too large"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["tokens-aa"]


def test_what_was_not_used_for_longest_goes_first_and_nothing_else(tmp_path: Path) -> None:
    kept = Kept(tmp_path, bound_bytes=3500)
    (tmp_path / "thesis.txt").write_bytes(b"x" * 9000)
    (tmp_path / "tokens-of-mine.txt").write_bytes(b"x" * 9000)
    for second, name in enumerate(("aa", "bb", "cc")):
        kept.put(name, b"x" * 700)
        os.utime(tmp_path / f"tokens-{name}", (second, second))
    for name, age in (("dd", 10.0), ("ee", 90_000.0)):
        (tmp_path / f"tokens-{name}.k1_2x.tmp").write_bytes(b"x" * 9000)
        os.utime(tmp_path / f"tokens-{name}.k1_2x.tmp", (time.time() - age,) * 2)
    assert kept.take("aa") == b"x" * 700  # which makes it the youngest but for what comes now
    kept.put("ff", b"x" * 700)
    kept.put("0f", b"x" * 700)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "thesis.txt", "tokens-0f", "tokens-aa", "tokens-cc", "tokens-dd.k1_2x.tmp", "tokens-ff", "tokens-of-mine.txt",
    ]  # fmt: skip
    kept.put("99", b"x" * 4000)
    assert kept.told[-1] == f"tokens not kept in the cache '{tmp_path}': 4,000 bytes; the cache holds 3,500"
    assert kept.take("0f") is not None


def test_the_same_entry_may_be_written_and_read_at_once(tmp_path: Path) -> None:
    content, wrong = os.urandom(200_000), list[bytes]()

    def work() -> None:
        kept = Kept(tmp_path)
        for _ in range(20):
            kept.put(KEY, content)
            if (found := kept.take(KEY)) != content:
                wrong.append(found or b"nothing")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [path.name for path in tmp_path.iterdir()] == [f"tokens-{KEY}"]


# ---- tokens ----


def corpus(path: Path, *, changed: int = -1, count: int = 60) -> str:
    rows = [f"{'other' if d == changed else d} says {chr(40 + d)}." * 5 for d in range(count)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def make(folder: Path, kept: Kept, spec: str, **changes: Any) -> Dataset:
    settings: dict[str, Any] = {
        "tokenizer": BYTES, "sequence_length": 8, "held_out": 0.1, "folder": folder, "seed": 0, "cache": kept.cache,
        "samples_per_step": 4, "text_field": "text",
    }  # fmt: skip
    settings |= changes
    return prepare(documents(spec, text_field=settings.pop("text_field")), **settings)


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which datasets have really been tokenised, by the names of their folders."""
    made: list[str] = []
    write = module._write

    def counted(path: Path, *rest: Any) -> Any:
        made.append(path.parent.name)
        return write(path, *rest)

    monkeypatch.setattr(module, "_write", counted)
    return made


def test_the_same_text_is_tokenised_once_whatever_its_name(tmp_path: Path, once: list[str]) -> None:
    kept = Kept(tmp_path / "cache")
    one = make(tmp_path / "one", kept, corpus(tmp_path / "a.jsonl"))
    rows = [{"body": row, "text": 1} for row in documents(str(tmp_path / "a.jsonl"))]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    two = make(tmp_path / "two", kept, str(tmp_path / "b.json"), text_field="body")
    assert once == ["one"]
    assert kept.told == ["tokens taken from the cache"]
    assert (two.tokens == one.tokens).all()
    assert two.fingerprint == one.fingerprint
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["documents.jsonl", "meta.json", "tokens.bin"]
    make(tmp_path / "two", kept, str(tmp_path / "b.json"), text_field="body")  # and is there when the run goes on
    assert (once, len(kept.told)) == (["one"], 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1}, {"sequence_length": 9}, {"held_out": 0.2}, {"max_tokens": 1500},
        {"tokenizer": build_tokenizer("bpe", 300, ["1 says 2. 3 says 4." * 50])},
    ],
    ids=str,
)  # fmt: skip
def test_other_settings_are_other_entries(tmp_path: Path, once: list[str], changes: dict[str, Any]) -> None:
    kept = Kept(tmp_path / "cache")
    spec = corpus(tmp_path / "a.jsonl")
    one = make(tmp_path / "one", kept, spec)
    assert make(tmp_path / "two", kept, spec, **changes).fingerprint != one.fingerprint
    assert once == ["one", "two"]


def test_other_text_is_another_entry_but_not_where_it_is_never_read(tmp_path: Path, once: list[str]) -> None:
    kept = Kept(tmp_path / "cache")
    spec = corpus(tmp_path / "a.jsonl")
    make(tmp_path / "one", kept, spec, max_tokens=1000)
    changed = [make(tmp_path / f"{d}", kept, corpus(tmp_path / "b.jsonl", changed=d), max_tokens=1000).fingerprint
               for d in range(60)]  # fmt: skip
    read = json.loads((tmp_path / "one" / "meta.json").read_text())["read"]
    assert len(once) == 1 + read  # the first document that was not read makes no difference, nor those after it
    assert len(set(changed)) == 1 + read
    make(tmp_path / "more", kept, corpus(tmp_path / "b.jsonl", count=61), max_tokens=1000)
    assert once[-1] == "more"
    assert len(kept.told) == 60 - read


def test_a_run_folder_needs_no_cache_and_does_not_harm_it(tmp_path: Path, once: list[str]) -> None:
    kept = Kept(tmp_path / "cache")
    spec = corpus(tmp_path / "a.jsonl")
    tokens = np.array(make(tmp_path / "one", kept, spec).tokens)
    for name in ("one", "two"):
        make(tmp_path / name, kept, spec)
        with (tmp_path / name / "tokens.bin").open("r+b") as file:
            file.write(b"\xff" * 100)
    assert (make(tmp_path / "three", kept, spec).tokens == tokens).all()
    assert once == ["one"]
    shutil.rmtree(tmp_path / "cache")
    assert (Dataset.open(tmp_path / "three").tokens == tokens).all()
    make(tmp_path / "three", kept, spec)
    assert once == ["one"]


def test_damaged_tokens_are_made_anew(tmp_path: Path, once: list[str]) -> None:
    kept = Kept(tmp_path / "cache")
    spec = corpus(tmp_path / "a.jsonl")
    tokens = np.array(make(tmp_path / "one", kept, spec).tokens)
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(entry.read_bytes()[:-2])
    assert (make(tmp_path / "two", kept, spec).tokens == tokens).all()
    assert (make(tmp_path / "three", kept, spec).tokens == tokens).all()
    assert once == ["one", "two"]
    assert kept.told == [f"tokens in the cache damaged and made anew: {entry}", "tokens taken from the cache"]


def test_the_cache_is_no_way_around_what_is_refused(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "cache")
    spec = corpus(tmp_path / "a.jsonl")
    make(tmp_path / "one", kept, spec)
    with pytest.raises(CorpusError, match="needed: 16001, one global batch of 2000 samples"):
        make(tmp_path / "two", kept, spec, samples_per_step=2000)

    def refuse(fingerprint: str) -> None:
        raise ValueError(fingerprint)

    with pytest.raises(ValueError, match=Dataset.open(tmp_path / "one").fingerprint):
        make(tmp_path / "two", kept, spec, accept=refuse)
    assert list((tmp_path / "two").iterdir()) == []


def test_a_full_disk_is_no_fault_of_the_cache(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "cache")
    spec = corpus(tmp_path / "a.jsonl")
    make(tmp_path / "one", kept, spec)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CorpusError, match=r"cannot be written to '.*two': File too large"):
            make(tmp_path / "two", kept, spec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "two").iterdir()) == []


def test_a_tokenizer_that_does_not_say_what_it_does_is_not_cached(tmp_path: Path, once: list[str]) -> None:
    class Slow:
        eos_token_id = 256

        def __len__(self) -> int:
            return 258

        def __call__(self, text: str, **how: Any) -> Any:
            return BYTES(text, **how)

        def get_vocab(self) -> dict[str, int]:
            return {}

    kept = Kept(tmp_path / "cache")
    for name in ("one", "two"):
        make(tmp_path / name, kept, corpus(tmp_path / "a.jsonl"), tokenizer=Slow())
    assert once == ["one", "two"]
    assert not (tmp_path / "cache").exists()


# ---- tokenizers ----


def test_a_tokenizer_is_trained_once_for_each_text_and_size(tmp_path: Path) -> None:
    kept, trained = Kept(tmp_path / "cache"), list[str]()

    def build(texts: list[str], vocabulary: int = 300) -> str:
        trained.append("")
        made = build_tokenizer(
            "bpe", vocabulary, texts, progress=lambda what, share: trained.append(what), cache=kept.cache
        )
        return made.backend_tokenizer.to_str()

    def trains(build: Callable[[], str]) -> bool:
        trained.clear()
        build()
        return "training the tokenizer" in trained

    texts = [f"{n} words and more words {n}" for n in range(50)]
    first = build(texts)
    assert "training the tokenizer" in trained
    assert not trains(lambda: build(texts))
    assert build(texts) == first == build_tokenizer("bpe", 300, texts).backend_tokenizer.to_str()
    assert kept.told == ["tokenizer taken from the cache"] * 2
    assert trains(lambda: build(texts, 301))
    assert trains(lambda: build([*texts, "and more"]))
    assert trains(lambda: build([texts[0] + texts[1], *texts[2:]]))


# ---- a run ----


def test_two_runs_prepare_the_same_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBROKEN_CACHE", str(tmp_path / "cache"))
    base = TrainConfig(
        data=corpus(tmp_path / "a.jsonl"), model="llama-tiny", vocabulary=300, sequence_length=8, microbatches=2,
        microbatch_size=2, workers=1,
    )  # fmt: skip

    def told(out: str, **changes: Any) -> set[str]:
        lines: set[str] = set()
        make_plan(replace(base, out=tmp_path / out, **changes), lambda what, share: lines.add(what))
        return lines

    taken = {"tokenizer taken from the cache", "tokens taken from the cache"}
    assert told("one") == {"training the tokenizer", "tokenising"}
    assert told("two") == taken
    one, two = (Dataset.open(tmp_path / name / "data") for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert told("three", seed=1) == {"tokenizer taken from the cache", "tokenising"}
    monkeypatch.setenv("UNBROKEN_CACHE", "off")
    assert told("four") == {"training the tokenizer", "tokenising"}
    monkeypatch.setenv("UNBROKEN_CACHE", str(tmp_path / "a.jsonl"))
    lost = {f"{kind} not kept in the cache '{tmp_path}/a.jsonl': File exists" for kind in ("tokens", "tokenizer")}
    assert told("five") == {"training the tokenizer", "tokenising", *lost}
