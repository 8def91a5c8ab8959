"""The settings of a training job that no scheduler, remedy or optimizer owns: each with its default, its text (which is
its --help) and the numbers that it may be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pipeline.settings import MOST_STEPS, RunShape, Within, require, require_known

TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class ModelSettings:
    """What is trained, and how it is computed."""

    model: str = "llama-2m"
    """A preset (see `unbroken doctor`), a directory with config.json and safetensors or with a distributed checkpoint
    of PyTorch (DCP), the id of one that `hf download` has fetched, a config.json, or a GGUF file."""
    dropout: Annotated[float | None, Within(0, 1, below=True)] = None
    """Dropout probability where the model has dropout (GPT-2); unset keeps the model's own."""
    seed: Annotated[int, Within(-(2**63), 2**63 - 1)] = 0
    """Everything random is keyed by it."""
    steps: Annotated[int, Within(1, MOST_STEPS)] = 240
    """Optimizer steps of the whole run, counted from its first start."""
    until: Annotated[int, Within(0, MOST_STEPS)] = 0
    """End this start of the run after so many of its steps, with a checkpoint and the model as of then; 0 goes on to
    --steps. The learning rate is that of the whole run, which --resume goes on with."""
    microbatch_size: Annotated[int, Within(1, 65536)] = 4
    """Samples per microbatch: what others call the batch size per device, or the micro or local batch size."""
    sequence_length: Annotated[int, Within(1, 2**24)] = 128
    """Tokens per sample."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes under autocast; weights, gradients and optimizer state stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where it is present."""
    threads: Annotated[int, Within(0, 1024)] = 0
    """Compute threads per worker; 0 shares the cores of the machine evenly, at least one each."""
    peak_tflops: Annotated[float | None, Within(0, 1_000_000, above=True)] = None
    """TFLOP/s that a device could do at most, of dense products in --dtype: what the utilisation (MFU) in metrics.jsonl
    is measured against. Unset, it is that of the data sheet of a GPU that is known, and on a CPU there is none. There
    every worker has a device of its own: its threads."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile decoder blocks (torch.compile): it pays where activations are kept, and every worker starts seconds
    later. Weight gradients are then computed with the backward pass, also in schedules that put them off (zero_bubble,
    balanced)."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError where a start of the run would end after the run itself."""
        require(self.until <= self.steps, "until", self.until, f"0 to {self.steps}, the steps of the run")


@dataclass(frozen=True)
class DataSettings:
    """The text, and how it becomes tokens."""

    data: str | None = None
    """`stdlib` (the sources of Python's standard library), files of text or JSON, globs, or hf:NAME for a dataset. JSON
    with prompt and completion, question and answer, or messages is rows, of which the answers are learned. Unset, it is
    stdlib where weights begin at random; weights that were trained before need to be told. Several, each with a weight
    (a.jsonl:0.7 b.txt:0.3, or a table in TOML), are a mixture: of samples, in exact shares."""
    text_field: str = "text"
    """The field of a JSON object or of a dataset's row that holds the text."""
    tokenizer: str = "auto"
    """bytes, bpe (trained on the corpus), model (the model's own), auto (that, where it has one, else bpe), or a
    directory with a tokenizer, such as that of another run."""
    vocabulary: Annotated[int, Within(258, 2**20, note=" (a token per byte, and 2)")] = 2048
    """Vocabulary of a trained BPE."""
    held_out: Annotated[float | None, Within(0, 1, below=True)] = None
    """Share of the corpus that is kept for evaluation and never trained on. Unset, it is 0.02 of text, and nothing of
    rows of questions and answers: then those that are trained on are evaluated."""
    pack: bool = False
    """Of rows of questions and answers, have as many in a sample as fit: none of them sees another."""
    document_mask: bool = False
    """Of packed text, have no token see another document of its sample: attention and positions begin anew in each."""
    max_tokens: Annotated[int, Within(0, 10**12)] = 4_000_000
    """Tokens of the corpus that are used at most, of each source of a mixture its share; 0 for all."""


@dataclass(frozen=True)
class OutputSettings:
    """The run folder, and what goes there when."""

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
    patience: Annotated[int, Within(0, MOST_STEPS)] = 0
    """End the run, whole, after so many evaluations in a row whose held-out loss was no lower than the lowest before; 0
    goes on to --steps."""
    export_every: Annotated[int, Within(0, MOST_STEPS)] = 0
    """Steps between models that are written to exports/step-NUMBER/model, for transformers to load; 0 writes the one at
    the end alone."""
    track: str = ""
    """Where metrics and events go too: some of tensorboard, wandb and mlflow, with commas; each needs the extra of its
    name. Their own settings come from their own environment, such as WANDB_MODE and MLFLOW_TRACKING_URI."""
    tensorboard: bool = False
    """The same as --track tensorboard."""
    sample_tokens: Annotated[int, Within(0, 65536)] = 60
    """Tokens of the continuation that is sampled at the end; 0 for none."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names of those that are asked for, each once."""
        asked = [name.strip() for name in self.track.split(",") if name.strip()]
        return tuple(dict.fromkeys([*asked, *(["tensorboard"] if self.tensorboard else [])]))

    def check(self, run: RunShape) -> None:
        """Raise ConfigError for a tracker that is none, and for a patience that nothing tries."""
        for name in self.trackers:
            require_known("track", name, TRACKERS)
        require(
            not self.patience or self.evaluate_every > 0, "patience", self.patience,
            "0 with evaluate_every 0: nothing is evaluated before the end",
        )  # fmt: skip


@dataclass(frozen=True)
class MachineSettings:
    """Where workers are, and how they meet."""

    network: Path | None = None
    """JSON with latency_s and bandwidth matrices: links between workers are slowed down to it (one machine only)."""
    nodes: Annotated[int, Within(1, 1024)] = 1
    """Machines of the run. On each the same command is given, under torchrun or not, with its own --node-rank; --out
    must be a folder that all of them see."""
    node_rank: Annotated[int, Within(0, 1023)] = 0
    """This machine's number; 0 hosts the store and speaks to the user."""
    store: str = ""
    """HOST:PORT of node 0 where all machines meet; needed with --nodes."""
    store_port: Annotated[int, Within(0, 65535)] = 0
    """TCP port of the store on this machine; 0 takes a free one."""
    token_file: Path | None = None
    """A file of mode 0600 with the token by which the run's processes know each other (32 characters or more). Unset,
    it is $UNBROKEN_TOKEN, or made anew: then other machines read it in --out."""
    links: Literal["auto", "shm", "gloo"] = "auto"
    """What workers exchange activations through: auto is shared memory between workers of one machine, and gloo's
    sockets between machines; shm is shared memory, or the run does not begin; gloo is sockets everywhere."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError where the machines of a run cannot meet."""
        require(self.node_rank < self.nodes, "node_rank", self.node_rank, f"0 to {self.nodes - 1}")
        host, _, port = self.store.rpartition(":")
        meets = bool(host) and port.isdecimal() and 0 < int(port[:6]) < 65536
        require(
            meets if self.nodes > 1 else not self.store, "store", self.store,
            "HOST:PORT of node 0" if self.nodes > 1 else "nothing with one node",
        )  # fmt: skip
        if self.network is not None:
            require(self.network.is_file(), "network", str(self.network), "a readable JSON file")
