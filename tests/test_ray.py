"""Runs on a real Ray cluster of this machine: several raylets, one of which is killed, and one that is added."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.forkserver import ForkServer
from recovery import checkpoint
from tests.harness import run_command
from tests.test_recovery import events, metrics, settings

pytest.importorskip("ray")

from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parent.parent
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
RUN = ["--recovery", "exact", "--exact-sums", "--cooldown", "0", "--no-shift"]
COPIES = ["--snapshot", "neighbour", "--workers"]


class Nodes:
    """A cluster: a head without CPUs where `workers` are on nodes of their own, each with one."""

    def __init__(self, cluster: Cluster, environment: dict[str, str]) -> None:
        self.cluster, self.environment = cluster, environment
        self.nodes: list[Any] = []

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(**NODE))

    def kill(self, node: Any) -> None:
        """SIGKILL its raylet, and nothing else: its actors have to see that by themselves."""
        raylet = node.all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait()

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *command], env=self.environment, cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def train(self, out: Path, *flags: str) -> subprocess.Popen[str]:
        return self.start("-m", "launch", *settings(out, "--cluster", "ray", *RUN, *flags))


@contextmanager
def nodes(folder: Path, count: int, **head: Any) -> Iterator[Nodes]:
    """A cluster in a folder with a short name, as its sockets need one; all its processes end with the block."""
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch' / 'public'}",
                   "RAY_JOB_STOP_WAIT_TIME_S": "60"}  # fmt: skip
    before = dict(os.environ)
    os.environ |= environment
    cluster = None
    try:
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0 if count else 1, **head})
        made = Nodes(cluster, {**os.environ, "RAY_ADDRESS": cluster.address})
        for _ in range(count):
            made.add()
        yield made
    finally:
        if cluster is not None:
            cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)
        for process in psutil.process_iter(["cmdline"]):
            if any(str(folder) in word for word in process.info["cmdline"] or ()):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


@pytest.fixture
def short(tmp_path: Path) -> Iterator[Path]:
    """tmp_path, by a name that leaves a Unix socket room."""
    path = Path(f"/tmp/ub{os.getpid()}")
    path.symlink_to(tmp_path)
    try:
        yield path
    finally:
        path.unlink()


def until(run: subprocess.Popen[str], holds: Callable[[], bool], seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        code = run.poll()
        if code is not None or time.monotonic() > deadline:
            run.kill()
            pytest.fail(f"it has not come, and the run has ended with {code}: {run.communicate()[0][-3000:]}")
        time.sleep(0.02)


def steps(out: Path) -> int:
    return len(metrics(out)) if (out / "metrics.jsonl").is_file() else 0


def happened(out: Path, *kinds: str) -> Sequence[dict[str, Any]]:
    return [e for e in events(out) if e["event"] in kinds] if (out / "events.jsonl").is_file() else []


def no_agent_is_left(out: Path) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = [p for p in psutil.process_iter(["environ"]) if "UNBROKEN_AGENT" in (p.info["environ"] or {})]
        if not [p for p in found if p.status() != psutil.STATUS_ZOMBIE]:
            return True
        time.sleep(0.1)
    return False


def test_a_run_on_a_cluster_of_one_node(short: Path, tmp_path: Path) -> None:
    with nodes(short, 0) as cluster:
        run = cluster.train(tmp_path / "run", "--workers", "1:1", "--steps", "4")
        said = run.communicate(timeout=110)[0]
        assert run.returncode == 0, said
        assert steps(tmp_path / "run") == 4
        assert no_agent_is_left(tmp_path)


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_node_is_killed_in_a_step_and_another_one_comes_bitwise_the_calm_run(
    forkserver: ForkServer, short: Path, tmp_path: Path
) -> None:
    out, calm = tmp_path / "run", tmp_path / "calm"
    with nodes(short, 2) as cluster:
        run = cluster.train(out, *COPIES, "1:2", "--steps", "100000", "--checkpoint-every", "0")
        until(run, lambda: steps(out) >= 20)
        cluster.kill(cluster.nodes[0])
        until(run, lambda: bool(happened(out, "resized")))
        assert [e["workers"] for e in happened(out, "resized")] == [1]
        (lost,) = happened(out, "agent_lost")
        reached = steps(out)
        until(run, lambda: steps(out) > reached + 5)
        cluster.add()
        until(run, lambda: bool(happened(out, "rejoined")))
        assert [e["agent"] for e in happened(out, "agent_came")] == [lost["agent"]], "it has the rank of the lost one"
        reached = steps(out)
        until(run, lambda: steps(out) > reached + 5)
        run.send_signal(signal.SIGTERM)
        said = run.communicate(timeout=90)[0]
        assert run.returncode == 75, said
        assert no_agent_is_left(out)
    assert not happened(out, "rolled_back", "failed")
    last = metrics(out)[-1]["step"]
    assert checkpoint.find(out / "checkpoints").path == out / "checkpoints" / f"step-{last:08d}"
    flags = ["--workers", "2", "--recovery", "exact", "--exact-sums", "--steps", "100000", "--until", str(last)]
    done = run_command(forkserver, tmp_path / "calm.log", *settings(calm, *flags), timeout_s=200.0)
    assert done.code == 0, done.output
    assert {m["step"]: m["loss"] for m in metrics(out)} == {m["step"]: m["loss"] for m in metrics(calm)}


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_run_begins_with_the_nodes_that_are_there_and_uses_one_that_comes(short: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with nodes(short, 1) as cluster:
        run = cluster.train(out, *COPIES, "1:2", "--steps", "100000", "--cluster-wait", "2", "--wait", "120")
        until(run, lambda: steps(out) >= 5)
        assert [e["workers"] for e in happened(out, "resized")] == [1]
        cluster.add()
        until(run, lambda: bool(happened(out, "rejoined")))
        assert [e["workers"] for e in happened(out, "resized")] == [1, 2]
        assert not happened(out, "agent_lost", "detected")
        run.send_signal(signal.SIGTERM)
        said = run.communicate(timeout=90)[0]
        assert run.returncode == 75, said


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_cluster_without_room_is_for_later_and_the_run_holds_none_of_it(short: Path, tmp_path: Path) -> None:
    with nodes(short, 1) as cluster:
        run = cluster.train(tmp_path / "run", *COPIES, "2:2", "--cluster-wait", "60")
        other = cluster.train(tmp_path / "other", "--workers", "1:1", "--steps", "4")
        said = other.communicate(timeout=110)[0]
        assert other.returncode == 0, said
        assert run.poll() is None
        said = run.communicate(timeout=200)[0]
        assert run.returncode == 75, said
        assert "of 2 workers 0 have come; its 2 nodes have 1 of 1 CPUs free" in said
        assert not (tmp_path / "run").exists(), "it leaves nothing"
        assert no_agent_is_left(tmp_path)


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_script_of_ray_train_s_trains_with_a_scaling_config(short: Path, tmp_path: Path) -> None:
    argv = settings(tmp_path / "run")
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(argv[1::2], argv[2::2])}
    numbers = {n: int(v) for n, v in given.items() if v.isdecimal()}
    given = {**given, **numbers, "deadline": 30.0, "steps": 6, "exact_sums": True}
    script = (
        "import ray\nfrom unbroken import ray_train\n"
        "class Scaling: num_workers, use_gpu, resources_per_worker = (1, 2), False, {'CPU': 1}\n"
        f"ray.init()\nresult = ray_train(Scaling, **{given!r})\n"
        "assert result.metrics['step'] == 6 and result.metrics['held_out_loss'] > 0, result\n"
        "assert result.checkpoint.name == 'step-00000006' and result.model.is_dir() and not result.stopped\n"
        f"more = ray_train(2, {given['out']!r}, resume=True, steps=8)\nprint('ended', more.metrics['step'])\n"
        "ray.shutdown()\n"
    )
    with nodes(short, 2) as cluster:
        run = cluster.start("-c", script)
        said = run.communicate(timeout=300)[0]
        assert run.returncode == 0, said
        assert "ended 8" in said


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_job_that_is_submitted_and_one_that_is_stopped(short: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    ray = str(Path(sys.executable).with_name("ray"))
    with nodes(short, 1, include_dashboard=True, dashboard_port=0) as cluster:
        address = f"http://{cluster.cluster.webui_url}"
        submit = [ray, "job", "submit", "--address", address, "--submission-id"]

        def command(out: Path, *more: str) -> list[str]:
            return ["--", sys.executable, "-m", "launch", *settings(out, "--cluster", "ray", "--workers", "1:1", *more)]

        done = subprocess.run(
            [*submit, "one", *command(tmp_path / "one", "--steps", "4")], env=cluster.environment, cwd=ROOT,
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "step 4/4" in done.stdout
        refused = subprocess.run(
            [*submit, "two", *command(tmp_path / "two", "--lr", "-1")], env=cluster.environment, cwd=ROOT,
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert refused.returncode != 0
        assert "failed with exit code 2" in refused.stdout + refused.stderr
        out = tmp_path / "three"
        run = cluster.start("-m", "ray.scripts.scripts", *submit[1:], "three", *command(out, "--steps", "100000"))
        until(run, lambda: steps(out) >= 3)
        subprocess.run([ray, "job", "stop", "--address", address, "three"], env=cluster.environment, timeout=100)
        run.communicate(timeout=60)
        assert checkpoint.find(out / "checkpoints").path is not None
        assert happened(out, "stopped")
