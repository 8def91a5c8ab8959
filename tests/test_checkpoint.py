"""A checkpoint is whole or it is not there, whatever happens to the process, the disk or the bytes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recovery import checkpoint
from recovery.checkpoint import CheckpointError

LAYERS = 3


def tensors(step: int, layer: int) -> dict[str, Tensor]:
    """A state of odd shapes and types that is different for every step and layer."""
    values = torch.arange(6, dtype=torch.float32) + 100 * step + layer
    return {
        "param/w": values.view(2, 3), "param/turned": values.view(2, 3).T, "exp_avg/w": values.bfloat16(),
        "step/w": torch.tensor(float(step)), "count": torch.tensor([step, layer]), "none": torch.empty(0, 4),
    }  # fmt: skip


def save(root: Path, step: int, keep: int = 9, **extra: Any) -> Path:
    folder = checkpoint.begin(root, step)
    records = [checkpoint.write_layer(folder, layer, tensors(step, layer)) for layer in range(LAYERS)]
    path = checkpoint.commit(root, step, records[::-1], {"step": step, **extra})
    checkpoint.prune(root, step, keep)
    return path


def check_whole(found: checkpoint.Found, step: int) -> None:
    assert found.path is not None
    assert found.manifest is not None
    assert found.path.name == f"step-{step:08d}"
    assert found.manifest["extra"]["step"] == step
    for layer in range(LAYERS):
        read = checkpoint.read_layer(found.path, found.manifest, layer)
        assert read.keys() == tensors(step, layer).keys()
        for name, tensor in tensors(step, layer).items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside, a file that grows past `size` bytes fails as on a full disk: Python ignores SIGXFSZ and sees EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- what is written is read ----


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path / "not" / "yet", 7, seed=3, model={"a": [1, None]})
    assert path == checkpoint.directory(tmp_path / "not" / "yet", 7)
    found = checkpoint.find(tmp_path / "not" / "yet")
    check_whole(found, 7)
    assert found.manifest is not None
    assert found.manifest["extra"] == {"step": 7, "seed": 3, "model": {"a": [1, None]}, "fence": [0, 0]}
    assert [record["layer"] for record in found.manifest["files"]] == list(range(LAYERS))
    assert found.skipped == ()
    assert sorted(p.name for p in path.iterdir()) == [f"layer-0000{n}.safetensors" for n in range(3)] + [
        "manifest.json"
    ]


def test_a_record_is_what_lies_on_the_disk(tmp_path: Path) -> None:
    record = checkpoint.write_layer(tmp_path, 12, tensors(1, 0))
    data = (tmp_path / record.name).read_bytes()
    assert (record.layer, record.size, record.crc32) == (12, len(data), zlib.crc32(data))
    assert checkpoint.FileRecord.from_json(json.loads(json.dumps(record.as_json()))) == record


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        assert checkpoint.find(root) == checkpoint.Found(None, None, ())


def test_the_newest_is_found_by_number(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        save(tmp_path, step)
    check_whole(checkpoint.find(tmp_path), 10)


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 4, run="first")
    save(tmp_path, 4, run="second")
    found = checkpoint.find(tmp_path)
    check_whole(found, 4)
    assert found.manifest is not None
    assert found.manifest["extra"]["run"] == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


# ---- a crash at any moment ----


def test_nothing_counts_before_its_commit(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = checkpoint.begin(tmp_path, 2)
    assert folder == checkpoint.temporary(tmp_path, 2)
    for layer in range(LAYERS):
        checkpoint.write_layer(folder, layer, tensors(2, layer))
        check_whole(checkpoint.find(tmp_path), 1)


class Crash(BaseException):
    """The process ends here: nothing catches this."""


def crash_at(monkeypatch: pytest.MonkeyPatch, point: int, function: Callable[[], Any]) -> bool:
    """Call a function that ends at its flush, rename or removal number `point`, from 0; whether it came so far."""
    calls = 0

    def crashing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > point:
                raise Crash
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "fsync"), (os, "rename"), (shutil, "rmtree")):
            patch.setattr(module, name, crashing(getattr(module, name)))
        try:
            function()
        except Crash:
            return True
    return False


@pytest.mark.parametrize("point", range(9))
def test_a_crash_at_any_call_leaves_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """Every flush, rename and removal in turn is where the process ends; so is the moment after the last of them."""
    save(tmp_path, 1)
    crashed = crash_at(monkeypatch, point, lambda: save(tmp_path, 2, keep=1))
    assert crashed == (point < 8), "3 layers, manifest, folder, rename, root and the removal of step 1"
    found = checkpoint.find(tmp_path)
    assert found.skipped == ()
    check_whole(found, 1 if point < 6 else 2)
    save(tmp_path, 3, keep=1)  # the next save is not disturbed by what is left, and removes it
    check_whole(checkpoint.find(tmp_path), 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("point", range(12))
def test_a_crash_while_a_step_is_saved_again_leaves_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    save(tmp_path, 2, run="first")
    crash_at(monkeypatch, point, lambda: save(tmp_path, 2, keep=1, run="second"))
    found = checkpoint.find(tmp_path)
    assert found.path is not None, "no checkpoint is left"
    assert found.manifest is not None
    assert found.path.name.removesuffix(".old") == "step-00000002"
    assert found.manifest["extra"]["run"] == ("first" if point < 7 else "second")
    save(tmp_path, 3, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_nothing_older_goes_before_it_is_pruned(tmp_path: Path) -> None:
    """Until all know of the new one, what is lost may bring everybody back to the one before."""
    save(tmp_path, 1)
    records = [checkpoint.write_layer(checkpoint.begin(tmp_path, 2), 0, tensors(2, 0))]
    checkpoint.commit(tmp_path, 2, records, {"step": 2})
    assert checkpoint.any_saved(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    checkpoint.drop_newer(tmp_path, checkpoint.directory(tmp_path, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    checkpoint.drop_newer(tmp_path, None)
    assert list(tmp_path.iterdir()) == []
    assert not checkpoint.any_saved(tmp_path)


def test_what_a_crash_left_is_removed_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint.write_layer(checkpoint.begin(tmp_path, 2), 0, tensors(2, 0))
    check_whole(checkpoint.find(tmp_path), 1)
    folder = checkpoint.begin(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003.0-0.tmp"]
    assert list(folder.iterdir()) == []
    checkpoint.abort(tmp_path, 3)
    checkpoint.abort(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_other_things_in_the_folder_are_let_be(tmp_path: Path) -> None:
    save(tmp_path, 1)
    others = ["step-00000009", "step-7", "step-000000005", "best-step-00000008", "notes.txt"]
    (tmp_path / others[0]).write_text("a file")
    for name in others[1:]:
        (tmp_path / name).mkdir()
    save(tmp_path, 2, keep=1)
    found = checkpoint.find(tmp_path)
    check_whole(found, 2)
    assert found.skipped == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "step-00000002"])


# ---- damage ----


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _forge(path: Path) -> None:
    whole = json.loads(path.read_text())
    whole["body"]["extra"]["step"] = 1
    path.write_text(json.dumps(whole))


def _into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


LAYER, MANIFEST = "layer-00001.safetensors", "manifest.json"


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (LAYER, lambda p: os.truncate(p, 100), r"layer-00001.safetensors has 100 bytes, written were \d{3}$"),
        (LAYER, lambda p: os.truncate(p, 0), r"layer-00001.safetensors has 0 bytes, written were"),
        (LAYER, _grow, r"layer-00001.safetensors has \d{3} bytes, written were"),
        (LAYER, lambda p: flip(p, 20), r"layer-00001.safetensors has checksum [0-9a-f]{8}, written was [0-9a-f]{8}$"),
        (LAYER, lambda p: flip(p, -1, 7), r"layer-00001.safetensors has checksum"),
        (LAYER, Path.unlink, r"layer-00001.safetensors cannot be read: No such file"),
        (LAYER, _into_folder, r"layer-00001.safetensors cannot be read: Is a directory"),
        (MANIFEST, Path.unlink, r"^manifest.json is missing$"),
        (MANIFEST, lambda p: os.truncate(p, 50), r"^manifest.json is damaged"),
        (MANIFEST, lambda p: os.truncate(p, 0), r"^manifest.json is damaged"),
        (MANIFEST, lambda p: p.write_bytes(b"\xff\xfe"), r"^manifest.json is damaged"),
        (MANIFEST, lambda p: p.write_text("[]"), r"^manifest.json is damaged"),
        (MANIFEST, lambda p: p.write_text("null"), r"^manifest.json is damaged"),
        (MANIFEST, _forge, r"^manifest.json is damaged \(checksum\)$"),
        (MANIFEST, _into_folder, r"^manifest.json is damaged"),
    ],
)
def test_a_damaged_one_is_skipped_with_its_reason_for_the_newest_that_is_whole(
    tmp_path: Path, name: str, damage: Callable[[Path], Any], reason: str
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage(checkpoint.directory(tmp_path, 3) / name)
    found = checkpoint.find(tmp_path)
    check_whole(found, 2)
    ((path, told),) = found.skipped
    assert path == checkpoint.directory(tmp_path, 3)
    with pytest.raises(CheckpointError, match=reason):
        raise CheckpointError(told)


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for file in (path / LAYER, path / MANIFEST):
        whole = file.read_bytes()
        for byte in range(0, len(whole), 3):
            flip(file, byte, bit=byte % 8)
            assert checkpoint.find(tmp_path).path is None, f"bit {byte % 8} of byte {byte} of {file.name}"
            file.write_bytes(whole)
    check_whole(checkpoint.find(tmp_path), 1)


def test_all_that_is_skipped_is_told_newest_first(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        os.truncate(save(tmp_path, step) / LAYER, step)
    found = checkpoint.find(tmp_path)
    assert (found.path, found.manifest) == (None, None)
    assert [path.name for path, _ in found.skipped] == ["step-00000003", "step-00000002", "step-00000001"]
    assert [reason.split(" bytes")[0] for _, reason in found.skipped] == [f"{LAYER} has {n}" for n in (3, 2, 1)]


def test_a_layer_is_verified_again_as_it_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = checkpoint.read_manifest(path)
    with pytest.raises(CheckpointError, match=r"step-00000001 has no layer 3; it has \[0, 1, 2\]"):
        checkpoint.read_layer(path, manifest, 3)
    flip(path / LAYER, 30)
    with pytest.raises(CheckpointError, match=r"layer-00001.safetensors has checksum"):
        checkpoint.read_layer(path, manifest, 1)
    (path / LAYER).unlink()
    with pytest.raises(CheckpointError, match=r"step-00000001/layer-00001.safetensors cannot be read: No such file"):
        checkpoint.read_layer(path, manifest, 1)


# ---- how many are kept ----


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=keep)
        check_whole(checkpoint.find(tmp_path), step)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:08d}" for step in left]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_just_written_is_kept_whatever_lies_damaged_beside_it(tmp_path: Path, keep: int) -> None:
    """A run that fell back from damaged steps 6 and 9 to step 3 writes step 4: that is now all there is to resume."""
    for step in (3, 6, 9):
        save(tmp_path, step)
    for step in (6, 9):
        flip(checkpoint.directory(tmp_path, step) / LAYER, 30)
    check_whole(checkpoint.find(tmp_path), 3)
    path = save(tmp_path, 4, keep=keep)
    assert path.is_dir(), "the checkpoint that was just committed is gone"
    check_whole(checkpoint.find(tmp_path), 4)


# ---- a full disk ----


def test_a_full_disk_is_named_and_leaves_no_partial_layer(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = checkpoint.begin(tmp_path, 2)
    checkpoint.write_layer(folder, 0, tensors(2, 0))
    with largest_file(10_000):
        with pytest.raises(
            CheckpointError,
            match=r"step-00000002.0-0.tmp/layer-00001.safetensors cannot be written \(File too large\): 40\d{3} bytes "
            r"are needed, \d+ are free",
        ):
            checkpoint.write_layer(folder, 1, {"param/w": torch.zeros(10_000)})
    assert [p.name for p in folder.iterdir()] == ["layer-00000.safetensors"]
    check_whole(checkpoint.find(tmp_path), 1)
    checkpoint.abort(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_disk_that_is_full_at_the_manifest_leaves_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = checkpoint.begin(tmp_path, 2)
    records = [checkpoint.write_layer(folder, layer, tensors(2, layer)) for layer in range(LAYERS)]
    with largest_file(100):
        with pytest.raises(CheckpointError, match=r"manifest.json cannot be written \(File too large\)"):
            checkpoint.commit(tmp_path, 2, records, {"step": 2})
    assert not (folder / MANIFEST).exists()
    check_whole(checkpoint.find(tmp_path), 1)
    checkpoint.abort(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone/layer-00000.safetensors cannot be written \(No such file"):
        checkpoint.write_layer(tmp_path / "gone", 0, tensors(1, 0))


# ---- of this run ----


SAVED = {"model": {"hidden_size": 64, "layers": 4, "act": "silu"}, "data": "abc", "seed": 1, "list": (1, 2)}


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"seed": 2}, r"cannot resume with another seed: it was 1 and is 2. Use the same seed, or another --out"),
        ({"data": "abd"}, r"cannot resume with another data: it was 'abc' and is 'abd'"),
        ({"seed": 1, "data": None}, r"another data: it was 'abc' and is None"),
        ({"unknown": 5}, r"another unknown: it was None and is 5"),
        ({"list": [1]}, r"another list: it was \[1, 2\] and is \[1\]"),
        (
            {"model": {"hidden_size": 128, "layers": 4, "heads": 2}},
            r"another model: act was 'silu' and is None; heads was None and is 2; hidden_size was 64 and is 128\. Use",
        ),
    ],
)
def test_another_run_is_refused_by_name(tmp_path: Path, now: dict[str, Any], message: str) -> None:
    save(tmp_path, 1, **SAVED)
    manifest = checkpoint.find(tmp_path).manifest
    assert manifest is not None
    checkpoint.check_compatible(manifest, **SAVED)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.check_compatible(manifest, **now)


def test_a_long_difference_is_cut(tmp_path: Path) -> None:
    save(tmp_path, 1, model={f"field{n}": n for n in range(40)})
    with pytest.raises(CheckpointError) as refused:
        checkpoint.check_compatible(
            checkpoint.read_manifest(checkpoint.directory(tmp_path, 1)), model={f"field{n}": -1 for n in range(40)}
        )
    assert str(refused.value).count(" was ") == 5


# ---- writers of views that are over ----


def saved_by(root: Path, step: int, fence: checkpoint.Fence) -> Path:
    folder = checkpoint.begin(root, step, fence)
    records = [checkpoint.write_layer(folder, layer, tensors(step, layer)) for layer in range(LAYERS)]
    path = checkpoint.commit(root, step, records, {"step": step}, fence=fence)
    checkpoint.prune(root, step, 9, fence)
    return path


def test_who_comes_back_late_deletes_nothing_newer_and_saves_nothing(tmp_path: Path) -> None:
    """A leader was stopped after all had voted and before its commit; its view is over, and others have saved since."""
    late = checkpoint.begin(tmp_path, 5, (1, 3))
    records = [checkpoint.write_layer(late, layer, tensors(5, layer)) for layer in range(LAYERS)]
    unfinished = shutil.copytree(late, tmp_path / "aside")
    saved_by(tmp_path, 8, (1, 4))
    assert not late.exists(), "the next view removes what an earlier one left"
    shutil.move(unfinished, late)
    with pytest.raises(CheckpointError, match="step-00000008 was saved by a later view than 3, which is over"):
        checkpoint.commit(tmp_path, 5, records, {"step": 5}, fence=(1, 3))
    check_whole(checkpoint.find(tmp_path), 8)


def test_who_comes_back_late_sets_nothing_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was stopped after it had looked for later views: the next one removes what it wrote, and saves the step."""
    folder = checkpoint.begin(tmp_path, 5, (1, 3))
    records = [checkpoint.write_layer(folder, n, tensors(5, n)) for n in range(LAYERS)]

    def looks_and_is_stopped(path: Path) -> list[Path]:
        monkeypatch.undo()
        found = committed(path)
        saved_by(tmp_path, 5, (1, 4))
        return found

    committed = checkpoint._committed
    monkeypatch.setattr(checkpoint, "_committed", looks_and_is_stopped)
    with pytest.raises(CheckpointError, match=r"step-00000005\.1-3\.tmp was removed by a later view than 3"):
        checkpoint.commit(tmp_path, 5, records, {"step": 5}, fence=(1, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    check_whole(checkpoint.find(tmp_path), 5)


def test_what_is_saved_again_while_it_is_verified_is_not_taken_for_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, run="first")
    verifier, again = checkpoint.Verifier(), [True]

    def come_on() -> None:
        if again and again.pop():
            folder = checkpoint.begin(tmp_path, 2)
            records = [checkpoint.write_layer(folder, n, tensors(7, n)) for n in range(LAYERS)]
            checkpoint.commit(tmp_path, 2, records, {"step": 2})

    verifier._come_on = come_on  # type: ignore[method-assign]
    found = verifier.find(tmp_path)
    assert found.path == checkpoint.directory(tmp_path, 2)
    assert found.skipped == ()


def test_a_view_that_is_over_does_not_disturb_one_that_is_saving(tmp_path: Path) -> None:
    at_work = checkpoint.begin(tmp_path, 8, (1, 4))
    with pytest.raises(CheckpointError, match=r"step-00000008\.1-4\.tmp is being written by a later view than 3"):
        checkpoint.begin(tmp_path, 9, (1, 3))
    assert at_work.exists()


def test_a_later_view_replaces_what_an_earlier_one_saved(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        saved_by(tmp_path, step, (1, 2))
    saved_by(tmp_path, 6, (1, 5))  # after a rollback: 9 is of a future that was given up
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000006"]
    assert checkpoint.last_attempt(tmp_path) == 1
    saved_by(tmp_path, 4, (2, 1))  # views begin anew when a run is started again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert checkpoint.last_attempt(tmp_path) == 2


def test_a_checkpoint_of_before_there_were_fences_is_read_and_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    manifest = json.loads((path / MANIFEST).read_bytes())
    del manifest["body"]["extra"]["fence"]
    manifest["crc32"] = zlib.crc32(json.dumps(manifest["body"], sort_keys=True).encode())
    (path / MANIFEST).write_text(json.dumps(manifest))
    check_whole(checkpoint.find(tmp_path), 3)
    assert checkpoint.last_attempt(tmp_path) == 0
    saved_by(tmp_path, 2, (1, 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002"]
