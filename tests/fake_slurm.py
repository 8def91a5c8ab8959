"""Slurm's commands as far as a batch script uses them, with real local processes: sbatch, srun and scontrol, by
the first argument. What happens is told in $FAKE_SLURM, line by line."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

FOLDER = Path(os.environ["FAKE_SLURM"])
LONGEST_S = 240.0


def say(text: str) -> None:
    with (FOLDER / "slurm.log").open("a") as log:
        log.write(text + "\n")


def sbatch(script: str, *arguments: str) -> int:
    """Run a batch script until it does not ask to be put into the queue again. Where $FAKE_SLURM/notice is, its shell
    gets USR1, as by --signal=B:USR1@60, once $FAKE_SLURM/began is there."""
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in Path(script).read_text().splitlines()
        if line.startswith("#SBATCH --")
    )
    nodes = os.environ.get("FAKE_NODES", options["nodes"])
    environment = {
        **os.environ, "SLURM_JOB_ID": "4242", "SLURM_NNODES": nodes, "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
    }  # fmt: skip
    for restart in range(5):
        say(f"start {restart}")
        (FOLDER / "requeued").unlink(missing_ok=True)
        batch = subprocess.Popen(
            ["bash", script, *arguments], env={**environment, "SLURM_RESTART_COUNT": str(restart)},
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + LONGEST_S
        while batch.poll() is None:
            if (FOLDER / "notice").exists() and (FOLDER / "began").exists() and options["signal"] == "B:USR1@60":
                (FOLDER / "notice").unlink()
                batch.send_signal(signal.SIGUSR1)
            if time.monotonic() > deadline:
                os.killpg(batch.pid, signal.SIGKILL)
            time.sleep(0.01)
        say(f"end {batch.returncode}")
        if not (FOLDER / "requeued").exists() or "requeue" not in options:
            return batch.returncode
    return 1


def srun(*words: str) -> int:
    """One task on each node; signals go to all, and the greatest exit code is that of the step."""
    command = list(itertools.dropwhile(lambda word: word.startswith("--"), words))
    tasks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: FrameType | None) -> None:
        for task in tasks:
            task.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    for node in range(int(os.environ["SLURM_NNODES"])):
        environment = {**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}
        tasks.append(subprocess.Popen(command, env=environment))
    codes = [task.wait() for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


def scontrol(what: str, *words: str) -> int:
    if what == "show":
        sys.stdout.write("127.0.0.1\n" * int(os.environ["SLURM_NNODES"]))
    else:
        say(f"{what} {' '.join(words)}")
        (FOLDER / "requeued").touch()
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](*sys.argv[2:]))
