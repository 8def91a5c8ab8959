"""The settings of a training job: each with its default, its text (which is its --help) and the numbers that it may be.

What they mean together is in config.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from jobs.bounds import Within
from pipeline.model.lora import ALL_LINEAR

MOST_STEPS = 99_999_999
"""A step's number has eight digits, in the names of checkpoints."""
WEEK_S = 604_800


@dataclass(frozen=True)
class TrainFields:
    """All that can be set, one by one."""

    workers: Annotated[int, Within(1, 1024)] = 4
    """Worker processes in all, over every stage and replica."""
    replicas: Annotated[int, Within(1, 1024)] = 1
    """Data-parallel copies of the pipeline; must divide --workers and --microbatches."""
    scheduler: str = "one_f_one_b"
    """gpipe, one_f_one_b, interleaved, zero_bubble, balanced (shares layers between neighbours), skippipe (partial
    routes through the slow links of --network), or roundpipe (workers that hold nothing, state in host memory)."""
    skip: Annotated[float, Within(0, 1, below=True)] = 0.0
    """Share of the stages that each microbatch leaves out, under --scheduler skippipe; the first is never left out."""
    swaps: bool = False
    """Let a pair of neighbouring stages change places on a route, under --scheduler skippipe."""
    full_every: Annotated[int, Within(0, MOST_STEPS)] = 0
    """Under --scheduler skippipe, every so many steps one in which no stage is skipped; 0 for none."""
    search_moves: Annotated[int, Within(0, 100_000_000)] = 12_000
    """How long routes are searched for under --scheduler skippipe: moves, so that the seed alone decides the result."""
    at_once: Annotated[int, Within(0, 65536)] = 0
    """Under --scheduler roundpipe, microbatches that go through a span before another is loaded; 0 for half of them.
    Their gradients are summed first, so the sum depends on it, and not on --workers."""
    rule: Literal["ready", "round_robin"] = "ready"
    """Under --scheduler roundpipe, who gets the next span: the worker that will be through with it first, by measured
    speed, or the next one in turn, as published."""
    optimizer_async: bool = False
    """Under --scheduler roundpipe, apply an update while the next iteration computes with the weights before it."""
    cpu_adam: Literal["torch", "deepspeed"] = "torch"
    """Under --scheduler roundpipe, whose AdamW updates the weights in host memory; torch's is the faster one."""
    span_mib: Annotated[int, Within(0, 2**24)] = 0
    """Under --scheduler roundpipe, MiB that the weights of one span may take: a worker holds two of them, and on a GPU
    one's gradients; 0 for no limit."""
    lora_rank: Annotated[int, Within(0, 65536)] = 0
    """Under --scheduler roundpipe, train low-rank adapters of this rank and nothing else (LoRA, through peft; needs the
    lora extra); 0 trains all weights."""
    lora_alpha: Annotated[float, Within(0, 1_000_000, above=True)] = 16.0
    """What an adapter adds is multiplied by this, divided by --lora-rank."""
    lora_targets: str = ALL_LINEAR
    """What gets adapters: all-linear (every linear layer of the decoder blocks), or names separated by commas, such as
    q_proj,v_proj."""
    chunks: Annotated[int, Within(1, 1024)] = 2
    """Spans per worker under --scheduler interleaved."""
    microbatches: Annotated[int, Within(1, 65536)] = 8
    """Microbatches per step, over all replicas."""
    microbatch_size: Annotated[int, Within(1, 65536)] = 4
    """Samples per microbatch."""
    sequence_length: Annotated[int, Within(1, 2**24)] = 128
    """Tokens per sample."""
    steps: Annotated[int, Within(1, MOST_STEPS)] = 240
    """Optimizer steps of the whole run, counted from its first start."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes under autocast; weights, gradients and optimizer state stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where it is present."""
    threads: Annotated[int, Within(0, 1024)] = 0
    """Compute threads per worker; 0 shares the cores of the machine evenly, at least one each."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    ends: Literal["auto", "in-line", "home", "apart"] = "auto"
    """Where the embedding and the head go: in-line with the blocks, the head home to the first worker, or both apart
    from the blocks on a worker of their own (--scheduler one_f_one_b); auto is in-line unless --recovery needs more."""

    model: str = "llama-2m"
    """A preset (see `unbroken doctor`), a directory with config.json and safetensors, a config.json, or a GGUF file."""
    dropout: Annotated[float | None, Within(0, 1, below=True)] = None
    """Dropout probability where the model has dropout (GPT-2); unset keeps the model's own."""
    data: str | None = None
    """`stdlib` (the sources of Python's standard library), files of text or JSON, globs, or hf:NAME for a dataset.
    Unset, it is stdlib where weights begin at random; weights that were trained before need to be told."""
    text_field: str = "text"
    """The field of a JSON object or of a dataset's row that holds the text."""
    tokenizer: Literal["auto", "bytes", "bpe", "model"] = "auto"
    """bpe is trained on the corpus; auto takes the model's own where it has one, else bpe."""
    vocabulary: Annotated[int, Within(258, 2**20, note=" (a token per byte, and 2)")] = 2048
    """Vocabulary of a trained BPE."""
    held_out: Annotated[float, Within(0, 1, above=True, below=True)] = 0.02
    """Share of the corpus that is kept for evaluation and never trained on."""
    max_tokens: Annotated[int, Within(0, 10**12)] = 4_000_000
    """Tokens of the corpus that are used at most; 0 for all."""

    lr: Annotated[float | None, Within(0, 100, above=True)] = None
    """Peak learning rate of AdamW. Unset, it is 2e-3 where weights begin at random; 2e-5 for weights that were trained
    before, as Llama 2 was fine-tuned (arXiv 2307.09288, section 3.1); 2e-4 for adapters on these, as in QLoRA
    (2305.14314)."""
    warmup: Annotated[int | None, Within(0, MOST_STEPS)] = None
    """Steps of linear warm-up; a cosine follows. Unset, a tenth of --steps, and 20 at most."""
    min_lr_ratio: Annotated[float, Within(0, 1)] = 0.1
    """Where the cosine ends, as a share of --lr."""
    weight_decay: Annotated[float, Within(0, 100)] = 0.1
    """AdamW's decay of matrices; norms and biases do not decay."""
    beta1: Annotated[float, Within(0, 1, below=True)] = 0.9
    """AdamW's first moment decay."""
    beta2: Annotated[float, Within(0, 1, below=True)] = 0.95
    """AdamW's second moment decay."""
    eps: Annotated[float, Within(0, 1, above=True)] = 1e-8
    """AdamW's epsilon."""
    clip: Annotated[float, Within(0, 1_000_000)] = 1.0
    """Global gradient norm above which gradients are scaled down; 0 never."""
    seed: Annotated[int, Within(-(2**63), 2**63 - 1)] = 0
    """Everything random is keyed by it."""

    out: Path = Path("runs/default")
    """The run folder: config, metrics, events, checkpoints, model and pictures."""
    resume: bool = False
    """Go on from the newest valid checkpoint in --out, with the settings in its config.toml but for those given now."""
    change: bool = False
    """With --resume, allow settings that make another run of it: learning rate, batch, seed, data and the like."""
    checkpoint_every: Annotated[int, Within(0, MOST_STEPS)] = 80
    """Steps between checkpoints; 0 saves only on SIGTERM and at the end."""
    keep: Annotated[int, Within(1, 10_000)] = 2
    """Checkpoints that are kept."""
    evaluate_every: Annotated[int, Within(0, MOST_STEPS)] = 80
    """Steps between evaluations on held-out text; 0 evaluates only at the end."""
    evaluate_samples: Annotated[int, Within(1, 1_000_000)] = 64
    """Held-out samples per evaluation."""
    tensorboard: bool = False
    """Write TensorBoard event files too (needs the tensorboard extra)."""
    sample_tokens: Annotated[int, Within(0, 65536)] = 60
    """Tokens of the continuation that is sampled at the end; 0 for none."""

    recovery: str = "auto"
    """What brings the state of a lost worker back: auto, replica, checkfree, checkfree+, redundant,
    copy, random, checkpoint, or none."""
    checkfree_weights: Literal["norm", "norm_squared", "uniform"] = "norm"
    """How checkfree weighs both neighbours: by their gradient norms, the squares of these, or alike."""
    inject: str = ""
    """Faults to inject, e.g. 'kill:worker=2,step=30,at=backward' or 'rate:p=0.002,stages=1-4,seed=7'; ; between.
    They are of this start: --resume does not repeat them."""
    heartbeat: Annotated[float, Within(2, WEEK_S, note=" (seconds)")] = 10.0
    """Seconds without a sign of life after which a worker is given up."""
    spares: Annotated[int, Within(0, 1024)] = 0
    """Workers per agent that wait with everything loaded, to take a lost one's place a little sooner."""
    max_failures: Annotated[int, Within(0, 10**9)] = 100
    """Lost workers after which the run gives up."""

    network: Path | None = None
    """JSON with latency_s and bandwidth matrices: links between workers are slowed down to it (one machine only)."""
    deadline: Annotated[float, Within(0, WEEK_S, above=True, note=" (a week)")] = 300.0
    """Seconds after which a worker that is busy with one step is given up."""
    nodes: Annotated[int, Within(1, 1024)] = 1
    """Machines of the run. On each the same command is given, under torchrun or not, with its own --node-rank; --out
    must be a folder that all of them see."""
    node_rank: Annotated[int, Within(0, 1023)] = 0
    """This machine's number; 0 hosts the store and speaks to the user."""
    store: str = ""
    """HOST:PORT of node 0 where all machines meet; needed with --nodes."""
    store_port: Annotated[int, Within(0, 65535)] = 0
    """TCP port of the store on this machine; 0 takes a free one."""
