"""A request whose process ends by SIGKILL right before a change that it makes on the disk, and is gone on with.

This runs in a process of the forkserver, which has no threads, and forks once more for each kill: what is killed is
`unlearn` itself, in the middle of a real request.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from jobs.row_data import RowDataset
from jobs.unlearn.begin import Trained
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.request import Request, folder_of
from launch import unlearn as module
from launch.past import Past, read_ledger
from recovery import checkpoint
from recovery.generation import read_generation

CHANGES = ("replace", "rename", "unlink", "rmdir", "mkdir", "chmod", "fsync")
"""The calls of os that change what is on the disk, or make it stay."""
KEPT = ("model", "data", "generation.json", "tokenizer", "model-config")


def drive(payload: dict[str, Any]) -> int:
    """Kill a request at some of its changes, and complete it; the results go to payload["out"]."""
    run, scratch, out = (Path(payload[name]) for name in ("run", "scratch", "out"))
    AutoTokenizer.from_pretrained(run / "tokenizer")  # what it imports is there for all
    out.write_text(json.dumps(list(_results(run, scratch, int(payload["kills"])))))
    return 0


def _results(run: Path, scratch: Path, kills: int) -> Iterator[dict[str, Any]]:
    """First what an undisturbed request leaves, and in how many changes; then each kill."""
    assert _forked(lambda: _trained(run)) == 0
    calm = Path(shutil.copytree(run, scratch / "calm"))
    assert _forked(lambda: _go_on(calm, 0, scratch / "changes.json")) == 0
    changes: list[str] = json.loads((scratch / "changes.json").read_text())
    wanted, before = left(calm), left(run)
    yield {"changes": changes, "generation": read_generation(calm), "differs": wanted != before}
    for at in chosen(changes, kills):
        copy = Path(shutil.copytree(run, scratch / "killed"))
        code = _forked(lambda: _go_on(copy, at, None))  # noqa: B023
        reached = read_generation(copy) > 0
        as_it_was = not reached and _as_it_was(copy, before)
        again = _forked(lambda: _go_on(copy, 0, None))  # noqa: B023
        status = Request.read(folder_of(copy, 1)).status
        yield {
            "at": at, "change": changes[at - 1], "signal": -code, "reached": reached, "as_it_was": as_it_was,
            "again": again, "status": status, "same": left(copy) == wanted,
        }  # fmt: skip
        _remove(copy)
    _remove(calm)


def chosen(changes: Sequence[str], kills: int) -> list[int]:
    """The changes around the one that commits, and others evenly spread up to the one that completes, from 1."""
    last = max(i for i, change in enumerate(changes) if change.endswith("request.json"))
    moment = 1 + max(i for i, change in enumerate(changes) if change.endswith("generation.json"))
    spread = {1 + i * last // (kills - 1) for i in range(kills)}
    return sorted(spread | {moment - 1, moment, moment + 1})


def left(run: Path) -> dict[str, bytes]:
    """What a run has that a request changes, but for times and for who wrote a checkpoint."""
    found: dict[str, bytes] = {}
    step = next((run / "checkpoints").glob("step-????????"), None)
    for folder in (*(run / name for name in KEPT), *([] if step is None else [step])):
        files = [folder] if folder.is_file() else folder.rglob("*")
        found |= {str(path.relative_to(run)): path.read_bytes() for path in files
                  if path.is_file() and path.name != checkpoint.MANIFEST}  # fmt: skip
    return found


def _as_it_was(run: Path, before: dict[str, bytes]) -> bool:
    """Whether a run can go on from its own checkpoint, knows all its rows, and has the model that it had."""
    if checkpoint.find(run / "checkpoints", 0).manifest is None:
        return False
    known = not any(row.blank for row in RowDataset.open(run / "data").rows)
    now = left(run)
    return known and all(now[name] == data for name, data in before.items() if not name.startswith("checkpoints"))


def _trained(run: Path) -> int:
    """Begin a request, and put a model in its folder that is another one than before."""
    past = Past.read(run)
    config = UnlearnConfig(**{**module.of_the_run({"run": run}), "run": run, "forget": "author=author-001"})
    config, _ = module._begun(config, Trained.read(run, past.config, read_ledger(run)))
    shutil.copytree(config.out / "start", config.out / "model")
    for path in (config.out / "model").glob("*.safetensors"):
        save_file({name: 0.5 * tensor for name, tensor in load_file(path).items()}, path)
    return 0


def _go_on(run: Path, at: int, into: Path | None) -> int:
    """`unbroken unlearn RUN --resume`, killed right before change number `at`; with 0 the changes are told instead."""
    config = UnlearnConfig(**module.of_the_run({"run": run, "resume": True}))
    config = replace(config, run=run, resume=True)
    module._steps = lambda *_: 0  # type: ignore[assignment]  # its model is there
    made: list[str] = []

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **more: Any) -> Any:
            made.append(f"{call.__name__} {Path(os.fspath(args[-1])).name if isinstance(args[-1], str | Path) else ''}")
            if len(made) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)

        return change

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    module.unlearn(config, as_json=True)
    if into is not None:
        into.write_text(json.dumps(made))
    return 0


def _forked(work: Callable[[], int]) -> int:
    """Its exit code, or minus the signal that ended it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _remove(folder: Path) -> None:
    for path in folder.rglob("*"):  # what is fenced is closed
        if path.is_dir():
            path.chmod(0o700)
    shutil.rmtree(folder)
