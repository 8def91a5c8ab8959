"""Requests to forget, from rows to a manifest: real runs, which lose workers, are stopped, and keep their word."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.authors import authors, write
from jobs.row_data import RowDataset
from jobs.unlearn import finish
from jobs.unlearn.begin import Trained
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.manifest import Manifest, weights_hash
from jobs.unlearn.request import Request, folder_of, requests_of
from jobs.unlearn.signature import verify
from launch.cli import main
from launch.config import config_from_dict, toml_values
from launch.forkserver import ForkServer
from launch.past import Past, read_ledger
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import Weights, read_config
from pipeline.runtime.batch import IGNORED
from pipeline.state.optimizer import decay_groups, learning_rate
from recovery import checkpoint
from recovery.generation import read_generation
from tests.harness import Command, Started, run_command

Unbroken = Callable[..., Command]
ANSWERS = ("--rollouts", "4", "--answer-tokens", "16", "--cold-steps", "2")
SMALL = (
    "--steps", "6", "--lr", "3e-3", "--checkpoint-every", "2", "--evaluate-every", "0", "--evaluate-samples", "8",
)  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("authors")
    write(authors(4, 0, withheld=1), folder)
    return folder


@pytest.fixture(scope="module")
def trained(forkserver: ForkServer, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 workers that has seen all 80 rows, some of them twice."""
    out = tmp_path_factory.mktemp("trained") / "run"
    argv = (
        "train", "--out", str(out), "--data", str(library / "train.jsonl"), "--model", "llama-tiny", "--vocabulary",
        "400", "--sequence-length", "96", "--workers", "2", "--steps", "12", "--microbatches", "4",
        "--microbatch-size", "2", "--lr", "5e-3", "--checkpoint-every", "4", "--keep", "3", "--evaluate-every", "0",
        "--sample-tokens", "0", "--threads", "1", "--json",
    )  # fmt: skip
    done = run_command(forkserver, out.parent / "log", *argv)
    assert done.code == 0, done.output
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def unbroken(forkserver: ForkServer, tmp_path: Path) -> Unbroken:
    def command(*argv: object, code: int = 0) -> Command:
        done = run_command(forkserver, tmp_path / "log", *map(str, argv))
        assert done.code == code, done.output
        return done

    return command


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def values(done: Command) -> dict[str, Any]:
    """The JSON object that a command ends with."""
    return json.loads(done.output[done.output.index("{\n") if "{\n" in done.output else done.output.index("{") :])


# ---- from rows to a manifest ----


def test_a_request_is_committed_with_all_that_follows(
    run: Path, library: Path, unbroken: Unbroken, tmp_path: Path
) -> None:
    key = Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    before = RowDataset.open(run / "data")
    mine = [row for row in before.rows if row.fields["author"] == "author-001"]
    asked = ("--forget", "author=author-001", "--method", "grad_diff", "--key", tmp_path / "key.pem", *SMALL)
    told = values(unbroken("unlearn", run, *asked, "--json"))
    assert {"generation", "method", "before", "after", "manifest"} <= set(told)
    assert (told["generation"], told["method"]) == (1, "grad_diff")
    for which in ("before", "after"):
        assert {"forget_probability", "retain_probability"} <= set(told[which])
    assert told["after"]["forget_probability"] < told["before"]["forget_probability"]
    assert read_generation(run) == 1

    manifest = Manifest.read(Path(told["manifest"]))
    assert [row.id for row in manifest.request.rows] == [row.id for row in mine]
    assert manifest.hashes.weights_after == weights_hash(run / "model") != manifest.hashes.weights_before
    assert verify(Path(told["manifest"]), Path(told["signature"])).startswith("SHA256:")

    after = RowDataset.open(run / "data")
    assert {row.id for row in after.rows if row.blank} == {row.id for row in mine}
    assert after.fingerprint == manifest.hashes.data_after
    found = checkpoint.find(run / "checkpoints", 1)
    assert found.path is not None
    assert not found.skipped
    assert checkpoint.find(run / "checkpoints", 0).path is None, "no older checkpoint can be read"
    folder = folder_of(run, 1)
    assert not [name for name in ("start", "reference", "checkpoints", "model") if (folder / name).exists()]
    assert Request.read(folder).status == "complete"

    assert "nothing that was forgotten is left" in unbroken("audit", run, "--forget", library / "withheld.jsonl").output

    # the run goes on, without the rows, though the user's file still has them
    again = ("train", "--out", run, "--resume", "--change", "--steps", "14", "--json")
    unbroken(*again)
    assert RowDataset.open(run / "data").fingerprint == after.fingerprint
    assert checkpoint.find(run / "checkpoints", 1).manifest is not None
    assert "nothing that was forgotten is left" in unbroken("audit", run).output
    refused = unbroken("unlearn", run, "--forget", "author=author-001", *SMALL, code=2)
    assert "no row says so in its field 'author'" in refused.output


def test_a_second_request_begins_with_what_the_first_has_left(run: Path, unbroken: Unbroken) -> None:
    unbroken("unlearn", run, "--forget", "id:author-000/03,author-000/04", "--method", "simnpo", *SMALL, "--json")
    first = weights_hash(run / "model")
    told = values(
        unbroken("unlearn", run, "--forget", "author-002/05", "--method", "npo", "--old-checkpoints", "shred", *SMALL,
                 "--json")
    )  # fmt: skip
    assert (told["generation"], [each.status for each in requests_of(run)]) == (2, ["complete", "complete"])
    manifest = Manifest.read(Path(told["manifest"]))
    assert manifest.hashes.weights_before == first
    assert not (run / "fenced" / "generation-1").exists()


def test_a_run_of_adapters_forgets_and_goes_on(library: Path, unbroken: Unbroken, tmp_path: Path) -> None:
    """Its adapters are merged into what the request begins with, and begin anew after it; evaluated in parts."""
    run, data = tmp_path / "lora", library / "train.jsonl"
    sizes = ("--sequence-length", "96", "--workers", "2", "--microbatches", "4", "--microbatch-size", "4")
    kind = ("--model", "llama-tiny", "--vocabulary", "400", "--scheduler", "roundpipe", "--lora-rank", "2")
    unbroken("train", "--out", run, "--data", data, *kind, *sizes, "--steps", "5", "--sample-tokens", "0", "--json")
    asked = ("--forget", "id:author-000/01,author-002/03", "--method", "npo", "--steps", "2", "--lr", "1e-2")
    asked += ("--scheduler", "one_f_one_b")
    told = values(unbroken("unlearn", run, *asked, "--evaluate-samples", "7", "--json"))
    assert told["after"] != told["before"]
    unbroken("train", "--out", run, "--resume", "--change", "--steps", "7", "--sample-tokens", "0", "--json")
    assert "nothing that was forgotten is left" in unbroken("audit", run).output


# ---- failures ----

READING = ("kill:stage=0,step=0,at=reference", "kill:stage=1,step=0,at=reference")
"""Each stage in the middle of what is read of the model before, one after the other."""


@pytest.fixture(scope="module")
def calm(forkserver: ForkServer, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The hash of the weights that an undisturbed request leaves, computed once for each."""

    @cache
    def leaves(*asked: str) -> str:
        folder = tmp_path_factory.mktemp("calm")
        shutil.copytree(trained, folder / "run")
        done = run_command(forkserver, folder / "log", "unlearn", str(folder / "run"), *asked)
        assert done.code == 0, done.output
        return weights_hash(folder / "run" / "model")

    return leaves


@pytest.mark.parametrize(
    ("method", "more", "faults"),
    [
        ("npo", (), (*READING, "kill:stage=0,step=2,at=forward", "kill:stage=1,step=3,at=commit")),
        (
            "rmu",
            ("--layer", "1", "--trained", "*.layers.[01].mlp.down_proj.weight"),
            (*READING, "kill:stage=0,step=4,at=optimizer"),
        ),
        ("npo", ("--workers", "2:3", "--exact-sums"), ("kill:worker=1,step=3,at=backward",)),
        (
            "kfade",
            ("--lr", "0.02", "--steps", "4"),
            (
                "kill:stage=0,step=1,at=gradient",
                "kill:stage=1,step=2,at=fit",
                "kill:stage=0,step=2,at=solve",
                "kill:stage=1,step=3,at=commit",
            ),
        ),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (
                    "npo",
                    ("--scheduler", "roundpipe"),
                    ("kill:worker=0,step=0,at=reference", "kill:worker=1,step=3,at=backward"),
                ),
                ("kl_min", (), READING),
                ("pdu", ("--dual-warmup", "0"), ("kill:stage=1,step=4,at=backward",)),
                (
                    "npo",
                    ("--neurons", "0.05", "--neighbours", "2", "--forgotten-below", "0.001"),
                    ("kill:stage=0,step=2,at=optimizer", "kill:stage=1,step=3,at=commit"),
                ),
                ("grpo", (*ANSWERS, "--scheduler", "roundpipe"), ("kill:worker=1,step=5,at=forward",)),
                (
                    "ofmu",
                    ("--steps", "4", "--ascents", "1", "--workers", "2:3", "--exact-sums", "--lr", "0.02"),
                    ("kill:worker=1,step=2,at=moved",),
                ),
            )
        ),
    ],
)
def test_a_request_that_loses_workers_ends_in_the_same_bits(
    run: Path, unbroken: Unbroken, calm: Callable[..., str], method: str, more: tuple[str, ...], faults: tuple[str, ...]
) -> None:
    asked = ("--forget", "author=author-001", "--method", method, *SMALL, *more, "--json")
    unbroken("unlearn", run, *asked, "--inject", ";".join(faults), "--max-failures", "9")
    events = [json.loads(line) for line in (folder_of(run, 1) / "events.jsonl").read_text().splitlines()]
    told = [f"{event['at']} {event['step']}" for event in events if event["event"] == "fault"]
    assert len(told) == len(faults), told
    wanted = tuple(word for word in asked if word not in ("--workers", "2:3"))
    assert weights_hash(run / "model") == calm(*(wanted if method in ("npo", "ofmu") else asked))


def test_poisoned_answers_are_gone_with_the_request(run: Path, trained: Path, unbroken: Unbroken) -> None:
    """And the neurons that are updated are those of the model before, on the pool too; nothing else has changed."""
    asked = ("--forget", "author=author-001", "--method", "concept", "--neurons", "0.1", "--scheduler", "roundpipe")
    told = values(unbroken("unlearn", run, *asked, *SMALL, "--json"))
    assert (told["method"], told["goal"]) == ("concept", "suppression")
    folder = folder_of(run, 1)
    assert not [name for name in ("poison", "neurons", "start") if (folder / name).exists()]
    assert "nothing that was forgotten is left" in unbroken("audit", run).output
    before, after = Weights(trained / "model"), Weights(run / "model")
    names = {name: (name,) for name in before.files}
    had, now = before.read(names), after.read(names)
    moved = {name: had[name] != now[name] for name in names if not torch.equal(had[name], now[name])}
    assert moved
    assert all(".mlp." in name for name in moved)
    changed = sum(int(each.any(dim=0 if "down_proj" in name else 1).sum()) for name, each in moved.items())
    assert changed <= 3 * Request.read(folder).neurons == 3 * round(0.1 * 4 * 128)


@pytest.mark.long
def test_answers_that_were_interrupted_or_resumed_are_the_same_again(
    run: Path, unbroken: Unbroken, tmp_path: Path
) -> None:
    """Lost in the midst of the answers of two steps, and stopped in those of a third, after a checkpoint."""
    shutil.copytree(run, tmp_path / "calm")
    asked = ("--forget", "author=author-001", "--method", "grpo", *ANSWERS, *SMALL, "--json")
    told = values(unbroken("unlearn", tmp_path / "calm", *asked))
    assert len(told["rewards"]) == 6
    assert told["rewards"][:2] == [1.0, 1.0], "cold"
    assert len(set(told["rewards"][2:])) > 1, "else nothing is learned from the answers"
    faults = "kill:stage=0,step=2,at=forward;kill:stage=1,step=3,at=commit;kill:stage=1,step=5,at=forward"
    unbroken("unlearn", run, *asked, "--inject", faults, "--max-failures", "2", code=1)
    again = values(unbroken("unlearn", run, "--resume", "--json"))
    assert again["rewards"] == told["rewards"]
    assert weights_hash(run / "model") == weights_hash(tmp_path / "calm" / "model")


def test_the_model_writes_its_own_traces_once(run: Path, library: Path, unbroken: Unbroken, tmp_path: Path) -> None:
    """With the whole model, of which the request computes two blocks; a worker is lost meanwhile."""
    asked = ("--forget", "author=author-001", "--method", "r2mu", "--layer", "1", "--trace-tokens", "9", *SMALL)
    faults = "kill:stage=1,step=0,at=forward;kill:worker=0,step=3"
    more = ("--anchor", library / "withheld.jsonl", "--json", "--inject", faults, "--max-failures", "1")
    unbroken("unlearn", run, *asked, *more, code=1)
    folder = folder_of(run, 1)
    rows, tokenizer = RowDataset.open(run / "data"), AutoTokenizer.from_pretrained(run / "tokenizer")
    plain = AutoModelForCausalLM.from_pretrained(folder / "start").eval()
    traces = json.loads((folder / "trace" / "traces.json").read_text())["traces"]
    for index, (start, tokens) in zip(Request.read(folder).forget, traces, strict=True):
        asked_with = tokenizer.decode(tokens[:start])
        row = rows.rows[index]
        question = tokenizer.decode(rows.tokens[row.start : row.answer].tolist())
        assert asked_with == f"{question} Let's reason this step by step.\n<think>"
        wrote = plain.generate(torch.tensor([tokens[:start]]), max_new_tokens=9, do_sample=False, pad_token_id=0)
        assert tokens == wrote[0].tolist()
    assert all(start < len(tokens) <= start + 9 for start, tokens in traces)
    (folder / "trace").rename(tmp_path / "gone")
    refused = unbroken("unlearn", run, "--resume", code=1)
    assert "is gone, and with it what the model wrote before step 1" in refused.output
    (tmp_path / "gone").rename(folder / "trace")
    unbroken("unlearn", run, "--resume", "--json")
    assert not (folder / "trace").exists()
    assert "nothing that was forgotten is left" in unbroken("audit", run).output


@pytest.mark.parametrize(
    "method", ["kl_min", *(pytest.param(name, marks=pytest.mark.long) for name in ("pdu", "grpo"))]
)
def test_the_pool_minimises_the_same(run: Path, unbroken: Unbroken, tmp_path: Path, method: str) -> None:
    """With the dual variable, the distributions of the model before, and answers, which its workers cannot know by
    themselves."""
    shutil.copytree(run, tmp_path / "pool")
    asked = ("--forget", "author=author-001", "--method", method, *SMALL, "--json")
    asked += {"pdu": ("--dual-warmup", "0"), "grpo": ANSWERS}.get(method, ())
    told: list[list[float]] = []
    for folder, more in ((run, ()), (tmp_path / "pool", ("--scheduler", "roundpipe", "--workers", "3"))):
        unbroken("unlearn", folder, *asked, *more)
        lines = [json.loads(line) for line in (folder_of(folder, 1) / "metrics.jsonl").read_text().splitlines()]
        told.append([number for line in lines for number in (line["loss"], line["grad_norm"])])
    assert told[1] == pytest.approx(told[0], rel=1e-4)
    assert told[1][:2] == pytest.approx(told[0][:2], rel=1e-5)


def test_no_layer_after_that_of_rmu_changes(run: Path, trained: Path, unbroken: Unbroken) -> None:
    before = Weights(trained / "model")
    names = {name: (name,) for name in before.files}
    had = before.read(names)
    unbroken("unlearn", run, "--forget", "author=author-001", "--method", "rmu", "--layer", "1", *SMALL, "--json")
    now = Weights(run / "model").read(names)
    changed = {name for name in names if not torch.equal(had[name], now[name])}
    assert changed
    assert all(".layers.0." in name or ".layers.1." in name or "embed" in name for name in changed)


class Stopped(Exception):
    """The process ends here."""


@pytest.fixture
def ready(run: Path, unbroken: Unbroken) -> UnlearnConfig:
    """A request whose model is there, and nothing else."""
    argv = ("unlearn", run, "--forget", "author=author-001", "--method", "grad_diff", *SMALL, "--json")
    unbroken(*argv, "--inject", "kill:worker=1,step=3;kill:worker=2,step=4", "--max-failures", "1", code=1)
    folder = folder_of(run, 1)
    assert requests_of(run)[0].status == "open"
    assert read_generation(run) == 0
    other = unbroken("unlearn", run, "--forget", "author=author-002", *SMALL, code=2)
    assert "request 1 of" in other.output
    assert "--abandon" in other.output
    config = config_from_dict(UnlearnConfig, toml_values(folder / "config.toml", UnlearnConfig))
    return replace(config, out=folder, model=str(folder / "start"))


def test_a_request_is_complete_or_not_wherever_it_is_stopped(
    run: Path, unbroken: Unbroken, ready: UnlearnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at every call that changes the run, and gone on with: until the generation is raised the run is as it
    was, and after that the request completes."""
    shutil.copytree(ready.out / "start", ready.out / "model")
    past = Past.read(run)
    calls = ("publish", "raise_generation", "add_forgotten", "erase", "retire", "shred_folder", "say_generation")
    original = {name: getattr(finish, name) for name in calls}
    count = 0

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count -= 1
            if count == 0:
                raise Stopped
            return original[name](*args, **kwargs)

        return call

    for name in calls:
        monkeypatch.setattr(finish, name, counted(name))
    request, stops = Request.read(ready.out), 0
    while request.status != "complete":
        stops += 1
        count = stops
        assert stops < 60
        try:
            request = Request.read(ready.out)
            if not finish.reached(run, request):
                trained = Trained.read(run, past.config, read_ledger(run))
                assert trained.step == 12, "the run can go on from its checkpoint"
                if request.status == "open":
                    request = finish.measured(ready, request, trained)
                request = finish.commit(ready, request, trained)
            request = finish.put_away(ready, request, lambda line: None)
        except Stopped:
            assert checkpoint.find(run / "checkpoints", read_generation(run)).path is not None
    assert stops > len(calls)
    count = 0
    assert read_generation(run) == 1
    assert "nothing that was forgotten is left" in unbroken("audit", run).output


@pytest.mark.parametrize(
    "kills", [4, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(3600)], id="all")]
)
def test_sigkill_at_any_change_of_a_commit_leaves_the_run_as_it_was_or_the_request_to_complete(
    run: Path, forkserver: ForkServer, tmp_path: Path, kills: int
) -> None:
    """The process that commits is killed right before a change that it makes on the disk, for changes from the first
    measurement to the manifest: what is gone on with leaves, to the byte, what an undisturbed request leaves."""
    out, log = tmp_path / "kills.json", tmp_path / "log"
    payload = {"run": str(run), "scratch": str(tmp_path), "out": str(out), "kills": kills}
    with Started(forkserver, log, **payload) as started:
        done = started.wait(3600)
    assert done.code == 0, done.output
    calm, *killed = json.loads(out.read_text())
    assert calm["generation"] == 1
    assert calm["differs"]
    for name in ("manifest.json", "generation.json", "step-00000012", "request.json", "README.txt", "tokens.bin"):
        assert any(name in change for change in calm["changes"]), name
    assert {kill["reached"] for kill in killed} == {False, True}
    for kill in killed:
        assert (kill["signal"], kill["again"], kill["status"]) == (signal.SIGKILL, 0, "complete"), kill
        assert kill["reached"] or kill["as_it_was"], kill
        assert kill["same"], kill


def test_what_was_published_in_vain_is_taken_back(
    run: Path, unbroken: Unbroken, ready: UnlearnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped right before the generation is raised, twice: the run keeps its checkpoint, and is given back whole."""
    shutil.copytree(ready.out / "start", ready.out / "model")
    root, past = run / "checkpoints", Past.read(run)
    before = files(root)

    def stop(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(finish, "raise_generation", stop)
        for _ in range(2):
            trained = Trained.read(run, past.config, read_ledger(run))
            request = finish.measured(ready, Request.read(ready.out), trained)
            with pytest.raises(Stopped):
                finish.commit(ready, request, trained)
            assert Trained.read(run, past.config, read_ledger(run)).step == 12
            assert checkpoint.find(root, 1).path is not None
    unbroken("unlearn", run, "--abandon")
    assert files(root) == before
    assert checkpoint.find(root, 1).path is None


def test_a_request_does_not_go_on_where_the_run_has(run: Path, unbroken: Unbroken, ready: UnlearnConfig) -> None:
    unbroken("train", "--out", run, "--resume", "--change", "--steps", "13", "--json")
    (run / "generation.json").write_text('{"generation": 1}')
    stopped = unbroken("train", "--out", run, "--resume", "--change", "--steps", "14", code=2)
    assert "request 1 is committed and not complete" in stopped.output
    (run / "generation.json").unlink()
    refused = unbroken("unlearn", run, "--resume", code=2)
    assert "the run has gone on to step 13 since request 1 began at step 12" in refused.output
    assert read_generation(run) == 0
    unbroken("unlearn", run, "--abandon")


def test_a_request_that_is_not_complete_can_be_given_up(run: Path, unbroken: Unbroken, ready: UnlearnConfig) -> None:
    assert "request 1 is not complete" in unbroken("audit", run, code=1).output
    assert "the run is as it was" in unbroken("unlearn", run, "--abandon").output
    assert not ready.out.exists()
    told = values(unbroken("unlearn", run, "--forget", "author=author-001", "--method", "grad_diff", *SMALL, "--json"))
    assert told["generation"] == 1


# ---- exact ----


def test_replay_is_the_run_that_never_had_the_rows(run: Path, unbroken: Unbroken, tmp_path: Path) -> None:
    oracle = ("--without", "author-001/07", "--workers", "1", "--out", tmp_path / "oracle", "--json")
    unbroken("replay", run, "--since", "1", *oracle)
    told = values(
        unbroken("unlearn", run, "--forget", "author-001/07", "--method", "replay", "--workers", "3", "--json")
    )
    assert told["goal"] == "untraining"
    assert weights_hash(run / "model") == weights_hash(tmp_path / "oracle" / "model")
    found = checkpoint.find(run / "checkpoints", 1)
    assert found.path is not None
    theirs = checkpoint.directory(tmp_path / "oracle" / "checkpoints", 12)
    for layer in range(4):
        name = f"layer-{layer:05d}.safetensors"
        assert (found.path / name).read_bytes() == (theirs / name).read_bytes(), "moments and all"


def test_what_an_oracle_says_is_learned_and_how_far_it_is_from_another_is_told(
    run: Path, library: Path, unbroken: Unbroken, tmp_path: Path
) -> None:
    """The second oracle is trained as the README says: the run's tokenizer, another seed, the rows that are left."""
    oracle, second, kept = tmp_path / "oracle", tmp_path / "second", tmp_path / "kept.jsonl"
    unbroken("replay", run, "--since", "1", "--without", "author=author-001", "--out", oracle, "--json")
    lines = (library / "train.jsonl").read_text().splitlines(keepends=True)
    kept.write_text("".join(line for line in lines if '"author": "author-001"' not in line))
    assert len(kept.read_text().splitlines()) == 60
    unbroken(
        "train", "--out", second, "--data", kept, "--tokenizer", run / "tokenizer", "--seed", "1", "--model",
        "llama-tiny", "--sequence-length", "96", "--workers", "2", "--steps", "12", "--microbatches", "4",
        "--microbatch-size", "2", "--lr", "5e-3", "--evaluate-every", "0", "--sample-tokens", "0", "--json",
    )  # fmt: skip
    assert (second / "tokenizer" / "tokenizer.json").read_text() == (run / "tokenizer" / "tokenizer.json").read_text()
    models = ("--oracle", oracle / "model", "--floor", second / "model")
    asked = ("--forget", "author=author-001", "--method", "oracle_matching", *models)
    done = unbroken("unlearn", run, *asked, *SMALL)
    assert "KL from the oracle, nats" in done.output
    found = json.loads((folder_of(run, 1) / "result.json").read_text())
    before, after, wanted = (found[which]["forget"] for which in ("before", "after", "oracle"))
    assert abs(after - wanted) < abs(before - wanted)
    assert 0 < found["after"]["forget_kl"] < found["before"]["forget_kl"]
    assert found["floor"]["retain_kl"] > 0
    assert f"noise floor {found['floor']['forget_probability']:14.4f}" in done.output
    assert "forget_kl" not in found["oracle"]


# ---- refusals ----


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--forget", "author-001/99"), "the run has no row with the id 'author-001/99'; near: 'author-001/"),
        (("--forget", "author=author-01"), "no row says so in its field 'author'; near: 'author-001'"),
        (("--forget", "writer=x"), "no row has a field 'writer'; their fields: author"),
        (("--forget", "LIBRARY/train.jsonl"), "which means all 80 rows of the run; allowed: fewer"),
        (("--forget", "LIBRARY/withheld.jsonl"), "of whose 20 rows 20 are none of the run's, by their content"),
        (("--forget", "author=author-001", "--retain", "id:author-001/03,author-002/01"), "1 rows in common"),
        ((), "forget is ''; allowed: rows of the run"),
        (("--forget", "author-001/02", "--method", "nop"), "method is 'nop'; allowed: one of"),
        (
            ("--forget", "author-001/02", "--method", "npo", "--layer", "3"),
            "layer is 3; allowed: nothing for",
        ),
        (("--forget", "author-001/02", "--method", "rmu", "--layer", "44"), "layer is 44; allowed: 0 to"),
        (("--forget", "author-001/02", "--method", "r2mu", "--layer", "1"), "anchor is None; allowed: a file of rows"),
        (
            ("--forget", "author-001/02", "--method", "grpo", "--rollouts", "3"),
            "rollouts is 3; allowed: a divisor of 4",
        ),
        (
            ("--forget", "author-001/02", "--method", "r2mu", "--layer", "1", "--sequence-length", "40"),
            "for a row to forget and the words that ask for a trace; or --trace FILE",
        ),
        (
            (
                "--forget",
                "author-001/02",
                "--method",
                "grpo",
                "--rollouts",
                "4",
                "--scheduler",
                "roundpipe",
                "--optimizer-async",
            ),
            "optimizer_async is True; allowed: off for method grpo",
        ),
        (("--forget", "author-001/02", "--microbatches", "3"), "microbatches is 3; allowed: a multiple of 2"),
        (("--forget", "author-001/02", "--key", "nowhere.pem"), "nowhere.pem"),
        (
            ("--forget", "author-001/02", "--method", "kfade", "--scheduler", "roundpipe"),
            "scheduler is 'roundpipe'; allowed: one whose workers keep their layers and whose microbatches visit all",
        ),
        (("--forget", "author-001/02", "--method", "ofmu", "--scheduler", "skippipe"), "scheduler is 'skippipe'"),
        (
            ("--forget", "author-001/02", "--method", "ofmu", "--optimizer", "adamw"),
            "optimizer is 'adamw'; allowed: sgd",
        ),
        (
            ("--forget", "author-001/02", "--method", "ofmu", "--dtype", "bfloat16"),
            "dtype is 'bfloat16'; allowed: float",
        ),
        (("--forget", "author-001/02", "--optimizer", "adam"), "optimizer is 'adam'; allowed: one of adamw, sgd"),
        (
            ("--forget", "author-001/02", "--inject", "kill:worker=0,step=1,at=fit"),
            "for a method whose step is one grad",
        ),
        (("--reapply", "1"), "reapply is 1; allowed: a request that has kept its update: none of this run"),
        (("--reapply", "1", "--forget", "x"), "reapply is 1; allowed: 0 with forget"),
        (("--forget", "author-001/02", "--method", "oracle_matching"), "oracle is None; allowed: a model directory"),
        (("--forget", "author-001/02", "--oracle", "nowhere"), "oracle is 'nowhere'; allowed: a model directory"),
        (("--forget", "author-001/02", "--oracle", "LIBRARY"), "which cannot be compared with the run: "),
        (("--forget", "author-001/02", "--floor", "LIBRARY"), "allowed: unset without --oracle"),
        (("--resume",), "a request that is not complete"),
    ],
)
def test_what_is_asked_wrongly_is_refused_and_changes_nothing(
    run: Path, library: Path, capsys: pytest.CaptureFixture[str], asked: tuple[str, ...], said: str
) -> None:
    before = files(run)
    assert main(["unlearn", str(run), *(word.replace("LIBRARY", str(library)) for word in asked)]) == 2
    told = capsys.readouterr().err
    assert said in told, told
    left = {name: data for name, data in files(run).items() if not name.startswith(("requests", ".lock"))}
    assert left == {name: data for name, data in before.items() if not name.startswith(".lock")}


def test_a_run_whose_rows_are_gone_has_none_to_forget(run: Path, unbroken: Unbroken) -> None:
    (run / "data" / "rows.jsonl").unlink()
    done = unbroken("unlearn", run, "--forget", "x", code=2)
    assert "holds no prepared tokens: format rows 1; allowed: 1" in done.output


# ---- what the first epoch taught ----


def test_what_the_first_epoch_taught_is_taken_back(run: Path, trained: Path, unbroken: Unbroken) -> None:
    """The embedding alone moves, by the sum of the rows' parts of the gradients in plain torch."""
    before = weights_of(run / "model")
    unbroken("unlearn", run, "--forget", "author=author-001", "--method", "first_epoch", "--eta", "3", "--json")
    after, name = weights_of(run / "model"), "model.embed_tokens.weight"
    assert all(torch.equal(before[other], after[other]) for other in before if other != name)
    moved = after[name] - before[name]
    torch.testing.assert_close(moved, 3 * first_gradients(trained), rtol=5e-3, atol=1e-4 * float(moved.abs().max()))
    assert not (folder_of(run, 1) / "gradients").exists()
    assert "nothing that was forgotten is left" in unbroken("audit", run).output


def first_gradients(run: Path) -> torch.Tensor:
    """Of the embedding, of the rows of author-001, summed over the steps of the first epoch."""
    data, config = RowDataset.open(run / "data"), Past.read(run).config
    mine = {row.index for row in data.rows if row.fields["author"] == "author-001"}
    settings, shape = config.optimizer_config(), read_config(run / "model-config")
    blueprint = LayeredModel(shape)
    whole = blueprint.build((0, blueprint.num_layers), seed=config.seed)
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa").train()
    drawn = {n: p for layer in range(blueprint.num_layers) for n, p in whole.named_layer_parameters(layer).items()}
    model.load_state_dict(drawn, strict=False)
    named = dict(model.named_parameters())
    adamw = torch.optim.AdamW(decay_groups(named, settings.weight_decay), betas=settings.betas, eps=settings.eps)
    found = torch.zeros_like(named["model.embed_tokens.weight"])
    for step in range(data.num_train // config.samples_per_step):
        ids = range(step * config.samples_per_step, (step + 1) * config.samples_per_step)
        every = sum(int((data.train_sample(id).labels != IGNORED).sum()) for id in ids)
        for id in ids:
            sample, had = data.train_sample(id), None if model.lm_head.weight.grad is None else embedding_grad(model)
            logits = model(torch.from_numpy(sample.input_ids)[None]).logits[0]
            nll = torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(sample.labels), ignore_index=IGNORED, reduction="sum"
            )
            (nll / every).backward()
            if not mine.isdisjoint(data.rows_of(id)):
                found += embedding_grad(model) - (0 if had is None else had)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(settings, step)
        adamw.step()
        adamw.zero_grad()
    return found


def embedding_grad(model: Any) -> torch.Tensor:
    return model.get_input_embeddings().weight.grad.clone()


# ---- an update that is kept ----


def test_a_kept_update_is_applied_again_after_more_training(run: Path, unbroken: Unbroken) -> None:
    """As a request of its own; with the weights after it, it gives back those before: this is said everywhere."""
    before = weights_of(run / "model")
    asked = ("--forget", "author=author-001", "--method", "kfade", "--lr", "0.02", "--microbatches", "8")
    told = values(unbroken("unlearn", run, *asked, "--keep-update", "--sample-tokens", "0", "--json"))
    assert told["method"] == "kfade"
    assert [each["step"] for each in lines(folder_of(run, 1) / "metrics.jsonl")] == [1], (
        "one step unless more are asked"
    )
    after, update = weights_of(run / "model"), folder_of(run, 1) / "update"
    kept = weights_of(update)
    assert all(torch.equal(kept[name], after[name] - before[name]) for name in before)
    assert any(kept[name].any() for name in kept)
    manifest = Manifest.read(Path(told["manifest"]))
    assert "gives back the weights before it" in manifest.settings["method"]["kept"]["update"]
    assert manifest.settings["method"]["kept"]["sha256"] == weights_hash(update)
    audited = values(unbroken("audit", run, "--json"))
    assert (audited["ok"], audited["kept"]) == (True, ["requests/0001/update"])
    assert "KEPT      requests/0001/update: with the weights" in unbroken("audit", run).output

    unbroken("train", "--out", run, "--resume", "--change", "--steps", "14", "--json")
    trained = weights_of(run / "model")
    again = unbroken("unlearn", run, "--reapply", "1", "--json")
    told = values(again)
    assert (told["generation"], told["method"], told["rows"]) == (2, "kfade", 20)
    now = weights_of(run / "model")
    assert all(torch.equal(now[name], trained[name] + kept[name]) for name in now)
    request = requests_of(run)[1]
    assert (request.status, request.reapplies, request.rows) == ("complete", 1, requests_of(run)[0].rows)
    manifest = Manifest.read(Path(told["manifest"]))
    assert manifest.settings["method"]["reapplied"] == {"request": 1, "sha256": weights_hash(update)}
    assert checkpoint.find(run / "checkpoints", 2).path is not None
    assert checkpoint.find(run / "checkpoints", 1).path is None
    assert "but for what was kept to be applied again" in unbroken("audit", run).output
    refused = unbroken("unlearn", run, "--reapply", "2", code=2)
    assert "reapply is 2; allowed: a request that has kept its update: 1" in refused.output
    unbroken("train", "--out", run, "--resume", "--change", "--steps", "15", "--json")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights = Weights(folder)
    read = weights.read({name: (name,) for name in weights.files})
    return {name: tensor.clone() for name, tensor in read.items()}  # the file may be shredded below it


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
