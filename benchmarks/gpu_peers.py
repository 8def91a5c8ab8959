"""Section d of benchmarks/gpu.py, the peers: one process on one device each, on the work of gpu_offload.py.

FSDP2 with CPUOffloadPolicy and DeepSpeed ZeRO-3 with CPU offload keep fp32 masters and moments in host memory and
compute in bfloat16; neither recomputes, since all activations fit. The official RoundPipe (LGPL, called and not copied)
keeps fp32 masters too and sums gradients in bfloat16; its preset for Qwen3 does not go with transformers 5, so it is
given the model's own blocks as nn.Sequential. All clip by the norm of the whole gradient; AdamW is torch's fused one
but for RoundPipe, which has its own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from engine_peers import CLIP, LEARNING_RATE
from gpu_case import Case, Missing, require
from gpu_machine import Peaks
from gpu_offload import SHAPE, training_of
from gpu_work import (
    WEIGHT_DECAY,
    Training,
    accumulate,
    adamw,
    cross_entropy,
    figures,
    load,
    resident_step,
    timed,
)
from torch import Tensor, nn

Step = Callable[[int], float]


def _measure(values: dict[str, Any], name: str, make: Callable[[Case, Training], Step], **about: Any) -> None:
    case = Case.from_json(values)
    torch.set_num_threads(1 if case.dry else len(os.sched_getaffinity(0)))
    if case.device != "cpu":
        torch.cuda.set_device(case.device)
    training, peaks = training_of(case), Peaks()
    peaks.start()
    found = timed(training, make(case, training), case.device)
    case.say(name, **figures(case, training, found["seconds"], found["losses"]), **peaks.close(), **about)
    if dist.is_initialized():
        dist.destroy_process_group()


def _alone(case: Case, backend: str) -> None:
    """A process group of this process."""
    if backend == "":
        backend = "gloo" if case.device == "cpu" else "cpu:gloo,cuda:nccl"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0",
                   "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    dist.init_process_group(backend)


# ---- all on the device ----


def on_device(values: dict[str, Any]) -> None:
    """The plain loop, where nothing is offloaded."""
    _measure(values, "all on the device", resident_step)


# ---- FSDP2 ----


def fsdp2(values: dict[str, Any]) -> None:
    """torch's fully_shard with CPUOffloadPolicy."""
    _measure(values, "FSDP2, CPU offload", fsdp2_step, torch=torch.__version__)


def fsdp2_step(case: Case, training: Training) -> Step:
    """Gradients leave the device with a step's last microbatch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    _alone(case, "")
    kind = torch.device(case.device).type
    model = load(case, SHAPE, torch.float32, "cpu")
    shared: dict[str, Any] = {
        "mesh": init_device_mesh(kind, (1,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=kind == "cuda"),
    }
    for block in model.model.layers:
        fully_shard(block, **shared)
    fully_shard(model, **shared)
    optimizer, work = adamw(model), training.work(model.config)
    left = [0]

    def one(x: Tensor, y: Tensor) -> Tensor:
        left[0] -= 1
        model.set_requires_gradient_sync(left[0] == 0)
        loss = cross_entropy(model(input_ids=x, use_cache=False).logits, y)
        (loss / work.microbatches).backward()
        return loss.detach()

    def step(number: int) -> float:
        left[0] = work.microbatches
        loss = accumulate(case, work, number, one)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


# ---- DeepSpeed ----


def deepspeed_zero3(values: dict[str, Any]) -> None:
    """DeepSpeed's ZeRO-3 with weights and optimizer in host memory."""
    require("deepspeed")
    _measure(values, "DeepSpeed ZeRO-3, CPU offload", deepspeed_step, deepspeed=version("deepspeed"))


def deepspeed_step(case: Case, training: Training) -> Step:
    """torch's AdamW on the host, which needs no compiler and is the faster one (benchmarks/cpu_adam.py)."""
    if case.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    _alone(case, "gloo" if case.device == "cpu" else "nccl")
    import deepspeed

    if case.device == "cpu":  # an extension for sums between ranks, which takes minutes to compile: there is one rank
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = load(case, SHAPE, torch.bfloat16, "cpu")
    work = training.work(model.config)
    offload = {"device": "cpu", "pin_memory": case.device != "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": work.batch, "gradient_accumulation_steps": work.microbatches,
        "gradient_clipping": CLIP, "bf16": {"enabled": True}, "steps_per_print": 10**9,
        "zero_optimization": {"stage": 3, "offload_param": offload, "offload_optimizer": offload},
        "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model), config=config)

    def one(x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(engine(input_ids=x, use_cache=False).logits, y)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return lambda number: float(accumulate(case, work, number, one))


# ---- the official RoundPipe ----


class _First(nn.Module):
    """Ids -> what the blocks take: the hidden state and the rotary embedding's two tensors."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.embedding, self.rotary = inner.embed_tokens, inner.rotary_emb

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.embedding(ids)
        cos, sin = self.rotary(hidden, torch.arange(ids.shape[1], device=ids.device)[None])
        return hidden, cos, sin


class _Block(nn.Module):
    """One of the model's own blocks."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, cos, sin = given
        out = self.block(hidden, attention_mask=None, position_embeddings=(cos, sin))
        return (out[0] if isinstance(out, tuple) else out), cos, sin


class _Last(nn.Module):
    """The norm and the head: logits."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.norm, self.head = whole.model.norm, whole.lm_head

    def forward(self, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self.head(self.norm(given[0]))


def sequential(whole: Any) -> nn.Sequential:
    """A causal LM of transformers as a sequence of layers."""
    return nn.Sequential(_First(whole.model), *map(_Block, whole.model.layers), _Last(whole))


def roundpipe(values: dict[str, Any]) -> None:
    """The official one, updates one step behind: its default."""
    _roundpipe(values, "RoundPipe 0.1.1, one step behind", behind=True)


def roundpipe_in_turn(values: dict[str, Any]) -> None:
    """The official one, every update before the next iteration."""
    _roundpipe(values, "RoundPipe 0.1.1", behind=False)


def _roundpipe(values: dict[str, Any], name: str, behind: bool) -> None:
    require("roundpipe")
    if Case.from_json(values).device == "cpu":
        raise Missing("roundpipe is not imported without a CUDA device")
    _measure(values, name, lambda case, training: roundpipe_step(case, training, behind))


def roundpipe_step(case: Case, training: Training, behind: bool) -> Step:
    """Its own pipeline, gradients and AdamW; the loss is divided by the microbatches, whose losses it adds up."""
    os.environ.setdefault("RPP_DISABLE_TORCH_COMPILE", "1")  # of presets that are not used here
    from roundpipe import RoundPipe, RoundPipeRunConfig
    from roundpipe.optim import Adam

    whole = load(case, SHAPE, torch.bfloat16, "cpu")
    work = training.work(whole.config)
    model = RoundPipe(
        sequential(whole), optim_dtype=torch.float32, name="qwen3",
        model_run_config=RoundPipeRunConfig(num_microbatch=work.microbatches),
    )  # fmt: skip
    parameters = list(model.optim_parameters())
    optimizer = Adam(
        parameters, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY,
        decoupled_weight_decay=True,
    )  # fmt: skip

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets) / work.microbatches

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    def step(number: int) -> float:
        inputs, targets = work.data(number)
        loss = model.forward_backward(input_args=(inputs,), label=targets, loss_fn=loss_of)
        model.step(update, is_async=behind)
        return float(loss)

    return step
