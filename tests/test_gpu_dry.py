"""benchmarks/gpu.py from end to end on the CPU, and its driver where parts hang, fail or are ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from launch.forkserver import ForkServer

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
ROWS = {
    "0": {"weights of Qwen3-0.6B", "weights of Qwen3-1.7B"},
    "a": {
        *(f"{kind}, {workers} workers, {size} MiB" for kind in ("IPC", "sockets") for workers in (2, 4)
          for size in ("0.0625", "0.25")),
        "pytest -m cuda, test_rng",
    },
    "b": {"plain PyTorch", "ours, 1 worker", "ours, 2 workers", "torch pipelining 1F1B, 2 ranks"},
    "c": {"a CUDA context", "SIGKILL, replica", "SIGKILL, replica, spare"},
    "d": {"ours, 1 worker", "ours, 1 worker, one step behind", "FSDP2, CPU offload", "all on the device"},
}  # fmt: skip
PEERS_THAT_MAY_LACK = {"RoundPipe", "RoundPipe, in turn", "DeepSpeed"}


def module(name: str) -> ModuleType:
    """A script's module, found as the script finds it: after the packages, one of which has a script's name."""
    if (folder := str(ROOT / "benchmarks")) not in sys.path:
        sys.path.append(folder)
    return import_module(name)


# ---- from end to end ----


@pytest.mark.timeout(300)
def test_every_part_runs_on_the_cpu(tmp_path: Path) -> None:
    """What `make gpu-dry` runs: a typo in a part must not wait for the day with a GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, cwd=ROOT)
    found = json.loads((tmp_path / "gpu.json").read_text())
    told = done.stdout[-3000:] + done.stderr[-1000:]
    assert done.returncode == 0, told
    assert found["about"]["dry"] is True
    assert found["about"]["whole"] is True
    assert {"device", "driver", "torch", "transformers", "commit", "cpus", "seconds"} <= set(found["about"])
    assert set(found["sections"]) == set(ROWS)
    for letter, section in found["sections"].items():
        rows = [row for part in section["parts"] for row in part["rows"]]
        assert ROWS[letter] <= {row["row"] for row in rows}, told
        for part in section["parts"]:
            assert part["state"] == "done" or (part["part"] in PEERS_THAT_MAY_LACK and part["missing"]), part
            assert part["state"] == "done" or part["part"] in done.stdout
    losses = {row["row"]: row["losses"] for part in found["sections"]["b"]["parts"] for row in part["rows"]}
    for name, values in losses.items():
        assert values == pytest.approx(losses["plain PyTorch"], abs=2e-3), f"{name} does other work"
    offloaded = {row["row"]: row["losses"] for part in found["sections"]["d"]["parts"] for row in part["rows"]}
    assert offloaded["FSDP2, CPU offload"] == pytest.approx(offloaded["ours, 1 worker"], abs=2e-3)
    killed = found["sections"]["c"]["parts"][1]["rows"][0]
    assert killed["kills"] == 1
    assert 0 < killed["detect_p50_s"] < killed["total_p50_s"]
    assert "goals" in done.stdout
    assert any(goal["value"] for goal in found["goals"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", "a,x"], "x is no section: allowed are a, b, c, d"),
        (["--minutes", "0"], "expected more than 0"),
        pytest.param(
            [],
            "there is no NVIDIA device here; --dry tries",
            marks=pytest.mark.skipif(
                any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvidia0")), reason="there is one"
            ),
        ),
    ],
)
def test_refuses_what_it_cannot_run(flags: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr


def command(payload: dict[str, Any]) -> int:
    """The script in a process that has imported most of it."""
    with open(payload["log"], "wb") as log:
        os.dup2(log.fileno(), 1)
    sys.stdout, sys.argv = open(1, "w", buffering=1, closefd=False), [str(SCRIPT), *payload["flags"]]  # noqa: SIM115
    try:
        return module("gpu").main()
    except SystemExit as error:
        return int(error.code or 0)


def test_a_run_that_is_ended_says_what_it_has(forkserver: ForkServer, tmp_path: Path) -> None:
    flags, log = ["--dry", "--only", "b", "--out", str(tmp_path)], tmp_path / "log"
    pid = forkserver.start({"call": "tests.test_gpu_dry:command", "flags": flags, "log": str(log)})
    path, deadline = tmp_path / "gpu.json", time.monotonic() + 90
    while not (path.is_file() and '"losses"' in path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    below = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGTERM)
    assert '"losses"' in path.read_text(), "nothing was measured in time"
    ended: list[int] = []
    while not ended and time.monotonic() < deadline:
        ended = [exit_.code for exit_ in forkserver.poll(0.1) if exit_.pid == pid]
    assert ended == [143]
    found, said = json.loads(path.read_text()), log.read_text()
    assert found["about"]["whole"] is False
    parts = found["sections"]["b"]["parts"]
    assert [row["row"] for row in parts[0]["rows"]] == ["plain PyTorch"], json.dumps(parts[0])
    assert parts[-1]["state"] == "done" or (parts[-1]["state"], parts[-1]["error"]) == ("cut", "the run was ended")
    assert "plain PyTorch" in said
    assert "ENDED before its last part" in said
    _, alive = psutil.wait_procs(below, timeout=5)
    assert not alive


# ---- the driver ----


def says_and_hangs(values: dict[str, Any]) -> None:
    """A part with a row, a child with a child, and no end."""
    case = module("gpu_case").Case.from_json(values)
    deep = "import subprocess, sys, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", deep], start_new_session=True)
    deadline = time.monotonic() + 10
    while not (below := psutil.Process(child.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    case.say("a row", tokens_per_s=2.0, pids=[os.getpid(), child.pid, *(each.pid for each in below)])
    store = module("gpu_driver").store_path(case.folder)
    store.write_bytes(b"held")
    case.say("shared memory", path=str(store))
    time.sleep(600)


def fails(values: dict[str, Any]) -> None:
    """A part with a row and an error."""
    module("gpu_case").Case.from_json(values).say("before the error", tokens_per_s=1.0)
    raise ValueError("nothing fits")


def lacks(values: dict[str, Any]) -> None:
    """A part whose peer is not there."""
    module("gpu_case").require("no_such_package")


def vanishes(values: dict[str, Any]) -> None:
    """A part whose process ends without a word."""
    os.write(1, b"about to go\n")
    os._exit(7)


def works(values: dict[str, Any]) -> None:
    """A part that says a row twice: the last one counts."""
    case = module("gpu_case").Case.from_json(values)
    case.say("a row", tokens_per_s=3.0)
    case.say("a row", tokens_per_s=4.0)


def drive(payload: dict[str, Any]) -> int:
    """In a process of its own, which has no threads: one section of the parts above."""
    driver, sections = module("gpu_driver"), module("gpu_sections")
    names = payload["parts"]
    parts = tuple(sections.Part(name, f"tests.test_gpu_dry:{name}", payload["limit_s"]) for name in names)
    section = sections.Section("b", "a trial", 1.0, parts)
    out = Path(payload["out"])
    report = driver.Report(out / "gpu.json", {"dry": True})
    forkserver = ForkServer(module("gpu_case").entry)
    try:
        driver.run_section(section, forkserver, report, out, True, time.monotonic() + payload["seconds"])
    finally:
        forkserver.close()
    return 0


def driven(
    forkserver: ForkServer, out: Path, *parts: str, limit_s: float = 60.0, seconds: float = 100.0
) -> dict[str, Any]:
    """What the file says of each part."""
    pid = forkserver.start(
        {"call": "tests.test_gpu_dry:drive", "parts": parts, "out": str(out), "limit_s": limit_s, "seconds": seconds}
    )
    deadline, ended = time.monotonic() + 90, []
    while not ended and time.monotonic() < deadline:
        ended = [exit_ for exit_ in forkserver.poll(0.1) if exit_.pid == pid]
    assert [exit_.code for exit_ in ended] == [0]
    found = json.loads((out / "gpu.json").read_text())
    return {part["part"]: part for part in found["sections"]["b"]["parts"]}


def test_a_part_that_hangs_is_cut_and_leaves_nothing(forkserver: ForkServer, tmp_path: Path) -> None:
    found = driven(forkserver, tmp_path, "says_and_hangs", "works", limit_s=4.0)
    cut = found["says_and_hangs"]
    assert cut["state"] == "cut"
    assert cut["error"] == "it took longer than 4 s"
    said = {row["row"]: row for row in cut["rows"]}
    assert said["a row"]["tokens_per_s"] == 2.0, "what it had found is kept"
    assert len(pids := said["a row"]["pids"]) == 3
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert not Path(said["shared memory"]["path"]).exists()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "its folder is gone"
    assert found["works"]["state"] == "done"
    assert [row["tokens_per_s"] for row in found["works"]["rows"]] == [4.0]


def test_what_fails_or_lacks_something_is_told_and_the_others_go_on(forkserver: ForkServer, tmp_path: Path) -> None:
    found = driven(forkserver, tmp_path, "fails", "lacks", "vanishes", "works")
    assert found["fails"]["state"] == "failed"
    assert found["fails"]["error"] == "ValueError: nothing fits"
    assert found["fails"]["traceback"][-1] == "ValueError: nothing fits"
    assert [row["row"] for row in found["fails"]["rows"]] == ["before the error"]
    assert (found["lacks"]["state"], found["lacks"]["missing"]) == ("missing", "not installed: no_such_package")
    assert found["vanishes"]["state"] == "failed"
    assert found["vanishes"]["error"] == "its process ended with exit code 7"
    assert found["vanishes"]["said"] == ["about to go"]
    assert found["works"]["state"] == "done"


def test_no_part_begins_without_time(forkserver: ForkServer, tmp_path: Path) -> None:
    found = driven(forkserver, tmp_path, "works", seconds=1.0)
    assert found["works"]["state"] == "cut"
    assert found["works"]["error"] == "no time was left to begin"


def test_the_exit_code_is_of_our_parts_alone() -> None:
    driver, sections = module("gpu_driver"), module("gpu_sections").SECTIONS[2:3]

    def found(**states: str) -> dict[str, dict[str, Any]]:
        return {"b": {"parts": [{"peer": name == "peer", "state": state} for name, state in states.items()]}}

    assert driver.ran(sections, found(ours="done", peer="missing"))
    assert driver.ran(sections, found(ours="done", peer="failed"))
    assert not driver.ran(sections, found(ours="cut", peer="done"))
    assert not driver.ran(sections, {})


# ---- its figures ----


def test_goals_are_ratios_within_a_round() -> None:
    report, goal = module("gpu_report"), module("gpu_sections").Goal

    def part(round_: int, row: str, **figures: float) -> dict[str, Any]:
        return {"round": round_, "rows": [{"row": row, **figures}]}

    found = {
        "b": {
            "parts": [
                part(1, "ours", tokens_per_s=98.0), part(1, "theirs", tokens_per_s=100.0),
                part(2, "ours", tokens_per_s=51.0), part(2, "theirs", tokens_per_s=50.0),
                part(3, "ours", tokens_per_s=1.0), part(1, "lost", total_p95_s=3.0),
            ]
        }
    }  # fmt: skip
    wanted = (
        goal("b", "ours", "tokens_per_s", "theirs", 0.98), goal("b", "ours", "tokens_per_s", "nobody", 1.0),
        goal("b", "lost", "total_p95_s", None, 3.0, at_least=False),
        goal("b", "lost", "total_p95_s", None, 2.9, at_least=False), goal("d", "ours", "tokens_per_s"),
    )  # fmt: skip
    told = report.goals(wanted, found)
    assert [each["value"] for each in told] == [pytest.approx(1.0), None, 3.0, 3.0]
    assert [each["met"] for each in told] == [True, None, True, False]


def test_model_flops_are_those_of_the_published_shapes() -> None:
    """6 N + 12 L H S (PaLM, appendix B), where N are the weights that are multiplied with."""
    work, use = module("gpu_work"), module("utilisation")
    small = Qwen3Config(**{**work.COMMON, **work.SHAPES["Qwen3-0.6B"]})
    with torch.device("meta"):
        model = Qwen3ForCausalLM(small)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert matrices == pytest.approx(0.596e9, rel=1e-3)
    assert use.step_flops(small, 1, 1, 2048) / 2048 == 6 * matrices + 12 * 28 * 16 * 128 * 2048


def test_the_official_roundpipe_is_given_the_same_model() -> None:
    """It cannot be imported here; what it is given can."""
    peers, work = module("gpu_peers"), module("gpu_work")
    torch.manual_seed(0)
    whole = Qwen3ForCausalLM(Qwen3Config(**{**work.COMMON, **work.TINY}))
    ids = torch.randint(256, (2, 16))
    layers = peers.sequential(whole)
    assert torch.equal(layers(ids), whole(input_ids=ids, use_cache=False).logits)
    assert {id(p) for p in layers.parameters()} == {id(p) for p in whole.parameters()}


@pytest.mark.parametrize(("free_gib", "span_mib"), [(500, 0), (50, 2048), (45, 1500), (1, 1500)])
def test_spans_are_as_large_as_the_host_allows(tmp_path: Path, free_gib: int, span_mib: int) -> None:
    offload, work = module("gpu_offload"), module("gpu_work")
    tokens = work.Training(offload.SHAPE, 2048, 4, 4, 1, 1)
    shape = Qwen3Config(**{**work.COMMON, **work.SHAPES[offload.SHAPE]})
    config = offload.make_config("gpipe", tokens.work(shape), 1, 2, tmp_path, 60.0)
    config = replace(config, scheduler="roundpipe", at_once=4, dtype="bfloat16")
    model = offload.LayeredModel(shape)
    found, rounds, layout = offload.planned(config, model, free_gib << 30)
    assert found.span_mib == span_mib
    assert layout.num_bytes <= offload.SHARE * (free_gib << 30) or span_mib == 1500
    assert rounds.cut.fused[1] == model.num_layers


@pytest.mark.parametrize("encoded", [False, True])
def test_the_device_is_asked_through_nvml(monkeypatch: pytest.MonkeyPatch, encoded: bool) -> None:
    """As its Python package is called; older ones answer in bytes."""
    machine, used = module("gpu_machine"), [5 << 30, 9 << 30, 7 << 30]
    nvml = ModuleType("pynvml")
    name = b"NVIDIA H200" if encoded else "NVIDIA H200"
    for call, answer in {
        "nvmlInit": lambda: None, "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: name, "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=139 << 30, used=used[0]),
    }.items():  # fmt: skip
        setattr(nvml, call, answer)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert machine.Device().about() == {"device": "NVIDIA H200", "driver": "580.1", "device_bytes": 139 << 30}
    peaks = machine.Peaks()
    peaks.start()
    for _ in range(2):
        used.pop(0)
        peaks._look()
    found = peaks.close()
    assert found["device_peak_bytes"] == 4 << 30
    assert found["host_peak_bytes"] >= 0


# ---- what a machine lacks ----


def test_wheels_are_installed_once_and_found(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    assert module("gpu").install(wheels) is None
    info = "absent_one-1.0.dist-info"
    with zipfile.ZipFile(wheels / "absent_one-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("absent_one.py", "HERE = 1\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: absent-one\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    site = module("gpu").install(wheels)
    assert (site / "absent_one.py").is_file()
    stamp = (site / "installed.txt").stat().st_mtime_ns
    assert module("gpu").install(wheels) == site
    assert (site / "installed.txt").stat().st_mtime_ns == stamp
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    with pytest.raises(RuntimeError, match="cannot be installed"):
        module("gpu").install(wheels)


def test_the_list_of_wheels_is_pinned_and_small() -> None:
    lines = (ROOT / "benchmarks" / "gpu-wheels.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in line and " MiB " in line for line in packages)
    assert sum(float(line.split("#")[1].split()[0]) for line in packages) < 58
    assert sum(line.startswith("# built: deepspeed==") for line in lines) == 1
