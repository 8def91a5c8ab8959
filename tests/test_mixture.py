"""Mixtures of data: exact shares in every window, a pure function of seed and sample, one position through faults, a
resumed run and another batch."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cache import Cache
from jobs.config import TrainConfig
from jobs.files import CorpusError
from jobs.forgettable import open_forgettable
from jobs.mixture import Mixture, plain_spec, sources_of
from jobs.prepare_data import Preparation, Text, open_data
from jobs.tokenizer import build_tokenizer
from launch.cli import configured
from launch.config import toml_values
from launch.forkserver import ForkServer
from tests.harness import run_command

BYTES = build_tokenizer("bytes", 0, ())


class Refused(Exception):
    """The data are not what they were."""


def write(folder: Path) -> tuple[str, str]:
    """Texts of a alone, and of b alone."""
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name * (20 + n)} {n}"}) for n in range(30)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "a.jsonl"), str(folder / "b.jsonl")


def prepare(folder: Path, data: str, had: str | None = None, **changes: Any) -> Any:
    config = TrainConfig(data=data, out=folder, sequence_length=8, held_out=0.2, microbatches=2, **changes)

    def accept(fingerprint: str) -> None:
        if had not in (None, fingerprint):
            raise Refused

    text = Text.read(plain_spec(data), config.text_field)
    return Preparation(config, BYTES, Cache(), lambda *_: None, accept).run(text)


def letters(tokens: np.ndarray) -> str:
    return "".join(sorted(set(bytes(tokens[(tokens >= 0) & (tokens < 256)].astype(np.uint8)).decode()) & {"a", "b"}))


def test_every_window_has_the_exact_shares_and_samples_come_from_where_they_say(tmp_path: Path) -> None:
    a, b = write(tmp_path)
    found = prepare(tmp_path / "run", f"{a}:0.7,{b}:0.3")
    assert isinstance(found, Mixture)
    assert found.window == 10
    for window in range(30):  # many epochs of either
        told = Counter(found.source_of(10 * window + at) for at in range(10))
        assert told == {a: 7, b: 3}
    assert len({tuple(found.source_of(10 * w + at) for at in range(10)) for w in range(30)}) > 20, "one order for all"
    for sample in range(0, 300, 7):
        assert letters(found.train_sample(sample)) == ("a" if found.source_of(sample) == a else "b")
        assert found.num_labels(sample) == 8
    # each source is taken in its own order, with nothing left out or repeated
    places = [found.place(sample) for sample in range(200)]
    for source, share in ((0, 140), (1, 60)):
        assert [index for which, index in places if which == source] == [*range(share)] != []
    again = pickle.loads(pickle.dumps(open_data(tmp_path / "run" / "data")))
    assert [again.place(sample) for sample in reversed(range(200))] == places[::-1], "in any order, by anybody"
    assert again.fingerprint == found.fingerprint


def test_held_out_samples_are_dealt_by_the_shares_as_far_as_they_go(tmp_path: Path) -> None:
    a, b = write(tmp_path)
    found = prepare(tmp_path / "run", f"{a}:1,{b}:3")
    ten = [letters(found.held_out_spread(8)(i)) for i in range(8)]
    assert Counter(ten) == {"a": 2, "b": 6}
    whole = [tuple(found.held_out_spread(found.num_held_out)(i)) for i in range(found.num_held_out)]
    assert len(whole) == sum(part.num_held_out for part in found.parts)
    each = {name: part.num_held_out for name, part in zip("ab", found.parts, strict=True)}
    assert Counter(letters(np.array(sample)) for sample in whole) == each
    with pytest.raises(IndexError):
        found.train_sample(-1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("x.txt:0.5,y.txt", "gives 'y.txt' no weight; allowed: SOURCE:WEIGHT for all, or for none"),
        ("x.txt:0.5,y.txt:0", "gives 'y.txt' the weight 0; allowed: above 0"),
        ("x.txt:0.5,x.txt:0.2", "names a source twice"),
        ("x.txt:1,y.txt:0.0001", "gives 'y.txt' a share of less than one sample in 1000"),
    ],
)
def test_weights_that_cannot_be_are_refused(spec: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        sources_of(spec)


def test_what_a_mixture_is(tmp_path: Path) -> None:
    (tmp_path / "odd:0.5").write_text("a file of that name")
    assert sources_of(str(tmp_path / "odd:0.5")) == sources_of("stdlib") == sources_of("a,b") == ()
    assert sources_of("hf:some/name@config:train") == ()
    thirds = sources_of("hf:some/name:train:1,stdlib:1,c:1")
    assert [(s.spec, s.count) for s in thirds] == [("hf:some/name:train", 1), ("stdlib", 1), ("c", 1)]
    assert [s.count for s in sources_of("a:0.3333,b:0.6667")] == [333, 667], "rounded to the longest window"
    assert plain_spec("a:0.5,b:0.5") == "a,b"


def test_command_line_and_table_say_the_same(tmp_path: Path) -> None:
    words = ["--data", "a.txt:0.7", "b.txt:0.3", "--steps", "3"]
    assert configured(TrainConfig, "unbroken train", words).data == "a.txt:0.7,b.txt:0.3"
    (tmp_path / "some.toml").write_text('steps = 3\n[data]\n"a.txt" = 0.7\n"b.txt" = 0.3\n')
    assert toml_values(tmp_path / "some.toml", TrainConfig)["data"] == "a.txt:0.7,b.txt:0.3"
    (tmp_path / "some.toml").write_text('data = ["a.txt", "b.txt"]\n')
    assert toml_values(tmp_path / "some.toml", TrainConfig)["data"] == "a.txt,b.txt"


def test_another_mixture_is_refused_before_anything_changes(tmp_path: Path) -> None:
    a, b = write(tmp_path)
    first = prepare(tmp_path / "run", f"{a}:0.7,{b}:0.3")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    assert prepare(tmp_path / "run", f"{a}:7,{b}:3", first.fingerprint).fingerprint == first.fingerprint
    for other in (f"{a}:0.6,{b}:0.4", f"{b}:0.7,{a}:0.3", a):
        with pytest.raises(Refused):
            prepare(tmp_path / "run", other, first.fingerprint)
        assert {path: path.read_bytes() for path in before} == before
    single = prepare(tmp_path / "run", a)
    assert sorted(path.name for path in (tmp_path / "run" / "data").iterdir()) == [
        "documents.jsonl", "meta.json", "tokens.bin",
    ]  # fmt: skip
    assert prepare(tmp_path / "run", f"{a}:0.5,{b}:0.5", None).fingerprint != single.fingerprint
    assert isinstance(open_data(tmp_path / "run" / "data"), Mixture)
    with pytest.raises(CorpusError, match="holds a mixture of several sources, of which nothing can be forgotten yet"):
        open_forgettable(tmp_path / "run" / "data")


def test_rows_are_mixed_with_rows(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = [{"question": f"{name}?", "answer": name * (n + 1)} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    config = {"data": f"{a}:0.5,{b}:0.5", "out": tmp_path / "run", "sequence_length": 32, "microbatches": 2}
    text = Text.read(f"{a},{b}", "text")
    found = Preparation(TrainConfig(**config), BYTES, Cache(), lambda *_: None, lambda _: None).run(text)
    assert isinstance(found, Mixture)
    assert found.rows
    assert Counter(letters(found.train_sample(i).labels) for i in range(8)) == {"a": 4, "b": 4}


# ---- whole runs ----


def ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]


def test_a_run_goes_on_with_the_next_unseen_sample_after_another_batch(forkserver: ForkServer, tmp_path: Path) -> None:
    a, b = write(tmp_path)
    flags = [
        "train", "--out", str(tmp_path / "run"), "--threads", "1", "--sample-tokens", "0", "--checkpoint-every", "0",
    ]  # fmt: skip
    data = ["--data", f"{a}:0.75", f"{b}:0.25", "--tokenizer", "bytes", "--held-out", "0.2"]
    shape = ["--model", "llama-tiny", "--sequence-length", "16", "--microbatches", "2", "--workers", "2"]
    more = ["--microbatch-size", "2", "--steps", "3", "--evaluate-every", "0", "--evaluate-samples", "4"]
    done = run_command(forkserver, tmp_path / "log", *flags, *data, *shape, *more)
    assert done.code == 0, done.output
    assert f"a mixture: of every 4 samples 3 of {a}, 1 of {b}" in done.output
    again = ["--resume", "--change", "--microbatch-size", "3", "--steps", "5"]
    done = run_command(forkserver, tmp_path / "log", *flags, *again)
    assert done.code == 0, done.output
    lines = ledger(tmp_path / "run")
    taken = [id for line in lines for id in range(line["first_sample"], line["first_sample"] + line["samples"])]
    assert taken == [*range(3 * 4 + 2 * 6)], "each sample once, none left out"
    assert [line["sources"] for line in lines[:3]] == [{a: 3, b: 1}] * 3
    assert sum(line["sources"][b] for line in lines) == 6
    scored = run_command(forkserver, tmp_path / "log", "eval", "--model", str(tmp_path / "run" / "model"))
    assert scored.code == 0, scored.output
    assert "that the run in" in scored.output
    refused = run_command(
        forkserver, tmp_path / "log", *flags, "--resume", "--data", f"{a}:0.5", f"{b}:0.5", "--steps", "6"
    )
    assert refused.code == 2
    assert "cannot resume with another data" in refused.output
