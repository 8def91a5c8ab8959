"""Where a run's token comes from, who may read it, and how the slots of torchrun find the store."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from jobs.config import ConfigError, TrainConfig
from launch.slots import Slot, StoreHandle, open_store
from launch.token import VARIABLE, find_token, leave_token, read_token
from launch.worker_main import connect

GIVEN = "the token of a test, long enough for one"


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def written(path: Path, text: str = GIVEN, mode: int = 0o600) -> Path:
    path.write_text(text + "\n")
    path.chmod(mode)
    return path


def test_a_run_of_one_machine_has_a_new_token_each_time_and_leaves_it_nowhere(tmp_path: Path) -> None:
    config = TrainConfig(out=tmp_path)
    one, two = find_token(config, 0, 1), find_token(config, 0, 1)
    assert one != two
    assert len(one) == 64
    leave_token(config, one, 1)
    assert list(tmp_path.iterdir()) == []


def test_other_machines_read_the_token_in_the_run_folder(tmp_path: Path) -> None:
    config, found = TrainConfig(out=tmp_path), list[bytes]()
    thread = threading.Thread(target=lambda: found.append(find_token(config, 1, 2, 10.0)))
    thread.start()
    token = find_token(config, 0, 2)
    leave_token(config, token, 2)
    thread.join(10)
    assert found == [token]
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert find_token(config, 0, 2) == token, "and so does who starts the run again"


def test_where_no_token_comes_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no '.*token', for 0 s; allowed: an --out that all machines"):
        find_token(TrainConfig(out=tmp_path), 1, 2, 0.1)


def test_a_token_is_given_by_a_file_or_by_the_environment(tmp_path: Path) -> None:
    config = TrainConfig(out=tmp_path, token_file=written(tmp_path / "file"))
    assert find_token(config, 1, 2, environment={VARIABLE: "x" * 40}) == GIVEN.encode()
    assert find_token(TrainConfig(out=tmp_path), 1, 2, environment={VARIABLE: GIVEN}) == GIVEN.encode()
    leave_token(config, GIVEN.encode(), 2)
    assert not (tmp_path / "token").exists()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604])
def test_a_token_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "file", mode=mode)
    with pytest.raises(
        ConfigError,
        match=rf"token_file is '.*file', of user \d+ with mode {mode:04o}; allowed: a file of user \d+ with mode 0600",
    ):
        read_token(path, "token_file")


def test_what_is_no_token_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"token_file: .*is a token of 5 bytes; allowed: 32 or more, such as"):
        read_token(written(tmp_path / "short", "short"), "token_file")
    with pytest.raises(ConfigError, match=r"UNBROKEN_TOKEN: what it holds is a token of 5 bytes"):
        find_token(TrainConfig(out=tmp_path), 0, 1, environment={VARIABLE: "short"})
    with pytest.raises(ConfigError, match=r"which cannot be read: No such file"):
        read_token(tmp_path / "none", "token_file")
    os.mkfifo(fifo := tmp_path / "fifo", 0o600)
    with pytest.raises(ConfigError, match=r"allowed: a file of user"):
        read_token(fifo, "token_file")


# ---- the store ----


@pytest.fixture
def hosted() -> Iterator[StoreHandle]:
    handle = open_store(Slot())
    yield handle
    handle.close()


def test_an_address_is_all_that_a_process_of_the_run_needs(hosted: StoreHandle) -> None:
    hosted.store.set("key", "value")
    assert connect(hosted.address(), 10.0).get("key") == b"value"
    assert hosted.token.hex() not in repr(hosted)


def test_another_token_joins_nothing(hosted: StoreHandle) -> None:
    with pytest.raises(ConfigError, match=r"token: .* the store has another token than this process; allowed: that of"):
        open_store(Slot(1, 2, host=hosted.host, port=hosted.port), 5.0, b"u" * 40)


def test_where_there_is_no_store_that_is_said(hosted: StoreHandle) -> None:
    hosted.close()
    with pytest.raises(
        ConfigError, match=rf"there is no store at 127.0.0.1:{hosted.port}, for 0 s; allowed: the addre"
    ):
        open_store(Slot(1, 2, host="127.0.0.1", port=hosted.port), 0.3, b"u" * 40)


def test_slots_of_torchrun_find_the_store_through_torchruns_own(tmp_path: Path) -> None:
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = (Slot(r, 2, True, r, 2, "127.0.0.1", meeting.port, True, "unbroken/run/0") for r in (0, 1))
    found, token = list[StoreHandle](), GIVEN.encode()
    thread = threading.Thread(target=lambda: found.append(open_store(second, 10.0, token)))
    thread.start()
    handle = open_store(first, 10.0, token)
    thread.join(10)
    try:
        handle.store.set("key", "value")
        assert found[0].store.get("key") == b"value"
        assert handle.port != meeting.port
        assert meeting.num_keys() <= 2, "nothing else of the run is kept there, where anybody reads"
    finally:
        handle.close()


@pytest.mark.parametrize("said", ["", "nowhere", "host:0", "host:99999", "host:x", ":1"])
def test_an_address_that_a_stranger_left_in_torchruns_store_is_refused(said: str) -> None:
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting.set("unbroken/store", said)
    slot = Slot(1, 2, True, 1, 2, "127.0.0.1", meeting.port, True)
    with pytest.raises(ConfigError, match=r"the store of torchrun says that ours is at .*, which is no address"):
        open_store(slot, 5.0, GIVEN.encode())
