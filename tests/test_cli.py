"""The command line as a person meets it: what --help says, what --json holds, and how a mistake is answered."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from jobs.corpus import documents
from jobs.data import Dataset
from jobs.prepare import blocks, prepare
from jobs.row_data import RowDataset
from jobs.row_prepare import Encoded, prepare_rows
from jobs.rows import Row, read_rows
from jobs.tokenizer import build_tokenizer
from launch.cli import COMMANDS, main
from pipeline.model.families import FAMILIES
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import PRESETS, finish_export, preset, write_shard
from pipeline.schedule.lower import lower
from pipeline.schedule.ops import loads
from pipeline.schedule.verify import verify
from schedulers import PLANNERS

ROOT = Path(__file__).parents[1]


BYTES = build_tokenizer("bytes", 0, ())


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """The exit code, what is printed on stdout and on stderr."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as ended:  # the parser of arguments ends like that
        code = ended.code if isinstance(ended.code, int) else 1
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def report(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """The one JSON object that a command prints with --json."""
    code, out, err = told(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


# ---- help ----


def docstrings(settings: type) -> dict[str, str]:
    """Field -> the text below it, of a class and of those it inherits from."""
    found: dict[str, str] = {}
    for cls in reversed(settings.__mro__[:-1]):
        source = ROOT / f"{cls.__module__.replace('.', '/')}.py"
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
                for field, text in zip(node.body, node.body[1:], strict=False):
                    if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                        assert isinstance(field.target, ast.Name)
                        assert isinstance(text.value, ast.Constant)
                        found[field.target.id] = str(text.value.value)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_of_every_flag_what_its_field_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    settings, _ = COMMANDS[command].load()
    code, out, _ = told(capsys, command, "--help")
    assert code == 0
    said = "".join(out.split()).replace("│", "")
    assert f"unbroken {command}" in out
    names = [field.name for field in fields(settings)]
    texts = docstrings(settings)
    assert set(names) == set(texts), "a setting without a docstring has no help"
    for name in names:
        assert f"--{name.replace('_', '-')}" in out
        assert "".join(texts[name].split()) in said, f"the help of --{name} is not what its field says"


def test_help_tells_of_the_file_of_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config" in told(capsys, "train", "--help")[1]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_without_a_command_all_of_them_are_listed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, _ = told(capsys, *arguments)
    assert code == (0 if arguments else 2)
    for name, command in COMMANDS.items():
        assert f"{name} " in out
        assert command.summary in out


# ---- who reads it ----


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--version"], ["simulate"], ["draw", "--help"]])
def test_a_reader_that_is_gone_has_enough(arguments: list[str], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        done = launched(arguments, gone, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_cannot_be_written_is_an_error_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = launched(["simulate"], full)
    assert (done.returncode, done.stderr) == (
        1, "unbroken: what it says cannot be written: No space left on device\n"
    )  # fmt: skip


def launched(arguments: list[str], stdout: IO[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        check=False, env={**os.environ, "PYTHONUNBUFFERED": "", **environment},
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [["simulate"], ["draw", "--help"], ["simulate", "--stages", "0"]])
def test_what_needs_no_torch_does_not_wait_for_it(arguments: list[str]) -> None:
    program = f"import sys; from launch.cli import main; main({arguments}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT, check=False).returncode == 0


# ---- mistakes in the line itself ----


@pytest.mark.parametrize(("level", "code"), [("loud", 2), ("10", 2), ("", 0), ("info", 0)])
def test_how_much_is_logged_is_one_of_the_levels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, level: str, code: int
) -> None:
    monkeypatch.setenv("UNBROKEN_LOG", level)
    message = f"unbroken: UNBROKEN_LOG is {level!r}; allowed: DEBUG, INFO, WARNING, ERROR, CRITICAL\n"
    found, _, err = told(capsys, "simulate")
    assert (found, err) == (code, message if code else "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trian"],
            "command 'trian' is unknown; allowed: train, unlearn, slices, audit, authors, replay, eval, generate, "
            "export, simulate, plan, explain, draw, report, doctor, clean (did you",
        ),
        (["train", "--wrokers", "2"], "--wrokers: no such flag (did you mean --workers?); --help lists all"),
        (["train", "--learning-rate=3"], "--learning-rate: no such flag (did you mean --lr?); --help lists all"),
        (["train", "--per_device_train_batch_size", "3"], "batch_size: no such flag (did you mean --microbatch-size?)"),
        (["eval", "--no-such"], "--no-such: no such flag; --help lists all"),
        (["train", "--json=1"], "json is '1'; allowed: --json or --no-json"),
        (["train", "--workers", "two"], "workers is 'two'; allowed: int"),
        (["train", "--workers"], "workers is missing its value; allowed: --workers value"),
        (["train", "--dtype", "float64"], "dtype is 'float64'; allowed: 'float32' or 'bfloat16'"),
        (["train", "--scheduler", "1f1b"], "roundpipe (did you mean one_f_one_b?)"),
        (["train", "stray"], "'stray' is no flag; allowed: flags, as --name value"),
        (["train", "--config"], "config is missing its value; allowed: the path of a TOML file"),
        (["train", "--config", "nowhere.toml"], "config is 'nowhere.toml', which cannot be read"),
        (["eval", "--config=nowhere.toml"], "config is 'nowhere.toml', which cannot be read"),
        (["simulate", "--config", str(ROOT / "Makefile")], "Makefile', which is no TOML"),
        (
            ["simulate", "--config", str(ROOT / "pyproject.toml")],
            "project, tool: no such setting; settings stand at the t",
        ),
        (["simulate", "--stages", "0"], "stages is 0; allowed: 1 to 1024"),
        (
            ["simulate", "--scheduler", "roundpipe"],
            "which `unbroken plan --scheduler roundpipe` plans and times; allowed",
        ),
        (
            ["draw", "--scheduler", "skippipe"],
            "which `unbroken plan --scheduler skippipe` plans and times; allowed here",
        ),
        (["simulate", "--scheduler", "magic"], "scheduler is 'magic'; allowed: one of gpipe, one_f_one_b, interleaved"),
        (["simulate", "--costs", "nowhere.json"], "costs is 'nowhere.json', which cannot be read"),
        (["simulate", "--costs", str(ROOT / "Makefile")], "Makefile', which is no JSON"),
        (["simulate", "--network", str(ROOT)], "which cannot be read"),
        (["simulate", "--schedule", "nowhere.txt"], "schedule is 'nowhere.txt', which cannot be read"),
        (["simulate", "--schedule", str(ROOT / "Makefile")], "first line"),
        (["draw", "--out", "picture.pdf"], "out is 'picture.pdf'; allowed: a path that ends in .svg, .json or .txt"),
        (["draw", "--out", "nowhere/picture.svg"], "out is 'nowhere/picture.svg', which cannot be written"),
        (["eval", "--model", "nowhere"], "model is 'nowhere', which has no config.json"),
        (["eval", "--samples", "0"], "samples is 0; allowed: 1 to 1000000"),
        (["eval", "--sequence-length", "0"], "sequence_length is 0; allowed: 1 to"),
        (["generate", "--model", "nowhere"], "model is 'nowhere', which has no config.json"),
        (["generate", "--tokens", "0"], "tokens is 0; allowed: 1 to 65536"),
        (["generate", "--temperature", "-1"], "temperature is -1.0; allowed: 0 to 100"),
        (["doctor", "--store-port", "70000"], "store_port is 70000; allowed: 0 to 65535"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_by_name_and_with_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = told(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1, "a mistake is answered in one line"
    assert err.startswith("unbroken")
    assert list(tmp_path.iterdir()) == []


# ---- simulate and draw ----


@pytest.mark.parametrize(
    ("arguments", "makespan", "bubble", "peaks"),
    [
        # p = 4 stages, m = 8 microbatches, F = 1, B = 2: m + p - 1 rounds of 3, of which p - 1 are bubble
        ([], 33.0, 3 / 11, [4, 3, 2, 1]),
        (["--scheduler", "gpipe"], 33.0, 3 / 11, [8, 8, 8, 8]),
        (["--scheduler", "one_f_one_b", "--stages", "2", "--microbatches", "3"], 12.0, 1 / 4, [2, 1]),
        (["--replicas", "2"], 21.0, 3 / 7, [4, 3, 2, 1] * 2),
        (["--stages", "1"], 24.0, 0.0, [1]),
        # 9 replicas of 4 workers for 8 microbatches: the last replica has nothing to do, and that is a bubble too
        (["--replicas", "9"], 12.0, 1 - 8 * 4 * 3 / (9 * 4 * 12), None),
        # v = 2 chunks: the bubble is (p - 1) / (v m + p - 1)
        (["--scheduler", "interleaved", "--chunks", "2"], 57.0, 3 / 19, None),
        # ZB-H1 with F = I = W = 1: (p - 1)(F + I - W) idle beside 3 m of work
        (["--scheduler", "zero_bubble"], 27.0, 1 / 9, [4, 4, 4, 4]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else "",
)
def test_simulation_reports_what_the_published_formulas_say(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], makespan: float, bubble: float,
    peaks: list[int] | None,
) -> None:  # fmt: skip
    found = report(capsys, "simulate", *arguments)
    assert found["simulated"] is True
    assert found["makespan_s"] == pytest.approx(makespan)
    assert found["bubble"] == pytest.approx(bubble)
    assert sorted(found["peak_activations"], key=int) == [str(w) for w in range(found["workers"])]
    if peaks is not None:
        assert all(n <= limit for n, limit in zip(found["peak_activations"].values(), peaks, strict=True))
    proved = verify(lower(loads(schedule_text(capsys, tmp_path, *arguments))))
    for name in ("peak_messages", "peak_received", "peak_sent"):
        assert found[name] == {str(w): n for w, n in getattr(proved, name).items()}
    busy = sum(found["busy_s"].values())
    assert found["bubble"] == pytest.approx(1 - busy / (found["workers"] * makespan))


@pytest.mark.parametrize("scheduler", PLANNERS)
def test_every_scheduler_can_be_simulated_with_costs_and_a_network(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, scheduler: str
) -> None:
    costs = {"about": "4 layers", "forward": [1.0, 2.0, 2.0, 1.0], "output_bytes": 10}
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    matrix = {"latency_s": [[0, 0.5], [0.5, 0]], "bandwidth": [[None, 10], [10, None]]}
    (tmp_path / "network.json").write_text(json.dumps(matrix))
    shared = ["simulate", "--scheduler", scheduler, "--stages", "2", "--chunks", "2", "--microbatches", "4"]
    free = report(capsys, *shared, "--costs", tmp_path / "costs.json")
    slow = report(capsys, *shared, "--costs", tmp_path / "costs.json", "--network", tmp_path / "network.json")
    assert free["scheduler"] == slow["scheduler"] == scheduler
    assert sum(free["busy_s"].values()) == pytest.approx(4 * 6 * 3)
    assert slow["makespan_s"] > free["makespan_s"] >= 36.0
    assert slow["bubble"] > free["bubble"]


def schedule_text(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    report(capsys, "draw", *arguments, "--out", folder / "schedule.txt")
    return (folder / "schedule.txt").read_text()


def test_a_drawn_schedule_can_be_simulated_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for scheduler in PLANNERS:
        verify(loads(schedule_text(capsys, tmp_path, "--scheduler", scheduler)))
        again = report(capsys, "simulate", "--schedule", tmp_path / "schedule.txt")
        assert again == report(capsys, "simulate", "--scheduler", scheduler)


def test_drawings_are_pictures_and_traces(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = report(capsys, "draw", "--out", tmp_path / "a.svg")
    assert found == {"out": str(tmp_path / "a.svg"), "makespan_s": 33.0, "bubble": pytest.approx(3 / 11)}
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert told(capsys, "draw", "--out", tmp_path / "b.json")[:2] == (0, f"wrote {tmp_path / 'b.json'}\n")
    events = json.loads((tmp_path / "b.json").read_text())["traceEvents"]
    assert len([e for e in events if e["ph"] == "X" and e["pid"] == 1]) == 4 * 8 * 2  # forwards and backwards
    assert len([e for e in events if e["ph"] == "X" and e["pid"] == 2]) == 3 * 8 * 2  # over three links, both ways
    report(capsys, "draw", "--out", tmp_path / "c.anything", "--format", "svg")
    assert ET.parse(tmp_path / "c.anything").getroot().tag.endswith("svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.svg", "b.json", "c.anything"]


def test_a_simulation_is_shown_to_people_too(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = told(capsys, "simulate", "--stages", "2", "--microbatches", "2")
    assert (code, err) == (0, "")
    assert "worker 0" in out
    assert "worker 1" in out
    assert "simulated: makespan 9 s, bubble 33.3%, peak activations per worker 0:2 1:1; messages at most 0:4 1:4" in out
    assert "(received 0:2 1:2, sent and kept 0:2 1:2)" in out


def test_no_messages_are_told_of_workers_that_spans_come_to(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Their outputs lie in host memory."""
    text = "unbroken schedule 1\nroute 0-0: 0:1 1:2 |\nlane 0: LOAD[0:1] F[0:1]#0\nlane 1: LOAD[1:2] F[1:2]#0\n"
    (tmp_path / "schedule.txt").write_text(text)
    code, out, _ = told(capsys, "simulate", "--schedule", tmp_path / "schedule.txt")
    assert code == 0
    assert "messages" not in out
    assert report(capsys, "simulate", "--schedule", tmp_path / "schedule.txt")["peak_messages"] == {}


# ---- doctor ----


def test_doctor_finds_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "doctor")
    assert found["ok"] is True
    assert found["packages"]["torch"] == version("torch")
    assert found["cores"] >= 1
    assert found["cuda_devices"] == torch.cuda.device_count()
    assert found["store"]["ok"] is True
    assert 0 < found["store"]["port"] < 65536
    assert set(found["schedulers"]) == {*PLANNERS, "skippipe", "roundpipe"}
    assert set(found["models"]["families"]) == set(FAMILIES)
    assert set(found["models"]["presets"]) == set(PRESETS)
    code, out, _ = told(capsys, "doctor")
    assert code == 0
    assert "all well" in out
    assert version("torch") in out


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_doctor_says_that_a_port_is_taken(capsys: pytest.CaptureFixture[str], taken: int) -> None:
    code, out, _ = told(capsys, "doctor", "--store-port", str(taken), "--json")
    assert code == 1
    found = json.loads(out)
    assert (found["ok"], found["store"]["ok"], found["store"]["port"]) == (False, False, taken)
    assert "in use" in found["store"]["error"]
    code, out, _ = told(capsys, "doctor", "--store-port", str(taken))
    assert code == 1
    assert "NOT READY" in out


# ---- a run that is refused ----


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("a pipeline of workers trains on this. " * 400)
    return path


def refused(capsys: pytest.CaptureFixture[str], folder: Path, **changes: object) -> tuple[int, str]:
    """Exit code and message of a training run that must not start; its folder must not be there afterwards."""
    values: dict[str, object] = {
        "model": "llama-tiny", "data": folder / "corpus.txt", "tokenizer": "bytes", "workers": 2, "microbatches": 4,
        "microbatch_size": 2, "sequence_length": 32, "steps": 2, "out": folder / "run",
    }  # fmt: skip
    flags = [text for n, v in {**values, **changes}.items() for text in (f"--{n.replace('_', '-')}", str(v))]
    code, _, err = told(capsys, "train", *flags)
    assert "Traceback" not in err
    assert err.startswith("unbroken train: ")
    assert not (folder / "run").exists(), "a refused run leaves nothing"
    return code, err


def _binary(folder: Path) -> Path:
    (folder / "binary.txt").write_bytes(b"text " * 1000 + b"\xff\xfe")
    return folder / "binary.txt"


def _rows(line: str) -> Callable[[Path], Path]:
    """A file of JSON lines, by its content, with this as the third."""

    def write(folder: Path) -> Path:
        (folder / "rows.json").write_text('{"text": "a"}\n' * 2 + line + '\n{"text": "b"}\n' * 20)
        return folder / "rows.json"

    return write


def _empty(folder: Path) -> Path:
    (folder / "empty.txt").touch()
    return folder / "empty.txt"


def _short(folder: Path) -> Path:
    (folder / "short.txt").write_text("x" * 280)
    return folder / "short.txt"


def _no_weights(folder: Path) -> Path:
    preset("llama-tiny", vocab_size=258).save_pretrained(folder / "bare")
    return folder / "bare"


def _truncated(folder: Path) -> Path:
    model = exported(folder / "model", "llama-tiny")
    file = next(model.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    return model


def _no_index(folder: Path) -> Path:
    model = exported(folder / "model", "llama-tiny")
    for file in model.glob("*.safetensors"):
        file.unlink()
    return model


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scheduler", "pipedream", "scheduler is 'pipedream'; allowed: one of gpipe, one_f_one_b, interleaved, zero_b"),
        ("workers", 7, "workers 7 / replicas 1 asks for 7 spans; "),
        ("replicas", 3, "replicas is 3; allowed: a divisor of workers (2)"),
        ("steps", 0, "steps is 0; allowed: 1 to 99999999"),
        ("data", "nowhere.txt", "data is 'nowhere.txt', which does not exist; allowed: stdlib, UTF-8 text files"),
        ("data", lambda folder: folder, ", a folder; allowed: a glob, such as "),
        ("data", _empty, "empty.txt', which holds no text"),
        ("data", _short, "has 281 tokens, 33 of them held out, so 248 to train on; needed: 257, one global batch of 8"),
        ("data", _binary, "binary.txt' is not UTF-8: byte 0xff at offset 5000; allowed: text in UTF-8"),
        (
            "data",
            _rows('{"body": "a"}'),
            "rows.json', line 3 has no field 'text', which 1 of 23 lines lack; allowed for",
        ),
        ("data", _rows('{"text": "\\ud800"}'), "rows.json', line 3 holds a lone surrogate, \\ud800, at character 0"),
        ("data", _rows('{"text": ' + "[" * 100_000), "rows.json', line 3 is nested too deeply to be read; allowed: an"),
        ("text_field", "body", "text_field is 'body', which has no effect: nothing in data '"),
        ("model", "nowhere", "model 'nowhere': found nothing at that path; expected a directory with config.json"),
        ("model", _no_weights, "looked for model.safetensors or model.safetensors.index.json; found config.json"),
        ("model", _truncated, "truncated or not a safetensors file"),
        ("model", _no_index, "names 1 files; not there: model-00001-of-00001.safetensors"),
        ("sequence_length", 4096, "sequence_length is 4096; allowed: at most 2048 for model llama-tiny"),
        ("network", "nowhere.json", "network is 'nowhere.json'; allowed: a readable JSON file"),
        ("store_port", 99999, "store_port is 99999; allowed: 0 to 65535"),
        ("config", "nowhere.toml", "config is 'nowhere.toml', which cannot be read"),
    ],
    ids=lambda value: value.strip("_").replace("_", "-") if isinstance(value, str) and " " not in value else "",
)
def test_a_run_that_cannot_be_is_refused_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], corpus: Path, name: str, value: Any, message: str
) -> None:
    folder = corpus.parent
    code, err = refused(capsys, folder, **{name: value(folder) if callable(value) else value})
    assert code == 2
    assert message in err


def test_microbatches_are_shared_evenly_by_replicas(capsys: pytest.CaptureFixture[str], corpus: Path) -> None:
    code, err = refused(capsys, corpus.parent, replicas=2, microbatches=5)
    assert (code, err) == (2, "unbroken train: microbatches is 5; allowed: a multiple of replicas (2)\n")


def test_a_port_in_use_is_named(capsys: pytest.CaptureFixture[str], corpus: Path, taken: int) -> None:
    code, err = refused(capsys, corpus.parent, store_port=taken)
    assert code == 2
    assert f"store_port is {taken}, which is in use; allowed: a free port, or 0 to take one" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], corpus: Path) -> None:
    code, err = refused(capsys, corpus.parent, device="cuda")
    assert code == 2
    assert "device is 'cuda', but no CUDA device is present; allowed here: cpu, auto" in err


def test_a_torchrun_of_another_size_is_refused(
    capsys: pytest.CaptureFixture[str], corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    code, err = refused(capsys, corpus.parent)
    assert code == 2
    assert "workers is 2; allowed under this torchrun: 3, one per slot" in err


def test_a_refused_run_leaves_no_folder_that_it_made_on_the_way(
    capsys: pytest.CaptureFixture[str], corpus: Path
) -> None:
    refused(capsys, corpus.parent, data="nowhere.txt", out=corpus.parent / "new" / "deep" / "run")
    assert sorted(p.name for p in corpus.parent.iterdir()) == ["corpus.txt"]


def test_a_refused_run_leaves_an_empty_folder_empty(capsys: pytest.CaptureFixture[str], corpus: Path) -> None:
    (corpus.parent / "mine").mkdir()
    refused(capsys, corpus.parent, data=_short(corpus.parent), out=corpus.parent / "mine")
    assert list((corpus.parent / "mine").rglob("*")) == []


@pytest.mark.parametrize("out", ["corpus.txt", "corpus.txt/run"])
def test_a_run_folder_that_cannot_be_made_is_named(capsys: pytest.CaptureFixture[str], corpus: Path, out: str) -> None:
    code, err = refused(capsys, corpus.parent, out=corpus.parent / out)
    assert code in (1, 2)
    assert f"out is '{corpus.parent / out}'" in err
    assert corpus.read_text().startswith("a pipeline")


# ---- eval and generate ----


def exported(path: Path, name: str) -> Path:
    """A model with random weights and a tokenizer of bytes, as a run exports it."""
    tokenizer = build_tokenizer("bytes", 0, ())
    config = preset(name, vocab_size=len(tokenizer))
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model = LayeredModel(config)
    span = model.build((0, model.num_layers), seed=0)
    tensors = {
        name: parameter.detach()
        for layer in range(model.num_layers)
        for name, parameter in span.named_layer_parameters(layer).items()
        if name in model.keys(layer)
    }
    return finish_export(path, config, write_shard(path, 1, 1, tensors), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama-tiny", "gpt2-tiny"):
        exported(folder / name, name)
    return folder


def test_eval_is_the_mean_loss_per_token(capsys: pytest.CaptureFixture[str], models: Path, corpus: Path) -> None:
    for name in ("llama-tiny", "gpt2-tiny"):
        found = report(
            capsys, "eval", "--model", models / name, "--data", corpus, "--sequence-length", "16", "--samples", "5"
        )
        model = AutoModelForCausalLM.from_pretrained(models / name).eval()
        capsys.readouterr()
        samples = [b for b, _ in zip(blocks([corpus.read_text()], build_tokenizer("bytes", 0, ()), 16), range(5))]
        ids = torch.stack([torch.from_numpy(sample[:-1]) for sample in samples])
        labels = torch.stack([torch.from_numpy(sample[1:]) for sample in samples])
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
        assert found["loss"] == pytest.approx(float(loss), abs=1e-5)
        assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
        assert (found["tokens"], found["samples"], found["model"]) == (80, 5, str(models / name))
        assert (found["data"], found["scored"]) == (str(corpus), f"5 samples of 16 tokens, the first of '{corpus}'")


def test_eval_says_which_text_it_scored(capsys: pytest.CaptureFixture[str], models: Path, corpus: Path) -> None:
    for data, name in ((["--data", str(corpus)], corpus), ([], "stdlib")):
        code, out, _ = told(capsys, "eval", "--model", models / "llama-tiny", "--samples", "2", *data)
        assert code == 0
        assert out.endswith(f"over 256 tokens: 2 samples of 128 tokens, the first of '{name}'\n")


# ---- eval beside the data of a run ----


@pytest.fixture
def run(models: Path, corpus: Path, tmp_path: Path) -> Path:
    """The folder of a run that held out some of the corpus, as eval finds it."""
    shutil.copytree(models / "gpt2-tiny", tmp_path / "run" / "model")
    prepare(documents(str(corpus)), build_tokenizer("bytes", 0, ()), 16, 0.5, tmp_path / "run" / "data", 0)
    (tmp_path / "run" / "config.toml").write_text("evaluate_samples = 3\n")
    return tmp_path / "run"


def test_eval_takes_the_held_out_samples_of_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    data = Dataset.open(run / "data")
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    for count, arguments in (3, []), (5, ["--samples", "5"]), (data.num_held_out, ["--samples", "1000000"]):
        found = report(capsys, "eval", "--model", run / "model", *arguments)
        samples = torch.stack([torch.from_numpy(data.held_out_spread(count)(i)) for i in range(count)])
        with torch.no_grad():
            loss = model(samples[:, :-1]).logits.flatten(0, 1)
        assert found["loss"] == pytest.approx(float(cross_entropy(loss, samples[:, 1:].flatten())), abs=1e-5)
        assert (found["samples"], found["sequence_length"], found["data"]) == (count, 16, "held-out")
    monkeypatch.chdir(run / "model")
    other = {"model": "", "tokens_per_s": 0.0}
    assert report(capsys, "eval", "--model", ".", "--samples", "5") | other == (
        report(capsys, "eval", "--model", run / "model", "--samples", "5", "--data", "held-out") | other
    )
    code, out, _ = told(capsys, "eval", "--model", ".")
    assert code == 0
    assert f"3 samples of 16 tokens, spread over the {data.num_held_out} that the run in '{run}' has held out" in out


def mean_loss(model: Any, pairs: Iterable[tuple[Any, Any]]) -> float:
    """Of inputs and labels [tokens] each, by themselves."""
    total, count = 0.0, 0
    for ids, labels in pairs:
        ids, labels = (torch.from_numpy(np.array(each, np.int64)) for each in (ids, labels))
        with torch.no_grad():
            total += float(cross_entropy(model(ids[None]).logits[0], labels, reduction="sum", ignore_index=-100))
        count += int((labels != -100).sum())
    return total / count


def test_documents_that_a_run_keeps_apart_are_scored_by_themselves(
    capsys: pytest.CaptureFixture[str], models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "llama-tiny", tmp_path / "run" / "model")
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": f"{n} is {n * n}."}) + "\n" for n in range(60)))
    prepare(documents(str(tmp_path / "short.jsonl")), BYTES, 32, 0.5, tmp_path / "run" / "data", 0)
    data, model = Dataset.open(tmp_path / "run" / "data"), AutoModelForCausalLM.from_pretrained(models / "llama-tiny")

    def pieces() -> Iterator[tuple[Any, Any]]:
        for sample in map(data.held_out_spread(6), range(6)):
            starts = [0, *(at + 1 for at in np.flatnonzero(sample[:-2] == data.end_token)), 32]
            for start, end in itertools.pairwise(starts):
                yield sample[start:end], sample[start + 1 : end + 1]

    losses = {}
    for mask in (True, False):
        (tmp_path / "run" / "config.toml").write_text(f"evaluate_samples = 6\ndocument_mask = {str(mask).lower()}\n")
        losses[mask] = report(capsys, "eval", "--model", tmp_path / "run" / "model")["loss"]
    assert losses[True] == pytest.approx(mean_loss(model.eval(), pieces()), abs=1e-5)
    assert abs(losses[True] - losses[False]) > 1e-4


@pytest.mark.parametrize("pack", [False, True])
def test_of_rows_the_answers_are_scored(
    capsys: pytest.CaptureFixture[str], models: Path, tmp_path: Path, pack: bool
) -> None:
    shutil.copytree(models / "llama-tiny", tmp_path / "run" / "model")
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * n}."} for n in range(40)]
    (path := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_rows(str(path))
    assert found is not None
    prepare_rows(found, BYTES, 256, 0.25, tmp_path / "run" / "data", 0, pack=pack)
    (tmp_path / "run" / "config.toml").write_text("evaluate_samples = 100\n")
    data = RowDataset.open(tmp_path / "run" / "data")
    model = AutoModelForCausalLM.from_pretrained(models / "llama-tiny")

    def of(rows: Iterable[Row]) -> Iterator[tuple[Any, Any]]:
        for row in rows:
            one = Encoded.of(row, BYTES)
            yield one.ids[:-1], [-100] * (one.answer - 1) + list(one.ids[one.answer :])

    held = {info.id for info in data.rows if info.held_out}
    scored = report(capsys, "eval", "--model", tmp_path / "run" / "model")
    assert len(held) == 10
    assert scored["samples"] == data.num_held_out == (10 if not pack else scored["samples"])
    assert (scored["samples"] < 10) == pack
    assert scored["loss"] == pytest.approx(mean_loss(model.eval(), of(r for r in found if r.id in held)), abs=1e-5)
    scored = report(capsys, "eval", "--model", tmp_path / "run" / "model", "--data", path, "--samples", "7")
    assert scored["loss"] == pytest.approx(mean_loss(model, of(found[:7])), abs=1e-5)
    longest = max(len(Encoded.of(row, BYTES).ids) - 1 for row in found[:7])
    assert scored["scored"] == f"7 samples of {longest} tokens, the answers of the first 7 rows of '{path}'"
    code, _, err = told(
        capsys,
        "eval",
        "--model",
        tmp_path / "run" / "model",
        "--data",
        path,
        "--samples",
        "7",
        "--sequence-length",
        "9",
    )
    assert code == 2
    assert f"sequence_length is 9; allowed: {longest} or more, which the longest of the rows has" in err


def test_other_text_can_be_scored_beside_a_run(capsys: pytest.CaptureFixture[str], run: Path, corpus: Path) -> None:
    assert report(capsys, "eval", "--model", run / "model", "--data", corpus, "--samples", "1")["data"] == str(corpus)


@pytest.mark.parametrize(
    ("arguments", "spoil", "message"),
    [
        (
            ["--sequence-length", "32"],
            None,
            "sequence_length is 32; allowed: 16, as the held-out samples of the run in",
        ),
        (
            ["--text-field", "body"],
            None,
            "text_field is 'body'; allowed: nothing with data 'held-out', which is tokens",
        ),
        ([], "config.toml", "samples is unset, and '{run}/config.toml' does not tell how many the run evaluates"),
        ([], "data/tokens.bin", "'{run}/data' holds no prepared tokens"),
        (
            ["--data", "held-out"],
            "data/meta.json",
            "does not lie in a run folder: '{run}/data' holds no prepared tokens",
        ),
    ],
    ids=["length", "field", "settings", "tokens", "no data"],
)
def test_what_the_data_of_a_run_does_not_allow_is_refused(
    capsys: pytest.CaptureFixture[str], run: Path, arguments: list[str], spoil: str | None, message: str
) -> None:
    if spoil is not None:
        (run / spoil).unlink()
    code, out, err = told(capsys, "eval", "--model", run / "model", *arguments)
    assert (code, out) == (2, "")
    assert message.format(run=run) in err


def test_a_model_that_does_not_know_the_tokens_of_the_run_is_refused(
    capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    tokens = np.fromfile(run / "data" / "tokens.bin", np.uint16)
    tokens[3] = 300
    tokens.tofile(run / "data" / "tokens.bin")
    code, _, err = told(capsys, "eval", "--model", run / "model")
    assert code == 2
    assert "has exported; this one knows 258 tokens, not number 300" in err


def test_eval_stops_at_the_end_of_the_text(capsys: pytest.CaptureFixture[str], models: Path, corpus: Path) -> None:
    found = report(capsys, "eval", "--model", models / "llama-tiny", "--data", corpus, "--sequence-length", "500",
                   "--samples", "1000")  # fmt: skip
    assert found["tokens"] == len(corpus.read_text()) // 500 * 500


def test_generation_is_repeatable_and_begins_with_the_prompt(capsys: pytest.CaptureFixture[str], models: Path) -> None:
    def sampled(*more: str) -> str:
        return report(capsys, "generate", "--model", models / "llama-tiny", "--tokens", "12", *more)["text"]

    assert sampled("--prompt", "once").startswith("once")
    assert sampled("--seed", "1") == sampled("--seed", "1") != sampled("--seed", "2")
    assert sampled("--temperature", "0", "--seed", "1") == sampled("--temperature", "0", "--seed", "2")
    assert sampled("--prompt", "") != ""


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("eval", ["--data", "nowhere.txt"], "data is 'nowhere.txt', which does not exist"),
        ("eval", ["--sequence-length", "100000"], "sequence_length is 100000; allowed: at most 512"),
        ("eval", ["--data", "CORPUS", "--sequence-length", "512", "--samples", "1"], None),
        ("eval", ["--data", "SHORT"], "at least 129 tokens of text"),
        ("eval", ["--data", "SHORT", "--text-field", "body"], "text_field is 'body', which has no effect: nothing in"),
        ("eval", ["--data", "held-out"], "' does not lie in a run folder: '"),
        ("generate", ["--prompt", "x" * 600], "at most 512"),
    ],
    ids=["no data", "too long", "as long as can be", "too short", "no fields", "no run", "long prompt"],
)
def test_what_a_model_cannot_take_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], models: Path, corpus: Path, command: str, flags: list[str], message: str | None
) -> None:
    """A GPT-2 knows 512 positions and no more."""
    (corpus.parent / "tiny.txt").write_text("tiny")
    names = {"CORPUS": str(corpus), "SHORT": str(corpus.parent / "tiny.txt")}
    code, _, err = told(
        capsys, command, "--model", models / "gpt2-tiny", *[names.get(flag, flag) for flag in flags]
    )  # fmt: skip
    assert code == (0 if message is None else 2), err
    assert (message or "") in err


@pytest.mark.parametrize("command", ["eval", "generate"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "config.json").unlink(),
        lambda path: (path / "config.json").write_text("{"),
        lambda path: (path / "model-00001-of-00001.safetensors").write_bytes(b"no tensors"),
        lambda path: (path / "model-00001-of-00001.safetensors").unlink(),
        lambda path: (path / "tokenizer.json").unlink(),
    ],
    ids=["no config", "broken config", "broken weights", "no weights", "no tokenizer"],
)
def test_a_model_that_cannot_be_read_is_named(
    capsys: pytest.CaptureFixture[str], models: Path, tmp_path: Path, command: str, damage: Callable[[Path], object]
) -> None:
    path = shutil.copytree(models / "llama-tiny", tmp_path / "model")
    damage(path)
    code, out, err = told(capsys, command, "--model", path, "--json")
    assert (code, out) == (2, "")
    assert f"model is '{path}', which " in err


def test_nothing_but_the_report_is_shown(capsys: pytest.CaptureFixture[str], models: Path) -> None:
    """Progress bars of libraries are no part of the answer."""
    transformers.utils.logging.enable_progress_bar()  # as in a fresh process
    code, out, err = told(capsys, "generate", "--model", models / "llama-tiny", "--tokens", "3", "--prompt", "once")
    assert (code, err) == (0, "")
    assert out.startswith("once")


def test_the_project_says_where_the_command_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"unbroken": "launch.cli:main"}


def test_help_groups_flags_by_owner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = told(capsys, "train", "--help")
    _, *parts = re.split(r"^\W*(\w+) options\b", out, flags=re.MULTILINE)
    panels = dict(zip(parts[::2], parts[1::2], strict=True))
    owners = {
        "skippipe": "--full-every", "roundpipe": "--at-once", "interleaved": "--chunks", "supervision": "--spares",
        "checkfree": "--checkfree-weights", "optimizer": "--beta2",
    }  # fmt: skip
    for owner, flag in owners.items():
        assert [name for name, panel in panels.items() if f"{flag} " in panel] == [owner], panels.keys()
