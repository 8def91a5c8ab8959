"""What is older than the generation of a run is out of its reach, wherever whoever does it is interrupted."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from recovery import checkpoint
from recovery.checkpoint import MANIFEST
from recovery.disk import write_flushed
from recovery.fencing import FENCED, KEPT_ELSEWHERE, FencingError, retire, shred_folder

How = Literal["fence", "shred"]


class Killed(BaseException):
    """The process ends here."""


def save(run: Path, step: int, generation: int) -> Path:
    root = run / "checkpoints"
    checkpoint.begin(root, step)
    folder = checkpoint.temporary(root, step)
    records = [checkpoint.write_layer(folder, layer, {"w": torch.full((9,), float(step))}) for layer in range(2)]
    return checkpoint.commit(root, step, records, {"step": step, "generation": generation})


def make_run(run: Path) -> Path:
    """Steps 1, 2 (and one set aside) of generation 0, one that says nothing, one of generation 1, one unfinished."""
    shutil.copytree(save(run, 1, 0), run / "aside")
    save(run, 2, 0)
    (run / "aside").rename(run / "checkpoints" / "step-00000001.old")
    (save(run, 3, 0) / MANIFEST).write_text("{")
    save(run, 4, 1)
    unfinished = checkpoint.begin(run / "checkpoints", 5)
    checkpoint.write_layer(unfinished, 0, {"w": torch.ones(3)})
    return run


OLD = {"step-00000001", "step-00000001.old", "step-00000002", "step-00000003", "step-00000005.0-0.tmp"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_fenced(run: Path) -> None:
    for generation, expected in (("0", {"step-00000001", "step-00000001.old", "step-00000002"}), ("unknown", None)):
        folder = run / FENCED / f"generation-{generation}"
        assert names(folder) == (expected or {"step-00000003", "step-00000005.0-0.tmp"})
        for path in folder.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == 0, path
    assert "The run never looks here" in (run / FENCED / "README.txt").read_text()


def check_shredded(run: Path) -> None:
    assert not (run / FENCED).exists()


CHECKS: dict[How, Callable[[Path], None]] = {"fence": check_fenced, "shred": check_shredded}


@pytest.mark.parametrize("how", CHECKS)
def test_what_is_older_goes_and_what_is_current_stays(tmp_path: Path, how: How) -> None:
    make_run(tmp_path)
    before = contents(tmp_path / "checkpoints" / "step-00000004")
    done = retire(tmp_path, 1, how)
    assert {path.name for path in done} == OLD
    assert names(tmp_path / "checkpoints") == {"step-00000004"}
    assert contents(tmp_path / "checkpoints" / "step-00000004") == before
    assert checkpoint.find(tmp_path / "checkpoints", 1).path == tmp_path / "checkpoints" / "step-00000004"
    CHECKS[how](tmp_path)
    assert retire(tmp_path, 1, how) == []
    CHECKS[how](tmp_path)


@pytest.mark.parametrize("how", CHECKS)
def test_a_run_without_checkpoints_has_none_to_retire(tmp_path: Path, how: How) -> None:
    assert retire(tmp_path, 1, how) == []
    save(tmp_path, 4, 2)
    assert retire(tmp_path, 1, how) == []
    assert names(tmp_path) == {"checkpoints"}
    assert names(tmp_path / "checkpoints") == {"step-00000004"}


CALLS = ("rename", "replace", "chmod", "unlink", "rmdir", "mkdir", "fsync")


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int, after: bool) -> Callable[[], int]:
    """The process ends at the call of that number that changes something, or after it. Returns how many there were."""
    calls = [0]

    def wrap(name: str) -> None:
        real: Any = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == number and not after:
                raise Killed
            result = real(*args, **kwargs)
            if calls[0] == number:
                raise Killed
            return result

        monkeypatch.setattr(os, name, call)

    for name in CALLS:
        wrap(name)
    return lambda: calls[0]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("how", CHECKS)
def test_interrupted_anywhere_a_repeat_finishes(tmp_path: Path, how: How, after: bool) -> None:
    start = make_run(tmp_path / "start")
    current = contents(start / "checkpoints" / "step-00000004")
    number, killed = 0, True
    while killed:
        number += 1
        run = Path(shutil.copytree(start, tmp_path / f"run-{number}"))
        with pytest.MonkeyPatch.context() as patch:
            calls = killed_at(patch, number, after)
            with contextlib.suppress(Killed):
                retire(run, 1, how)
            killed = calls() >= number
        found = checkpoint.find(run / "checkpoints", 1)
        assert found.path == run / "checkpoints" / "step-00000004", "at no moment is the current one lost"
        left = checkpoint.find(run / "checkpoints", 0)
        assert left.path is None or contents(left.path) == contents(start / "checkpoints" / left.path.name)
        retire(run, 1, how)
        assert names(run / "checkpoints") == {"step-00000004"}
        assert contents(run / "checkpoints" / "step-00000004") == current
        CHECKS[how](run)
        shutil.rmtree(run)
    assert number > 20


def test_two_of_one_name_are_both_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 0)
    retire(tmp_path, 1, "fence")
    save(tmp_path, 1, 0)
    (done,) = retire(tmp_path, 1, "fence")
    assert done == tmp_path / FENCED / "generation-0" / "step-00000001.2"
    assert names(done.parent) == {"step-00000001", "step-00000001.2"}


def test_what_was_opened_by_hand_is_closed_again(tmp_path: Path) -> None:
    save(tmp_path, 1, 0)
    (path,) = retire(tmp_path, 1, "fence")
    path.chmod(0o755)
    assert retire(tmp_path, 1, "fence") == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0


@pytest.mark.parametrize("how", CHECKS)
def test_a_checkpoint_that_is_a_link_is_refused_before_anything_is_touched(tmp_path: Path, how: How) -> None:
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "step-00000002").rename(tmp_path / "elsewhere")
    (run / "checkpoints" / "step-00000002").symlink_to(tmp_path / "elsewhere")
    before = names(run / "checkpoints")
    with pytest.raises(FencingError, match=r"step-00000002 is a link to .*elsewhere; allowed: a folder of the run's"):
        retire(run, 1, how)
    assert names(run / "checkpoints") == before
    assert (tmp_path / "elsewhere" / MANIFEST).exists()


def test_every_byte_is_overwritten_before_a_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = tmp_path / "start", dict[str, bytes]()
    (folder / "inner").mkdir(parents=True)
    for path, size in ((folder / "a", 10), (folder / "inner" / "b", (1 << 22) + 5), (folder / "empty", 0)):
        path.write_bytes(b"x" * size)
    unlink = os.unlink

    def look(path: Any, **kwargs: Any) -> None:
        seen[Path(path).name] = Path(path).read_bytes()
        unlink(path, **kwargs)

    monkeypatch.setattr(os, "unlink", look)
    shred_folder(folder)
    assert not folder.exists()
    assert seen == {"a": bytes(10), "b": bytes((1 << 22) + 5), "empty": b""}
    shred_folder(folder)
    assert "SSDs" in KEPT_ELSEWHERE


def test_what_lies_outside_is_not_harmed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "start", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "model").write_text("mine")
    (folder / "link").symlink_to(outside)
    (folder / "file").symlink_to(outside / "model")
    (folder / "same").hardlink_to(outside / "model")
    shred_folder(folder)
    assert not folder.exists()
    assert (outside / "model").read_text() == "mine"


def test_what_is_fenced_can_be_shredded(tmp_path: Path) -> None:
    save(tmp_path, 1, 0)
    retire(tmp_path, 1, "fence")
    shred_folder(tmp_path / FENCED)
    assert names(tmp_path) == {"checkpoints"}


def test_only_a_folder_is_shredded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(FencingError, match="file is no folder; allowed: a folder"):
        shred_folder(tmp_path / "file")
    with pytest.raises(FencingError, match="link is a link to"):
        shred_folder(tmp_path / "link")


@pytest.mark.parametrize(("how", "name"), [("fence", "rename"), ("shred", "unlink")])
def test_what_the_system_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: How, name: str) -> None:
    save(tmp_path, 1, 0)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(18, "Invalid cross-device link", str(args[0]))

    monkeypatch.setattr(os, name, refuse)
    with pytest.raises(FencingError, match=r"step-00000001 cannot be (fenced|shredded): Invalid cross-device link"):
        retire(tmp_path, 1, how)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_flushed(tmp_path / "file", b"before")

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_flushed(tmp_path / "file", b"after")
    assert contents(tmp_path) == {"file": b"before"}
