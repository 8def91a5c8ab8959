"""S3T: who learns from what, what a deletion leaves, and a run of slices that forgets without training."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from jobs.config import ConfigError
from jobs.row_data import RowDataset
from jobs.s3t import (
    Prefix,
    best,
    deal,
    expected_deletions,
    left,
    matched,
    name_of,
    prefixes,
    rotations,
    rows_of,
    score,
    simulated_deletions,
    spans,
    steps_of,
)  # fmt: skip
from jobs.slices import Slices, SlicesConfig, adapter_hash, folder_of
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.manifest import Manifest, weights_hash
from jobs.unlearn.request import Request
from jobs.unlearn.request import folder_of as request_folder
from launch import slice_unlearn
from launch.forkserver import ForkServer
from recovery.generation import read_generation
from tests.harness import Command, run_command
from tests.test_cli import exported

# ---- slices and sequences ----


def test_rows_are_dealt_evenly_and_without_a_look_at_them() -> None:
    found = deal(10, 3, seed=1)
    assert sorted(Counter(found).values()) == [3, 3, 4]
    assert found == deal(10, 3, seed=1) != deal(10, 3, seed=2)
    assert sorted(rows_of(found, (2, 0))) == [row for row in range(10) if found[row] != 1]


def test_each_stage_has_blocks_of_its_own_from_the_top() -> None:
    assert spans(7, 3) == ((5, 7), (3, 5), (1, 3))
    assert spans(4, 4) == ((3, 4), (2, 3), (1, 2), (0, 1))
    with pytest.raises(ValueError, match="5 slices for 4 blocks"):
        spans(4, 5)


def test_every_row_is_taken_as_often_in_each_stage() -> None:
    assert [steps_of(10, tuple(range(k)), 4) for k in (1, 2, 3, 4)] == [3, 5, 8, 10]


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_sequences_are_rotations_and_all_different(slices: int) -> None:
    every = set(permutations(range(slices)))
    for count in range(1, len(every) + 1):
        found = rotations(range(slices), count)
        assert len(set(found)) == count
        assert set(found) <= every
        firsts = Counter(sequence[0] for sequence in found).values()
        assert len(firsts) == min(slices, count), "the more begin alike, the fewer deletions are survived"
        assert max(firsts) - min(firsts) <= 1
    assert rotations(range(slices), 1) == [tuple(range(slices))]
    if slices == 4:
        assert rotations(range(4), 3) == [(0, 1, 2, 3), (3, 0, 1, 2), (2, 3, 0, 1)]


@pytest.mark.parametrize("rates", [(0.4, 0.3, 0.2, 0.1), (1.0, 1.0, 5.0, 2.0), (0.5, 0.25, 0.25)])
def test_a_matching_gives_each_sequence_the_next_slice_that_is_best_for_all(rates: Sequence[float]) -> None:
    known = [rate / sum(rates) for rate in rates]
    found = sorted(matched(rates, len(rates)))
    for k in range(1, len(rates) + 1):
        assert sorted(sequence[k - 1] for sequence in found) == list(range(len(rates))), "two sequences share a place"
    for k in range(1, len(rates)):
        heads = [sequence[:k] for sequence in found]
        sums = [
            sum(score((*head, each), known) for head, each in zip(heads, nexts))
            for nexts in permutations(range(len(rates)))
            if not any(each in head for head, each in zip(heads, nexts))
        ]
        assert sum(score(sequence[: k + 1], known) for sequence in found) == pytest.approx(max(sums), rel=1e-9)
    scores = {sequence: score(sequence, known) for sequence in found}
    assert set(matched(rates, 2)) == set(sorted(found, key=lambda each: -scores[each])[:2])


# ---- deletions ----


def test_what_has_seen_a_slice_goes_and_the_prefix_stays() -> None:
    stages = prefixes([(0, 1, 2), (2, 0, 1), (2, 1, 0)])
    assert stages == [(0,), (0, 1), (0, 1, 2), (2,), (2, 0), (2, 0, 1), (2, 1), (2, 1, 0)]
    assert left(stages, {1}) == [(0,), (2,), (2, 0)]
    assert best(left(stages, {1})) == (2, 0)
    assert best(left(stages, {2})) == (0, 1)
    assert best(left(stages, {0, 2})) is None


def exact(sequences: Sequence[Prefix], rates: Sequence[float]) -> float:
    """By the states that deletions can lead to, one by one."""

    @cache
    def more(stages: tuple[Prefix, ...]) -> float:
        if not stages:
            return 0.0
        after = [(rate / sum(rates), tuple(left(stages, {each}))) for each, rate in enumerate(rates)]
        change = [(p, then) for p, then in after if then != stages]
        return (1 + sum(p * more(then) for p, then in change)) / sum(p for p, _ in change)

    return more(tuple(prefixes(sequences)))


@pytest.mark.parametrize("rates", [(1, 1), (1, 1, 1), (1, 1, 1, 1), (0.5, 0.3, 0.2), (0.4, 0.3, 0.2, 0.1)])
def test_deletions_survived_by_formula_by_every_state_and_by_trying(rates: Sequence[float]) -> None:
    for count in range(1, len(rates) + 2):
        sequences = rotations(range(len(rates)), count)
        expected = expected_deletions(sequences, rates)
        assert expected == pytest.approx(exact(sequences, rates), rel=1e-6)
        assert simulated_deletions(sequences, rates, 1500, 0) == pytest.approx(expected, rel=0.1)


def test_the_papers_formula_and_setting() -> None:
    """Five shards of six slices, a budget of one to six (the figure of the code): m L log(m B), exactly m L H_(m B),
    and a budget of one is SISA's m L H_m."""
    found = []
    for budget in range(1, 7):
        shards = [
            tuple(6 * shard + each for each in order) for shard in range(5) for order in rotations(range(6), budget)
        ]
        found.append(expected_deletions(shards, [1] * 30))
        assert found[-1] == pytest.approx(30 * sum(1 / k for k in range(1, 5 * budget + 1)))
        assert simulated_deletions(shards, [1] * 30, 100, 0) == pytest.approx(found[-1], rel=0.12)
    assert found[0] == pytest.approx(68.5)
    assert found[-1] / found[0] == pytest.approx(1.75, abs=0.01)
    more = expected_deletions(rotations(range(4), 24), [1] * 4)
    assert more == expected_deletions(rotations(range(4), 4), [1] * 4), "more orders than slices win nothing"


# ---- runs ----

SIZES = (
    "--sequence-length", "64", "--workers", "2", "--microbatches", "2", "--microbatch-size", "2", "--lora-rank", "2",
    "--lr", "1e-2", "--threads", "1", "--evaluate-every", "0", "--sample-tokens", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    names = ["Ann", "Bob", "Cy", "Dee", "Eve", "Flo", "Gus", "Hal", "Ida", "Jon"]
    lines = [{"id": f"r{n}", "question": f"Who is {name}?", "answer": f"{name} lives at {n * 7} Elm St."}
             for n, name in enumerate(names)]  # fmt: skip
    slices = deal(len(lines), 2, 0)
    twin = next(n for n in range(4, len(lines)) if slices[n] == slices[3])
    lines[twin] |= {"question": lines[3]["question"], "answer": lines[3]["answer"]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("base") / "model", "llama-tiny")


@pytest.fixture(scope="module")
def trained(forkserver: ForkServer, rows: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slices, in both orders; a worker of every stage is killed on the way."""
    out = tmp_path_factory.mktemp("slices") / "run"
    argv = ("slices", "--out", out, "--data", rows, "--model", base, "--slices", 2, "--sequences", 2, "--steps", 4,
            *SIZES, "--inject", "kill:stage=1,step=1,at=backward", "--json")  # fmt: skip
    done = run_command(forkserver, out.parent / "log", *map(str, argv))
    assert done.code == 0, done.output
    told = json.loads(done.output[done.output.index("{") :])
    assert told["sequences"] == [[0, 1], [1, 0]]
    assert list(told["stages"]) == ["0", "0-1", "1", "1-0"]
    assert told["deletions"]["expected"] == 3.0
    assert told["deletions"]["simulated"] == pytest.approx(3.0, rel=0.1)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def unbroken(forkserver: ForkServer, tmp_path: Path) -> Callable[..., Command]:
    def command(*argv: object, code: int = 0) -> Command:
        done = run_command(forkserver, tmp_path / "log", *map(str, argv))
        assert done.code == code, done.output
        return done

    return command


def hashes(run: Path) -> dict[str, str]:
    stages = sorted(folder for folder in (run / "stages").iterdir())
    return {folder.name: adapter_hash(folder / "adapter") for folder in stages}


def test_a_stage_is_an_ordinary_run_and_leaves_its_adapters_alone(trained: Path) -> None:
    known = Slices.read(trained)
    assert known.spans == ((2, 4), (0, 2))
    assert hashes(trained) == {name_of(stage): said for stage, said in known.stages.items()}
    for stage in known.stages:
        folder = folder_of(trained, stage)
        events = [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
        assert "fault" in events
        assert not [name for name in ("data", "checkpoints", "model") if (folder / name).exists()]
    lines = [json.loads(line) for line in (trained / "ledger.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 2 * (2 + 4) + 1))
    for stage in known.stages:
        seen = {row for line in lines if line["stage"] == name_of(stage) for row in line["rows"]}
        assert seen <= set(rows_of(known.slice_of, stage))


def test_a_deletion_leaves_what_has_never_seen_the_row_to_the_last_bit(
    run: Path, rows: Path, base: Path, unbroken: Callable[..., Command], tmp_path: Path
) -> None:
    """What is left is what a training comes to that never had the slice: its adapters, and the whole model."""
    known, before = Slices.read(run), hashes(run)
    gone = known.slice_of[3]
    kept = 1 - gone
    done = unbroken("unlearn", run, "--method", "s3t", "--forget", "r3", "--json")
    told: dict[str, Any] = json.loads(done.output[done.output.index("{") :])
    assert hashes(run) == {str(kept): before[str(kept)]} == told["stages"]
    assert (told["generation"], read_generation(run)) == (1, 1)
    assert told["after"] != told["before"]
    manifest = Manifest.read(Path(told["manifest"]))
    assert (manifest.goal, manifest.method) == ("untraining", "s3t")
    assert manifest.hashes.weights_after == weights_hash(run / "model") != manifest.hashes.weights_before
    blank = [row.id for row in RowDataset.open(run / "data").rows if row.blank]
    assert len(blank) == 2, "a row that says the same is forgotten, too"
    assert [row.id for row in manifest.request.rows] == blank
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert manifest.seen_in_steps == tuple(
        line["step"] for line in lines if any(f"r{row}" in blank for row in line["rows"])
    )
    assert "nothing that was forgotten is left" in unbroken("audit", run).output

    lacking = [line for number, line in enumerate(rows.read_text().splitlines()) if known.slice_of[number] == kept]
    (tmp_path / "kept.jsonl").write_text("\n".join(lacking) + "\n")
    alone = ("--out", tmp_path / "alone", "--data", tmp_path / "kept.jsonl", "--model", base, "--steps", 2)
    unbroken("train", *alone, *SIZES, "--lora-blocks", "2:4", "--json")
    assert adapter_hash(tmp_path / "alone" / "adapter") == before[str(kept)]
    assert weights_hash(tmp_path / "alone" / "model") == weights_hash(run / "model")

    after = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and path.name != ".lock"}
    another = next(f"r{number}" for number, each in enumerate(known.slice_of) if each == kept)
    refused = unbroken("unlearn", run, "--method", "s3t", "--forget", another, code=2)
    assert (
        "without which no stage is left of the 1 that there are; allowed: rows of fewer slices, or training again"
        in (refused.output)
    )
    assert after == {path: path.read_bytes() for path in after}


def test_a_deletion_that_is_interrupted_is_completed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Any:
        raise OSError("the disk is full")

    asked = UnlearnConfig(run=run, method="s3t", forget="r3")
    known = Slices.read(run)
    with monkeypatch.context() as patch:
        patch.setattr(slice_unlearn, "raise_generation", fails)
        with pytest.raises(OSError, match="the disk is full"):
            slice_unlearn.forget_slices(asked)
    assert hashes(run) == {name_of(stage): said for stage, said in known.stages.items()}
    assert (Request.read(request_folder(run, 1)).status, read_generation(run)) == ("trained", 0)
    with monkeypatch.context() as patch:
        patch.setattr(slice_unlearn, "put_away", fails)
        with pytest.raises(OSError, match="the disk is full"):
            slice_unlearn.forget_slices(UnlearnConfig(run=run, method="s3t", resume=True))
    assert read_generation(run) == 1
    with pytest.raises(ConfigError, match=r"request 1 of .* is not complete"):
        slice_unlearn.forget_slices(asked)
    with pytest.raises(ConfigError, match="request 1 is committed, and stays so"):
        slice_unlearn.forget_slices(UnlearnConfig(run=run, method="s3t"), abandon=True)
    values, text = slice_unlearn.forget_slices(UnlearnConfig(run=run, method="s3t", resume=True))
    assert Request.read(request_folder(run, 1)).status == "complete"
    assert list(values["stages"]) == [str(1 - known.slice_of[3])]
    assert "deletions until nothing is left: 2.0 on average" in text


def test_a_run_of_slices_goes_on_where_it_was_stopped(run: Path, unbroken: Callable[..., Command]) -> None:
    before, known = hashes(run), Slices.read(run)
    kept = {stage: said for stage, said in known.stages.items() if stage != (1, 0)}
    Slices(**{**vars(known), "stages": kept}).write(run)
    shutil.rmtree(folder_of(run, (1, 0)))
    shutil.rmtree(folder_of(run, (1,)))  # with the weights that the last stage begins with
    Slices(**{**vars(known), "stages": {stage: said for stage, said in kept.items() if stage != (1,)}}).write(run)
    unbroken("slices", "--resume", "--out", run, "--json")
    assert hashes(run) == before
    refused = unbroken("slices", "--resume", "--out", run, "--slices", 3, code=2)
    assert "slices is 3; allowed: 2, with which the run began" in refused.output


# ---- refusals ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slices": 5}, "slices is 5; allowed: 2 to 4, the decoder blocks of the model"),
        ({"sequences": 3}, "sequences is 3; allowed: 1 to 2, the orders of the slices"),
        ({"deletion_rates": "1,2,3"}, "deletion_rates is '1,2,3'; allowed: 2 numbers above 0"),
        ({"deletion_rates": "1,0"}, "deletion_rates is '1,0'; allowed: 2 numbers above 0"),
        ({"deletion_rates": "1,x"}, "deletion_rates is '1,x'; allowed: 2 numbers above 0"),
        ({"lora_rank": 0}, "lora_rank is 0; allowed: 1 or more: a slice is learned by adapters"),
        ({"lora_blocks": "0:2"}, "lora_blocks is '0:2'; allowed: all: each slice has its own"),
        (
            {"model": "llama-tiny"},
            "model is 'llama-tiny'; allowed: a model with weights, on which adapters are trained",
        ),
        ({"tokenizer": "bpe"}, "tokenizer is 'bpe'; allowed: auto or model: the model's own"),
        (
            {"microbatches": 8},
            "slices is 2; allowed: few enough that each has a global batch of 16 rows; of 10 it has 5",
        ),
        ({"resume": True}, "resume is True; allowed: unset: .* holds no run of slices"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_there(
    rows: Path, base: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    from launch.slices import slices

    values = {"slices": 2, "data": str(rows), "model": str(base), "out": tmp_path / "run", "lora_rank": 2,
              "microbatches": 2, "microbatch_size": 2, "sequence_length": 64}  # fmt: skip
    with pytest.raises(ConfigError, match=said):
        slices(SlicesConfig(**{**values, **changes}))
    assert not (tmp_path / "run").exists()


def test_a_row_that_says_the_same_in_another_slice_is_forgotten_with_it(run: Path) -> None:
    """Here that leaves nothing, so it is refused."""
    known, path = Slices.read(run), run / "data" / "rows.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    other = next(n for n, each in enumerate(known.slice_of) if each != known.slice_of[3])
    lines[other]["digest"] = lines[3]["digest"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match=r"in slices 0, 1 of 2, without which no stage is left"):
        slice_unlearn.forget_slices(UnlearnConfig(run=run, method="s3t", forget="r3"))


def test_other_methods_and_other_runs_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method is 'npo'; allowed: s3t for a run of slices"):
        slice_unlearn.forget_slices(UnlearnConfig(run=run, forget="r3"))
    with pytest.raises(
        ConfigError, match=r"whose slices.json cannot be read .*; allowed: a folder of `unbroken slices`"
    ):
        slice_unlearn.forget_slices(UnlearnConfig(run=tmp_path, method="s3t", forget="r3"))
    with pytest.raises(ConfigError, match=r"oracle is .*; allowed: unset with method s3t"):
        slice_unlearn.forget_slices(UnlearnConfig(run=run, method="s3t", forget="r3", oracle=tmp_path))
