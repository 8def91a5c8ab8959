"""Runs from Python: `import unbroken` starts them in processes of their own, watches them and ends with them."""

from __future__ import annotations

import base64
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM

import unbroken
from jobs.authors import authors, write
from launch.api.lines import Lines, identity
from launch.api.process import flags
from launch.run_lock import RunLock
from pipeline.exit_codes import STOPPED

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "pages" / "python-api.md").read_text()
SMALL: dict[str, Any] = {
    "model": "llama-tiny", "tokenizer": "bytes", "workers": 2, "sequence_length": 32, "threads": 1, "sample_tokens": 0,
    "evaluate_samples": 4, "microbatches": 2, "microbatch_size": 2, "data": "stdlib", "max_tokens": 30_000,
}  # fmt: skip
ENDLESS: dict[str, Any] = {**SMALL, "steps": 1_000_000, "evaluate_every": 0, "checkpoint_every": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[unbroken.Run, list[dict[str, Any]], list[str]]:
    """A run that has lost a worker, the records that came while it went on, and the events that were called back."""
    events, called = list[str](), list[int]()
    run = unbroken.Run(
        **SMALL, steps=6, evaluate_every=3, out=tmp_path_factory.mktemp("api") / "run", inject="kill:worker=1,step=3",
        on_record=lambda record: called.append(record["step"]), on_event=lambda event: events.append(event["event"]),
    )  # fmt: skip
    with run:
        records = list(run)
    assert called == [record["step"] for record in records]
    return run, records, events


# ---- a run ----


def test_records_come_as_steps_do_and_the_result_is_that_of_the_files(
    trained: tuple[unbroken.Run, list[dict[str, Any]], list[str]],
) -> None:
    run, records, events = trained
    assert [record["step"] for record in records if record["again"]] == [1, 2, 3], "the rollback has undone them"
    assert [record["step"] for record in run.records] == [1, 2, 3, 4, 5, 6]
    assert list(run) == records, "it can be iterated over again"
    assert {"started", "evaluation", "detected", "rolled_back", "exported"} <= set(events)
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if line["event"] == "evaluation"]
    found = run.result()
    assert (found.exit_code, found.step, found.loss, found.stopped) == (0, 6, records[-1]["loss"], False)
    assert (found.held_out_loss, found.perplexity) == (held_out[-1]["loss"], held_out[-1]["perplexity"])
    assert found.model == run.folder / "model"
    assert not run.running
    assert "step 6 of 6" in repr(run)
    with pytest.raises(unbroken.ConfigError, match=r"start is 'again'; allowed: once; Run\(out=.*, resume=True\)"):
        run.start()


def test_what_a_run_has_left_can_be_loaded(
    trained: tuple[unbroken.Run, list[dict[str, Any]], list[str]], tmp_path: Path
) -> None:
    run, records, _ = trained
    again = unbroken.load(run.folder)
    assert (again.result(), list(again), again.running) == (run.result(), records, False)
    assert again.config.steps == 6
    with pytest.raises(unbroken.ConfigError, match=r"allowed: the folder of a run, which has config.toml in it"):
        unbroken.load(tmp_path)


def test_a_notebook_shows_the_loss(trained: tuple[unbroken.Run, list[dict[str, Any]], list[str]]) -> None:
    shown = trained[0]._repr_html_()
    found = re.fullmatch(r'<p>.*</p><img alt="[^"]+" src="data:image/svg\+xml;base64,([^"]+)">', shown)
    assert found is not None
    text = "".join(ET.fromstring(base64.b64decode(found[1])).itertext())
    assert "worker 1 lost: checkpoint" in text
    assert "held out" in text
    assert re.fullmatch(r"<p>.*not started</p>", unbroken.Run(**SMALL)._repr_html_())


def test_the_model_is_evaluated_goes_on_with_a_prompt_and_is_exported(
    trained: tuple[unbroken.Run, list[dict[str, Any]], list[str]], tmp_path: Path
) -> None:
    run = trained[0]
    assert run.evaluate()["loss"] == pytest.approx(run.result().held_out_loss, rel=1e-5)
    text = run.generate("def ", tokens=4, temperature=0)
    assert text.startswith("def ")
    assert run.export(tmp_path / "model") == tmp_path / "model"
    own = AutoModelForCausalLM.from_pretrained(run.folder / "model").state_dict()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(own[name].equal(tensor) for name, tensor in written.items())
    for asked, told in (
        ({"sample": 3}, r"^sample .*did you mean samples"),
        ({"samples": 0}, r"^samples is 0; allowed"),
    ):
        with pytest.raises(unbroken.ConfigError, match=told):
            run.evaluate(**asked)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wrokers": 2}, r"^wrokers \(did you mean workers\?\): no such setting"),
        ({"learning_rate": 1}, r"^learning_rate \(did you mean lr\?\): no such setting"),
        ({"steps": 0}, r"^steps is 0; allowed: 1 to"),
        ({"workers": "two"}, r"^workers is 'two'; allowed: int"),
        ({"workers": 4, "replicas": 3}, r"^replicas is 3; allowed: a divisor"),
        ({"data": [3]}, r"^data is \[3\]; allowed: str"),
        ({"json": True}, r"^json is True; allowed: only in the command"),
        ({"inject": "kill:worker=999,step=1"}, r"worker is 999"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unbroken.Run(**settings)


def test_a_run_that_has_not_begun_is_not_waited_for() -> None:
    run = unbroken.Run()
    for ask in (run.result, run.wait, run.stop, lambda: list(run)):
        with pytest.raises(unbroken.ConfigError, match=r"allowed: start\(\) before it is waited for"):
            ask()
    with pytest.raises(unbroken.ConfigError, match=r"^forgets \(did you mean forget\?\): no such setting"):
        run.unlearn(forgets="a=b")


def test_arguments_are_the_settings_by_name() -> None:
    names = inspect.signature(unbroken.Run).parameters
    assert {"model", "workers", "lora_rank", "on_record", "on_event"} <= set(names)
    assert {each.kind for each in names.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert "forget" in inspect.signature(unbroken.Run.unlearn).parameters


def test_settings_are_words_of_the_command() -> None:
    values = {"out": Path("a b"), "resume": True, "swaps": False, "lr": 1e-05, "clip": None, "model": "-x=\n"}
    assert flags(values) == ["--out=a b", "--resume", "--no-swaps", "--lr=1e-05", "--clip=None", "--model=-x=\n"]


# ---- the files, as they are written ----


def test_lines_come_whole_and_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path)
    assert lines.take() == []
    path.write_bytes(b'{"step": 1}\n{"st')
    assert lines.take() == [{"step": 1}]
    with path.open("ab") as file:
        file.write(b'ep": 2}\nno json\n[]\n{"step": 3}\n')
    assert lines.take() == [{"step": 2}, {"step": 3}]
    assert lines.take() == []


def test_what_a_run_before_has_left_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    lines = Lines(path, identity(path))
    assert lines.take() == []
    (tmp_path / "new").write_text('{"step": 7}\n')
    os.replace(tmp_path / "new", path)
    assert lines.take() == [{"step": 7}]


@pytest.mark.parametrize(
    ("ends", "code", "message"),
    [
        (["started", "exported"], 0, ""),
        (["started", "exported", "started", "stopped"], STOPPED, ""),
        (["started", "failed"], None, "^it broke$"),
        (["exported", "started"], None, "has ended without a word"),
        ([], None, "has ended without a word"),
    ],
)
def test_how_a_loaded_run_has_ended_is_what_its_events_say(
    tmp_path: Path, ends: list[str], code: int | None, message: str
) -> None:
    (tmp_path / "config.toml").write_text("steps = 3\n")
    told = [{"event": name, "step": 0, **({"error": "it broke"} if name == "failed" else {})} for name in ends]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told))
    run = unbroken.load(tmp_path)
    if code is None:
        with pytest.raises(unbroken.RunFailed, match=message):
            run.result()
    else:
        assert run.result().exit_code == code


def test_a_run_goes_on_as_long_as_its_folder_is_held(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("steps = 3\n")
    run, claim = unbroken.load(tmp_path), RunLock(tmp_path)
    assert run.running
    with pytest.raises(TimeoutError, match=r"goes on; wait\(\) waits"):
        run.result()
    with pytest.raises(TimeoutError, match=r"has not ended within 0\.2 s"):
        run.wait(0.2)
    claim.release()
    assert not run.running


# ---- who starts it ----


def test_a_child_is_asked_to_stop_when_its_parent_is_killed() -> None:
    """By the kernel, with nothing but a pipe: also where the parent is gone before the child looks."""
    child = (
        "import sys,time; from launch.api.child import stop_with; stop_with(0); print('on', flush=True); time.sleep(60)"
    )
    for early in (False, True):
        theirs, ours = os.pipe()
        if early:
            os.close(ours)
        process = subprocess.Popen(
            [sys.executable, "-c", child], stdin=theirs, stdout=subprocess.PIPE, cwd=ROOT, text=True
        )
        os.close(theirs)
        assert process.stdout is not None
        with process:
            if not early:
                assert process.stdout.readline() == "on\n"
                assert process.poll() is None
                os.close(ours)
            assert process.wait(20) == -signal.SIGTERM


@pytest.mark.parametrize("name", ["jobs", "launch"])
def test_a_package_of_the_users_is_refused_by_its_path(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'launch' / 'public'}"}
    done = subprocess.run(
        [sys.executable, "-c", "import unbroken"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    told = f"package {name!r} would be taken from '{tmp_path / name}.py', and not from '{ROOT / name}'"
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: unbroken: {told}")


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_run_that_is_stopped_saves_itself_and_goes_on(tmp_path: Path) -> None:
    run = unbroken.Run(**ENDLESS, out=tmp_path / "run").start()
    for record in run:
        if record["step"] == 2:
            break
    other = unbroken.load(run.folder)
    assert other.running
    assert repr(other).endswith("running>")
    found = other.stop()  # as another notebook would
    assert (found.exit_code, found.stopped, found.model) == (STOPPED, True, None)
    assert run.wait(300) == found
    on = unbroken.Run(out=run.folder, resume=True, steps=found.step + 2)
    assert on.config.sequence_length == 32
    assert on.start().wait(300).exit_code == 0
    assert [record["step"] for record in on] == [found.step + 1, found.step + 2]


@pytest.mark.long
@pytest.mark.timeout(500)
def test_ctrl_c_saves_the_run_and_is_raised(tmp_path: Path) -> None:
    def interrupt(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

    run = unbroken.Run(**ENDLESS, out=tmp_path / "run", on_record=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        list(run)
    assert run.result().stopped
    again = unbroken.Run(**ENDLESS, out=tmp_path / "again").start()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        again.wait()
    assert again.result().exit_code == STOPPED, "asked before there was anything to save"
    assert not (tmp_path / "again").exists()


@pytest.mark.long
@pytest.mark.timeout(500)
@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit()"])
def test_a_run_ends_with_the_interpreter_and_is_saved(tmp_path: Path, how: str) -> None:
    notebook = tmp_path / "notebook.py"
    notebook.write_text(
        "import os, signal, sys, unbroken\n"
        f"run = unbroken.Run(**{ENDLESS!r}, out='run').start()\n"
        "for record in run:\n"
        "    if record['step'] == 2:\n"
        "        print(run._process.pid, flush=True)\n"
        f"        {how}\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'launch' / 'public'}"}
    done = subprocess.run(
        [sys.executable, str(notebook)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    gone(int(done.stdout))
    assert unbroken.load(tmp_path / "run").result().stopped
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def gone(pid: int) -> None:
    deadline = time.monotonic() + 200
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it goes on without its parent"
        time.sleep(0.1)


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_run_that_fails_says_its_last_words(tmp_path: Path) -> None:
    run = unbroken.Run(**SMALL, steps=6, out=tmp_path / "run", recovery="none", inject="kill:worker=1,step=3").start()
    with pytest.raises(unbroken.RunFailed, match="worker 1 was killed by SIGKILL; what was lost cannot be brought"):
        list(run)
    with pytest.raises(unbroken.RunFailed, match="worker 1 was killed by SIGKILL"):
        unbroken.load(run.folder).result()
    absent = unbroken.Run(**{**SMALL, "data": "nowhere.txt"}, out=tmp_path / "other").start()
    with pytest.raises(unbroken.ConfigError, match=r"^data is 'nowhere.txt', which does not exist"):
        absent.wait(300)


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_run_on_rows_forgets(tmp_path: Path) -> None:
    write(authors(3, 0), tmp_path / "library")
    more = {"tokenizer": "auto", "vocabulary": 400, "sequence_length": 96, "lr": 5e-3, "checkpoint_every": 4}
    data = str(tmp_path / "library" / "train.jsonl")
    run = unbroken.Run(**{**SMALL, **more, "data": data}, steps=8, out=tmp_path / "run")
    run.start().wait(300)
    with pytest.raises(unbroken.ConfigError, match="author-099"):
        run.unlearn(forget="author=author-099", method="grad_diff")
    told = run.unlearn(forget="author=author-001", method="grad_diff", steps=4, lr=3e-3)
    assert told["generation"] == 1
    assert told["after"]["forget_probability"] < told["before"]["forget_probability"]


# ---- the page ----


@pytest.mark.long
@pytest.mark.timeout(500)
def test_the_ten_lines_of_the_page_run_as_they_stand(tmp_path: Path) -> None:
    lines = next(iter(code())).strip()
    assert len(lines.splitlines()) <= 10
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'launch' / 'public'}"}
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "forget_probability" in done.stdout


def code() -> Iterator[str]:
    """The pieces of Python on the page."""
    yield from re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_all_code_of_the_page_is_code_and_its_names_are_there() -> None:
    pieces = list(code())
    assert len(pieces) > 1
    for piece in pieces:
        compile(piece, "python-api.md", "exec")
    asked = set(re.findall(r"\brun\.(\w+)", PAGE))
    assert asked <= set(dir(unbroken.Run)) | {"config", "folder"}
    assert set(re.findall(r"\bunbroken\.([A-Za-z]\w*)", PAGE)) <= set(unbroken.__all__)


def test_ray_train_is_there_where_ray_is_and_says_what_is_missing_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "launch.ray_train", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"^unbroken.ray_train needs Ray; pip install 'unbroken\[ray\]'$"):
        from unbroken import ray_train as missing  # noqa: F401
    monkeypatch.setitem(sys.modules, "launch.ray_train", SimpleNamespace(ray_train=tell))  # type: ignore[arg-type]
    from unbroken import ray_train

    assert ray_train is tell
    with pytest.raises(ImportError, match="cannot import name 'raytrain'"):
        from unbroken import raytrain  # type: ignore[attr-defined]  # noqa: F401


def tell() -> None:
    """Stands for ray_train."""
