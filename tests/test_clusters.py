"""The scripts for clusters: what they start, and that each acts upon an exit code as the table in the docs says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.exit_codes import ERROR, GIVE_UP, STOPPED, USAGE
from tests.test_recovery import events, free_port, metrics, settings

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "launch" / "clusters"
CODES = (0, ERROR, USAGE, STOPPED, GIVE_UP)
PRETENDS = """#!/bin/bash
echo "$@" >>"$TOLD/calls-${SLURM_NODEID:-${SKYPILOT_NODE_RANK:-${JOB_COMPLETION_INDEX:-${RANK:-0}}}}"
mkdir -p "$OUT/checkpoints/step-00000001"
code=$(head -n 1 "$TOLD/codes")
if [ "$code" = wait ]; then
    trap 'sed -i 1d "$TOLD/codes"; exit 75' TERM
    touch "$TOLD/began"
    for _ in $(seq 600); do sleep 0.05; done
    exit 1
elif [ "$code" = deaf ]; then
    sed -i 1d "$TOLD/codes"
    touch "$TOLD/began"
    exec sleep 30
fi
[ "${SLURM_NODEID:-0}" = 0 ] && sed -i 1d "$TOLD/codes"
exit "${code:-0}"
"""

# what is told to stop may be gone before the script that told it waits again
SLOW_KILL = {"BASH_FUNC_kill%%": '() { builtin kill "$@" && { [ "$1" != -TERM ] || sleep 0.5; }; }'}
STOPS = pytest.mark.parametrize(
    ("how", "environment"),
    [
        pytest.param("wait", {}, id="later"),
        pytest.param("wait", SLOW_KILL, id="at-once"),
        pytest.param("deaf", {}, id="before-it-could-hear"),
    ],
)


class Bench:
    """A PATH on which `unbroken` ends as it is told: `codes` are those of its starts, "wait" is until a SIGTERM, and
    "deaf" until one that it knows nothing to do about."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.out = folder, folder / "bin", folder / "run"
        self.bin.mkdir()
        self.command("unbroken", PRETENDS)
        for name in ("sbatch", "srun", "scontrol"):
            self.command(name, f'#!/bin/bash\nexec {sys.executable} {ROOT}/tests/fake_slurm.py {name} "$@"\n')
        self.environment = {
            **os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "TOLD": str(folder), "OUT": str(self.out),
            "FAKE_SLURM": str(folder), "FAKE_NODES": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
            self.environment.pop(name, None)

    def command(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def really(self) -> None:
        """Have `unbroken` be ours, and `torchrun` that of the same Python."""
        for name, module in (("unbroken", "launch"), ("torchrun", "torch.distributed.run")):
            self.command(name, f'#!/bin/bash\nexec {sys.executable} -P -m {module} "$@"\n')

    def codes(self, *codes: int | str) -> None:
        (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))

    def run(self, *command: str, timeout: float = 60.0, **environment: str) -> int:
        return subprocess.run(
            command, env={**self.environment, **environment}, timeout=timeout, check=False, cwd=self.folder
        ).returncode

    def calls(self, node: int = 0) -> list[str]:
        path = self.folder / f"calls-{node}"
        return path.read_text().splitlines() if path.is_file() else []

    @property
    def slurm(self) -> list[str]:
        return (self.folder / "slurm.log").read_text().splitlines()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_the_table_of_exit_codes_says_all_there_are() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "pages" / "exit-codes.md").read_text(), re.M)
    assert tuple(map(int, rows)) == CODES


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.s[hb]*")), ids=lambda path: path.name)
def test_a_script_is_one(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


# ---- Slurm ----


@pytest.mark.parametrize("code", CODES)
def test_slurm_puts_a_run_into_the_queue_again_for_one_code_alone(bench: Bench, code: int) -> None:
    bench.codes(code, 0)
    again = code == STOPPED
    assert bench.run("sbatch", str(SCRIPTS / "slurm.sbatch"), "--steps", "9") == (0 if again else code)
    first = f"train --workers 1 --out {bench.out} --steps 9"
    assert bench.calls() == [first, *([f"train --workers 1 --out {bench.out} --resume --steps 9"] if again else [])]
    assert bench.slurm == [
        "start 0",
        *(["requeue 4242", "end 75", "start 1"] if again else []),
        f"end {0 if again else code}",
    ]


@STOPS
def test_slurm_gives_notice_and_the_run_saves_itself(bench: Bench, how: str, environment: dict[str, str]) -> None:
    bench.codes(how, 0)
    (bench.folder / "notice").touch()
    assert bench.run("sbatch", str(SCRIPTS / "slurm.sbatch"), **environment) == 0
    assert bench.slurm == ["start 0", "requeue 4242", "end 75", "start 1", "end 0"]


def test_slurm_s_nodes_meet_at_the_first(bench: Bench) -> None:
    bench.codes(0)
    assert bench.run("sbatch", str(SCRIPTS / "slurm.sbatch"), FAKE_NODES="3", WORKERS_PER_NODE="2") == 0
    store = f"127.0.0.1:{20000 + 4242}"
    for node in range(3):
        assert f"--workers 6 --out {bench.out} --nodes 3 --node-rank {node} --store {store}" in bench.calls(node)[0]


# ---- torchrun ----

TORCHRUN = """#!/bin/bash
while [ "$1" != --no-python ]; do shift; done
shift
trap 'kill -TERM $child; wait $child; exit 1' TERM
WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 "$@" &
child=$!
wait $child
"""


@pytest.mark.parametrize("code", CODES)
def test_torchrun_s_code_is_that_of_the_run(bench: Bench, code: int) -> None:
    bench.command("torchrun", TORCHRUN)
    bench.codes(code)
    assert bench.run("bash", str(SCRIPTS / "torchrun.sh"), "--steps", "9") == code
    assert bench.calls() == [f"train --workers 2 --out {bench.out} --steps 9"]
    bench.codes(0)
    assert bench.run("bash", str(SCRIPTS / "torchrun.sh")) == 0
    assert bench.calls()[1] == f"train --workers 2 --out {bench.out} --resume"


@STOPS
def test_torchrun_that_is_stopped_says_start_it_again(bench: Bench, how: str, environment: dict[str, str]) -> None:
    bench.command("torchrun", TORCHRUN)
    bench.codes(how)
    script = ["bash", str(SCRIPTS / "torchrun.sh")]
    run = subprocess.Popen(script, env={**bench.environment, **environment}, cwd=bench.folder)
    until(lambda: (bench.folder / "began").exists(), 20.0)
    run.send_signal(signal.SIGTERM)
    assert run.wait(20) == STOPPED


def until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- SkyPilot ----


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((SCRIPTS / name).read_text()))


def test_skypilot_recovers_from_one_code_alone(bench: Bench) -> None:
    (job,) = load("skypilot.yaml")
    recovery = job["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [STOPPED]
    assert recovery["max_restarts_on_errors"] == 0, "1, 2 and 93 end it"
    bench.codes(*CODES)
    for node, code in enumerate(CODES):
        told = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": str(node), "SKYPILOT_NUM_NODES": "5"}
        assert bench.run("bash", "-c", job["run"], **told, SETTINGS=job["envs"]["SETTINGS"]) == code
    meet = "--nodes 5 --node-rank 0 --store 10.0.0.1:29400"
    assert bench.calls(0) == [f"train --workers 5 --out {bench.out} {meet} {job['envs']['SETTINGS']}"]
    assert "--resume" in bench.calls(1)[0], "there is a checkpoint now"


# ---- Kubernetes ----


def test_the_manifest_is_valid_and_its_job_acts_upon_codes() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    service, job = load("kubernetes.yaml")
    for each in (service, job):
        validate.validate(each, validate.latest_version(), strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate(
            {**job, "spec": {**job["spec"], "completions": "two"}}, validate.latest_version(), strict=True
        )
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"][:2]}
    assert rules == {"FailJob": [USAGE, GIVE_UP], "Ignore": [STOPPED]}, "1 is tried again, as often as backoffLimit"
    pod = job["spec"]["template"]["spec"]
    assert (pod["restartPolicy"], pod["subdomain"]) == ("Never", service["metadata"]["name"])
    names = {rule["onExitCodes"]["containerName"] for rule in job["spec"]["podFailurePolicy"]["rules"][:2]}
    assert names == {pod["containers"][0]["name"]}
    assert f"{job['metadata']['name']}-0.{pod['subdomain']}" in environment_of(pod)["STORE_HOST"]


def environment_of(pod: Mapping[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in pod["containers"][0]["env"] if "value" in each}


def test_each_pod_is_a_node(bench: Bench) -> None:
    pod = load("kubernetes.yaml")[1]["spec"]["template"]["spec"]
    told = {**environment_of(pod), "OUT": str(bench.out), "POD_IP": "10.0.0.7"}
    bench.codes(0, 0)
    for node, store in enumerate(("10.0.0.7", "unbroken-0.unbroken")):
        command = [*pod["containers"][0]["command"], *pod["containers"][0]["args"]]
        assert bench.run(*command, **told, JOB_COMPLETION_INDEX=str(node)) == 0
        meet = f"--workers 1:2 --nodes 2 --node-rank {node} --store {store}:29400 --out {bench.out}"
        assert bench.calls(node)[0].startswith(f"train {meet}")


# ---- Docker ----


def test_the_dockerfile_copies_all_packages_and_nothing_that_is_not_there() -> None:
    text = (SCRIPTS / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENV", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in lines} <= known
    copied = [name for word, rest in lines if word == "COPY" for name in rest.split()[:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    packages.remove("unbroken")  # in launch/public
    assert packages <= set(copied)


# ---- whole runs ----


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_real_run_under_slurm_is_saved_at_the_notice_and_ends_after_it(bench: Bench, tmp_path: Path) -> None:
    bench.really()
    flags = settings(bench.out, "--steps", "120")
    flags = [word for word in flags[1:] if word not in ("--out", str(bench.out))]
    run = subprocess.Popen(
        ["sbatch", str(SCRIPTS / "slurm.sbatch"), *flags], env={**bench.environment, "FAKE_NODES": "2"},
        cwd=bench.folder,
    )  # fmt: skip
    until(lambda: (bench.out / "metrics.jsonl").is_file() and len(metrics(bench.out)) > 5, 120.0)
    (bench.folder / "notice").touch()
    (bench.folder / "began").touch()
    assert run.wait(200) == 0
    assert bench.slurm == ["start 0", "requeue 4242", "end 75", "start 1", "end 0"]
    assert [m["step"] for m in metrics(bench.out)] == list(range(1, 121))
    assert events(bench.out, "stopped")


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_real_torchrun_takes_a_node_that_comes(bench: Bench) -> None:
    bench.really()
    flags = settings(bench.out, "--steps", "3000", "--checkpoint-every", "50")
    flags = [word for word in flags[1:] if word not in ("--out", str(bench.out))]
    told = {**bench.environment, "NNODES": "1:2", "RDZV": f"127.0.0.1:{free_port()}"}
    first = subprocess.Popen(["bash", str(SCRIPTS / "torchrun.sh"), *flags], env=told, cwd=bench.folder)
    second = None
    try:
        until(lambda: (bench.out / "metrics.jsonl").is_file() and len(metrics(bench.out)) > 5, 180.0)
        second = subprocess.Popen(["bash", str(SCRIPTS / "torchrun.sh"), *flags], env=told, cwd=bench.folder)
        until(lambda: [e["workers"] for e in events(bench.out, "started")] == [1, 2], 180.0)
        seen = len(metrics(bench.out))
        until(lambda: len(metrics(bench.out)) > seen + 5, 60.0)
        for run in (first, second):
            run.send_signal(signal.SIGTERM)
        assert [run.wait(60) for run in (first, second)] == [STOPPED, STOPPED]
    finally:
        for run in (first, second):
            if run is not None and run.poll() is None:
                run.kill()
