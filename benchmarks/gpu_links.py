"""Links between workers of one device, for section a of benchmarks/gpu.py: CUDA IPC beside sockets and a device copy.

As benchmarks/links.py: in each pair one worker sends a payload, the other takes it from its mailbox, reads all of it
and answers with one number; all pairs do so at the same time. The bound is a copy on the device, by CUDA events.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch
from engine_ours import hosted_store
from gpu_case import Case, crew, entry, synchronize
from links import MIB, WAIT_S

from launch.forkserver import ForkServer
from launch.worker_main import connect
from pipeline.runtime.groups import GroupBuilder
from pipeline.runtime.transport import Transport
from pipeline.schedule.ops import Op

KINDS = {"IPC": True, "sockets": False}
SIZES = (1, 16, 64)


def links(values: dict[str, Any]) -> None:
    """Pairs among two and four workers, over both kinds."""
    case = Case.from_json(values)
    sizes = [0.0625, 0.25] if case.dry else [float(size) for size in SIZES]
    forkserver = ForkServer(entry)
    try:
        for workers in (2, 4):
            with hosted_store() as (_, address):
                shared = {
                    "store": address, "device": case.device, "workers": workers, "sizes": sizes,
                    "messages": 3 if case.dry else 40,
                }  # fmt: skip
                asked = [{**shared, "worker": w} for w in range(workers)]
                found = crew(forkserver, case.folder, "gpu_links:end", asked, min(60.0, case.limit_s))
            for at, one in enumerate(found[0]):
                mine = [each[at] for each in found[::2]]  # those who send, and have timed it
                speed = one["bytes"] / statistics.median(each["seconds"] for each in mine)
                copy = one["bytes"] / statistics.median(each["copy_s"] for each in mine)
                case.say(
                    f"{one['kind']}, {workers} workers, {one['mib']:g} MiB", link=one["link"],
                    gb_per_s=speed / 1e9, copy_gb_per_s=copy / 1e9, of_a_copy=speed / copy,
                )  # fmt: skip
    finally:
        forkserver.close()


def end(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """One worker: all kinds and sizes, with its figures."""
    torch.set_num_threads(1)
    me, device = int(payload["worker"]), torch.device(payload["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, sizes = connect(payload["store"], WAIT_S), payload["sizes"]
    pairs = {(low, low + 1) for low in range(0, payload["workers"], 2)}
    found: list[dict[str, Any]] = []
    for view, (kind, shared) in enumerate(KINDS.items(), 1):
        transport = Transport(me, view)
        builder = GroupBuilder(store, me, "127.0.0.1", device, WAIT_S)
        transport.connect(builder, pairs, max_bytes=int(max(sizes) * MIB), shared=shared)
        for size in sizes:
            figures = exchange(transport, me, int(size * MIB / 4), payload["messages"], device)
            link = type(transport.links[me ^ 1]).__name__
            found.append({"kind": kind, "mib": size, "bytes": int(size * MIB), "link": link, **figures})
        transport.close()
    return found


def exchange(transport: Transport, me: int, numbers: int, messages: int, device: torch.device) -> dict[str, float]:
    """Seconds of a message and of a copy of it on the device; the first fifth, which takes memory, does not count."""
    payload, warm, peer = torch.randn(numbers, device=device), max(2, messages // 5), me ^ 1
    began = 0.0
    for m in itertools.count():
        synchronize(device.type)
        if m == warm:
            began = time.perf_counter()
        if m == warm + messages:
            break
        forth, back = Op("F", (0, 1), m), Op("B", (0, 1), m)
        deadline = time.monotonic() + WAIT_S
        if me % 2 == 0:
            transport.send(numbers, forth, peer, payload)
            float(transport.receive(numbers, back, peer, deadline).to(device))
        else:
            total = transport.receive(numbers, forth, peer, deadline).to(device).sum()
            transport.send(numbers, back, peer, total)
    return {"seconds": (time.perf_counter() - began) / messages, "copy_s": copy_seconds(payload, messages)}


def copy_seconds(payload: torch.Tensor, copies: int) -> float:
    """Of one copy on the payload's device."""
    into = torch.empty_like(payload)
    into.copy_(payload)
    if payload.device.type == "cpu":
        began = time.perf_counter()
        for _ in range(copies):
            into.copy_(payload)
        return (time.perf_counter() - began) / copies
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(copies):
        into.copy_(payload)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / copies
