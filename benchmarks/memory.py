"""The proved memory of a worker beside what it was measured to take: real steps, in real processes.

    python benchmarks/memory.py --out benchmarks/results      # all schedulers, 2 and 4 workers, recomputing or not
    python benchmarks/memory.py --only gpipe --workers 2 --malloc straight --links gloo

What a worker takes above its rest between two steps is held against two marks. *Alone*: the activations that forwards
leave for their backwards, which is all that was proved before. *Proved*: with messages in the mailbox, sent copies,
buffers of links and what an op takes meanwhile (schedule/holdings.py, runtime/footprint.py of pipeline/); it must
never be exceeded by more than rounding (every block takes whole pages: the share of a page in a message), COUNTING,
and over shared memory the one message that is being copied into a slot, whose pages both ends have meanwhile. At rest a
worker takes its state, and REST beside: interpreter, threads, gloo and MKL. Measured is RssAnon at rest, and at the
fullest VmHWM (reset through /proc/self/clear_refs) less RssFile; both less RssAnon before anything was built. Links are
shared memory, as between workers of one machine, or with --links gloo sockets. A slot counts for the worker that owns
it: so here a receiver touches the pages of a message as it is filed, for the kernel to see them as its own, and a
sender lets go of its mapping of a slot that it has filled. Each case runs under two settings of glibc's malloc.
*straight*: blocks from 64 KiB on come from the system and go back to it at once (mallopt: M_MMAP_THRESHOLD and
M_TRIM_THRESHOLD 64 KiB, M_TOP_PAD 0, M_ARENA_MAX 1), so that what is measured is what is held; the verdict is on these.
*usual*: glibc's own settings, under which blocks that were freed are kept, more or less as luck has it. The messages in
mailboxes and the sent copies are counted too, as they come and go, and held against their bounds, and so are the slots
of a worker's links. Writes memory.json, with the model FLOP/s of the timed steps, their share of a measured peak, and
all that was resident, pages of libraries and of the parent included (utilisation.py).
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import itertools
import json
import mmap
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# The packages come before scripts beside this one: recovery is both.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from engine import arguments
from engine_ours import OursError, WorkJob, hosted_store, join, leave, make_config, make_view
from engine_peers import Work, llama, reset_peak
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from transformers.utils import logging
from utilisation import Peak, cpu_peak, memory, reached, step_flops

from launch.forkserver import ForkServer
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import read_config
from pipeline.runtime.batch import Needs
from pipeline.runtime.compute import Settings
from pipeline.runtime.footprint import footprints
from pipeline.runtime.message import Header
from pipeline.runtime.shared_link import KEPT, SharedLink
from pipeline.runtime.transport import span_bytes
from pipeline.runtime.worker import Worker
from pipeline.schedule.graph import compiled
from pipeline.schedule.holdings import bounds
from pipeline.schedule.layout import Layout, sends
from pipeline.schedule.verify import verify
from recovery.membership import View, publish
from schedulers import PLANNERS

HERE = Path(__file__).parent
MIB = 2**20
COUNTING = 32 * 4096 * (os.cpu_count() or 1)
"""Bytes by which the kernel's own figure may be off: each CPU keeps up to 32 pages that it has not reported yet."""
REST = 10 * MIB
"""What a worker may take at rest beside its state: its interpreter, its threads, gloo and MKL."""
SIZE = Work(hidden=256, intermediate=688, layers=8, heads=4, vocabulary=4096, sequence=256, microbatches=8, batch=2)
TINY = Work(hidden=128, intermediate=256, layers=4, heads=4, vocabulary=256, sequence=128, microbatches=4, batch=2)
MALLOCS = ("straight", "usual")
DONTNEED = 4
"""MADV_DONTNEED of mman.h: of memory that is shared, the mapping goes and the pages stay."""
MALLOPT = {-3: 65536, -1: 65536, -2: 0, -8: 1}
"""M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX of malloc.h."""

Run = dict[str, Any]


# ---- one worker ----


def entry(payload: dict[str, Any]) -> int:
    """What a forked worker does."""
    return leave(payload, train)


def train(payload: dict[str, Any]) -> dict[str, Any]:
    """Run all steps. Bytes, and the most messages seen, are those of the timed ones."""
    torch.set_num_threads(1)
    if payload["malloc"] == "straight":
        libc = ctypes.CDLL(None)
        assert all(libc.mallopt(option, value) == 1 for option, value in MALLOPT.items())
    job = WorkJob(Work(**payload["work"]))
    job.batch(0, 0, Needs.INPUT)
    before = private()
    own_pages()
    worker, schedule = join(payload)
    built = private()
    for number in range(payload["warmup"]):
        worker.run(schedule, job, number)
    rest = private()
    reset_peak()
    seen = watch(worker)
    began = time.perf_counter()
    for number in range(payload["warmup"], payload["warmup"] + payload["steps"]):
        worker.run(schedule, job, number)
    step_s = (time.perf_counter() - began) / payload["steps"]
    peak = status("VmHWM") - status("RssFile")
    links = worker.transport.links.values()
    seen["seen_slots"] = sum(link.slots for link in links if isinstance(link, SharedLink))
    worker.gather({})  # nobody leaves while another still trains
    worker.transport.close()
    resident = status("VmHWM")
    return {
        "built": built - before, "rest": rest - before, "peak": peak - before, "resident": resident,
        "step_s": step_s, **seen,
    }  # fmt: skip


def own_pages() -> None:
    """From now on each page of a slot is in the memory of its owner alone, as far as the kernel tells."""
    fill, deliver = SharedLink._fill, SharedLink._deliver
    libc = ctypes.CDLL(None, use_errno=True)

    def filled(link: SharedLink, number: int, header: bytes, payload: Tensor) -> None:
        fill(link, number, header, payload)
        slot = link._theirs[number]
        assert libc.madvise(ctypes.c_void_p(slot.data_ptr()), ctypes.c_size_t(slot.numel()), DONTNEED) == 0

    def delivered(link: SharedLink, number: int, header: Header) -> None:
        slot = link._mine[number]
        for at in range(0, header.num_bytes, mmap.PAGESIZE):
            slot._memory[at]
        deliver(link, number, header)

    SharedLink._fill, SharedLink._deliver = filled, delivered  # type: ignore[method-assign]


def private() -> int:
    """Bytes of private memory, after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("RssAnon")


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def watch(worker: Worker) -> dict[str, int]:
    """The most messages in the mailbox, and the most sent copies, that were there at once: counted from now on."""
    seen = {"seen_received": 0, "seen_sent": 0}
    transport, box = worker.transport, worker.transport.mailbox
    put, send = box.put, transport.send

    def counted_put(*message: Any) -> None:
        put(*message)
        seen["seen_received"] = max(seen["seen_received"], len(box._messages))

    def counted_send(*message: Any) -> None:
        send(*message)
        copies = sum(link.in_flight for link in transport.links.values())
        seen["seen_sent"] = max(seen["seen_sent"], copies)

    box.put, transport.send = counted_put, counted_send
    return seen


# ---- one run ----


def run(
    scheduler: str, workers: int, recompute: bool, work: Work, options: argparse.Namespace, forkserver: ForkServer,
    peak: Peak,
) -> Run:  # fmt: skip
    """Train in forked workers under each malloc; what is proved and measured of each. Raises OursError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llama(work).save_pretrained(folder / "model-config")
        steps = options.warmup + options.steps
        config = make_config(scheduler, work, workers, steps, folder, options.deadline)
        view, layout = make_view(replace(config, recompute=recompute, links=options.links))
        figures = {
            malloc: trained(folder, work, view, layout, malloc, options, forkserver) for malloc in options.malloc
        }
        model, job = LayeredModel(read_config(folder / "model-config")), WorkJob(work)
    settings = Settings(torch.device("cpu"), recompute=recompute)
    proved = footprints(model, layout.train, job, settings, links=options.links)
    report, bound = verify(layout.train), bounds(compiled(layout.train))
    message = span_bytes(work.batch, work.sequence, work.hidden, torch.float32)
    return {
        "scheduler": scheduler, "workers": workers, "recompute": recompute, "links": options.links,
        **{malloc: speed_and_memory(figures[malloc], model, work, peak) for malloc in figures},
        "by_worker": [
            {
                "state": proved[w].state, "alone": proved[w].most.activations,
                "alone_and_work": proved[w].most.activations + proved[w].most.working,
                "proved": proved[w].total - proved[w].state, "at_the_fullest": asdict(proved[w].held),
                "allowed": allowed(proved[w].total - proved[w].state, message, options.links),
                "proved_received": report.peak_received[w], "proved_sent": report.peak_sent[w],
                "proved_slots": sum(max(KEPT, bound[w].slots.get(peer, 0)) for peer in peers(layout, w)),
                **{malloc: figures[malloc][w] for malloc in figures},
            }
            for w in view.workers
        ],
    }  # fmt: skip


def speed_and_memory(figures: list[dict[str, Any]], model: LayeredModel, work: Work, peak: Peak) -> dict[str, Any]:
    """Of all workers together."""
    flops = step_flops(model.config, work.microbatches, work.batch, work.sequence)
    seconds = max(each["step_s"] for each in figures)
    return {**reached(flops, seconds, peak), **memory([each["resident"] for each in figures])}


def allowed(proved: float, message: int, links: str) -> float:
    """The bytes above which a bound has not held, as closely as the kernel's figures tell."""
    return (1 + mmap.PAGESIZE / message) * proved + COUNTING + (message if links == "shm" else 0)


def peers(layout: Layout, worker: int) -> set[int]:
    """Whom a worker has links to: slots lie on both sides of each, whatever is sent."""
    pairs = {pair for schedule in layout.schedules.values() for pair in sends(schedule)}
    return {a if b == worker else b for a, b in pairs if worker in (a, b)}


def trained(
    folder: Path,
    work: Work,
    view: View,
    layout: Layout,
    malloc: str,
    options: argparse.Namespace,
    forkserver: ForkServer,
) -> list[dict[str, Any]]:
    """The figures of each worker of a view. Raises OursError for one that fails or does not come to an end."""
    deadline = time.monotonic() + options.deadline
    with hosted_store() as (store, address):
        payload = {
            "threads": 1, "device": "cpu", "nccl": False, "folder": str(folder), "work": asdict(work),
            "store": address, "steps": options.steps, "warmup": options.warmup, "malloc": malloc,
        }  # fmt: skip
        running = {forkserver.start({**payload, "worker": w}): w for w in view.workers}
        try:
            publish(store, view, layout)
            while running:
                if time.monotonic() > deadline:
                    raise OursError(f"workers {sorted(running.values())} did not finish before the deadline")
                for exit_ in forkserver.poll(0.2):
                    worker = running.pop(exit_.pid)
                    if exit_.code:
                        said = folder / f"{worker}.error"
                        raise OursError(f"worker {worker} " + (said.read_text() if said.is_file() else str(exit_)))
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
    return [json.loads((folder / f"{w}.json").read_text()) for w in view.workers]


# ---- what a person reads ----


def rise(row: dict[str, Any], malloc: str) -> int:
    """Bytes from rest to the fullest."""
    return row[malloc]["peak"] - row[malloc]["rest"]


def verdict(runs: Sequence[Run]) -> dict[str, Any]:
    """What holds of all workers, under the malloc that hides nothing."""
    rows = [row for run in runs for row in run["by_worker"] if "straight" in row]
    counted = [(row, row[malloc]) for run in runs for row in run["by_worker"] for malloc in MALLOCS if malloc in row]
    at_rest = [row["straight"]["rest"] - row["state"] for row in rows]
    return {
        "workers": len(rows),
        "rest_allowed_bytes": REST,
        "counting_bytes": COUNTING,
        "rest_beside_state_bytes": [min(at_rest, default=0), max(at_rest, default=0)],
        "above_proved": sum(rise(row, "straight") > row["allowed"] for row in rows),
        "above_alone": sum(rise(row, "straight") > row["alone"] for row in rows),
        "above_alone_and_work": sum(rise(row, "straight") > row["alone_and_work"] for row in rows),
        "measured_over_proved": [f([rise(r, "straight") / r["proved"] for r in rows] or [0]) for f in (min, max)],
        "measured_over_alone": [f([rise(r, "straight") / r["alone"] for r in rows] or [0]) for f in (min, max)],
        "counts_above_proved": sum(
            seen["seen_received"] > row["proved_received"]
            or seen["seen_sent"] > row["proved_sent"]
            or seen["seen_slots"] > row["proved_slots"]
            for row, seen in counted
        ),
    }


def table(runs: Sequence[Run]) -> Table:
    """One row per worker. What is proved and measured counts from a worker's rest."""
    found = Table(title="Memory of a worker, MiB; after `rest`: above it", title_justify="left")
    for head in ("scheduler", "recomputes", "worker", "state", "rest", "alone", "and work", "proved",
                 "measured", "/ alone", "/ proved", "usual malloc", "received", "sent", "slots"):  # fmt: skip
        found.add_column(head, justify="left" if head in ("scheduler", "recomputes") else "right")
    for each in runs:
        for w, row in enumerate(each["by_worker"]):
            at = {malloc: rise(row, malloc) for malloc in MALLOCS if malloc in row}
            first = row[next(iter(at))]
            measured = at.get("straight")
            found.add_row(
                each["scheduler"] if w == 0 else "", ("yes" if each["recompute"] else "no") if w == 0 else "",
                f"{w} of {each['workers']}", f"{row['state'] / MIB:.1f}", f"{first['rest'] / MIB:.1f}",
                *(f"{row[mark] / MIB:.1f}" for mark in ("alone", "alone_and_work", "proved")),
                *(["", "", ""] if measured is None else
                  [f"{measured / MIB:.1f}", f"{measured / row['alone']:.2f}", f"{measured / row['proved']:.3f}"]),
                f"{at['usual'] / MIB:.1f}" if "usual" in at else "",
                f"{max(row[m]['seen_received'] for m in at)} of {row['proved_received']}",
                f"{max(row[m]['seen_sent'] for m in at)} of {row['proved_sent']}",
                f"{max(row[m]['seen_slots'] for m in at)} of {row['proved_slots']}",
                end_section=w + 1 == each["workers"],
            )  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PLANNERS, default=list(PLANNERS), metavar="NAME",
                        help=f"schedulers; of {', '.join(PLANNERS)}")  # fmt: skip
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--recompute", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--links", choices=("shm", "gloo"), default="shm", help="what messages go through")
    parser.add_argument("--malloc", nargs="+", choices=MALLOCS, default=list(MALLOCS))
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the timed ones")
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds that one run may take")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--out", type=Path, help="folder for memory.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    forkserver = ForkServer(entry)  # before anything starts threads
    work = TINY if options.quick else SIZE
    console = Console(width=None if sys.stdout.isatty() else 160)
    recompute = {"no": (False,), "yes": (True,), "both": (False, True)}[options.recompute]
    cases = list(itertools.product(options.workers, options.only, recompute))
    runs: list[Run] = []
    peaks = {count: cpu_peak(count) for count in options.workers}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(cases))
            for workers, scheduler, again in cases:
                said = f"{scheduler}, {workers} workers{', recomputing' if again else ''}"
                progress.update(task, description=said)
                runs.append(run(scheduler, workers, again, work, options, forkserver, peaks[workers]))
                progress.advance(task)
    finally:
        forkserver.close()
    found = verdict(runs)
    holds = not found["above_proved"] and not found["counts_above_proved"]
    holds &= found["rest_beside_state_bytes"][1] <= REST
    console.print(table(runs))
    console.print(
        f"of {found['workers']} workers, {found['above_proved']} took more than is proved "
        f"(measured / proved {' to '.join(f'{x:.3f}' for x in found['measured_over_proved'])}), "
        f"{found['above_alone']} more than activations alone and "
        f"{found['above_alone_and_work']} more than these with the work of an op; at rest they take "
        f"{' to '.join(f'{x / MIB:.1f}' for x in found['rest_beside_state_bytes'])} MiB beside their state "
        f"(allowed: {REST / MIB:.0f}); messages were more than proved on {found['counts_above_proved']}: "
        + ("[green]holds[/green]" if holds else "[red]does not hold[/red]"),
        highlight=False,
    )
    if options.out is not None:
        facts = {
            "command": shlex.join(["python", "benchmarks/memory.py", *arguments(sys.argv[1:])]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__, "python": platform.python_version(), "glibc": platform.libc_ver()[1],
            "mallopt_of_straight": MALLOPT, "work": asdict(work),
        }  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "memory.json").write_text(json.dumps({"about": facts, **found, "runs": runs}, indent=1) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
