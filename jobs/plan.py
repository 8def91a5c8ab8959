"""From settings to a first view: the model's shape, the corpus, the cut into spans and the verified schedules.

Only the coordinator plans. What it decides is written into the view, so that every worker, on whatever machine, reads
the same thing; what it writes to the run folder is whole or absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from jobs.cache import Cache, user_folder
from jobs.config import ConfigError, TrainConfig, require
from jobs.corpus import Corpus, documents
from jobs.data import Dataset
from jobs.network import read_network
from jobs.prepare import prepare
from jobs.rounds import Rounds, plan_rounds
from jobs.routes import Routes
from jobs.tokenizer import build_tokenizer
from pipeline.lower import add_redundant, lower
from pipeline.model import LayeredModel
from pipeline.schedule import Schedule, Span, dumps
from pipeline.transport import span_bytes
from pipeline.verify import verify
from pipeline.weights import PRESETS, read_config, resolve
from recovery import checkpoint, redundant
from recovery.membership import View
from recovery.reroute import Planner
from schedulers import num_spans, plan
from schedulers.plan import Ends

Progress = Callable[[str, float], None]
"""(what is being done, share done from 0 to 1)."""


@dataclass(frozen=True)
class Plan:
    """What the coordinator hands to the agents and keeps for its report. `notes`: skipped checkpoints, and why."""

    view: View
    model: LayeredModel
    notes: tuple[tuple[str, str], ...] = ()
    around: Planner | None = None
    rounds: Rounds | None = None


_SMALL_OPS = 1.2  # what norms, activations and rotations add to a block (measured at dim 384: a fifth)


def layer_costs(model: LayeredModel, sequence_length: int) -> list[float]:
    """Floating point operations per token of each layer's forward, counting products only (2 per weight, and
    attention's 4 * sequence * hidden / 2 under a causal mask). The embedding is a look-up: next to nothing."""
    hidden, vocabulary = model.hidden_size, int(model.config.vocab_size)
    blocks = [
        _SMALL_OPS * (2.0 * model.parameter_count(layer) + 2.0 * sequence_length * hidden)
        for layer in range(1, model.num_layers - 1)
    ]
    return [0.01 * hidden, *blocks, 2.0 * hidden * vocabulary]


def schedules(
    config: TrainConfig, model: LayeredModel, evaluated: int
) -> tuple[Mapping[str, Schedule], Planner | None]:
    """The lowered and verified schedules of one step and of one evaluation of `evaluated` samples; and what gives
    those for the workers that are left, where microbatches may take other routes.

    Raises ConfigError where the model has fewer layers than the settings ask for spans.
    """
    costs = layer_costs(model, config.sequence_length)
    if config.scheduler == "skippipe":
        size = span_bytes(config.microbatch_size, config.sequence_length, model.hidden_size, torch.float32)
        routes = Routes(config, costs, evaluated, size)
        return routes.schedules, routes.around
    ends = where_ends_go(config)
    asked = num_spans(config.scheduler, config.stages, config.chunks) + (ends != "in-line")
    if asked > len(costs):
        by = f" x chunks {config.chunks}" if config.scheduler == "interleaved" else ""
        raise ConfigError(
            f"workers {config.workers} / replicas {config.replicas}{by} asks for {asked} spans; "
            f"allowed: at most {len(costs)}, the layers of the model"
        )
    made: dict[str, Schedule] = {}
    for purpose, count in (("train", None), ("evaluate", -(-evaluated // config.microbatch_size))):
        schedule = plan(
            config.scheduler, costs, config.stages, config.microbatches, config.replicas, chunks=config.chunks,
            evaluated=count, ends=ends, swap=config.recovery == "checkfree+",
        )  # fmt: skip
        if config.recovery == "redundant" and count is None:
            schedule = add_redundant(schedule, shadows(config, schedule))
        made[purpose] = lower(schedule)
        verify(made[purpose])
    return made, None


def where_ends_go(config: TrainConfig) -> Ends:
    """Where the embedding and the head are placed: apart from the blocks where stages are to be alike (CheckFree)."""
    alike = config.recovery == "checkfree+" or (config.recovery == "checkfree" and config.stages > 3)
    if config.ends == "auto":
        return "apart" if alike and config.scheduler == "one_f_one_b" else "in-line"
    return config.ends


def shadows(config: TrainConfig, schedule: Schedule) -> tuple[tuple[Span, int], ...]:
    """Copies that are kept for recovery alone, as (span, worker): under checkfree+ both ends on the second worker,
    under redundant each stage on the one before it."""
    holders, found = schedule.holders, list[tuple[Span, int]]()
    for base in range(0, config.workers, config.stages):
        if config.recovery == "checkfree+":
            found += [(span, base + 1) for span in (min(holders), max(holders))]
        elif config.recovery == "redundant":
            stages = [[s for s, workers in holders.items() if base + k in workers] for k in range(config.stages)]
            found += [(span, base + worker) for span, worker in redundant.copies(stages)]
    return tuple(found)


def stage_at(config: TrainConfig, view: View, place: int) -> int | None:
    """The stage of the first replica in a place, in the first view of the run; None for the others."""
    if config.scheduler == "skippipe":
        holders = view.schedule("train").holders
        return next((i for i, span in enumerate(holders) if holders[span][0] == place and span != max(holders)), None)
    return place if place < config.stages else None


def evaluation_samples(config: TrainConfig, dataset: Dataset) -> int:
    """Held-out samples of one evaluation: those asked for, or as many as there are."""
    return min(config.evaluate_samples, dataset.num_held_out)


def make_plan(config: TrainConfig, progress: Progress) -> Plan:
    """Everything up to the first view. Raises ConfigError, CorpusError, ModelError or CheckpointError by name."""
    config.validate()
    out = config.out
    found = checkpoint.find(out / "checkpoints")
    if found.path is not None and not config.resume:
        raise ConfigError(
            f"out is {str(out)!r}, which holds checkpoints (newest: {found.path.name}); "
            "allowed: --resume to go on from them, or another folder"
        )
    notes = [(path.name, reason) for path, reason in found.skipped]
    if config.resume and found.path is None:
        told = "; ".join(f"{name} is skipped: {reason}" for name, reason in notes)
        raise ConfigError(f"resume is set, but {str(out / 'checkpoints')!r} holds no valid checkpoint; {told}")
    if config.network is not None:
        read_network(config.network, config.workers)
    model_config, source = find_model(config)
    corpus = documents(config.data, text_field=config.text_field)
    cache = Cache(user_folder(), lambda line: progress(line, 1.0))
    tokenizer = find_tokenizer(config, source, corpus, cache, progress)
    if config.model in PRESETS:
        model_config.vocab_size = len(tokenizer)
        model_config.bos_token_id = model_config.eos_token_id = tokenizer.eos_token_id
        model_config.pad_token_id = tokenizer.pad_token_id
    elif len(tokenizer) > int(model_config.vocab_size):
        raise ConfigError(
            f"tokenizer {config.tokenizer!r} has {len(tokenizer)} tokens; "
            f"model {config.model!r} allows at most {model_config.vocab_size}"
        )
    if config.dropout is not None:
        set_dropout(model_config, config)
    longest = getattr(model_config, "max_position_embeddings", None)
    require(
        longest is None or config.sequence_length <= longest, "sequence_length", config.sequence_length,
        f"at most {longest} for model {config.model}",
    )  # fmt: skip
    model = LayeredModel(model_config, lora=config.lora())
    extra: dict[str, Any] = {}
    if found.path is not None:
        assert found.manifest is not None
        extra = found.manifest["extra"]
        checkpoint.check_compatible(found.manifest, model=model_fingerprint(model_config), **identity(config))
        require(
            config.steps >= int(extra["step"]), "steps", config.steps,
            f"{extra['step']} or more: {found.path.name} is at step {extra['step']}",
        )  # fmt: skip

    def same_data(fingerprint: str) -> None:
        if found.manifest is not None:
            checkpoint.check_compatible(found.manifest, data=fingerprint)

    dataset = prepare(
        corpus, tokenizer, config.sequence_length, config.held_out, out / "data", config.seed,
        max_tokens=config.max_tokens or None, samples_per_step=config.samples_per_step, progress=progress,
        accept=same_data, cache=cache,
    )  # fmt: skip
    if found.path is None:
        tokenizer.save_pretrained(out / "tokenizer")
        model_config.save_pretrained(out / "model-config")
    first_step = first_sample = 0
    if found.path is not None:
        first_step, first_sample = int(extra["step"]), int(extra["next_sample"])
    rounds: Rounds | None = None
    if config.scheduler == "roundpipe":
        costs = layer_costs(model, config.sequence_length)
        rounds = plan_rounds(config, model, costs, evaluation_samples(config, dataset))
        made, around = rounds.schedules, None
    else:
        made, around = schedules(config, model, evaluation_samples(config, dataset))
    view = View(
        number=1,
        workers=tuple(range(config.workers)),
        schedules={purpose: dumps(schedule) for purpose, schedule in made.items()},
        first_step=first_step,
        first_sample=first_sample,
        checkpoint=None if found.path is None else str(found.path),
        places={worker: worker for worker in range(config.workers)},
        shadows=() if rounds else shadows(config, made["train"]),
        next_worker=config.workers,
        details={
            "config": json.loads(json.dumps(asdict(config), default=str)),
            "source": None if source is None else str(source),
            "attempt": checkpoint.last_attempt(out / "checkpoints") + 1,
        },
    )
    return Plan(view, model, tuple(notes), around, rounds)


def find_model(config: TrainConfig) -> tuple[PreTrainedConfig, Path | None]:
    """The model's shape, and the directory of its weights if it has any. Raises ModelError."""
    found = resolve(config.model, config.out / "converted")
    return (read_config(found), found) if isinstance(found, Path) else (found, None)


def find_tokenizer(
    config: TrainConfig, source: Path | None, corpus: Corpus, cache: Cache, progress: Progress
) -> PreTrainedTokenizerBase:
    """The tokenizer that the settings name: the model's own, bytes, or a BPE trained on the corpus."""
    kind = config.tokenizer
    saved = config.out / "tokenizer"
    if config.resume and saved.is_dir():
        return build_tokenizer("model", 0, (), saved)
    if kind == "auto":
        own = source is not None and any((source / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json"))
        kind = "model" if own else "bpe"
    return build_tokenizer(kind, config.vocabulary, corpus, source, progress, cache)


def identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that a run cannot change when it is resumed, beside its model and its data."""
    lora = config.lora()
    return {"seed": config.seed, "tokenizer": config.tokenizer, "lora": None if lora is None else asdict(lora)}


def set_dropout(model_config: PreTrainedConfig, config: TrainConfig) -> None:
    """Set every dropout probability that the model's family has. Raises ConfigError where it has none."""
    names = [n for n in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout") if hasattr(model_config, n)]
    require(bool(names), "dropout", config.dropout, f"nothing for {model_config.model_type}, which has no dropout")
    for name in names:
        setattr(model_config, name, config.dropout)


def model_fingerprint(model_config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a model's shape that weights depend on: what a checkpoint must agree with."""
    ignored = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "architectures"}
    fields = json.loads(model_config.to_json_string(use_diff=False))
    return {key: value for key, value in sorted(fields.items()) if key not in ignored and not key.startswith("_")}


def open_dataset(out: Path) -> Dataset:
    """The tokens that `make_plan` prepared in a run folder."""
    return Dataset.open(out / "data")
