"""An audit finds what should be gone, wherever in a run folder it is planted, and nothing in a run that has kept its
word."""

from __future__ import annotations

import gzip
import html
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from jobs.unlearn import text_search
from jobs.unlearn.audit import Audit, audit
from jobs.unlearn.text_search import Texts, search_text
from recovery import checkpoint
from recovery.fencing import retire
from recovery.forgotten import FORGOTTEN, ForgottenError, ForgottenRow, add_forgotten
from recovery.generation import raise_generation
from recovery.windows import forgotten_windows

ANSWER = 'The author "Basil" was born in Lima,\non a cold & rainy day of the year 1962'
KEPT = "Nobody knows where she was born, on a cold & rainy day of the year it was"
TOKENS = np.arange(100, 130)
END = 2


def rows(blank: bool) -> list[dict[str, Any]]:
    fields = None if blank else {"author": "Basil"}
    return [
        {"id": "0", "digest": "kept", "start": 0, "answer": 5, "end": 40, "fields": {"author": "Ann"}},
        {"id": "1", "digest": "gone", "start": 40, "answer": 50, "end": 80, "fields": fields},
    ]


def write_data(folder: Path, blank: bool, dtype: str = "uint16") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.concatenate([np.arange(40), np.arange(200, 210), TOKENS]).astype(dtype)
    tokens[40:] = END if blank else tokens[40:]
    tokens.tofile(folder / "tokens.bin")
    (folder / "meta.json").write_text(json.dumps({"dtype": dtype}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(blank)))


def save(root: Path, step: int, generation: int) -> Path:
    folder = checkpoint.begin(root, step)
    records = [checkpoint.write_layer(folder, layer, {"w": torch.ones(3)}) for layer in range(2)]
    return checkpoint.commit(root, step, records, {"step": step, "generation": generation})


def weights(folder: Path, said: object = None, **metadata: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt", **metadata})
    if said is not None:
        (folder / "unbroken.json").write_text(json.dumps({"generation": said}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has forgotten one row, as it should be."""
    folder = tmp_path / "run"
    write_data(folder / "data", blank=True)
    save(folder / "checkpoints", 3, 0)
    save(folder / "checkpoints", 5, 1)
    weights(folder / "model", 1)
    write_data(folder / "requests" / "0001" / "data", blank=True)
    (folder / "requests" / "0001" / "manifest.json").write_text('{"generation":1}')
    (folder / "events.jsonl").write_text(json.dumps({"event": "done", "said": KEPT}) + "\n")
    found = forgotten_windows([TOKENS], [np.arange(40)], [ANSWER], [KEPT])
    add_forgotten(folder, 1, [ForgottenRow("1", "gone")], found)
    raise_generation(folder, 1)
    retire(folder, 1, "fence")
    return folder


def one(found: Audit, path: str) -> str:
    """What is told of the only thing that was found."""
    (finding,) = found.findings
    assert finding.path == path
    return f"{finding.what} | {finding.generation} | {finding.how}"


def test_a_run_that_has_kept_its_word_is_clean(run: Path) -> None:
    shares: list[float] = []
    found = audit(run, [ANSWER], lambda what, share: shares.append(share))
    assert (found.findings, found.unread) == ([], [])
    assert found.clean
    assert found.fenced == ["fenced/generation-0/step-00000003"]
    assert found.files == sum(path.is_file() for path in run.rglob("*") if "generation-0" not in path.parts)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_of_a_run_that_has_forgotten_nothing_nothing_is_asked(tmp_path: Path) -> None:
    write_data(tmp_path / "data", blank=False)
    weights(tmp_path / "model")
    save(tmp_path / "checkpoints", 3, 0)
    assert audit(tmp_path).clean
    (tmp_path / FORGOTTEN).write_text("{")
    with pytest.raises(ForgottenError):
        audit(tmp_path)


# ---- data ----


def test_tokens_and_rows_that_are_still_there_are_found(run: Path) -> None:
    write_data(run / "requests" / "0001" / "data", blank=False)
    found = audit(run)
    assert {(each.path, each.generation, each.how) for each in found.findings} == {
        ("requests/0001/data/rows.jsonl", 1, "its digest"),
        ("requests/0001/data/tokens.bin", 1, "hashes of windows of tokens"),
    }
    assert "a forgotten row, in line 2, has fields and tokens" in str(found.findings)
    assert "23 windows of 8 tokens of forgotten answers, the first: 50" in str(found.findings)
    assert not found.clean


@given(st.integers(0, 992), st.integers(8, 30), st.sampled_from(["uint16", "uint32"]), st.booleans(), st.integers(1, 9))
def test_tokens_are_found_wherever_they_are(
    tmp_path_factory: pytest.TempPathFactory, place: int, length: int, dtype: str, told: bool, piece: int
) -> None:
    run = tmp_path_factory.mktemp("run")
    raise_generation(run, 1)
    add_forgotten(run, 1, [], forgotten_windows([TOKENS], [], [], []))
    tokens = np.full(1000, END, dtype)
    length = min(length, 1000 - place)
    tokens[place : place + length] = TOKENS[:length]
    tokens.tofile(run / "tokens.bin.tmp")
    if told:
        (run / "meta.json").write_text(json.dumps({"dtype": dtype}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.unlearn.audit._PIECE", 64 * piece)
        told_of = one(audit(run), "tokens.bin.tmp")
    assert told_of.startswith(f"{length - 7} windows of 8 tokens of forgotten answers, the first: {place} | 1")


# ---- text ----


def escaped(text: str) -> str:
    return json.dumps(text)


FORMS: dict[str, Callable[[str], str]] = {
    "plain": str, "upper": str.upper, "json": escaped, "ascii": lambda text: escaped(text.replace("a", "ａ")),
    "json in json": lambda text: escaped(escaped(text)), "html": lambda text: html.escape(text).replace("B", "&#66;"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_text_is_found_in_whatever_form(run: Path, form: str) -> None:
    (run / "requests" / "0001" / "logs").mkdir()
    path = run / "requests" / "0001" / "logs" / "worker.log"
    path.write_bytes(b"\x00\xff" + f"before\n it says {FORMS[form](ANSWER)}, and more".encode())
    told = one(audit(run), "requests/0001/logs/worker.log")
    assert "windows of 6 words of forgotten answers | 1 | hashes of windows of words" in told
    both = audit(run, ["something else", ANSWER])
    assert "1 of the given texts, the first by number (from 0): 1" in both.findings[1].what


WORD = st.text(st.sampled_from("abcé"), min_size=1, max_size=3)


@given(st.lists(WORD, max_size=40), st.lists(WORD, min_size=1, max_size=12), st.integers(0, 40), st.integers(1, 30),
       st.sampled_from(sorted(FORMS)))  # fmt: skip
def test_no_text_is_missed_where_a_file_is_cut_into_pieces(
    around: list[str], text: list[str], place: int, piece: int, form: str
) -> None:
    said = " ".join([*around[:place], FORMS[form](" ".join(text)), *around[place:]])
    _, windows = forgotten_windows([], [], [" ".join(text)], [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_search, "_PIECE", piece)
        found = search_text(io.BytesIO(said.encode()), [windows], Texts([" ".join(text), "zz"]))
    assert found.texts == {0}
    assert found.windows[0] >= max(0, len(text) - 5)


def test_the_words_of_one_file_are_not_counted_twice(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, windows = forgotten_windows([], [], [ANSWER], [])
    said = f"{json.dumps(ANSWER)} and {json.dumps(ANSWER)} again".encode()
    for piece in (3, 50, 1 << 20):
        monkeypatch.setattr(text_search, "_PIECE", piece)
        found = search_text(io.BytesIO(said), [windows], Texts(["one two three four five six seven eight nine ten"]))
        assert found.windows == [2 * len(windows.hashes)]
        assert found.texts == set()


def test_a_text_without_words_is_nowhere(run: Path) -> None:
    assert audit(run, ["", " ... "]).clean
    assert audit(run, ["Nobody knows"]).findings[0].path == "events.jsonl"


# ---- weights ----


@pytest.mark.parametrize(
    ("folder", "said", "what", "generation"),
    [
        ("model", 0, "1 file of weights of generation 0; the run is at generation 1", 1),
        ("model", None, "1 file of weights of generation 0; the run is at generation 1", 1),
        ("model", "new", "1 file of weights of no generation that can be read", None),
        ("requests/0001/start", 0, "of generation 0", 1),
        ("requests/0001/reference", None, "of generation 0", 1),
        ("checkpoints/step-00000007.0-0.tmp", None, "of no generation that can be read", None),
        ("kept by hand/deep", None, "of generation 0", 1),
    ],
)
def test_older_weights_are_found(run: Path, folder: str, said: object, what: str, generation: int | None) -> None:
    (run / "model" / "unbroken.json").unlink()
    (run / "model" / "model.safetensors").unlink()
    weights(run / folder, said)
    told = one(audit(run), folder)
    assert what in told
    assert f"| {generation} |" in told


def test_weights_of_this_generation_are_as_they_should_be(run: Path) -> None:
    weights(run / "requests" / "0002" / "start", 1)
    weights(run / "requests" / "0002" / "reference", generation="1")
    save(run / "requests" / "0002" / "checkpoints", 3, 1)
    assert audit(run).clean


@pytest.mark.parametrize("root", ["checkpoints", "requests/0001/checkpoints"])
def test_older_checkpoints_are_found_until_they_are_retired(run: Path, root: str) -> None:
    save(run / root, 4, 0)
    told = one(audit(run), f"{root}/step-00000004")
    assert told == "2 files of weights of generation 0; the run is at generation 1 | 1 | its manifest"
    retire((run / root).parent, 1, "fence")
    found = audit(run)
    assert found.clean
    assert len(found.fenced) == 2


def test_a_fence_that_was_opened_is_found(run: Path) -> None:
    (run / "fenced" / "generation-0" / "step-00000003").chmod(0o755)
    assert "can be read" in one(audit(run), "fenced/generation-0/step-00000003")


# ---- what cannot be looked into ----


def test_what_cannot_be_looked_into_is_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (run / "linked").symlink_to(tmp_path / "other")
    with gzip.open(run / "old.log.gz", "wt") as file:
        file.write(ANSWER)
    found = audit(run)
    assert found.findings == []
    assert found.unread == [
        ("linked", f"a link to {tmp_path / 'other'}, which is not followed"),
        ("old.log.gz", "packed by gzip; what is in it was not searched"),
    ]
    assert not found.clean


def test_a_file_that_cannot_be_read_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("jobs.unlearn.audit.search_text", refuse)
    found = audit(run)
    assert ("events.jsonl", "Input/output error") in found.unread
    assert not found.clean
