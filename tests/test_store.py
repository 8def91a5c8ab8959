"""The store of a run: torch's operations as torch has them, for who knows the token; for others a closed connection."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store import server as server_module
from pipeline.store.client import SealedStore, TokenRefused
from pipeline.store.frames import LONGEST, FrameError, Seal, pack, unpack
from pipeline.store.handshake import HELLO, NONCE_BYTES, PROOF_BYTES, REFUSED, Refused, Secrets, client_nonce
from pipeline.store.hosting import StoreProcess, StoreThread
from pipeline.store.table import Op

TOKEN = b"0123456789abcdef0123456789abcdef"
SOON = timedelta(milliseconds=50)


@pytest.fixture(scope="module")
def hosted() -> Iterator[StoreThread]:
    server = StoreThread("127.0.0.1", 0, TOKEN)
    yield server
    server.close()


def client(hosted: StoreThread | StoreProcess, prefix: str = "", token: bytes = TOKEN, timeout_s: float = 5.0) -> Any:
    return SealedStore("127.0.0.1", hosted.port, token, prefix, timeout_s)


def raw(hosted: StoreThread | StoreProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", hosted.port), timeout=5)


def read(end: socket.socket) -> bytes:
    """All that comes until the other end closes."""
    found = b""
    try:
        while piece := end.recv(65536):
            found += piece
    except ConnectionError:
        pass
    return found


# ---- torch's operations ----

KEYS, VALUES = st.sampled_from(["a", "b", "c"]), st.sampled_from(["", "1", "2", "long" * 40])
STEPS = st.one_of(
    st.tuples(st.just("set"), KEYS, VALUES),
    st.tuples(st.just("add"), st.just("n"), st.integers(-3, 3)),
    st.tuples(st.just("compare_set"), KEYS, VALUES, VALUES),
    st.tuples(st.just("delete_key"), KEYS),
    st.tuples(st.just("append"), KEYS, VALUES),
    st.tuples(st.just("check"), st.lists(KEYS, min_size=1)),
    st.tuples(st.just("get"), KEYS),
    st.tuples(st.just("multi_get"), st.lists(KEYS, min_size=1)),
)


def does(store: dist.Store, step: tuple[Any, ...]) -> Any:
    name, *arguments = step
    if name in ("get", "multi_get") and not store.check([arguments[0]] if name == "get" else arguments[0]):
        return "it would wait"
    return getattr(store, name)(*arguments)


def tcp_store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.mark.parametrize("theirs", [dist.HashStore, tcp_store], ids=["hash", "tcp"])
def test_what_is_done_comes_to_what_torchs_stores_make_of_it(hosted: StoreThread, theirs: Callable[[], Any]) -> None:
    ours, other, number = client(hosted), theirs(), [0]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(STEPS, max_size=12))
    def alike(steps: list[tuple[Any, ...]]) -> None:
        number[0] += 1
        name = f"{type(other).__name__}{number[0]}"
        pair = [dist.PrefixStore(name, ours), dist.PrefixStore(name, other)]
        for step in steps:
            assert does(pair[0], step) == does(pair[1], step), step

    alike()


def test_a_store_fails_as_torchs_does(hosted: StoreThread) -> None:
    ours = client(hosted, "fails", timeout_s=0.05)
    for wait in (lambda: ours.wait(["never"], SOON), lambda: ours.get("never"), lambda: ours.multi_get(["never"])):
        with pytest.raises(dist.DistStoreError, match="wait timeout after 50ms, keys: fails/never"):
            wait()
    ours.set("text", "no number")
    with pytest.raises(dist.DistStoreError, match="fails/text is no number"):
        ours.add("text", 1)
    assert ours.get("text") == b"no number", "and it is there as before"
    assert ours.num_keys() > 0
    copy = ours.clone()
    assert copy.get("text") == b"no number"


def test_who_waits_is_woken_by_the_last_of_the_keys(hosted: StoreThread) -> None:
    waiting, other, woken = client(hosted, "w"), client(hosted, "w"), list[float]()

    def wait() -> None:
        waiting.wait(["a", "b"], timedelta(seconds=5))
        woken.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    other.set("a", "")
    time.sleep(0.05)
    assert not woken
    other.delete_key("a")
    other.set("b", "")
    time.sleep(0.05)
    assert not woken, "one of them is gone again"
    began = time.monotonic()
    other.set("a", "")
    thread.join(5)
    assert woken[0] - began < 1.0


def test_prefixes_keep_runs_apart(hosted: StoreThread) -> None:
    one, two = client(hosted, "one"), client(hosted, "two")
    one.set("key", "1")
    assert not two.check(["key"])
    assert client(hosted).get("one/key") == b"1"
    ours = client(hosted)
    assert dist.PrefixStore("one", ours).get("key") == b"1"


def test_process_groups_meet_through_it(hosted: StoreThread) -> None:
    found = dict[int, list[float]]()

    def member(rank: int) -> None:
        ours = client(hosted)
        group = dist.ProcessGroupGloo(dist.PrefixStore("group", ours), rank, 2, timedelta(seconds=10))
        tensor = torch.ones(2)
        group.allreduce([tensor]).wait()
        found[rank] = tensor.tolist()

    threads = [threading.Thread(target=member, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {0: [2.0, 2.0], 1: [2.0, 2.0]}


def test_a_store_that_is_gone_wakes_who_waits_and_says_so() -> None:
    process = StoreProcess("127.0.0.1", 0, TOKEN)
    try:
        waiting, errors = client(process), list[str]()

        def wait() -> None:
            with pytest.raises(dist.DistNetworkError) as found:
                waiting.wait(["never"], timedelta(days=365))
            errors.append(str(found.value))

        thread = threading.Thread(target=wait)
        waiting.set("there", "")
        thread.start()
        time.sleep(0.05)
        psutil.Process(process.pid).kill()
        thread.join(5)
        assert "is gone: it has closed the connection" in errors[0]
        with pytest.raises(dist.DistNetworkError, match="is gone"):
            waiting.check(["there"])
    finally:
        process.close()


def test_nothing_of_a_token_can_be_seen_in_the_list_of_processes() -> None:
    process = StoreProcess("127.0.0.1", 0, TOKEN)
    try:
        client(process).set("key", "")
        seen = psutil.Process(process.pid)
        told = " ".join([*seen.cmdline(), *(f"{k}={v}" for k, v in seen.environ().items())])
        assert TOKEN.decode() not in told
        assert TOKEN.hex() not in told
    finally:
        process.close()
    assert not psutil.pid_exists(process.pid)


def test_an_operation_that_is_interrupted_leaves_the_store_usable(
    hosted: StoreThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's handler may raise in the middle of anything."""
    ours = client(hosted, "interrupted")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ours._seals[1], "take", interrupt)  # and not those of the server, which is a thread here
        with pytest.raises(KeyboardInterrupt):
            ours.set("key", "1")
    assert ours.compare_set("key", "1", "2") == b"2"


# ---- the handshake and the frames ----


def both_nonces(end: socket.socket, nonce: bytes = bytes(NONCE_BYTES)) -> Secrets:
    """The first half of a handshake, by who knows the token."""
    end.sendall(HELLO + nonce)
    return Secrets.of(TOKEN, nonce, end.recv(NONCE_BYTES, socket.MSG_WAITALL))


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda more: HELLO + more)))
def test_random_bytes_are_told_nothing(hosted: StoreThread, said: bytes) -> None:
    with raw(hosted) as end:
        end.sendall(said)
        end.shutdown(socket.SHUT_WR)
        found = read(end)
    whole = len(said) >= len(HELLO) + NONCE_BYTES and said.startswith(HELLO)
    assert len(found) in ((NONCE_BYTES, NONCE_BYTES + PROOF_BYTES) if whole else (0,))
    assert found[NONCE_BYTES:] in (b"", REFUSED)


def test_a_client_of_torchs_store_is_sent_away_at_once(hosted: StoreThread) -> None:
    began = time.monotonic()
    with pytest.raises(dist.DistNetworkError):
        dist.TCPStore("127.0.0.1", hosted.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=1))
    assert time.monotonic() - began < 4.0


def test_a_handshake_that_was_heard_is_worth_nothing_the_next_time(hosted: StoreThread) -> None:
    nonce = b"n" * NONCE_BYTES
    with raw(hosted) as end:
        secrets = both_nonces(end, nonce)
        end.sendall(secrets.client_proof)
        assert end.recv(PROOF_BYTES, socket.MSG_WAITALL) == secrets.server_proof
    with raw(hosted) as end:
        end.sendall(HELLO + nonce)
        assert end.recv(NONCE_BYTES, socket.MSG_WAITALL)
        end.sendall(secrets.client_proof)
        assert read(end) == REFUSED


def test_a_stranger_who_sends_back_what_it_is_sent_is_refused(hosted: StoreThread) -> None:
    with raw(hosted) as end:
        end.sendall(HELLO + bytes(NONCE_BYTES))
        end.sendall(end.recv(NONCE_BYTES, socket.MSG_WAITALL))
        assert read(end) == REFUSED


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_frames_that_are_changed_repeated_left_out_cut_or_sent_back_cost_the_connection(
    hosted: StoreThread, data: st.DataObject
) -> None:
    with raw(hosted) as end:
        secrets = both_nonces(end)
        end.sendall(secrets.client_proof)
        assert end.recv(PROOF_BYTES, socket.MSG_WAITALL) == secrets.server_proof
        mine, theirs = secrets.seals(server=False)
        frame = mine.seal(pack(Op.SET, [b"frames/key", b"1"]))
        how = data.draw(st.sampled_from(["changed", "repeated", "left out", "back", "long", "empty", "other key"]))
        if how == "changed":
            at, bit = data.draw(st.integers(4, len(frame) - 1)), data.draw(st.integers(0, 7))
            end.sendall(frame[:at] + bytes([frame[at] ^ (1 << bit)]) + frame[at + 1 :])
        elif how == "left out":
            end.sendall(mine.seal(pack(Op.SET, [b"frames/key", b"2"])))
        elif how == "long":
            end.sendall((LONGEST + 1).to_bytes(4, "big") + bytes(1000))
        elif how == "empty":
            end.sendall(bytes(4))
        elif how == "other key":
            end.sendall(Seal(bytes(32)).seal(b""))
        else:
            end.sendall(frame)
            answer = end.recv(65536)
            assert theirs.take(bytearray(answer)) is not None
            end.sendall(frame if how == "repeated" else answer)
        end.shutdown(socket.SHUT_WR)
        assert read(end) == b""
    assert client(hosted).get("frames/key") == b"1" if how in ("repeated", "back") else True


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=200))
def test_what_who_knows_the_token_says_wrongly_costs_its_connection_alone(hosted: StoreThread, plain: bytes) -> None:
    with raw(hosted) as end:
        secrets = both_nonces(end)
        end.sendall(secrets.client_proof)
        assert end.recv(PROOF_BYTES, socket.MSG_WAITALL) == secrets.server_proof
        end.sendall(secrets.seals(server=False)[0].seal(plain))
        end.shutdown(socket.SHUT_WR)
        read(end)
    assert client(hosted).set("still", "there") is None


@given(st.integers(0, 255), st.lists(st.binary(max_size=50)), st.integers(-(2**63), 2**63 - 1), st.floats(0, 1e6))
def test_a_message_is_read_as_it_was_written(kind: int, fields: list[bytes], number: int, seconds: float) -> None:
    assert unpack(pack(kind, fields, seconds, number)) == (kind, seconds, number, fields)


@given(st.binary(max_size=300))
def test_whatever_is_read_as_a_message_is_one_or_a_named_error(plain: bytes) -> None:
    try:
        kind, seconds, number, fields = unpack(plain)
    except FrameError:
        return
    assert sum(map(len, fields)) + 4 * len(fields) <= len(plain)
    assert (kind, number) == unpack(pack(kind, fields, seconds, number))[::2]


def test_a_first_message_of_something_else_is_refused() -> None:
    with pytest.raises(Refused, match="is no part of a run"):
        client_nonce(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".ljust(len(HELLO) + NONCE_BYTES))


def test_another_token_is_named_on_both_sides(hosted: StoreThread) -> None:
    with pytest.raises(TokenRefused, match="the store has another token than this process"):
        client(hosted, token=b"x" * 32)
    with pytest.raises(ValueError, match="a token of 5 bytes; allowed: 32 or more"):
        StoreThread("127.0.0.1", 0, b"short")


def test_who_plays_the_store_without_the_token_is_found_out() -> None:
    """It lets anybody in, as a stranger would who has taken the store's port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def play() -> None:
            end, _ = listener.accept()
            with end:
                end.recv(len(HELLO) + NONCE_BYTES, socket.MSG_WAITALL)
                end.sendall(bytes(NONCE_BYTES))
                end.sendall(end.recv(PROOF_BYTES, socket.MSG_WAITALL))  # what else could it say?

        thread = threading.Thread(target=play)
        thread.start()
        with pytest.raises(TokenRefused, match="does not know its token"):
            SealedStore("127.0.0.1", listener.getsockname()[1], TOKEN, timeout_s=5)
        thread.join(5)


# ---- floods ----


def test_a_crowd_that_says_half_a_word_is_sent_away_and_keeps_nobody_out(
    hosted: StoreThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_UNPROVED", 20)
    ours, crowd = client(hosted, "crowd"), [raw(hosted) for _ in range(60)]
    try:
        for end in crowd:
            try:
                end.sendall(HELLO[:5])
            except ConnectionError:
                continue  # it has had to go already
        assert ours.add("count", 1) == 1
        assert client(hosted, "crowd").add("count", 1) == 2
        assert [read(end) for end in crowd[:30]] == [b""] * 30
    finally:
        for end in crowd:
            end.close()


def test_who_does_not_go_on_with_its_handshake_is_sent_away(
    hosted: StoreThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_PROVE_S", 0.1)
    with raw(hosted) as end:
        end.sendall(HELLO)
        began = time.monotonic()
        assert read(end) == b""
        assert time.monotonic() - began < 2.0


def test_a_client_that_does_not_wait_for_its_answers_is_sent_away(hosted: StoreThread) -> None:
    with raw(hosted) as end:
        secrets = both_nonces(end)
        end.sendall(secrets.client_proof)
        assert end.recv(PROOF_BYTES, socket.MSG_WAITALL) == secrets.server_proof
        mine = secrets.seals(server=False)[0]
        end.sendall(mine.seal(pack(Op.WAIT, [b"never"], 60.0)))
        end.sendall(mine.seal(pack(Op.SET, [b"key", b"value"])))
        assert read(end) == b""


def test_without_descriptors_a_store_sends_away_and_comes_back() -> None:
    """A process of its own, with room for few sockets."""
    process = StoreProcess("127.0.0.1", 0, TOKEN)
    try:
        ours = client(process)
        ours.set("key", "value")
        most = psutil.Process(process.pid).num_fds() + 10
        psutil.Process(process.pid).rlimit(psutil.RLIMIT_NOFILE, (most, most))
        crowd = [raw(process) for _ in range(40)]
        assert ours.get("key") == b"value"
        assert client(process, timeout_s=20.0).get("key") == b"value"
        for end in crowd:
            end.close()
    finally:
        process.close()
