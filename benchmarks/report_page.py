"""What the report of a run costs: seconds of CPU to draw the page of runs of many lengths, and the share of a core that
the process beside a run takes while lines come.

    PYTHONPATH=. python benchmarks/report_page.py --seconds 120 --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from launch.page.draw import page
from launch.page.files import PAGE, RunReader
from launch.page.keeper import PageKeeper
from launch.page.sheet import sheet

LENGTHS = (100, 1_000, 10_000, 100_000)
GOAL = 0.005


def step(number: int, second: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The lines of metrics and ledger of a step."""
    metrics = {
        "step": number, "loss": 8.0 / number**0.1, "tokens": 4096, "tokens_per_s": 4000.0 + number % 7, "view": 1,
        "grad_norm": 1.0, "lr": 0.001, "again": 0, "tflops": 0.5, "mfu": 0.25, "peak_host_bytes": 1 << 29,
        "peak_host_bytes_sum": 1 << 31,
    }  # fmt: skip
    return metrics, {"step": number, "view": 1, "first_sample": 32 * number, "samples": 32, "time": second}


def append(folder: Path, first: int, last: int, began: float) -> None:
    """Lines of the steps first to last, a second each."""
    lines = [step(number, began + number) for number in range(first, last + 1)]
    for at, name in enumerate(("metrics", "ledger")):
        with (folder / f"{name}.jsonl").open("a") as file:
            file.writelines(json.dumps(each[at]) + "\n" for each in lines)


def begin(folder: Path, began: float) -> None:
    """A run of three workers, one of which is lost at its tenth step."""
    events = [
        {"event": "started", "step": 0, "workers": 3},
        {"event": "detected", "worker": 1, "reason": "is lost", "step": 10},
        {"event": "view", "view": 2, "workers": [0, 2, 3], "joined": {"3": 1}, "step": 10},
        {"event": "remedy", "worker": 1, "replacement": 3, "remedy": "checkfree", "view": 2, "step": 10},
    ]  # fmt: skip
    times = (0.0, 10.5, 10.5, 10.5)
    text = "".join(json.dumps({"time": began + at, **event}) + "\n" for at, event in zip(times, events, strict=True))
    (folder / "events.jsonl").write_text(text)


def drawing(lengths: tuple[int, ...]) -> list[dict[str, float]]:
    """CPU seconds of the first page, which reads all, and of the next ones, and the size of a page."""
    found: list[dict[str, float]] = []
    for length in lengths:
        with tempfile.TemporaryDirectory() as name:
            folder, began = Path(name), time.time()
            begin(folder, began)
            append(folder, 1, length, began)
            reader, seconds, text = RunReader(folder), list[float](), ""
            for _ in range(4):
                at = time.process_time()
                text = page(sheet(reader.read(True)))
                seconds.append(time.process_time() - at)
            found.append({"steps": length, "first_s": seconds[0], "next_s": min(seconds[1:]), "bytes": len(text)})
    return found


def beside(seconds: float, steps_before: int) -> dict[str, float]:
    """CPU of the process beside a run that has taken so many steps and takes two a second."""
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.time()
        begin(folder, began)
        append(folder, 1, steps_before, began)
        keeper, until, number, pages, last = PageKeeper(folder, print), time.monotonic() + seconds, steps_before, 0, ""
        assert keeper._process is not None
        process = psutil.Process(keeper._process.pid)
        while time.monotonic() < until:
            time.sleep(0.5)
            number += 1
            append(folder, number, number, began)
            path = folder / PAGE
            if path.is_file() and (now := f"{path.stat().st_mtime_ns}") != last:
                pages, last = pages + 1, now
        times = process.cpu_times()
        used, memory = times.user + times.system, process.memory_info().rss
        keeper.close()
    return {
        "seconds": seconds, "steps_before": steps_before, "cpu_s": used, "share": used / seconds, "pages": pages,
        "resident_bytes": memory,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    found = {"drawing": drawing(LENGTHS), "beside": [beside(arguments.seconds, steps) for steps in (20, 2_000)],
             "goal_share": GOAL}  # fmt: skip
    for each in found["drawing"]:
        print(f"{each['steps']:>7,} steps: first page {1e3 * each['first_s']:.0f} ms, each later one "
              f"{1e3 * each['next_s']:.0f} ms of CPU, {each['bytes'] / 1024:.0f} KiB")  # fmt: skip
    for each in found["beside"]:
        share, memory = 100 * each["share"], each["resident_bytes"] / 2**20
        print(f"beside a run of {each['steps_before']:,} steps, {each['seconds']:.0f} s: {share:.2f} % of a core "
              f"(goal: below {100 * GOAL:.1f} %), {each['pages']} pages, {memory:.0f} MiB")  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report-page.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
