"""The sections of benchmarks/gpu.py: their parts in order, how long each may take, and what is hoped for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One process: `call` is the function that it runs. `round` tells repeated parts apart; a peer may be missing."""

    name: str
    call: str
    limit_s: float
    round: int = 1
    peer: bool = False


@dataclass(frozen=True)
class Section:
    """Parts that follow one another. `share` is the section's of the whole run's time; what it leaves, later ones
    have."""

    letter: str
    title: str
    share: float
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Goal:
    """What a figure should be: `column` of `row`, over that of the row `over` within each round if there is one, at
    least or at most `bound`. Without a bound it is only told."""

    section: str
    row: str
    column: str
    over: str | None = None
    bound: float | None = None
    at_least: bool = True


SECTIONS = (
    Section("0", "weights", 0.05, (Part("weights", "gpu_work:prepare", 60),)),
    Section(
        "a", "CUDA tests; links between workers on one device", 0.20,
        (Part("links", "gpu_links:links", 45), Part("CUDA tests", "gpu_tests:cuda_tests", 75)),
    ),
    Section(
        "b", "Qwen3-0.6B, resident, sequence 2048, bf16", 0.20,
        (
            Part("plain PyTorch", "gpu_engine:plain", 45), Part("ours, 1 worker", "gpu_engine:one_worker", 45),
            Part("ours, 1 worker", "gpu_engine:one_worker", 45, round=2),
            Part("plain PyTorch", "gpu_engine:plain", 45, round=2),
            Part("ours, 2 workers", "gpu_engine:two_workers", 60),
            Part("torch pipelining", "gpu_engine:torch_1f1b", 60, peer=True),
        ),
    ),
    Section(
        "c", "SIGKILL of a CUDA worker to the next commit", 0.14,
        (
            Part("context", "gpu_recovery:contexts", 15), Part("replica", "gpu_recovery:replaced", 30),
            Part("replica, spare", "gpu_recovery:spared", 30),
        ),
    ),
    Section(
        "d", "Qwen3-1.7B, state in host memory, 1 worker, sequence 2048, bf16", 0.41,
        (
            Part("ours", "gpu_offload:ours", 100), Part("FSDP2", "gpu_peers:fsdp2", 60, peer=True),
            Part("RoundPipe", "gpu_peers:roundpipe", 90, peer=True),
            Part("DeepSpeed", "gpu_peers:deepspeed_zero3", 75, peer=True),
            Part("ours, one step behind", "gpu_offload:ours_behind", 100),
            Part("all on the device", "gpu_peers:on_device", 45, peer=True),
            Part("RoundPipe, in turn", "gpu_peers:roundpipe_in_turn", 60, peer=True),
        ),
    ),
)  # fmt: skip

GOALS = (
    Goal("b", "ours, 1 worker", "tokens_per_s", "plain PyTorch", 0.98),
    Goal("b", "ours, 2 workers", "tokens_per_s", "torch pipelining 1F1B, 2 ranks"),
    Goal("c", "SIGKILL, replica", "total_p95_s", None, 3.0, at_least=False),
    Goal("c", "SIGKILL, replica, spare", "total_p95_s", None, 1.0, at_least=False),
    Goal("c", "SIGKILL, replica", "kept_after_kills_bytes", None, 64 << 20, at_least=False),
    Goal("c", "SIGKILL, replica", "kept_in_the_end_bytes", None, 64 << 20, at_least=False),
    Goal("d", "ours, 1 worker, one step behind", "tokens_per_s", "RoundPipe 0.1.1, one step behind", 1.0),
    Goal("d", "ours, 1 worker", "tokens_per_s", "RoundPipe 0.1.1", 1.0),
    Goal("d", "ours, 1 worker", "tokens_per_s", "RoundPipe 0.1.1, one step behind"),
    Goal("d", "ours, 1 worker", "tokens_per_s", "DeepSpeed ZeRO-3, CPU offload", 1.5),
    Goal("d", "ours, 1 worker", "tokens_per_s", "FSDP2, CPU offload", 1.8),
    Goal("d", "ours, 1 worker, one step behind", "tokens_per_s", "all on the device"),
)
