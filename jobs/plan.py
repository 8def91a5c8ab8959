"""From settings to a first view: the model's shape, the corpus, the cut into spans and the verified schedules.

Only the coordinator plans. What it decides is written into the view, so that every worker, on whatever machine, reads
the same thing; what it writes to the run folder is whole or absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from jobs.cache import Cache, user_folder
from jobs.config import ConfigError, TrainConfig, require
from jobs.corpus import TEXT_FIELD, Corpus
from jobs.dcp import is_dcp, load_dcp
from jobs.early import check_early, set_dropout, tokenizer_kind
from jobs.mixture import Mixture, plain_spec
from jobs.network import read_network
from jobs.pipelines import layer_costs, plan_layout
from jobs.prepare_data import Preparation, Prepared, Text, open_data
from jobs.remarks import remarks
from jobs.resizing import make_planner, resize_problem
from jobs.resume import check_resumed, other_data
from jobs.rounds import Rounds, plan_rounds
from jobs.space import check_space, space_needed
from jobs.tokenizer import TOKENIZERS, build_tokenizer
from jobs.unlearn.guard import require_plain
from jobs.unlearn.request import require_complete
from pipeline.model.flops import ModelFlops
from pipeline.model.layered import LayeredModel
from pipeline.model.trained import ALL
from pipeline.model.weights import PRESETS, drawn, read_config, resolve
from pipeline.schedule.layout import Layout
from recovery import checkpoint
from recovery.generation import read_generation
from recovery.membership import View
from recovery.reroute import Planner
from recovery.resize import Resize
from recovery.speeds import Speeds

Progress = Callable[[str, float], None]
"""(what is being done, share done from 0 to 1)."""


@dataclass(frozen=True)
class Plan:
    """What the coordinator hands to the agents and keeps for its report. `notes`: skipped checkpoints, and why."""

    view: View
    layout: Layout
    model: LayeredModel
    notes: tuple[tuple[str, str], ...] = ()
    around: Planner | None = None
    rounds: Rounds | None = None
    said: tuple[str, ...] = ()
    """Lines for a person, before the first step."""
    resize: Resize | None = None


def evaluation_samples(config: TrainConfig, dataset: Prepared) -> int:
    """Held-out samples of one evaluation: those asked for, or as many as there are."""
    return min(config.evaluate_samples, dataset.num_held_out)


@dataclass(frozen=True)
class Material:
    """What is trained, and on what: the model's shape, the directory of the weights that it begins with, if it has any,
    and the tokens."""

    model: LayeredModel
    source: Path | None
    dataset: Prepared


def make_plan(
    config: TrainConfig, progress: Progress, before: TrainConfig | None = None, prepared: bool = False
) -> Plan:
    """Everything up to the first view. `before` are the settings that a run to be resumed has had. `prepared` takes
    tokens, tokenizer and the model's shape as they lie in the run folder, and reads no text. Raises ConfigError,
    CorpusError, ModelError or CheckpointError by name."""
    config = config.resolved()
    config.validate()
    out = config.out
    require_complete(out)
    require_plain(out)
    found = find_start(config)
    first_step, said = 0, list[str]()
    if found.manifest is not None:
        first_step = int(found.manifest["extra"]["step"])
        changed = [] if before is None else check_resumed(before, config)
        if changed:
            said.append(f"changed since the last start: {', '.join(changed)}")
        if before is None:
            said.append(f"{str(out / 'config.toml')!r} is not there: what was not given now has its default")
    said += remarks(config, first_step)
    if config.network is not None:
        read_network(config.network, config.workers)
    make = _opened if prepared else _made
    material = make(config, found, before, said, progress)
    evaluated = evaluation_samples(config, material.dataset)
    return planned(config, material.model, material.source, found, evaluated, said)


def planned(
    config: TrainConfig, model: LayeredModel, source: Path | None, found: checkpoint.Found, evaluated: int,
    said: Sequence[str] = (),
) -> Plan:  # fmt: skip
    """The layout of a job whose model and data are known, and the first view. `source` has the weights that it begins
    with, if they are not random; `found` is where it goes on from; `evaluated` counts the samples of an evaluation.
    Raises ConfigError, PartitionError."""
    first_step = first_sample = 0
    if found.manifest is not None:
        first_step, first_sample = (int(found.manifest["extra"][name]) for name in ("step", "next_sample"))
    rounds: Rounds | None = None
    around: Planner | None = None
    resize: Resize | None = None
    if config.scheduler == "roundpipe":
        rounds = plan_rounds(config, model, layer_costs(model, config.sequence_length), evaluated)
        layout = rounds.layout
    else:
        layout, around = plan_layout(config, model, evaluated)
        if config.min_workers:
            problem = resize_problem(config, model, layer_costs(model, config.sequence_length), evaluated)
            resize = Resize(
                make_planner(problem, layout), config.min_workers, config.cooldown, config.wait, config.spares,
                config.shift, float(config.migration_mib << 20), problem.layer_bytes, Speeds(problem.layer_costs),
            )  # fmt: skip
    view = View(
        number=1,
        workers=tuple(range(config.workers)),
        layout=layout.key,
        first_step=first_step,
        first_sample=first_sample,
        checkpoint=None if found.path is None else str(found.path),
        places={worker: worker for worker in range(config.workers)},
        next_worker=config.workers,
        generation=read_generation(config.out),
        details={
            "config": json.loads(json.dumps(asdict(config), default=str)),
            "source": None if source is None else str(source),
            "attempt": checkpoint.last_attempt(config.out / "checkpoints") + 1,
            "job": config.job,
            "flops": ModelFlops.of(model, config.microbatch_size, config.sequence_length).as_json(),
            "carried": None if found.manifest is None else found.manifest["extra"].get("job"),
            "watched": {} if found.manifest is None else found.manifest["extra"].get("watched", {}),
        },
    )
    notes = tuple((path.name, reason) for path, reason in found.skipped)
    return Plan(view, layout, model, notes, around, rounds, tuple(said), resize)


def _made(
    config: TrainConfig, found: checkpoint.Found, before: TrainConfig | None, said: list[str], progress: Progress
) -> Material:
    """Made of the text and the model that the settings name, and kept in the run folder."""
    out = config.out
    model_config, source = find_model(config)
    if config.dropout is not None:
        set_dropout(model_config, config)
    if (kind := tokenizer_kind(config, source)) not in TOKENIZERS:  # a directory
        config = replace(config, vocabulary=len(build_tokenizer(kind, 0, ())))
    largest = check_early(config, model_config, source)
    _tell_space(config, found, largest)  # before text is read, which may take long
    text = Text.read(plain_spec(config.data or ""), config.text_field, said.append)
    rows, corpus = text.rows, text.corpus
    require(rows is None or config.text_field == TEXT_FIELD, "text_field", config.text_field, "unset for rows")
    require(rows is not None or config.held_out != 0, "held_out", config.held_out, "above 0 for text")
    require(rows is None or not config.document_mask, "document_mask", True, "unset for rows, which pack keeps apart")
    require(rows is not None or not config.pack, "pack", config.pack, "unset for text, which is always packed")
    said.append(_tell_space(config, found, largest, corpus.most_tokens))
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
    model = _model(config, found, model_config)

    def same_data(fingerprint: str) -> None:
        had = None if found.manifest is None else found.manifest["extra"].get("data")
        if had not in (None, fingerprint) and not config.change:
            raise ConfigError(other_data(before, config, f"its fingerprint was {had} and is {fingerprint}"))

    if rows is not None:
        said.append(f"{len(rows):,} rows: the answers are learned{', several in a sample' if config.pack else ''}")
    dataset = Preparation(config, tokenizer, cache, progress, same_data).run(text)
    if isinstance(dataset, Mixture):
        shares = ", ".join(f"{source.count} of {source.spec}" for source in dataset.sources)
        said.append(f"a mixture: of every {dataset.window} samples {shares}")
    if found.path is None:
        tokenizer.save_pretrained(out / "tokenizer")
        model_config.save_pretrained(out / "model-config")
    return Material(model, source, dataset)


def _opened(
    config: TrainConfig, found: checkpoint.Found, before: TrainConfig | None, said: list[str], progress: Progress
) -> Material:
    """As it lies in the run folder: there the model's shape is that of the tokenizer, with the dropout of the settings.
    The weights that the run began with are needed where no checkpoint has taken their place."""
    model_config = read_config(config.out / "model-config")
    source = None if found.path is not None or drawn(config.model) else find_model(config)[1]
    check_early(config, model_config, source)
    model = _model(config, found, model_config)
    said.append(_tell_space(config, found, model, 0))
    return Material(model, source, open_dataset(config.out))


def _model(config: TrainConfig, found: checkpoint.Found, model_config: PreTrainedConfig) -> LayeredModel:
    """The model. Raises CheckpointError where the checkpoint is of another."""
    model = LayeredModel(model_config, lora=config.lora(), trained=config.patterns())
    if found.manifest is not None:
        now = {"trained": None, **kept_identity(config)}
        checkpoint.check_compatible(found.manifest, model=model_fingerprint(model_config), **now)
    return model


def _tell_space(
    config: TrainConfig, found: checkpoint.Found, model: LayeredModel, most_tokens: int | None = None
) -> str:
    """See `check_space`."""
    first_step = 0 if found.manifest is None else int(found.manifest["extra"]["step"])
    there = sum(path.suffix != ".tmp" for path in (config.out / "checkpoints").glob("step-*"))
    return check_space(config.out, space_needed(config, model, first_step, there, most_tokens))


def find_start(config: TrainConfig) -> checkpoint.Found:
    """The checkpoint that the run goes on from, if it is resumed. Raises ConfigError where there is none to go on from,
    and where there is one that nobody has asked for."""
    root = config.out / "checkpoints"
    found = checkpoint.find(root, read_generation(config.out))
    if found.path is not None and not config.resume:
        raise ConfigError(
            f"out is {str(config.out)!r}, which holds checkpoints (newest: {found.path.name}); "
            "allowed: --resume to go on from them, or another folder"
        )
    if config.resume and found.path is None:
        told = "".join(f"; {path.name} is skipped: {reason}" for path, reason in found.skipped)
        raise ConfigError(f"resume is set, but {str(root)!r} holds no valid checkpoint{told}")
    if found.manifest is not None and found.path is not None:
        step = int(found.manifest["extra"]["step"])
        require(
            config.steps >= step, "steps", config.steps, f"{step} or more: {found.path.name} is at step {step}"
        )  # fmt: skip
        require(config.last_step >= step, "until", config.until, f"{step} or more: {found.path.name} is at step {step}")
    return found


def find_model(config: TrainConfig) -> tuple[PreTrainedConfig, Path | None]:
    """The model's shape, and the directory of its weights if it has any. Raises ModelError."""
    path = Path(config.model)
    model = load_dcp(path, config.out / "converted") if is_dcp(path) else config.model
    found = resolve(model, config.out / "converted")
    return (read_config(found), found) if isinstance(found, Path) else (found, None)


def find_tokenizer(
    config: TrainConfig, source: Path | None, corpus: Corpus, cache: Cache, progress: Progress
) -> PreTrainedTokenizerBase:
    """The tokenizer that the settings name: the model's own, bytes, a BPE trained on the corpus, or a directory's."""
    kind, saved = tokenizer_kind(config, source), config.out / "tokenizer"
    if config.resume and saved.is_dir():
        return build_tokenizer(kind, 0, (), saved)
    return build_tokenizer(kind, config.vocabulary, corpus, source, progress, cache)


def identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that a run cannot change when it is resumed, beside its model and its data."""
    lora = config.lora()
    adapters = None if lora is None else lora.identity()
    trained = {} if config.trained == ALL else {"trained": config.trained}
    return {"seed": config.seed, "tokenizer": config.tokenizer, "lora": adapters, **trained}


def kept_identity(config: TrainConfig) -> dict[str, Any]:
    """The part of `identity` that a checkpoint must agree with: the seed may be changed by who says so."""
    return {name: value for name, value in identity(config).items() if not (config.change and name == "seed")}


def model_fingerprint(model_config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a model's shape that weights depend on: what a checkpoint must agree with."""
    ignored = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "architectures"}
    fields = json.loads(model_config.to_json_string(use_diff=False))
    return {key: value for key, value in sorted(fields.items()) if key not in ignored and not key.startswith("_")}


def open_dataset(out: Path) -> Prepared:
    """The tokens that `make_plan` prepared in a run folder, of text, of rows or of a mixture. Raises CorpusError."""
    return open_data(out / "data")
