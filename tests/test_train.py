"""Whole runs as a person starts them: the run folder, resuming, signals, deaths, full disks, torchrun.

Two ways lead in. `python -m launch train` as it is typed costs seconds of imports, so only the runs whose start
matters take it; all others are forked from a parent that has imported everything, into a session of their own, and
then call the same `main` with the same arguments.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.config import TrainConfig
from jobs.data import Dataset
from jobs.pipelines import plan_layout
from jobs.text import token_loss
from launch.cli import main
from launch.config import config_from_toml
from launch.forkserver import ForkServer
from launch.run_folder import METRICS, standing
from launch.token import VARIABLE
from pipeline.model.flops import ModelFlops
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import preset, read_config
from pipeline.schedule.simulate import Costs, Network, simulate
from pipeline.state.optimizer import learning_rate
from pipeline.store.client import SealedStore
from pipeline.store.frames import pack
from pipeline.store.handshake import HELLO, NONCE_BYTES, REFUSED, Secrets
from pipeline.store.table import Op
from recovery import checkpoint
from tests.harness import linked

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 60.0
PROMPT_S = 15.0
"""What must end at once ends within this on a busy machine; no deadline of a step is as short."""
STEPS, EVERY = 6, 3
ENDLESS: dict[str, Any] = {"steps": 100_000, "checkpoint_every": 0, "evaluate_every": 0}


# ---- starting runs ----


def launch(payload: dict[str, Any]) -> int:
    """What a forked process does: become a session of its own, write to files, and be the command."""
    os.setsid()
    os.environ.update(payload["environment"])
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(payload["log"]) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if payload["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (payload["largest_file"],) * 2)
    try:
        return main(payload["arguments"])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


class Parent:
    """Forks runs from the forkserver of the session, and keeps how they ended: several may run at once."""

    def __init__(self, forkserver: ForkServer) -> None:
        self._forkserver = forkserver
        self._codes: dict[int, int] = {}

    def start(self, payload: dict[str, Any]) -> int:
        return self._forkserver.start({"call": "tests.test_train:launch", **payload})

    def code(self, pid: int) -> int | None:
        """How the run ended, if it has."""
        self._codes.update((ended.pid, ended.code) for ended in self._forkserver.poll(0.0))
        return self._codes.get(pid)


_STARTED: list[Running] = []


@pytest.fixture(autouse=True)
def _runs_end() -> Iterator[None]:
    """A test that fails half-way leaves no run to disturb the next."""
    yield
    while _STARTED:
        _STARTED.pop().kill()


@dataclass
class Run:
    """A run that has ended."""

    out: Path
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def said(self) -> str:
        """What was printed, without the line breaks of a terminal's width."""
        return " ".join(self.stdout.split())

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return _lines(self.out / "metrics.jsonl")

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        return _lines(self.out / "events.jsonl")

    def named(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]

    @property
    def losses(self) -> list[float]:
        return [m["loss"] for m in self.metrics]

    @property
    def weights(self) -> dict[str, bytes]:
        """The exported files, byte by byte."""
        return {p.name: p.read_bytes() for p in (self.out / "model").glob("*.safetensors")}

    def ok(self) -> Run:
        assert self.code == 0, f"{self.stdout}\n{self.stderr}"
        return self


def _lines(path: Path) -> list[dict[str, Any]]:
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""  # the last may still be written
    return [json.loads(line) for line in whole.splitlines()]


def flags(**values: Any) -> list[str]:
    out: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        out += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return out


class Running:
    """A run that has been started, forked from the forkserver or as a command of its own."""

    def __init__(
        self, out: Path, arguments: Sequence[str], parent: Parent, *, command: Sequence[str] = (),
        largest_file: int = 0, environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self._parent = parent
        self.out, self._began, self._code = out, time.monotonic(), None
        self._earlier = self._starts()
        _STARTED.append(self)
        self._log = out.with_name(f"{out.name}.log{environment.get('RANK', '')}")
        self._log.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        if command:
            with (self._log / "stdout").open("wb") as stdout, (self._log / "stderr").open("wb") as stderr:
                self._process = subprocess.Popen(
                    [sys.executable, *command, *linked(arguments)], cwd=ROOT, stdout=stdout, stderr=stderr,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            self.pid = self._process.pid
        else:
            payload = {"log": str(self._log), "arguments": linked(arguments), "largest_file": largest_file}
            payload["environment"] = dict(environment)
            self.pid = parent.start(payload)

    def ended(self) -> bool:
        if self._code is None and self._process is not None:
            self._code = self._process.poll()
        elif self._code is None:
            self._code = self._parent.code(self.pid)
        return self._code is not None

    def until(self, holds: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        """Wait for something to happen while the run works."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert not self.ended(), f"the run ended first, with {self._code}:\n{self._text('stderr')}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s:\n{self._text('stdout')}{self._text('stderr')}"
            time.sleep(0.01)

    def until_step(self, step: int) -> None:
        """Wait until this run, not one before it in the same folder, has taken `step`."""
        self.until(lambda: self._starts() > self._earlier and len(_lines(self.out / "metrics.jsonl")) >= step)

    def _starts(self) -> int:
        return sum(event["event"] == "started" for event in _lines(self.out / "events.jsonl"))

    def processes(self) -> list[psutil.Process]:
        """The run's process and all that it has started."""
        own = psutil.Process(self.pid)
        return [own, *own.children(recursive=True)]

    def workers(self) -> list[psutil.Process]:
        """The processes that train: they have started nothing, another agent's child has started them, and they are
        neither a store nor who cleans up, which have an interpreter of their own."""
        own = psutil.Process(self.pid)
        leaves = [p for p in self.processes()[1:] if not p.children() and p.parent() != own]
        return [p for p in leaves if "-P" not in p.cmdline()]

    def parents(self) -> list[psutil.Process]:
        """The forkservers of the workers."""
        return list({p.ppid(): psutil.Process(p.ppid()) for p in self.workers()}.values())

    def finish(self, timeout_s: float = TIMEOUT_S) -> Run:
        """Wait for the end, and see that nothing of the run is left."""
        deadline = time.monotonic() + timeout_s
        try:
            while not self.ended():
                assert time.monotonic() < deadline, (
                    f"no end within {timeout_s} s:\n{self._text('stdout')}{self._text('stderr')}"
                )
                time.sleep(0.01)
        finally:
            self.kill()
        assert self._code is not None
        return Run(
            self.out, self._code, self._text("stdout"), self._text("stderr"), time.monotonic() - self._began
        )  # fmt: skip

    def kill(self) -> None:
        """End what still runs of this run, by its id, if it has not ended by itself."""
        if not self.ended():
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            deadline = time.monotonic() + 5
            while not self.ended() and time.monotonic() < deadline:
                time.sleep(0.01)

    def _text(self, name: str) -> str:
        return (self._log / name).read_text(errors="replace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


MARKS = [chr(c) for c in range(33, 127) if not chr(c).isalpha() and chr(c) not in '\\".']
"""Bytes that the corpus holds once each, in a document of their own."""


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    """About 12,000 bytes in 120 documents."""
    words = ["a", "pipeline", "of", "workers", "that", "may", "die", "at", "any", "moment", "trains", "on", "this"]
    rows = [" ".join(words[(d * k + d // 13) % 13] for k in range(1, 19)) for d in range(120)]
    rows = [f"{row} {MARKS[d]}." if d < len(MARKS) else row for d, row in enumerate(rows)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder / "corpus.jsonl"


@dataclass
class Launcher:
    """Starts runs of one small job; `changes` are settings by name."""

    folder: Path
    corpus: Path
    parent: Parent
    number: int = 0

    def settings(self, **changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "model": "llama-tiny", "data": self.corpus, "tokenizer": "bytes", "sequence_length": 32, "workers": 2,
            "microbatches": 4, "microbatch_size": 2, "steps": STEPS, "warmup": 2, "held_out": 0.1,
            "evaluate_samples": 8, "evaluate_every": EVERY, "checkpoint_every": EVERY, "sample_tokens": 0, "threads": 1,
            "recovery": "none", "out": self.new(),
        }  # fmt: skip
        return {**values, **changes}

    def new(self) -> Path:
        self.number += 1
        return self.folder / f"run{self.number}"

    def start(
        self, *, command: Sequence[str] = (), largest_file: int = 0,
        environment: Mapping[str, str] = MappingProxyType({}), **changes: Any,
    ) -> Running:  # fmt: skip
        values = self.settings(**changes)
        return Running(
            Path(values["out"]), ["train", *flags(**values)], self.parent, command=command, largest_file=largest_file,
            environment=environment,
        )  # fmt: skip

    def run(self, **changes: Any) -> Run:
        return self.start(**changes).finish()

    def copy(self, run: Run, *, without: Sequence[int] = ()) -> Path:
        """The run folder as it was when the run had not got to the steps `without`: no export, no such checkpoint."""
        out = shutil.copytree(run.out, self.new())
        shutil.rmtree(out / "model", ignore_errors=True)
        for step in without:
            shutil.rmtree(checkpoint.directory(out / "checkpoints", step))
        return out


@pytest.fixture(scope="module")
def launcher(folder: Path, corpus: Path, forkserver: ForkServer) -> Launcher:
    return Launcher(folder, corpus, Parent(forkserver))


@pytest.fixture(scope="module")
def reference(launcher: Launcher) -> Run:
    """The run that others are held against, started as it is typed."""
    return launcher.start(command=("-m", "launch"), sample_tokens=8).finish().ok()


# ---- what a run leaves behind ----


def test_a_run_folder_holds_all_that_a_run_leaves(reference: Run) -> None:
    assert sorted(p.name for p in reference.out.iterdir()) == [
        "certificates", "checkpoints", "config.toml", "data", "events.jsonl", "ledger.jsonl", "loss.svg",
        "metrics.jsonl", "model", "model-config", "report.html", "timeline.svg", "tokenizer", "trace.json",
    ]  # fmt: skip
    assert not [p for p in reference.out.rglob("*") if p.suffix in (".tmp", ".partial")]
    config = config_from_toml(reference.out / "config.toml", TrainConfig)
    assert (config.workers, config.steps, config.out, config.dropout) == (2, STEPS, reference.out, None)
    assert reference.stderr == ""


def test_metrics_tell_of_every_step(reference: Run) -> None:
    config = config_from_toml(reference.out / "config.toml", TrainConfig)
    measured = {"tflops", "peak_host_bytes", "peak_host_bytes_sum"}  # of a CPU no peak is known
    assert [set(m) for m in reference.metrics] == [{*METRICS, "again", *measured}] * STEPS
    model = LayeredModel(read_config(reference.out / "model-config"))
    flops = 4 * ModelFlops.of(model, 2, 32).microbatch(range(model.num_layers))
    for m in reference.metrics:
        assert 1e12 * m["tflops"] * m["tokens"] / m["tokens_per_s"] == pytest.approx(flops)
        assert 50 << 20 < m["peak_host_bytes"] < m["peak_host_bytes_sum"] <= 2 * m["peak_host_bytes"], "of two workers"
    assert [m["step"] for m in reference.metrics] == list(range(1, STEPS + 1))
    assert {m["tokens"] for m in reference.metrics} == {4 * 2 * 32}
    assert {m["view"] for m in reference.metrics} == {1}
    assert [m["lr"] for m in reference.metrics] == [learning_rate(config.optimizer_config(), n) for n in range(STEPS)]
    assert all(m["tokens_per_s"] > 0 and m["grad_norm"] > 0 for m in reference.metrics)
    assert reference.losses == sorted(reference.losses, reverse=True), "the loss falls"
    assert reference.losses[0] == pytest.approx(math.log(258), abs=0.2)


def test_events_tell_of_start_checkpoints_evaluations_and_export(reference: Run) -> None:
    events = [e for e in reference.events if e["event"] != "timeline"]  # which is there once both workers have told it
    assert [(e["event"], e["step"]) for e in events] == [
        ("started", 0), ("described", 0), ("evaluation", 3), ("checkpoint", 3), ("evaluation", 6), ("checkpoint", 6),
        ("exported", 6),
    ]  # fmt: skip
    assert [e["step"] for e in reference.named("timeline")] == [3]
    assert [e["time"] for e in events] == sorted(e["time"] for e in events)
    for event in reference.named("evaluation"):
        assert event["perplexity"] == pytest.approx(math.exp(event["loss"]))
    assert events[-1]["path"] == str(reference.out / "model")


def test_pictures_show_the_measured_step(reference: Run) -> None:
    for name in ("timeline.svg", "loss.svg"):
        assert ET.parse(reference.out / name).getroot().tag.endswith("svg")
    trace = json.loads((reference.out / "trace.json").read_text())
    slices = [(e["tid"], e["cat"]) for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == 1]
    for worker in {tid for tid, _ in slices}:
        kinds = [kind for tid, kind in slices if tid == worker]
        assert (kinds.count("F"), kinds.count("B"), kinds.count("STEP")) == (4, 4, 1)
    assert len({tid for tid, _ in slices}) == 2
    assert trace["otherData"]["state"] == "measured"


def test_the_end_of_a_run_is_told(reference: Run) -> None:
    perplexity = reference.named("evaluation")[-1]["perplexity"]
    assert f"step {STEPS}/{STEPS} loss {reference.losses[-1]:.3f}" in reference.said
    assert f"held-out perplexity {perplexity:.2f} after {STEPS} steps" in reference.said
    assert "sample, after 'def '" in reference.said
    for name in ("model", "timeline.svg", "trace.json", "loss.svg"):
        assert str(reference.out / name) in reference.stdout


def test_checkpoints_hold_the_exported_weights(reference: Run) -> None:
    found = checkpoint.find(reference.out / "checkpoints")
    assert found.path is not None
    assert found.manifest is not None
    assert sorted(p.name for p in (reference.out / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    extra = found.manifest["extra"]
    assert (extra["step"], extra["next_sample"], extra["seed"]) == (STEPS, STEPS * 8, 0)
    saved = {
        key.removeprefix("param/"): tensor
        for record in found.manifest["files"]
        for key, tensor in checkpoint.read_layer(found.path, found.manifest, record["layer"]).items()
        if key.startswith("param/")
    }
    exported = tensors(reference.out / "model")
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], exported[name]) for name in saved)


def tensors(model: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(model.glob("*.safetensors")) for name, t in load_file(file).items()}


def mean_loss(model: Any, samples: Sequence[Any]) -> float:
    ids = torch.stack([torch.from_numpy(sample) for sample in samples])
    with torch.no_grad():
        return float(token_loss(model(ids[:, :-1]).logits, ids[:, 1:])) / ids[:, 1:].numel()


def test_the_exported_model_has_the_loss_that_the_run_reported(reference: Run) -> None:
    model, notes = AutoModelForCausalLM.from_pretrained(reference.out / "model", output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    data = Dataset.open(reference.out / "data")
    held_out = data.held_out_spread(8)
    reported = reference.named("evaluation")[-1]["loss"]
    assert mean_loss(model.eval(), [held_out(i) for i in range(8)]) == pytest.approx(reported, abs=1e-5)
    assert AutoTokenizer.from_pretrained(reference.out / "model")("é")["input_ids"] == [*"é".encode()]


@pytest.mark.parametrize("arguments", [[], ["--data", "held-out", "--sequence-length", "32", "--samples", "8"]])
def test_eval_scores_what_the_run_evaluated(
    capsys: pytest.CaptureFixture[str], reference: Run, arguments: list[str]
) -> None:
    reported = reference.named("evaluation")[-1]
    assert main(["eval", "--model", str(reference.out / "model"), "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(reported["loss"], abs=1e-6, rel=0)
    assert found["perplexity"] == pytest.approx(reported["perplexity"], rel=1e-6)
    held_out = Dataset.open(reference.out / "data").num_held_out
    assert (found["data"], found["samples"], found["sequence_length"], found["tokens"]) == ("held-out", 8, 32, 256)
    assert found["scored"] == (
        f"8 samples of 32 tokens, spread over the {held_out} that the run in '{reference.out}' has held out"
    )


def test_a_run_takes_tokens_from_the_cache(launcher: Launcher) -> None:
    runs = [launcher.run(steps=1, checkpoint_every=0, tokenizer="bpe", vocabulary=300).ok() for _ in range(2)]
    assert "tokenising: done" in runs[0].stdout
    assert "training the tokenizer: done" in runs[0].stdout
    lines = runs[1].stdout.splitlines()
    assert lines[:2] == ["tokenizer taken from the cache", "tokens taken from the cache"]
    assert "tokenising" not in runs[1].stdout
    assert runs[1].weights == runs[0].weights
    (runs[0].out / "data" / "tokens.bin").write_bytes(b"")
    assert len(Dataset.open(runs[1].out / "data").tokens) > 1000


def test_the_first_step_is_the_initial_model_on_the_first_samples(reference: Run) -> None:
    blueprint = LayeredModel(read_config(reference.out / "model-config"))
    span = blueprint.build((0, blueprint.num_layers), seed=0)
    data = Dataset.open(reference.out / "data")
    ids = torch.stack([torch.from_numpy(data.train_sample(i)) for i in range(8)])
    with torch.no_grad():
        loss = float(token_loss(span(ids[:, :-1]), ids[:, 1:])) / ids[:, 1:].numel()
    assert reference.losses[0] == pytest.approx(loss, abs=1e-5)


def test_one_json_object_is_all_that_is_printed(launcher: Launcher) -> None:
    run = launcher.run(json=True, sample_tokens=5, steps=4).ok()
    assert run.stderr == ""
    summary = json.loads(run.stdout)
    assert summary["sample"].startswith("def ")
    assert summary.items() >= {
        "exit_code": 0, "step": 4, "out": str(run.out), "loss": run.losses[-1], "model": str(run.out / "model"),
        "held_out_perplexity": run.named("evaluation")[-1]["perplexity"],
    }.items()  # fmt: skip


def test_tensorboard_sees_the_same_losses(launcher: Launcher) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    run = launcher.run(tensorboard=True, steps=2).ok()
    (file,) = (run.out / "tensorboard").iterdir()
    found = [
        (event.step, value.tensor.float_val[0])
        for event in loading.EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag == "loss"
    ]
    assert found == [(m["step"], pytest.approx(m["loss"], rel=1e-6)) for m in run.metrics]


# ---- resuming ----


TIED = {
    **{k: v for k, v in preset("llama-tiny", vocab_size=258).to_dict().items() if k != "architectures"},
    "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A kind of run, the other layout in which it is resumed, and how near the losses then are."""

    changes: dict[str, Any]
    other: dict[str, Any]
    tolerance: float = 1e-5


VARIANTS = {
    "llama": Variant({}, {"workers": 3, "microbatches": 8, "microbatch_size": 1}),
    "gpt2 with dropout": Variant({"model": "gpt2-tiny", "dropout": 0.2}, {"workers": 1}),
    "tied, head apart": Variant({"model": "tied.json", "scheduler": "zero_bubble"}, {"workers": 3}),
    "tied, head beside": Variant({"model": "tied.json", "ends": "home", "workers": 3}, {"ends": "auto"}),
    "two replicas": Variant({"workers": 4, "replicas": 2, "scheduler": "interleaved"}, {"workers": 2, "replicas": 1}),
    "shared layers": Variant({"scheduler": "balanced"}, {"workers": 4, "replicas": 2}),
    "bfloat16": Variant({"dtype": "bfloat16", "recompute": True}, {"workers": 4, "scheduler": "gpipe"}, 1e-2),
}


@pytest.fixture(scope="module")
def runs(launcher: Launcher, reference: Run) -> Callable[[str], Run]:
    """The uninterrupted run of a variant."""
    (launcher.folder / "tied.json").write_text(json.dumps(TIED))
    made = {"llama": reference}

    def uninterrupted(name: str) -> Run:
        if name not in made:
            made[name] = launcher.run(**resolved(launcher, VARIANTS[name].changes)).ok()
        return made[name]

    return uninterrupted


def resolved(launcher: Launcher, changes: dict[str, Any]) -> dict[str, Any]:
    return {k: launcher.folder / v if str(v).endswith(".json") else v for k, v in changes.items()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


CHOSEN = [
    pytest.param(name, marks=() if name in ("gpt2 with dropout", "tied, head apart", "bfloat16") else pytest.mark.long)
    for name in VARIANTS
]
"""Of what all of them show, a part."""


@pytest.mark.parametrize("variant", CHOSEN)
def test_a_run_learns(runs: Callable[[str], Run], variant: str) -> None:
    run = runs(variant)
    assert len(run.losses) == STEPS
    assert run.losses[-1] < run.losses[0] - 0.3
    assert run.losses[0] == pytest.approx(math.log(258), abs=0.3)
    AutoModelForCausalLM.from_pretrained(run.out / "model")


@pytest.mark.parametrize("variant", CHOSEN)
def test_a_damaged_checkpoint_is_skipped_and_the_one_before_leads_to_the_same_bits(
    launcher: Launcher, runs: Callable[[str], Run], variant: str
) -> None:
    whole = runs(variant)
    out = launcher.copy(whole)
    flip(out / "checkpoints" / "step-00000006" / "layer-00002.safetensors")
    run = launcher.run(**resolved(launcher, VARIANTS[variant].changes), out=out, resume=True).ok()
    assert "checkpoint step-00000006 is skipped: layer-00002.safetensors has checksum" in run.said
    assert "resuming at step 3 from step-00000003" in run.said
    compared = ("step", "loss", "grad_norm", "lr", "tokens")
    assert [[m[k] for k in compared] for m in run.metrics] == [[m[k] for k in compared] for m in whole.metrics]
    assert run.named("evaluation")[-1]["loss"] == whole.named("evaluation")[-1]["loss"]
    assert run.weights == whole.weights
    assert checkpoint.find(out / "checkpoints").skipped == ()


@pytest.mark.parametrize("variant", CHOSEN)
def test_a_run_goes_on_with_other_workers(launcher: Launcher, runs: Callable[[str], Run], variant: str) -> None:
    whole, kind = runs(variant), VARIANTS[variant]
    changes = resolved(launcher, {**kind.changes, **kind.other})
    run = launcher.run(**changes, out=launcher.copy(whole, without=[6]), resume=True).ok()
    assert [m["step"] for m in run.metrics] == list(range(1, STEPS + 1))
    assert run.losses == pytest.approx(whole.losses, abs=kind.tolerance)
    theirs = tensors(whole.out / "model")
    assert tensors(run.out / "model").keys() == theirs.keys()
    if kind.tolerance < 1e-3:
        for name, tensor in tensors(run.out / "model").items():
            assert torch.allclose(tensor, theirs[name], atol=1e-4), name


def test_a_run_that_was_done_stays_done(launcher: Launcher, reference: Run) -> None:
    out = shutil.copytree(reference.out, launcher.new())
    run = launcher.run(out=out, resume=True).ok()
    assert run.metrics == reference.metrics
    assert run.weights == reference.weights


def test_what_was_not_seen_is_said_in_the_events_too(launcher: Launcher, reference: Run) -> None:
    """A machine reads events.jsonl and --json, not the screen."""
    out = launcher.copy(reference)
    flip(out / "checkpoints" / "step-00000006" / "layer-00000.safetensors")
    run = launcher.run(out=out, resume=True, json=True).ok()
    told = [e for e in run.events if "step-00000006" in json.dumps(e)]
    assert told, "no event tells of the checkpoint that was skipped"


# ---- slow links ----


@pytest.mark.parametrize(
    "links",
    [
        pytest.param(
            {"latency_s": [[0, 0.01], [0.01, 0]], "bandwidth": [[None, 1e6], [1e6, None]]}, id="latency and bandwidth"
        ),
        pytest.param({"hop_s": [[0, 0.02], [0.02, 0]]}, id="hops", marks=pytest.mark.long),
    ],
)
def test_slow_links_slow_a_run_down_as_simulated_and_change_no_bit(
    launcher: Launcher, reference: Run, links: dict[str, Any]
) -> None:
    """The simulator with compute that takes no time is a bound: no step can be faster than its transfers."""
    path = launcher.folder / "network.json"
    path.write_text(json.dumps(links))
    config = config_from_toml(reference.out / "config.toml", TrainConfig)
    config = replace(config, scheduler="gpipe")  # its messages come in bursts
    schedule = plan_layout(config, LayeredModel(preset("llama-tiny", vocab_size=258)), 8)[0].train
    costs = Costs(forward=0.0, backward=0.0, output_bytes=2 * 32 * 64 * 4)
    bound = simulate(schedule, costs, Network.from_json(links)).makespan_s
    assert bound > 0.05
    run = launcher.run(network=path, scheduler="gpipe").ok()
    assert run.losses == reference.losses
    assert run.weights == reference.weights
    measured = median(m["tokens"] / m["tokens_per_s"] for m in run.metrics)
    assert measured >= 0.97 * bound


# ---- being asked to stop ----


def _terminate(running: Running) -> None:
    os.kill(running.pid, signal.SIGTERM)


def _interrupt_all(running: Running) -> None:
    os.killpg(running.pid, signal.SIGINT)


def _asked_to_stop(running: Running, ask: Callable[[Running], None]) -> tuple[Run, dict[str, Any]]:
    """The run after it was asked, with all its processes gone, and what it says of its stop."""
    processes = running.processes()
    ask(running)
    stopped = running.finish(PROMPT_S)
    assert stopped.code == 75, stopped.stderr
    assert psutil.wait_procs(processes, timeout=3)[1] == []
    (event,) = stopped.named("stopped")
    return stopped, event


def _terminate_all(running: Running) -> None:
    os.killpg(running.pid, signal.SIGTERM)


def _terminate_one(running: Running) -> None:
    running.workers()[-1].terminate()


@pytest.mark.parametrize(
    "ask",
    [
        _terminate,
        _interrupt_all,
        *(pytest.param(ask, marks=pytest.mark.long) for ask in (_terminate_all, _terminate_one)),
    ],
    ids=lambda f: f.__name__,
)
def test_a_run_that_is_asked_to_stop_saves_itself_and_goes_on_later(
    launcher: Launcher, ask: Callable[[Running], None]
) -> None:
    running = launcher.start(**ENDLESS)
    running.until_step(2)
    stopped, event = _asked_to_stop(running, ask)
    assert event["step"] == stopped.metrics[-1]["step"] == len(stopped.metrics)
    assert f"saved at step {event['step']}; --resume goes on from there" in stopped.said
    assert [p.name for p in (stopped.out / "checkpoints").iterdir()] == [f"step-{event['step']:08d}"]
    assert not (stopped.out / "model").exists()
    if ask is not _terminate:  # one of them is enough to see that it goes on
        return
    last = event["step"] + 2
    resumed = launcher.run(**{**ENDLESS, "out": stopped.out, "resume": True, "steps": last}).ok()
    assert [m["step"] for m in resumed.metrics] == list(range(1, last + 1))
    assert resumed.losses[: event["step"]] == stopped.losses
    assert (resumed.out / "model" / "config.json").exists()


def _hang_up(running: Running) -> None:
    os.killpg(running.pid, signal.SIGHUP)


def _terminate_and_kill_who_was_told(running: Running) -> None:
    """The workers that got the signal die before they can vote on it."""
    workers = running.workers()
    os.kill(running.pid, signal.SIGTERM)
    for worker in workers:
        worker.kill()


def _tell_one_worker_and_kill_it(running: Running) -> None:
    """Nobody but one worker knows of it, and that one has a moment to pass it on."""
    worker = running.workers()[-1]
    worker.terminate()
    time.sleep(0.8)
    with suppress(psutil.NoSuchProcess):
        worker.kill()


@pytest.mark.parametrize(
    "ask",
    [_hang_up, _tell_one_worker_and_kill_it, pytest.param(_terminate_and_kill_who_was_told, marks=pytest.mark.long)],
    ids=lambda f: f.__name__,
)
def test_to_be_stopped_is_a_state_of_the_run(launcher: Launcher, ask: Callable[[Running], None]) -> None:
    running = launcher.start(**{**ENDLESS, "recovery": "checkpoint", "checkpoint_every": 2})
    running.until_step(3)
    stopped, event = _asked_to_stop(running, ask)
    assert f"step-{event['step']:08d}" in [p.name for p in (stopped.out / "checkpoints").iterdir()]
    ledger = standing(_lines(stopped.out / "ledger.jsonl"))
    assert [line["step"] for line in ledger] == list(range(1, event["step"] + 1))


def test_a_stop_ends_a_run_whose_workers_crash_in_a_loop(launcher: Launcher) -> None:
    """Every worker that comes up fails at once; the signal comes while they do."""
    deaths = ";".join(f"exception:worker={w},step={s},at=join" for w in range(2, 40) for s in range(3, 5))
    running = launcher.start(**{**ENDLESS, "recovery": "checkpoint", "inject": f"kill:worker=1,step=3;{deaths}"})
    running.until(lambda: any(e["event"] == "detected" for e in _lines(running.out / "events.jsonl")))
    _terminate(running)
    run = running.finish(PROMPT_S)
    assert run.code in (1, 75, 93), run.stderr
    assert len(run.named("detected")) <= 4
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name)
def test_a_run_that_is_stopped_before_its_first_step_leaves_nothing(launcher: Launcher, signum: int) -> None:
    running = launcher.start(data="stdlib", max_tokens=0)
    running.until((running.out / "data" / "tokens.bin.tmp").exists)
    processes = running.processes()
    os.kill(running.pid, signum)
    run = running.finish(PROMPT_S)
    assert run.code == 75
    assert "asked to stop before the first step: nothing was saved, and nothing is left" in run.stderr
    assert psutil.wait_procs(processes, timeout=3)[1] == []
    assert "Traceback" not in run.stderr
    assert not run.out.exists(), sorted(str(p) for p in run.out.rglob("*"))


def test_a_signal_after_the_last_step_changes_nothing(launcher: Launcher) -> None:
    """All is saved: what is left, the end of the workers and a sample, takes a while, and the run is done."""
    running = launcher.start(steps=2, sample_tokens=20_000)
    running.until(lambda: any(event["event"] == "exported" for event in _lines(running.out / "events.jsonl")))
    for signum in (signal.SIGTERM, signal.SIGHUP):
        os.kill(running.pid, signum)
    run = running.finish(PROMPT_S)
    assert run.code == 0
    assert (run.out / "model" / "config.json").exists()
    assert "asked to stop" not in run.stdout + run.stderr


# ---- deaths ----


def _kill_worker(running: Running) -> None:
    running.workers()[-1].kill()


def _suspend_worker(running: Running) -> None:
    running.workers()[-1].suspend()


def _kill_parent(running: Running) -> None:
    (parent,) = running.parents()
    parent.kill()


@pytest.mark.parametrize(
    ("fault", "message", "replicas"),
    [
        (_kill_worker, r"worker [01] was killed by SIGKILL", 1),
        (_kill_worker, r"worker [01] was killed by SIGKILL", 2),
        (_suspend_worker, r"workers? \[?[01]\]?", 1),
        (_kill_parent, r"the forkserver has ended unexpectedly", 1),
    ],
    ids=["a stage killed", "a replica killed", "a worker hangs", "the forkserver killed"],
)
def test_a_death_ends_the_run_with_its_name_and_leaves_nothing_running(
    launcher: Launcher, fault: Callable[[Running], None], message: str, replicas: int
) -> None:
    running = launcher.start(**ENDLESS, replicas=replicas, deadline=2.0)
    running.until_step(2)
    processes = running.processes()
    assert len(processes) == 6, "the agent, the store, who draws the report, the forkserver and two workers"
    fault(running)
    run = running.finish(PROMPT_S)
    assert run.code == 1
    assert psutil.wait_procs(processes, timeout=3)[1] == []
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(run.stderr)
    assert "Traceback" not in run.stderr
    (failed,) = run.named("failed")
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(failed["error"])
    assert failed["step"] == len(run.metrics)


def test_nothing_survives_the_agent(launcher: Launcher) -> None:
    running = launcher.start(**ENDLESS)
    running.until_step(1)
    processes = running.processes()
    os.kill(running.pid, signal.SIGKILL)
    assert running.finish(PROMPT_S).code == -signal.SIGKILL
    assert psutil.wait_procs(processes, timeout=5)[1] == []


def test_a_run_that_failed_goes_on_from_its_checkpoint(launcher: Launcher, reference: Run) -> None:
    running = launcher.start(**{**ENDLESS, "out": launcher.copy(reference, without=[6]), "resume": True})
    running.until_step(5)
    _kill_worker(running)
    failed = running.finish(PROMPT_S)
    assert failed.code == 1
    assert [m["step"] for m in failed.metrics[:5]] == [1, 2, 3, 4, 5]
    run = launcher.run(out=failed.out, resume=True).ok()
    assert run.losses == reference.losses
    assert run.weights == reference.weights


def test_a_folder_that_a_run_works_in_is_refused_to_another(launcher: Launcher) -> None:
    """Each would overwrite the other's metrics, checkpoints and model, and both would end with 0."""
    running = launcher.start(**ENDLESS)
    running.until_step(1)
    other = launcher.run(out=running.out, steps=2)
    assert other.code == 2, "two runs write to one folder"
    assert f"out is '{running.out}'" in other.stderr
    before = len(_lines(running.out / "metrics.jsonl"))
    running.until_step(before + 1)
    _terminate(running)
    first = running.finish(PROMPT_S)
    assert first.code == 75
    assert [m["step"] for m in first.metrics] == list(range(1, len(first.metrics) + 1))


# ---- numbers that are none ----


@pytest.fixture(scope="module")
def poisoned(launcher: Launcher, reference: Run) -> Callable[[int], Path]:
    """A model directory in which the embedding of one token is NaN."""

    def make(token: int) -> Path:
        path = shutil.copytree(reference.out / "model", launcher.new())
        for file in path.glob("*.safetensors"):
            held = load_file(file)
            if "model.embed_tokens.weight" in held:
                held["model.embed_tokens.weight"][token] = math.nan
                save_file(held, file, metadata={"format": "pt"})
        return path

    return make


def test_a_loss_that_is_no_number_stops_the_run_with_step_and_microbatch(
    launcher: Launcher, reference: Run, poisoned: Callable[[int], Path]
) -> None:
    data = Dataset.open(reference.out / "data")
    places = {ord(mark): i for i in range(8, 8 * STEPS) for mark in MARKS if ord(mark) in data.train_sample(i)[:-1]}
    token, sample = max(places.items(), key=lambda place: place[1])
    step, microbatch = sample // 8, sample % 8 // 2
    model = poisoned(token)
    run = launcher.run(model=model, evaluate_every=0, tokenizer="auto", checkpoint_every=1)
    assert run.code == 1
    assert len(run.metrics) == step, "every step before it was taken"
    assert run.losses[0] == pytest.approx(
        mean_loss(AutoModelForCausalLM.from_pretrained(model), [data.train_sample(i) for i in range(8)]), abs=1e-5
    )
    assert f"the loss is nan at step {step + 1}, microbatch {microbatch}" in run.stderr, (
        "steps are counted from 1 wherever a person sees them"
    )
    (failed,) = run.named("failed")
    assert "the loss is nan" in failed["error"]
    assert checkpoint.find(run.out / "checkpoints").path is None, "no run could go on from a weight that is no number"
    assert {"no numbers" in event["error"] for event in run.named("checkpoint_failed")} == {True}
    assert not (run.out / "model").exists()


def test_weights_that_were_trained_before_are_evaluated_before_they_are_trained(
    launcher: Launcher, reference: Run
) -> None:
    run = launcher.run(model=reference.out / "model", tokenizer="auto", steps=2, evaluate_every=0).ok()
    first, last = run.named("evaluation")
    assert (first["step"], last["step"]) == (0, 2)
    assert first["loss"] == pytest.approx(reference.named("evaluation")[-1]["loss"], abs=1e-6)
    assert "step 0: held-out loss" in run.said
    assert [e["step"] for e in reference.named("evaluation")] == [EVERY, STEPS], "random weights have nothing to tell"


def test_a_held_out_loss_that_is_no_number_is_called_that(
    launcher: Launcher, reference: Run, poisoned: Callable[[int], Path]
) -> None:
    data = Dataset.open(reference.out / "data")
    token = next(
        ord(mark) for i in range(data.num_held_out) for mark in MARKS if ord(mark) in data.held_out_sample(i)[:-1]
    )
    run = launcher.run(model=poisoned(token), evaluate_samples=1000, evaluate_every=2, tokenizer="auto")
    assert run.code == 1
    assert run.metrics == [], "weights that come from elsewhere are evaluated before they are trained"
    with pytest.raises(RuntimeError, match=r"the held-out loss is nan at microbatch \d+, before the first step"):
        raise RuntimeError(run.stderr)


def test_a_gradient_that_is_no_number_stops_the_run_with_its_step(launcher: Launcher) -> None:
    run = launcher.run(lr=100, weight_decay=100, clip=0.0, warmup=0, evaluate_every=0)
    assert run.code == 1
    assert "is nan at step" in run.stderr or "is inf at step" in run.stderr
    assert "the step was not taken" in run.stderr
    assert 1 <= len(run.metrics) < STEPS
    assert all(math.isfinite(m["loss"]) for m in run.metrics)


# ---- full disks ----


def test_a_checkpoint_that_does_not_fit_costs_the_checkpoint_and_not_the_run(
    launcher: Launcher, reference: Run
) -> None:
    """A block's state of 497,028 bytes does not fit, a shard of the export of 395,000 does."""
    run = launcher.start(largest_file=450_000).finish().ok()
    failed = run.named("checkpoint_failed")
    assert [e["step"] for e in failed] == [3, 6]
    for event in failed:
        assert "layer-00001.safetensors cannot be written (File too large): 497" in event["error"]
        assert f"no checkpoint at step {event['step']}: " in run.said
    assert run.named("checkpoint") == []
    assert run.losses == reference.losses
    assert run.weights == reference.weights
    assert list((run.out / "checkpoints").iterdir()) == []


def test_a_run_that_cannot_save_what_it_was_asked_to_save_says_so(launcher: Launcher) -> None:
    running = launcher.start(largest_file=450_000, **ENDLESS)
    running.until_step(2)
    _terminate(running)
    run = running.finish(PROMPT_S)
    assert run.code == 1
    assert "could not save" in run.stderr
    assert list((run.out / "checkpoints").iterdir()) == []


def test_a_model_that_does_not_fit_is_named_and_not_half_written(launcher: Launcher) -> None:
    run = launcher.start(largest_file=300_000).finish()
    assert run.code == 1
    assert str(run.out / "model") in run.stderr, "the message names what could not be written"
    assert "File too large" in run.stderr
    assert [p.name for p in run.out.iterdir() if p.name.startswith("model")] == ["model-config"]
    assert len(run.metrics) == STEPS


def test_a_reader_that_has_enough_does_not_end_the_run(launcher: Launcher, reference: Run) -> None:
    """unbroken train ... | head -n 1"""
    values = launcher.settings()
    arguments = [sys.executable, "-m", "launch", "train", *flags(**values)]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(TIMEOUT_S) == 0, process.stderr and process.stderr.read()
    assert [m["loss"] for m in _lines(Path(values["out"]) / "metrics.jsonl")] == reference.losses


# ---- what must not be lost or believed ----


def test_what_a_checkpoint_contains_is_in_the_ledger_whenever_the_run_is_killed(launcher: Launcher) -> None:
    """SIGKILL takes the coordinator, its store and all that it has not read, at a moment right after a checkpoint."""
    out = launcher.new()
    changes, checkpoints = {**ENDLESS, "out": out, "checkpoint_every": 1, "keep": 1}, out / "checkpoints"
    for number in range(4):
        running = launcher.start(**changes, resume=number > 0)
        running.until_step(3)
        before = {p.name for p in checkpoints.iterdir()}
        running.until(lambda before=before: bool({p.name for p in checkpoints.glob("step-????????")} - before))
        os.kill(running.pid, signal.SIGKILL)
        running.finish(PROMPT_S)
        found = checkpoint.find(checkpoints).path
        assert found is not None
        step = int(found.name.split("-")[1])
        ledger = [line["step"] for line in standing(_lines(out / "ledger.jsonl"))]
        assert ledger[:step] == list(range(1, step + 1))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_what_cannot_be_read_in_the_store_costs_lines_and_not_the_run(launcher: Launcher, reference: Run) -> None:
    """Written by who knows the token: a worker of another version, say, or one that is half dead."""
    port, token = free_port(), "a token of this test, and of no other one"
    running = launcher.start(
        store_port=port, steps=400, checkpoint_every=0, evaluate_every=0, environment={VARIABLE: token}
    )
    running.until_step(2)
    store = SealedStore("127.0.0.1", port, token.encode(), "unbroken", 5.0)
    for data in (b"\xff\xfe", b"[]", b'{"kind": "step"}', b'{"worker": 0}'):
        for key in ("loss/0", "complaint/1", "beat/0", "agent/0", "error/0", "record/1/0", "over/x"):
            store.set(key, data)
        time.sleep(0.1)
    before = len(_lines(running.out / "metrics.jsonl"))
    running.until_step(before + 20)
    _terminate(running)
    run = running.finish(PROMPT_S)
    assert run.code == 75, run.stderr
    assert run.named("unreadable")
    assert not run.named("detected")
    assert "Traceback" not in run.stderr
    assert token not in run.stdout + run.stderr + "".join(p.read_text() for p in run.out.glob("*.*l"))


FORGED = {
    "failed": '{"reason": "a stranger says so", "code": 1}', "over": "0", "stop": "", "view/2": "{}",
    "loss/0": '{"worker": 0, "reason": "a stranger says so", "told": true, "time": 1.0}', "losses": "0 1",
    "record/1/0": '{"time": 1.0, "kind": "step", "step": 1, "loss": 0.0}',
}  # fmt: skip
"""What a stranger would write to end a run, to have it stop, to evict a worker, or to forge a line of its ledger."""


def forge(port: int, key: str, value: str) -> bytes:
    """Speak the store's own protocol without its token, and go on whatever the answer is: all that it says."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as end, suppress(ConnectionError):
        end.sendall(HELLO + bytes(NONCE_BYTES))
        found += end.recv(NONCE_BYTES, socket.MSG_WAITALL)
        secrets = Secrets.of(b"a guess, as good as any other one", bytes(NONCE_BYTES), found)
        end.sendall(secrets.client_proof)
        end.sendall(secrets.seals(server=False)[0].seal(pack(Op.SET, [f"unbroken/{key}".encode(), value.encode()])))
        end.sendall(secrets.seals(server=False)[0].seal(pack(Op.GET, [b"unbroken/view/1"], 1.0)))
        while piece := end.recv(4096):
            found += piece
    return found


def test_a_stranger_reads_and_forges_nothing_and_the_run_comes_to_its_calm_result(
    launcher: Launcher, reference: Run
) -> None:
    port, tried = free_port(), Counter[str]()
    running = launcher.start(store_port=port)
    while not running.ended():
        with suppress(ConnectionRefusedError, ConnectionResetError):  # there is none yet, or no more
            for key, value in FORGED.items():
                assert forge(port, key, value)[NONCE_BYTES:] in (b"", REFUSED)
                tried[key] += 1
            with socket.create_connection(("127.0.0.1", port), timeout=5) as end:  # TCPStore's own first words
                end.sendall(bytes([9]) + (0x3C85F7CE).to_bytes(4, "little") + b"\x05" + bytes(64))
                assert end.recv(64) == b""
        time.sleep(0.02)
    run = running.finish().ok()
    assert set(tried) == set(FORGED)
    assert min(tried.values()) > 3
    assert run.losses == reference.losses
    assert run.weights == reference.weights
    assert [e["event"] for e in run.events] == [e["event"] for e in reference.events]


def test_without_the_token_no_machine_joins_a_run(launcher: Launcher) -> None:
    """A second machine that has another token, and one whose file others can read."""
    port, out, token = free_port(), launcher.new(), launcher.folder / "token"
    told = {"nodes": 2, "store": f"127.0.0.1:{port}", "out": out}
    token.write_text("t" * 40)
    token.chmod(0o640)
    refused = launcher.start(**told, node_rank=1, token_file=token).finish()
    assert refused.code == 2
    assert "with mode 0640; allowed: a file of user" in refused.stderr
    token.chmod(0o600)
    first = launcher.start(**told, **ENDLESS, node_rank=0, token_file=token)
    other = launcher.start(**{**told, "out": launcher.new()}, node_rank=1, environment={VARIABLE: "u" * 40}).finish()
    assert other.code == 2
    assert "the store has another token than this process" in other.stderr
    first.until(lambda: (out / "events.jsonl").exists())
    first.kill()
    assert "tttt" not in "".join(p.read_text(errors="replace") for p in out.rglob("*") if p.is_file())


def test_tokens_that_do_not_fit_are_named_and_leave_nothing(launcher: Launcher) -> None:
    run = launcher.start(largest_file=10_000).finish()
    assert run.code in (1, 2)
    assert f"tokens cannot be written to '{run.out / 'data'}': File too large" in run.stderr
    assert not run.out.exists()


# ---- torchrun ----


def torchrun(folder: Path, *flags: str) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--log-dir", str(folder), *flags, "-m", "launch")


@pytest.mark.long
def test_torchrun_trains_the_same_model_to_the_bit(launcher: Launcher, reference: Run, tmp_path: Path) -> None:
    run = launcher.start(command=torchrun(tmp_path, "--master-port", str(free_port()))).finish().ok()
    assert run.losses == reference.losses
    assert run.weights == reference.weights
    assert [e["event"] for e in run.events] == [e["event"] for e in reference.events]
    assert run.stdout.count("held-out perplexity") == 1, "one slot speaks for all"


def test_a_death_in_a_slot_is_named_and_ends_every_slot(launcher: Launcher) -> None:
    """What torchrun tells them, and not torchrun, which would end them all: each ends by itself."""
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    out = launcher.new()
    slots = [launcher.start(environment={**told, "RANK": r, "LOCAL_RANK": r}, **ENDLESS, out=out) for r in "01"]
    slots[0].until_step(2)
    processes = [process for slot in slots for process in slot.processes()]
    assert [len(slot.workers()) for slot in slots] == [1, 1]
    slots[0].workers()[0].kill()
    ended = [slot.finish(PROMPT_S) for slot in slots]
    assert [run.code for run in ended] == [1, 1]
    assert psutil.wait_procs(processes, timeout=3)[1] == []
    said = "".join(run.stderr for run in ended)
    with pytest.raises(RuntimeError, match=r"unbroken train: worker 0 was killed by SIGKILL"):
        raise RuntimeError(said)
    assert said.count("unbroken train: ") == 1, "one slot says it for all"
    (failed,) = ended[0].named("failed")
    assert "was killed by SIGKILL" in failed["error"]


@pytest.mark.long
def test_a_death_under_torchrun_is_named_and_ends_every_slot(launcher: Launcher, tmp_path: Path) -> None:
    running = launcher.start(command=torchrun(tmp_path, "--standalone"), **ENDLESS)
    running.until_step(2)
    processes = running.processes()
    assert len(running.parents()) == 2, "each slot has a forkserver with one worker"
    running.workers()[0].kill()
    run = running.finish(TIMEOUT_S)
    assert run.code == 1
    assert psutil.wait_procs(processes, timeout=3)[1] == []
    with pytest.raises(RuntimeError, match=r"unbroken train: worker [01] was killed by SIGKILL"):
        raise RuntimeError(run.stderr)
    assert run.stderr.count("unbroken train: ") == 1, "one slot says it for all"
    (failed,) = run.named("failed")
    assert "was killed by SIGKILL" in failed["error"]
