"""Section b of benchmarks/gpu.py: resident training, ours beside plain PyTorch and torch.distributed.pipelining.

One worker has the device to itself, as the plain loop has. Two workers share it, as do the two ranks of
torch.distributed.pipelining, whose messages go over gloo: that takes no CUDA tensors and NCCL takes no two ranks on one
device, so the peer's stages hand over host tensors, in their own forward.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from engine_ours import WorkJob, hosted_store, join, make_config, make_view
from engine_peers import CLIP, Work, deal
from gpu_case import Case, crew, entry
from gpu_machine import Peaks
from gpu_work import Training, adamw, cross_entropy, figures, load, resident_step, timed, weights_of
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from launch.forkserver import ForkServer
from pipeline.model.weights import read_config
from recovery.membership import publish

SHAPE = "Qwen3-0.6B"
SCHEDULER = {1: "gpipe", 2: "one_f_one_b"}
"""By workers: alone, nothing is to be ordered."""


def training_of(case: Case) -> Training:
    """65,536 tokens a step."""
    return Training.of(case, SHAPE, microbatches=8, batch=4)


# ---- plain PyTorch ----


def plain(values: dict[str, Any]) -> None:
    """The loop that everybody would write first."""
    case = Case.from_json(values)
    training, peaks = training_of(case), Peaks()
    peaks.start()
    found = timed(training, resident_step(case, training), case.device)
    case.say("plain PyTorch", **figures(case, training, found["seconds"], found["losses"]), **peaks.close())


# ---- ours ----


def ours(values: dict[str, Any], workers: int) -> None:
    """The engine's workers on the first device, from a view that is published by hand."""
    case = Case.from_json(values)
    forkserver = ForkServer(entry)
    try:
        training, source = training_of(case), weights_of(case, SHAPE)
        (case.folder / "model-config").symlink_to(source)
        work = training.work(read_config(source))
        config = make_config(
            SCHEDULER[workers], work, workers, training.warmup + training.steps, case.folder, case.limit_s
        )
        view, layout = make_view(replace(config, dtype="bfloat16"))
        peaks = Peaks()
        peaks.start()
        with hosted_store() as (store, address):
            publish(store, view, layout)
            shared = {
                "store": address, "device": case.device, "nccl": False, "work": asdict(work),
                "training": training.as_json(),
            }  # fmt: skip
            asked = [{**shared, "worker": w} for w in view.workers]
            found = crew(forkserver, case.folder, "gpu_engine:our_worker", asked, case.limit_s)
    finally:
        forkserver.close()
    seconds = [max(times) for times in zip(*(each["seconds"] for each in found), strict=True)]
    name = f"ours, {workers} worker{'s' if workers > 1 else ''}"
    case.say(name, **figures(case, training, seconds, found[0]["losses"]), **peaks.close())


def one_worker(values: dict[str, Any]) -> None:
    """Ours on one worker."""
    ours(values, 1)


def two_workers(values: dict[str, Any]) -> None:
    """Ours on two workers that share the device."""
    ours(values, 2)


def our_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """In a worker process: all steps."""
    torch.set_num_threads(1)
    worker, schedule = join(payload)
    training, job = Training(**payload["training"]), WorkJob(Work(**payload["work"]))

    def step(number: int) -> float:
        return worker.run(schedule, job, number).loss

    worker.gather({})
    found = timed(training, step, payload["device"])
    worker.transport.close()
    return found


# ---- torch.distributed.pipelining ----


class HostStage(nn.Module):
    """Some blocks of a model that lies on `device`, between tensors of the host: the first stage takes ids, the last
    one gives logits, which stay on the device."""

    def __init__(self, whole: Any, lo: int, hi: int, sequence: int, device: str) -> None:
        super().__init__()
        inner = whole.model
        self.embedding = inner.embed_tokens if lo == 0 else None
        self.blocks = nn.ModuleList(inner.layers[lo:hi])
        last = hi == len(inner.layers)
        self.norm, self.head = (inner.norm, whole.lm_head) if last else (None, None)
        cos, sin = inner.rotary_emb(torch.zeros(1, device=device), torch.arange(sequence, device=device)[None])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._device = torch.device(device)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self._device)
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            x = x if self.embedding is None else self.embedding(x)
            for block in self.blocks:
                out = block(x, attention_mask=None, position_embeddings=(self.cos, self.sin))
                x = out[0] if isinstance(out, tuple) else out
            if self.norm is not None and self.head is not None:
                return self.head(self.norm(x))
        return x.to("cpu")


def torch_1f1b(values: dict[str, Any]) -> None:
    """torch.distributed.pipelining's 1F1B in two processes on one device."""
    case = Case.from_json(values)
    forkserver = ForkServer(entry)
    try:
        peaks = Peaks()
        peaks.start()
        asked = [{"case": values, "rank": rank} for rank in range(2)]
        environment = {"GLOO_SOCKET_IFNAME": "lo"}
        found = crew(forkserver, case.folder, "gpu_engine:torch_rank", asked, case.limit_s, environment)
    finally:
        forkserver.close()
    training = training_of(case)
    seconds = [max(times) for times in zip(*(each["seconds"] for each in found), strict=True)]
    row = figures(case, training, seconds, found[-1]["losses"])
    case.say("torch pipelining 1F1B, 2 ranks", **row, **peaks.close(), note="activations pass through the host")


def torch_rank(payload: dict[str, Any]) -> dict[str, Any]:
    """One rank: its stage, the sum of the tied weight's two gradients, clipping over both, AdamW."""
    torch.set_num_threads(1)
    case, rank = Case.from_json(payload["case"]), int(payload["rank"])
    training, ranks = training_of(case), 2
    store = dist.FileStore(str(case.folder / "ranks"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    if case.device != "cpu":
        torch.cuda.set_device(case.device)
    whole = load(case, SHAPE, torch.float32, case.device)
    work, tied = training.work(whole.config), whole.get_input_embeddings().weight
    cut = deal(len(whole.model.layers), range(ranks))[rank]
    stage = HostStage(whole, *cut, work.sequence, case.device)
    del whole
    schedule = schedules.Schedule1F1B(
        PipelineStage(stage, rank, ranks, torch.device("cpu")), work.microbatches,
        loss_fn=lambda logits, targets: cross_entropy(logits, targets.to(logits.device)),
    )  # fmt: skip
    parameters, optimizer = list(stage.parameters()), adamw(stage)

    def step(number: int) -> float | None:
        inputs, targets = work.data(number)
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets, losses=losses)
        dist.all_reduce(tied.grad)
        mine = [p for p in parameters if p is not tied or rank == 0]
        squares = torch.stack([p.grad.square().sum() for p in mine if p.grad is not None]).sum().cpu()
        dist.all_reduce(squares)
        scale = float((CLIP / (squares.sqrt() + 1e-6)).clamp(max=1.0))
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(scale)
        optimizer.step()
        optimizer.zero_grad()
        return float(torch.stack([loss.detach() for loss in losses]).mean()) if losses else None

    dist.barrier()
    found = timed(training, step, case.device)
    dist.barrier()
    dist.destroy_process_group()
    return found
