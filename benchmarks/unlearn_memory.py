"""NPO without a second model: the peak memory of a request, beside a method without a reference, and beside a peer.

NPO compares with the model as it was. Ours reads one number for each row beforehand, so that NPO takes what gradient
difference takes. The peer is plain PyTorch in one process that deep-copies the model before the first step, as
OpenUnlearning does: its NPO takes the bytes of all weights more.

Memory is the proportional set size (PSS: shared pages count once) summed over all processes of a command, its most over
the whole command, looked up every 20 ms in /proc/PID/smaps_rollup. It does not depend on load. Each case is run some
times, and the least is told: what the allocator keeps beside is luck.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as functional
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.unlearn_runs import unbroken
from jobs.row_data import RowDataset
from jobs.unlearn.method import row_nll

MIB = 2**20
ROWS, STEPS, LENGTH = 2, 2, 96
"""Rows to forget and rows to keep in a step; steps; tokens of a row."""
ENGINES = {
    "pipeline of 2 workers": ("--workers", "2", "--recovery", "checkpoint"),
    "pool of 2 workers": ("--workers", "2", "--scheduler", "roundpipe"),
}
PEER = "plain PyTorch, one process"
METHODS = ("grad_diff", "npo")


def shape(layers: int) -> LlamaConfig:
    """7 M parameters a layer."""
    return LlamaConfig(
        vocab_size=512, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip


def peak(argv: Sequence[object]) -> float:
    """The most MiB that a command and all its processes took at once. Raises SystemExit where it fails."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, *map(str, argv)], cwd=Path(__file__).parents[1], stdout=said, stderr=said,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
        most = 0
        while process.poll() is None:
            most = max(most, taken(process.pid))
            time.sleep(0.02)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{argv} ended with {process.returncode}: {said.read()[-2000:].decode()}")
    return most / MIB


def taken(pid: int) -> int:
    """Bytes of a process and all that it has started."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for each in family:
        try:
            lines = Path(f"/proc/{each.pid}/smaps_rollup").read_text().splitlines()
            total += next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):  # it has just ended
            continue
    return total


def peer(run: Path, method: str) -> None:
    """The same steps in one process: a reference is a copy of the model, held beside it."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    reference = copy.deepcopy(model).eval().requires_grad_(False) if method == "npo" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    data = RowDataset.open(run / "data")
    forget = [row.index for row in data.rows if row.fields["author"] == "author-001"]
    retain = [row.index for row in data.rows if row.fields["author"] != "author-001"]
    for step in range(STEPS):
        optimizer.zero_grad()
        for rows, keeps in ((forget, False), (retain, True)):
            samples = [data.row(rows[(step * ROWS + i) % len(rows)]) for i in range(ROWS)]
            ids = torch.stack([torch.from_numpy(sample.input_ids) for sample in samples])
            labels = torch.stack([torch.from_numpy(sample.labels) for sample in samples])
            logits = model(input_ids=ids).logits
            if keeps:
                functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
            elif reference is None:
                (-functional.cross_entropy(logits.flatten(0, 1), labels.flatten())).backward()
            else:
                with torch.no_grad():
                    before = row_nll(reference(input_ids=ids).logits, labels)
                (-20 * functional.logsigmoid(0.1 * (row_nll(logits, labels) - before)).mean()).backward()
        optimizer.step()


def begun(folder: Path, layers: int) -> Path:
    """A run that has seen all of its 40 rows."""
    (folder / "shape").mkdir()
    shape(layers).save_pretrained(folder / "shape")
    unbroken("authors", "--out", folder / "authors", "--count", 2, "--withheld", 0)
    unbroken(
        "train", "--out", folder / "run", "--data", folder / "authors" / "train.jsonl", "--model",
        folder / "shape" / "config.json", "--vocabulary", 512, "--sequence-length", LENGTH, "--workers", 1, "--steps",
        5, "--microbatches", 2, "--microbatch-size", 4, "--evaluate-every", 0, "--evaluate-samples", 4,
        "--checkpoint-every", 0, "--sample-tokens", 0, "--threads", 1, "--json",
    )  # fmt: skip
    return folder / "run"


def request(run: Path, method: str, engine: Sequence[str]) -> list[object]:
    return [
        "-m", "launch", "unlearn", run, "--forget", "author=author-001", "--method", method, "--steps", STEPS,
        "--microbatch-size", ROWS, "--evaluate-every", 0, "--evaluate-samples", 4, "--checkpoint-every", 0, *engine,
        "--json",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer", nargs=2, metavar=("RUN", "METHOD"), help="be the peer")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)  # what took long is not lost for want of a folder
    if options.peer:
        peer(Path(options.peer[0]), options.peer[1])
        return
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        run = begun(Path(name), options.layers)
        for _ in range(options.rounds):
            for method in METHODS:
                for engine, settings in ENGINES.items():
                    copied = Path(name) / "copy"
                    subprocess.run(["cp", "-r", run, copied], check=True)
                    found.setdefault(engine, {}).setdefault(method, []).append(peak(request(copied, method, settings)))
                    subprocess.run(["rm", "-rf", copied], check=True)
                here = [__file__, "--peer", run, method]
                found.setdefault(PEER, {}).setdefault(method, []).append(peak(here))
                print({engine: each.get(method) for engine, each in found.items()}, method, flush=True)
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(shape(options.layers)).num_parameters()
    rows: dict[str, Any] = {}
    for engine, each in found.items():
        least = {method: min(each[method]) for method in METHODS}
        rows[engine] = {**least, "more_for_npo": least["npo"] - least["grad_diff"], "all": each}
        print(f"{engine:<28}" + "  ".join(f"{rows[engine][field]:9.1f}" for field in (*METHODS, "more_for_npo")))
    weights = 4 * parameters / MIB
    print(f"all weights in fp32: {weights:.1f} MiB, of {parameters:,} parameters")
    shown = {"parameters": parameters, "weights_mib": weights, "rounds": options.rounds, "mib": rows}
    (options.out / "unlearn-memory.json").write_text(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    main()
