"""The space that a run needs is known, said and checked before it writes anything."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.config import ConfigError, TrainConfig
from jobs.corpus import documents
from jobs.plan import make_plan
from jobs.space import check_space, in_words, space_needed
from jobs.tokenizer import build_tokenizer
from launch.forkserver import ForkServer
from pipeline.model.layered import LayeredModel
from pipeline.model.lora import Lora
from pipeline.model.weights import preset
from tests.harness import run_command

TINY = LayeredModel(preset("llama-tiny", vocab_size=258))
NUMBERS = sum(map(TINY.parameter_count, range(TINY.num_layers)))


@pytest.mark.parametrize(
    ("changes", "first_step", "there", "checkpoints"),
    [
        ({"steps": 3, "checkpoint_every": 80}, 0, 0, 1),
        ({"steps": 3, "checkpoint_every": 0}, 0, 0, 1),
        ({"steps": 160, "checkpoint_every": 80}, 0, 0, 2),
        ({"steps": 161, "checkpoint_every": 80}, 0, 0, 3),
        ({"steps": 10_000, "checkpoint_every": 80}, 0, 0, 3),
        ({"steps": 10_000, "checkpoint_every": 80, "keep": 5}, 0, 0, 6),
        ({"steps": 10_000, "checkpoint_every": 80}, 80, 1, 2),
        ({"steps": 10_000, "checkpoint_every": 80}, 160, 2, 1),
        ({"steps": 10_000, "checkpoint_every": 80, "keep": 1}, 800, 5, 1),
        ({"steps": 100}, 100, 1, 0),
    ],
)
def test_checkpoints_that_lie_beside_each_other(
    changes: dict[str, Any], first_step: int, there: int, checkpoints: int
) -> None:
    """`keep` of them, and the one that is being written; those that are there already take no more space."""
    assert space_needed(TrainConfig(**changes), TINY, first_step, there).checkpoints == checkpoints


def test_a_checkpoint_is_weights_and_two_moments() -> None:
    space = space_needed(TrainConfig(max_tokens=1000), TINY, most_tokens=5000)
    assert 12 * NUMBERS <= space.checkpoint <= 12 * NUMBERS + 8192 * 6
    assert (space.model, space.tokens) == (4 * NUMBERS, 2000)
    assert space.total == space.checkpoints * space.checkpoint + space.model + 2000
    behind = space_needed(TrainConfig(scheduler="roundpipe", optimizer_async=True), TINY)
    assert behind.checkpoint - space.checkpoint == 4 * NUMBERS
    assert space_needed(TrainConfig(max_tokens=0), TINY).tokens is None
    plain = space_needed(TrainConfig(optimizer="sgd"), TINY)
    assert 4 * NUMBERS <= plain.checkpoint <= 4 * NUMBERS + 8192 * 6, "weights alone"


def test_tokens_count_no_further_than_the_text_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = TrainConfig(max_tokens=10**11)
    short, unknown = (space_needed(config, TINY, most_tokens=most) for most in (500, None))
    assert short.tokens == 1000
    assert str(short).endswith("tokens up to 1 kB")
    assert str(unknown).endswith("the tokens of the text, 200 GB at most")
    assert short.total == unknown.total + 1000
    long = space_needed(config, TINY, most_tokens=10**9)
    full(monkeypatch, long.total - 1)
    assert check_space(tmp_path, short)
    assert check_space(tmp_path, unknown)
    with pytest.raises(
        ConfigError, match=r"tokens up to 2 GB; allowed: a folder with more room, or fewer tokens \(max_t"
    ):
        check_space(tmp_path, long)


def test_the_most_tokens_of_a_text_are_its_bytes_and_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é" * 10)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "tw\\u006f"}\n')
    corpus = documents(f"{tmp_path}/*")
    assert corpus.most_tokens == 20 + 16 + 21 + 3
    tokenizer = build_tokenizer("bytes", 0, ())
    assert sum(len(tokenizer(text)["input_ids"]) + 1 for text in corpus) <= corpus.most_tokens
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": ["a"]}))
    assert documents(f"hf:owner/name,{tmp_path}/a.txt").most_tokens is None


def test_a_short_text_is_trained_on_with_any_number_of_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a pipeline of workers trains on this. " * 400)
    config = TrainConfig(
        model="llama-tiny", data=str(tmp_path / "a.txt"), tokenizer="bytes", workers=2, microbatches=2,
        sequence_length=32, max_tokens=10**12, out=tmp_path / "run",
    )  # fmt: skip
    plan = make_plan(config, lambda what, share: None)
    assert [line for line in plan.said if line.startswith("space: ") and "tokens up to 30.4 kB;" in line]


def test_frozen_weights_have_no_moments() -> None:
    pytest.importorskip("peft")
    lora = LayeredModel(preset("llama-tiny", vocab_size=258), lora=Lora(4))
    trained = sum(map(lora.trained_count, range(lora.num_layers)))
    space = space_needed(TrainConfig(scheduler="roundpipe", lora_rank=4), lora)
    assert 4 * (NUMBERS + trained) + 8 * trained <= space.checkpoint < 12 * NUMBERS / 2


def full(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    real = shutil.disk_usage

    def usage(path: Any) -> Any:
        return real(path)._replace(free=free)

    monkeypatch.setattr("jobs.space.shutil.disk_usage", usage)


def test_what_cannot_fit_is_refused_with_needed_and_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    space = space_needed(TrainConfig(), TINY, most_tokens=10**9)
    full(monkeypatch, space.total)
    assert check_space(tmp_path / "deep" / "run", space) == f"space: {space}; {in_words(space.total)} are free"
    full(monkeypatch, space.total - 1)
    with pytest.raises(ConfigError, match=r"run', where 16 MB are free, and the run needs 16 MB: 3 checkpoints of 2"):
        check_space(tmp_path / "deep" / "run", space)


def test_it_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full(monkeypatch, 10_000)
    config = TrainConfig(model="llama-tiny", data="nowhere.txt", out=tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"where 10 kB are free, and the run needs .*; allowed: a folder with more ro"
    ):
        make_plan(config, lambda what, share: None)
    assert list(tmp_path.iterdir()) == []


def test_a_run_takes_what_it_said(forkserver: ForkServer, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a pipeline of workers trains on this. " * 400)
    done = run_command(
        forkserver, tmp_path / "log", "train", "--model", "llama-tiny", "--data", str(tmp_path / "text.txt"),
        "--tokenizer", "bytes", "--workers", "2", "--microbatches", "2", "--sequence-length", "32", "--steps", "3",
        "--max-tokens", "9000", "--checkpoint-every", "1", "--evaluate-every", "0", "--sample-tokens", "0",
        "--threads", "1", "--recovery", "none", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("space: ")]
    config = TrainConfig(steps=3, checkpoint_every=1, max_tokens=9000)
    space = space_needed(config, TINY, most_tokens=10**6)
    assert line.startswith(f"space: {space}; ")

    def size(*names: str) -> int:
        return sum(p.stat().st_size for name in names for p in (tmp_path / "run").glob(name) if p.is_file())

    kept = size("checkpoints/*/*")
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    assert kept <= 2 * space.checkpoint <= 1.1 * kept
    assert space.model <= size("model/*.safetensors") <= 1.1 * space.model
    assert size("data/tokens.bin") <= (space.tokens or 0)
    assert replace(space, checkpoints=0, model=0).total == space.tokens


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1_614_000_000, "1.61 GB"), (999_600, "1 MB"), (7 * 10**16, "70,000 TB")],
)  # fmt: skip
def test_sizes_are_read_by_people(size: int, text: str) -> None:
    assert in_words(size) == text
