"""The peers of benchmarks/engine.py: other engines that train the same Llama on the same tokens from the same weights.

    python benchmarks/engine_peers.py --peer torch_1f1b --workers 2 --steps 8 --warmup 2 --json

Peers: torch.distributed.pipelining (GPipe, 1F1B, interleaved 1F1B, two zero-bubble schedules), DeepSpeed's
PipelineModule, and plain PyTorch in one process on one thread or on all cores. Every worker is a process of its own on
one thread, and layers are dealt so that the slowest worker has the least to do, the head counted. One JSON line comes
out: tokens per second, model TFLOP/s and their share of a measured peak, peak memory per worker, and the loss of every
step, by which a reader sees that all did the same work. `peak_rss_bytes` is the peak of the timed steps alone,
`rss_before_bytes` what importing torch took. A peer that cannot run, or not before the deadline, prints {"peer": ...,
"error": ...} and exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

CLIP, LEARNING_RATE, SEED = 1.0, 1e-3, 0
HEAD = 0.9  # the head's matrix product beside a block's: 384 * 4096 weights against 1.77 million

TORCH = {  # peer -> (schedule, stages per worker)
    "torch_gpipe": (schedules.ScheduleGPipe, 1),
    "torch_1f1b": (schedules.Schedule1F1B, 1),
    "torch_interleaved": (schedules.ScheduleInterleaved1F1B, 2),
    "torch_zb": (schedules.ScheduleInterleavedZeroBubble, 2),
    "torch_zbv": (schedules.ScheduleZBVZeroBubble, 2),
}
PEERS = (*TORCH, "deepspeed", "one_thread", "all_cores")


@dataclass(frozen=True)
class Work:
    """What every peer trains: a Llama in fp32 on random tokens, `microbatches` of `batch` sequences a step."""

    hidden: int = 384
    intermediate: int = 1024
    layers: int = 8
    heads: int = 6
    vocabulary: int = 4096
    sequence: int = 256
    microbatches: int = 8
    batch: int = 4

    @property
    def tokens(self) -> int:
        return self.microbatches * self.batch * self.sequence

    def data(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, each (microbatches * batch, sequence): the same in every process."""
        generator = torch.Generator().manual_seed(SEED + 1 + step)
        shape = (self.microbatches * self.batch, self.sequence + 1)
        tokens = torch.randint(self.vocabulary, shape, generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# ---- the model, cut into stages ----


class Stage(nn.Module):
    """A run of a Llama's blocks; the first stage also embeds, the last one ends in logits."""

    def __init__(self, whole: Any, lo: int, hi: int, sequence: int) -> None:
        super().__init__()
        inner = whole.model
        self.embedding = inner.embed_tokens if lo == 0 else None
        self.blocks = nn.ModuleList(inner.layers[lo:hi])
        last = hi == len(inner.layers)
        self.norm, self.head = (inner.norm, whole.lm_head) if last else (None, None)
        cos, sin = inner.rotary_emb(torch.zeros(1), torch.arange(sequence)[None])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks:
            out = block(x, attention_mask=None, position_embeddings=(self.cos, self.sin))
            x = out[0] if isinstance(out, tuple) else out
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def llama(work: Work) -> Any:
    """The whole model, with weights that depend on nothing but the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=work.hidden,
        intermediate_size=work.intermediate,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        vocab_size=work.vocabulary,
        max_position_embeddings=work.sequence,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).float().train()


def build(work: Work, cuts: Sequence[tuple[int, int]], mine: Sequence[int]) -> list[Stage]:
    """The stages `mine` of the model."""
    whole = llama(work)
    return [Stage(whole, *cuts[i], work.sequence) for i in mine]


def deal(num_layers: int, owners: Sequence[int]) -> list[tuple[int, int]]:
    """Blocks [lo, hi) of each stage, stage i on worker owners[i], such that the most loaded worker has the least."""
    count = len(owners)
    if num_layers < count:
        raise ValueError(f"{num_layers} layers for {count} stages; expected at least one layer per stage")

    def load(inner: tuple[int, ...]) -> tuple[float, float]:
        sizes = [hi - lo for lo, hi in itertools.pairwise((0, *inner, num_layers))]
        held = dict.fromkeys(owners, 0.0)
        for worker, size in zip(owners, sizes, strict=True):
            held[worker] += size
        held[owners[-1]] += HEAD
        return max(held.values()), max(sizes) - min(sizes)

    best = min(itertools.combinations(range(1, num_layers), count - 1), key=load)
    return list(itertools.pairwise((0, *best, num_layers)))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---- the peers: each returns a function that runs one step and gives its loss, None where another worker knows it ----

StepFunction = Callable[[int], float | None]


def single_step(work: Work) -> StepFunction:
    (model,) = build(work, [(0, work.layers)], [0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(number: int) -> float:
        inputs, targets = work.data(number)
        total = 0.0
        for x, y in zip(inputs.split(work.batch), targets.split(work.batch), strict=True):
            loss = cross_entropy(model(x), y)
            (loss / work.microbatches).backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total / work.microbatches

    return step


def torch_step(work: Work, peer: str, rank: int, workers: int) -> StepFunction:
    kind, each = TORCH[peer]
    owners = [i % workers for i in range(each * workers)]
    if kind is schedules.ScheduleZBVZeroBubble:
        owners = [*range(workers), *reversed(range(workers))]
    mine = [i for i, owner in enumerate(owners) if owner == rank]
    modules = build(work, deal(work.layers, owners), mine)
    device = torch.device("cpu")
    stages = [PipelineStage(module, i, len(owners), device) for module, i in zip(modules, mine, strict=True)]
    schedule = kind(stages if each > 1 else stages[0], work.microbatches, loss_fn=cross_entropy)
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def step(number: int) -> float | None:
        inputs, targets = work.data(number)
        losses: list[Tensor] = []
        arguments = {"target": targets, "losses": losses} if owners[-1] == rank else {}
        schedule.step(*([inputs] if owners[0] == rank else []), **arguments)
        squares = torch.stack([p.grad.square().sum() for p in parameters if p.grad is not None]).sum()
        dist.all_reduce(squares)
        scale = (CLIP / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(scale)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().item() if losses else None

    return step


def deepspeed_step(work: Work, rank: int, workers: int) -> StepFunction:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(rank)}
    import deepspeed
    from deepspeed.pipe import PipelineModule

    cuts = deal(work.layers, range(workers))
    stages = build(work, cuts, range(workers))
    deepspeed.init_distributed(dist_backend="gloo")
    module = PipelineModule(stages, num_stages=workers, loss_fn=cross_entropy, partition_method="uniform")
    parameters = [p for p in module.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": work.batch,
        "gradient_accumulation_steps": work.microbatches,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=parameters, optimizer=optimizer, config=config)

    def step(number: int) -> float:
        inputs, targets = work.data(number)
        parts = zip(inputs.split(work.batch), targets.split(work.batch), strict=True)
        return float(engine.train_batch(data_iter=iter(parts)))

    return step


# ---- one worker ----


def worker(peer: str, work: Work, rank: int, workers: int, steps: int, warmup: int, folder: Path) -> None:
    """Train, and leave the figures of this worker in `folder`."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no worker outlives the launcher
    torch.set_num_threads(len(os.sched_getaffinity(0)) if peer == "all_cores" else 1)
    before = psutil.Process().memory_info().rss
    if workers > 1:
        store = dist.FileStore(str(folder / "store"), workers)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    if peer in TORCH:
        step = torch_step(work, peer, rank, workers)
    elif peer == "deepspeed":
        step = deepspeed_step(work, rank, workers)
    else:
        step = single_step(work)
    losses: list[float | None] = []
    seconds: list[float] = []
    for number in range(warmup + steps):
        if number == warmup:
            reset_peak()
        if workers > 1:
            dist.barrier()
        began = time.perf_counter()
        losses.append(step(number))
        if workers > 1:
            dist.barrier()
        seconds.append(time.perf_counter() - began)
    figures = {"loss": losses, "seconds": seconds[warmup:], "peak_rss_bytes": peak_rss(), "rss_before_bytes": before}
    (folder / f"{rank}.json").write_text(json.dumps(figures))
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def reset_peak() -> None:
    """Forget the peak of building the whole model, so that the peak reported is that of training."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Bytes: the most memory resident since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


# ---- the launcher ----


class PeerError(RuntimeError):
    """A peer that did not finish; the message is the end of what its worker said."""


def run(peer: str, work: Work, workers: int, steps: int, warmup: int, deadline_s: float) -> dict[str, Any]:
    """Run a peer in processes of its own and gather its figures. Raises PeerError."""
    if peer in ("one_thread", "all_cores"):
        workers = 1
    elif workers < 2:
        raise PeerError(f"{peer} on {workers} workers; expected at least 2")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false"}
    if peer != "all_cores":
        environment["OMP_NUM_THREADS"] = "1"
    else:
        environment.pop("OMP_NUM_THREADS", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shared = [f"--{k}={v}" for k, v in asdict(work).items()] + [f"--steps={steps}", f"--warmup={warmup}"]
        command = [sys.executable, __file__, f"--peer={peer}", f"--workers={workers}", f"--folder={folder}", *shared]
        with started(command, workers, environment, folder) as processes:
            wait(processes, peer, folder, time.monotonic() + deadline_s)
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(workers)]
    speeds = [work.tokens / max(times) for times in zip(*(f["seconds"] for f in found), strict=True)]
    losses = [
        next((x for x in values if x is not None), None) for values in zip(*(f["loss"] for f in found), strict=True)
    ]
    return {
        "peer": peer,
        "workers": workers,
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_steps": speeds,
        "loss": losses,
        "peak_rss_bytes": [f["peak_rss_bytes"] for f in found],
        "rss_before_bytes": [f["rss_before_bytes"] for f in found],
        "torch": torch.__version__,
        "work": asdict(work),
    }


@contextlib.contextmanager
def started(
    command: Sequence[str], workers: int, environment: dict[str, str], folder: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One process per rank, each the leader of a group that is killed on the way out, whatever happened."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(workers):
            with (folder / f"{rank}.log").open("wb") as log:
                rank_command = [*command, f"--rank={rank}"]
                processes.append(
                    subprocess.Popen(
                        rank_command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait(processes: Sequence[subprocess.Popen[bytes]], peer: str, folder: Path, deadline: float) -> None:
    """Until every process has ended well. Raises PeerError at the first that did not, or at the deadline."""
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            raise PeerError(f"{peer} did not finish before its deadline; worker 0 said last: {last_words(folder, 0)}")
        if any(process.poll() for process in processes):
            break
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.poll():
            raise PeerError(f"worker {rank} of {peer} ended with {process.returncode}: {last_words(folder, rank)}")


def last_words(folder: Path, rank: int) -> str:
    """The end of what a worker wrote."""
    lines = (folder / f"{rank}.log").read_text(errors="replace").strip().splitlines()
    return " | ".join(lines[-4:])[-1200:] or "nothing"


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Work]:
    """The options that our engine and its peers share, and the work they make up."""
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--deadline", type=float, default=900.0, help="seconds until all processes are killed")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of text")
    parser.add_argument("--parent", type=int, help="end when this process does")
    parser.add_argument(
        "--peak-tflops", type=float, help="of the threads of all workers; measured where it is not given"
    )
    for field in fields(Work):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    options = parser.parse_args()
    if options.steps < 1 or options.warmup < 0:
        parser.error(f"--steps {options.steps} --warmup {options.warmup}; expected at least 1 and at least 0")
    return options, Work(**{field.name: getattr(options, field.name) for field in fields(Work)})


def stop_well(parent: int | None) -> None:
    """Being stopped, or losing `parent`, also stops the workers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if parent is not None:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit(143)


def speed_and_memory(found: dict[str, Any], work: Work, peak_tflops: float | None) -> dict[str, Any]:
    """What the figures of a run come to in model FLOP/s, of which peak, and in bytes of all workers."""
    import utilisation  # here, so that the workers of peers import nothing of ours

    flops = utilisation.step_flops(llama(work).config, work.microbatches, work.batch, work.sequence)
    own = {name: found[name] for name in ("peak_tflops", "peak_of") if name in found}
    peak = own or utilisation.stated(peak_tflops, threads(found["peer"], found["workers"]))
    return {
        **utilisation.reached(flops, work.tokens / found["tokens_per_s"], peak),
        **utilisation.memory(found["peak_rss_bytes"]),
    }


def threads(peer: str, workers: int) -> int:
    """On how many all workers of a contender compute together."""
    return len(os.sched_getaffinity(0)) if peer == "all_cores" else workers


def show(found: dict[str, Any], work: Work, options: argparse.Namespace) -> None:
    """Print the figures of a run."""
    found = {**found, **speed_and_memory(found, work, options.peak_tflops), **found}  # what it says itself stands
    if options.json:
        print(json.dumps(found))
        return
    peaks = ", ".join(f"{b / 2**20:.0f}" for b in found["peak_rss_bytes"])
    speed = f"{found['tokens_per_s']:,.0f} tokens/s"
    if found["mfu"] is not None:
        speed += f", {100 * found['mfu']:.1f} % of {found['peak_tflops']:.3g} TFLOP/s ({found['peak_of']})"
    print(f"{found['peer']}: {speed}, peak memory {peaks} MiB, last loss {found['loss'][-1]:.4f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=PEERS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options, work = parse(parser)
    if options.rank is not None:
        worker(options.peer, work, options.rank, options.workers, options.steps, options.warmup, options.folder)
        return 0
    stop_well(options.parent)
    try:
        found = run(options.peer, work, options.workers, options.steps, options.warmup, options.deadline)
    except PeerError as error:
        print(json.dumps({"peer": options.peer, "workers": options.workers, "error": str(error)}))
        return 1
    show(found, work, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
