"""`unbroken clean`: what killed runs have left is shown, then removed; what a run holds, or a user has, stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.clean import CleanConfig, clean
from launch.run_lock import RunLock
from pipeline.locks import holder, lock, unlock
from pipeline.settings import ConfigError
from pipeline.state import host_store
from pipeline.state.host_store import store_path


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of shared memory, where other runs of this user may be at work."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(host_store, "_SHARED", folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder after a SIGKILL."""
    folder = tmp_path / "run"
    for name in ("config.toml", "metrics.jsonl", "model/config.json", "checkpoints/step-00000008/manifest.json",
                 *UNFINISHED):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("12345678")
    return folder


UNFINISHED = (
    "checkpoints/step-00000016.1-1.tmp/layer-00000.safetensors", "model.tmp/.model-00001-of-00001.safetensors.partial",
    ".model-old-abcd_fgh/model/config.json", "without-x3y/tokens.bin", "data/tokens.bin.tmp",
)  # fmt: skip


def taken(config: CleanConfig) -> set[str]:
    return {Path(left["path"]).name for left in clean(config)[0]["left"]}


def test_a_store_that_nobody_holds_goes_and_one_that_is_held_stays(shared: Path, tmp_path: Path) -> None:
    dead, alive, foreign = store_path(tmp_path / "dead"), store_path(tmp_path / "alive"), shared / "psm_others"
    for path in (dead, foreign, shared / f"unbroken-{os.getuid() + 1}-0123456789abcdef"):
        path.write_bytes(b"x" * 3000)
    held = lock(alive)
    try:
        assert holder(alive) == os.getpid()
        values, text = clean(CleanConfig())
        assert [left["path"] for left in values["left"]] == [str(dead)]
        assert text.splitlines()[-1] == "3 kB may go: --remove"
        assert dead.exists()
        assert taken(CleanConfig(remove=True)) == {dead.name}
        assert (dead.exists(), alive.exists(), foreign.exists()) == (False, True, True)
        assert clean(CleanConfig())[1] == "nothing is left"
    finally:
        unlock(alive, held)
    assert holder(alive) is None


def test_what_was_being_written_goes_and_what_is_written_stays(run: Path) -> None:
    expected = {"step-00000016.1-1.tmp", "model.tmp", ".model-old-abcd_fgh", "without-x3y", "tokens.bin.tmp"}
    before = sorted(path for path in run.rglob("*"))
    assert taken(CleanConfig(run)) == expected
    assert sorted(path for path in run.rglob("*")) == before
    values, text = clean(CleanConfig(run, remove=True))
    assert values["bytes"] == 8 * len(UNFINISHED)
    assert text.splitlines()[-1] == "40 B removed"
    left = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert left == {"config.toml", "metrics.jsonl", "model/config.json", "checkpoints/step-00000008/manifest.json"}


def test_a_model_that_was_set_aside_is_kept_where_no_other_has_come(run: Path) -> None:
    (run / "model" / "config.json").unlink()
    (run / "model").rmdir()
    assert ".model-old-abcd_fgh" not in taken(CleanConfig(run, remove=True))
    assert (run / ".model-old-abcd_fgh" / "model" / "config.json").exists()


def test_of_a_run_that_is_at_work_nothing_is_taken(run: Path, tmp_path: Path) -> None:
    claim = RunLock(run)
    try:
        with pytest.raises(ConfigError, match="where another run is at work"):
            clean(CleanConfig(run, remove=True))
    finally:
        claim.release()
    assert all((run / name).exists() for name in UNFINISHED)
    with pytest.raises(ConfigError, match=r"allowed: the folder of a run, with config.toml"):
        clean(CleanConfig(tmp_path / "nowhere"))


def test_the_cache_goes_by_choice_and_nothing_of_others_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("tokens-0123-abc", "tokenizer-77", "mine.txt", "tokens-99.x.tmp"):
        (cache / name).write_text("x")
    monkeypatch.setenv("UNBROKEN_CACHE", str(cache))
    assert taken(CleanConfig()) == set()
    assert taken(CleanConfig(cache=True, remove=True)) == {"tokens-0123-abc", "tokenizer-77"}
    assert {path.name for path in cache.iterdir()} == {"mine.txt", "tokens-99.x.tmp"}
