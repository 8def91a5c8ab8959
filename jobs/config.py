"""The settings of a training job. A field's docstring is its --help; `validate` refuses what cannot work, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pipeline.lora import ALL_LINEAR, Lora
from pipeline.optimizer import OptimizerConfig
from recovery.inject import parse as parse_faults
from recovery.policy import POLICIES
from schedulers import PLANNERS
from schedulers.swapped import LEAST

_WEEK_S = 604_800.0


class ConfigError(ValueError):
    """A setting that cannot be used: names the field, its value and what is allowed."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a causal language model through a pipeline of workers."""

    workers: int = 4
    """Worker processes in all, over every stage and replica."""
    replicas: int = 1
    """Data-parallel copies of the pipeline; must divide --workers and --microbatches."""
    scheduler: str = "one_f_one_b"
    """gpipe, one_f_one_b, interleaved, zero_bubble, balanced (shares layers between neighbours), skippipe (partial
    routes through the slow links of --network), or roundpipe (workers that hold nothing, state in host memory)."""
    skip: float = 0.0
    """Share of the stages that each microbatch leaves out, under --scheduler skippipe; the first is never left out."""
    swaps: bool = False
    """Let a pair of neighbouring stages change places on a route, under --scheduler skippipe."""
    full_every: int = 0
    """Under --scheduler skippipe, every so many steps one in which no stage is skipped; 0 for none."""
    search_moves: int = 12_000
    """How long routes are searched for under --scheduler skippipe: moves, so that the seed alone decides the result."""
    at_once: int = 0
    """Under --scheduler roundpipe, microbatches that go through a span before another is loaded; 0 for half of them.
    Their gradients are summed first, so the sum depends on it, and not on --workers."""
    rule: Literal["ready", "round_robin"] = "ready"
    """Under --scheduler roundpipe, who gets the next span: the worker that will be through with it first, by measured
    speed, or the next one in turn, as published."""
    optimizer_async: bool = False
    """Under --scheduler roundpipe, apply an update while the next iteration computes with the weights before it."""
    cpu_adam: Literal["torch", "deepspeed"] = "torch"
    """Under --scheduler roundpipe, whose AdamW updates the weights in host memory; torch's is the faster one."""
    span_mib: int = 0
    """Under --scheduler roundpipe, MiB that the weights of one span may take: a worker holds two of them, and on a GPU
    one's gradients; 0 for no limit."""
    lora_rank: int = 0
    """Under --scheduler roundpipe, train low-rank adapters of this rank and nothing else (LoRA, through peft; needs the
    lora extra); 0 trains all weights."""
    lora_alpha: float = 16.0
    """What an adapter adds is multiplied by this, divided by --lora-rank."""
    lora_targets: str = ALL_LINEAR
    """What gets adapters: all-linear (every linear layer of the decoder blocks), or names separated by commas, such as
    q_proj,v_proj."""
    chunks: int = 2
    """Spans per worker under --scheduler interleaved."""
    microbatches: int = 8
    """Microbatches per step, over all replicas."""
    microbatch_size: int = 4
    """Samples per microbatch."""
    sequence_length: int = 128
    """Tokens per sample."""
    steps: int = 240
    """Optimizer steps of the whole run, counted from its first start."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes under autocast; weights, gradients and optimizer state stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where it is present."""
    threads: int = 0
    """Compute threads per worker; 0 shares the cores of the machine evenly, at least one each."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    ends: Literal["auto", "in-line", "home", "apart"] = "auto"
    """Where the embedding and the head go: in-line with the blocks, the head home to the first worker, or both apart
    from the blocks on a worker of their own (--scheduler one_f_one_b); auto is in-line unless --recovery needs more."""

    model: str = "llama-2m"
    """A preset (see `unbroken doctor`), a directory with config.json and safetensors, a config.json, or a GGUF file."""
    dropout: float | None = None
    """Dropout probability where the model has dropout (GPT-2); unset keeps the model's own."""
    data: str = "stdlib"
    """`stdlib` (the sources of Python's standard library), files of text or JSON, globs, or hf:NAME for a dataset."""
    text_field: str = "text"
    """The field of a JSON object or of a dataset's row that holds the text."""
    tokenizer: Literal["auto", "bytes", "bpe", "model"] = "auto"
    """bpe is trained on the corpus; auto takes the model's own where it has one, else bpe."""
    vocabulary: int = 2048
    """Vocabulary of a trained BPE."""
    held_out: float = 0.02
    """Share of the corpus that is kept for evaluation and never trained on."""
    max_tokens: int = 4_000_000
    """Tokens of the corpus that are used at most; 0 for all."""

    lr: float = 2e-3
    """Peak learning rate of AdamW."""
    warmup: int = 20
    """Steps of linear warm-up; a cosine follows."""
    min_lr_ratio: float = 0.1
    """Where the cosine ends, as a share of --lr."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices; norms and biases do not decay."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.95
    """AdamW's second moment decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 never."""
    seed: int = 0
    """Everything random is keyed by it."""

    out: Path = Path("runs/default")
    """The run folder: config, metrics, events, checkpoints, model and pictures."""
    resume: bool = False
    """Go on from the newest valid checkpoint in --out."""
    checkpoint_every: int = 80
    """Steps between checkpoints; 0 saves only on SIGTERM and at the end."""
    keep: int = 2
    """Checkpoints that are kept."""
    evaluate_every: int = 80
    """Steps between evaluations on held-out text; 0 evaluates only at the end."""
    evaluate_samples: int = 64
    """Held-out samples per evaluation."""
    tensorboard: bool = False
    """Write TensorBoard event files too (needs the tensorboard extra)."""
    sample_tokens: int = 60
    """Tokens of the continuation that is sampled at the end; 0 for none."""

    recovery: str = "auto"
    """What brings the state of a lost worker back: auto, replica, checkfree, checkfree+, redundant,
    copy, random, checkpoint, or none."""
    checkfree_weights: Literal["norm", "norm_squared", "uniform"] = "norm"
    """How checkfree weighs both neighbours: by their gradient norms, the squares of these, or alike."""
    inject: str = ""
    """Faults to inject, e.g. 'kill:worker=2,step=30,at=backward' or 'rate:p=0.002,stages=1-4,seed=7'; ; between."""
    heartbeat: float = 10.0
    """Seconds without a sign of life after which a worker is given up."""
    spares: int = 0
    """Workers per agent that wait with everything loaded, to take a lost one's place a little sooner."""
    max_failures: int = 100
    """Lost workers after which the run gives up."""

    network: Path | None = None
    """JSON with latency_s and bandwidth matrices: links between workers are slowed down to it (one machine only)."""
    deadline: float = 300.0
    """Seconds after which a worker that is busy with one step is given up."""
    nodes: int = 1
    """Machines of the run. On each the same command is given, under torchrun or not, with its own --node-rank; --out
    must be a folder that all of them see."""
    node_rank: int = 0
    """This machine's number; 0 hosts the store and speaks to the user."""
    store: str = ""
    """HOST:PORT of node 0 where all machines meet; needed with --nodes."""
    store_port: int = 0
    """TCP port of the store on this machine; 0 takes a free one."""

    @property
    def stages(self) -> int:
        """Workers per replica."""
        return self.workers // self.replicas

    @property
    def round_size(self) -> int:
        """Microbatches that go through a span at once under roundpipe."""
        return self.at_once or max(1, -(-self.microbatches // 2))

    @property
    def samples_per_step(self) -> int:
        """The global batch."""
        return self.microbatches * self.microbatch_size

    def optimizer(self) -> OptimizerConfig:
        """The part that the optimizer reads."""
        return OptimizerConfig(
            self.lr, self.steps, self.warmup, self.min_lr_ratio, (self.beta1, self.beta2), self.eps,
            self.weight_decay, self.clip, self.cpu_adam,
        )  # fmt: skip

    def lora(self) -> Lora | None:
        """The adapters that are trained, if it is adapters."""
        return Lora(self.lora_rank, self.lora_alpha, self.lora_targets) if self.lora_rank else None

    def validate(self) -> None:
        """Raise ConfigError for the first setting that cannot work, whatever the model and the data are."""
        for name in ("workers", "replicas", "chunks", "microbatches", "microbatch_size", "sequence_length", "steps",
                     "evaluate_samples", "keep"):  # fmt: skip
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("at_once", "span_mib", "lora_rank", "checkpoint_every", "full_every", "search_moves",
                     "evaluate_every", "warmup", "max_tokens", "threads", "sample_tokens", "clip",
                     "weight_decay"):  # fmt: skip
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        known = (*PLANNERS, "skippipe", "roundpipe")
        require(self.scheduler in known, "scheduler", self.scheduler, f"one of {', '.join(known)}")
        skips = self.scheduler == "skippipe"
        require(not skips or self.network is not None, "network", self.network, "a JSON file, under scheduler skippipe")
        require(
            skips or not (self.skip or self.swaps or self.full_every), "skip", self.skip,
            "0, without swaps and full_every, unless scheduler is skippipe",
        )  # fmt: skip
        require(0 < self.lora_alpha < math.inf, "lora_alpha", self.lora_alpha, "above 0")
        require(
            all(name.strip() for name in self.lora_targets.split(",")), "lora_targets", self.lora_targets,
            f"{ALL_LINEAR}, or names separated by commas",
        )  # fmt: skip
        rounds = self.scheduler == "roundpipe"
        require(rounds or not self.lora_rank, "lora_rank", self.lora_rank, "0 unless scheduler is roundpipe")
        if rounds:
            self._check_rounds()
        else:
            require(
                not (self.optimizer_async or self.at_once or self.span_mib or self.cpu_adam != "torch"),
                "optimizer_async", self.optimizer_async,
                "False, without at_once, span_mib and cpu_adam, unless scheduler is roundpipe",
            )  # fmt: skip
        require(self.workers % self.replicas == 0, "replicas", self.replicas, f"a divisor of workers ({self.workers})")
        require(
            self.microbatches % self.replicas == 0, "microbatches", self.microbatches,
            f"a multiple of replicas ({self.replicas})",
        )  # fmt: skip
        require(self.recovery in POLICIES, "recovery", self.recovery, f"one of {', '.join(POLICIES)}")
        require(self.heartbeat >= 2, "heartbeat", self.heartbeat, "2 or more seconds")
        require(self.spares >= 0, "spares", self.spares, "0 or more")
        require(self.max_failures >= 0, "max_failures", self.max_failures, "0 or more")
        parse_faults(self.inject)
        require(0 < self.lr < math.inf, "lr", self.lr, "above 0")
        require(0 < self.deadline <= _WEEK_S, "deadline", self.deadline, f"above 0, up to {_WEEK_S:.0f} (a week)")
        require(0 < self.eps < math.inf, "eps", self.eps, "above 0")
        require(0 < self.held_out < 1, "held_out", self.held_out, "between 0 and 1")
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "0 to 1")
        require(self.dropout is None or 0 <= self.dropout < 1, "dropout", self.dropout, "0 or more and below 1")
        require(0 <= self.store_port < 65536, "store_port", self.store_port, "0 to 65535")
        require(self.nodes >= 1, "nodes", self.nodes, "1 or more")
        require(0 <= self.node_rank < self.nodes, "node_rank", self.node_rank, f"0 to {self.nodes - 1}")
        host, _, port = self.store.rpartition(":")
        meets = bool(host) and port.isdecimal() and 0 < int(port) < 65536
        require(
            meets if self.nodes > 1 else not self.store, "store", self.store,
            "HOST:PORT of node 0" if self.nodes > 1 else "nothing with one node",
        )  # fmt: skip
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 or more and below 1")
        if self.recovery == "checkfree+":
            require(
                self.scheduler == "one_f_one_b" and self.stages > LEAST, "recovery", self.recovery,
                f"only with scheduler one_f_one_b and {LEAST + 1} or more workers per replica (found {self.stages}): "
                f"{LEAST} block stages, and the embedding and the head on a worker of their own",
            )  # fmt: skip
            require(self.ends in ("auto", "apart"), "ends", self.ends, "auto or apart under --recovery checkfree+")
        if self.ends in ("home", "apart"):
            require(
                self.scheduler == "one_f_one_b" and self.stages > 1, "ends", self.ends,
                "auto or in-line; home and apart only with scheduler one_f_one_b and 2 or more stages",
            )  # fmt: skip
        if self.recovery == "redundant":
            require(
                self.scheduler not in ("balanced", "skippipe") and self.stages > 1, "recovery", self.recovery,
                "only with 2 or more workers per replica, and not with scheduler balanced or skippipe",
            )  # fmt: skip
        if self.network is not None:
            require(self.network.is_file(), "network", str(self.network), "a readable JSON file")

    def _check_rounds(self) -> None:
        """What workers that hold nothing cannot do, or need not."""
        for name, only in (("replicas", 1), ("nodes", 1), ("spares", 0), ("network", None), ("ends", "auto")):
            require(getattr(self, name) == only, name, getattr(self, name), f"{only} under scheduler roundpipe")
        require(
            self.recovery == "auto", "recovery", self.recovery,
            "auto under scheduler roundpipe: what a lost worker had is dealt to the others",
        )  # fmt: skip
        require(
            self.cpu_adam == "torch" or find_spec("deepspeed") is not None, "cpu_adam", self.cpu_adam,
            "torch, as deepspeed is not installed (pip install 'unbroken[deepspeed]')",
        )  # fmt: skip
        require(self.at_once <= self.microbatches, "at_once", self.at_once, f"0 to microbatches ({self.microbatches})")


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raise ConfigError in its one form unless `holds`."""
    if not holds:
        raise ConfigError(f"{name} is {value!r}; allowed: {allowed}")
