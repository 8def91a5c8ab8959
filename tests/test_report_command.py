"""`unbroken report`: a file, several runs in one, and a server that gives nothing but the page, and to nobody else."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from launch.cli import main
from launch.png import require_png
from launch.report import loss_svg
from pipeline.locks import lock, unlock
from pipeline.settings import ConfigError
from tests.test_page import HOSTILE, Elements, event, whole, write

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("out", ["", "elsewhere.html"])
def test_the_page_of_a_run_is_written_where_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    run = whole(tmp_path / "run")
    path = tmp_path / out if out else run / "report.html"
    assert main(["report", str(run), *(["--out", str(path)] if out else []), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(path), "runs": [str(run)], "png": []}
    assert "done: all 40 steps" in path.read_text()


def test_several_runs_are_compared_on_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(whole(tmp_path / "a")), str(whole(tmp_path / "b"))]) == 0
    assert capsys.readouterr().out == "wrote comparison.html\n"
    assert "a · b" in (tmp_path / "comparison.html").read_text()


def test_pictures_have_pngs_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        require_png()
    except ConfigError as error:
        pytest.skip(str(error))
    run = whole(tmp_path / "run")
    (run / "loss.svg").write_text(loss_svg([{"step": step, "loss": 4 - step / 9} for step in range(9)]))
    assert main(["report", str(run), "--png", "--json"]) == 0
    (path,) = json.loads(capsys.readouterr().out)["png"]
    data = Path(path).read_bytes()
    assert Path(path) == run / "loss.png"
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    drawn = re.search(r'width="(\d+)" height="(\d+)"', (run / "loss.svg").read_text())
    assert drawn is not None
    assert struct.unpack(">II", data[16:24]) == tuple(2 * int(each) for each in drawn.groups()), "sharp on any screen"
    (run / "loss.svg").write_text("no picture")
    assert main(["report", str(run), "--png"]) == 2
    assert "loss.svg' has no PNG: " in capsys.readouterr().err
    textless = '<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"><desc>{}</desc></svg>'
    monkeypatch.setattr("launch.png._PROBE", textless)
    assert main(["report", str(run), "--png"]) == 2
    assert "png is True; allowed: unset on a machine without fonts" in capsys.readouterr().err
    monkeypatch.setattr("launch.png.find_spec", lambda name: None)
    assert main(["report", str(run), "--png"]) == 2
    assert "png is True; allowed: unset without its package; pip install 'unbroken[png]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "runs is 'nowhere'; allowed: the folder of a run, which has metrics.jsonl or config.toml in it"),
        (["--runs", ""], "runs is ''; allowed: 1 to 24 run folders"),
        (["run", "--port", "80"], "port is 80; allowed: 0 without --serve"),
        (["run", "--port", "65536"], "port is 65536; allowed: 0 to 65535"),
        (["run", "--serve", "--out", "x"], "out is 'x'; allowed: unset with --serve, which writes no file"),
        (["run", "--serve", "--png"], "png is True; allowed: unset with --serve, which writes no file"),
        (["run", "--out", "no/x"], "out is 'no/x', which cannot be written: No such file or directory"),
    ],
)
def test_what_cannot_be_reported_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    whole(tmp_path / "run")
    assert main(["report", *arguments]) == 2
    assert capsys.readouterr().err == f"unbroken report: {message}\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, subprocess.Popen[str]]]:
    """A run that is served: its folder, the port, and the process."""
    run = whole(tmp_path_factory.mktemp("served") / "run")
    held = lock(run / ".lock")
    write(run, events=[event(0.0, "started", step=0, workers=3)])
    command = [sys.executable, "-m", "launch", "report", str(run), "--serve"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.match(r"http://127\.0\.0\.1:(\d+)/ shows ", line := process.stdout.readline())
            assert found is not None, line
            yield run, int(found[1]), process
        finally:
            process.kill()
            unlock(run / ".lock", held)


def asked(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


def test_the_page_is_served_and_asks_for_news_while_the_run_goes_on(served: tuple[Path, int, object]) -> None:
    run, port, _ = served
    status, text, headers = asked(port, "/")
    assert status == 200
    assert "the run goes on" in text
    (policy,) = [m["content"] for m in Elements(text).of("meta") if m.get("http-equiv")]
    assert "connect-src 'self'" in policy
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["cache-control"] == "no-store"
    state = json.loads(asked(port, "/state")[1])
    assert state["running"] is True
    assert f'data-version="{state["version"]}"' in text
    assert asked(port, "/", "HEAD")[:2] == (200, "")
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(event(9.0, HOSTILE, step=0)) + "\n")
    found = state
    for _ in range(100):
        if (found := json.loads(asked(port, "/state")[1])) != state:
            break
        time.sleep(0.05)
    assert found["version"] != state["version"], "the page is drawn anew once something has come"


@pytest.mark.parametrize(
    "path", ["/config.toml", "/metrics.jsonl", "/../config.toml", "//etc/passwd", "/report.html/../config.toml",
             "/%2e%2e/config.toml", "/state?x", "/.lock"],
)  # fmt: skip
def test_nothing_else_of_the_disk_is_served(served: tuple[Path, int, object], path: str) -> None:
    assert asked(served[1], path)[:2] == (404, "nothing here\n")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", ""])
def test_who_comes_by_another_name_is_refused(served: tuple[Path, int, object], host: str) -> None:
    status, text, _ = asked(served[1], "/", Host=host.format(port=served[1]))
    assert (status, text) == (421, "not this host\n")


def test_this_machine_is_known_by_its_two_names(served: tuple[Path, int, object]) -> None:
    for name in ("localhost", "127.0.0.1"):
        assert asked(served[1], "/state", Host=f"{name}:{served[1]}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE"])
def test_nothing_but_reading_is_answered(served: tuple[Path, int, object], method: str) -> None:
    assert asked(served[1], "/", method)[0] == 501


def test_half_a_request_and_noise_hold_nobody_up(served: tuple[Path, int, object]) -> None:
    port = served[1]
    idle = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(20)]
    for number, each in enumerate(idle):
        each.sendall([b"GET / HT", b"\0" * 5000, b"GET /" + b"x" * 70_000, b"\r\n\r\n"][number % 4])
    assert asked(port, "/state")[0] == 200
    for each in idle:
        each.close()


def test_a_port_that_is_taken_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], served: tuple[Path, int, object]
) -> None:
    run = whole(tmp_path / "run")
    assert main(["report", str(run), "--serve", "--port", str(served[1])]) == 2
    assert f"port is {served[1]}, which cannot be had on 127.0.0.1" in capsys.readouterr().err


def test_it_listens_on_this_machine_alone_and_ends_when_it_is_asked_to(
    served: tuple[Path, int, subprocess.Popen[str]],
) -> None:
    _, port, process = served
    listening = Path(f"/proc/{process.pid}/net/tcp").read_text()
    addresses = {line.split()[1] for line in listening.splitlines()[1:] if line.split()[3] == "0A"}
    assert f"0100007F:{port:04X}" in addresses
    assert f"00000000:{port:04X}" not in addresses
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
