"""What settings and a model's config tell by themselves: refused before any text is read or a tokenizer is trained."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from jobs.config import ConfigError, TrainConfig, require
from jobs.pipelines import find_routes, require_layers
from jobs.rounds import require_room
from pipeline.model.compiled import lacking
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import PRESETS
from recovery import rehearse

BYTES = 258
"""Tokens of a byte-level tokenizer: one for each byte, and two."""


def tokenizer_kind(config: TrainConfig, source: Path | None) -> str:
    """ "bytes", "bpe", "model" for the one in `source` or in the folder of a run that is resumed, or a directory."""
    if config.resume and (config.out / "tokenizer").is_dir():
        return "model"
    if config.tokenizer != "auto":
        return config.tokenizer
    own = source is not None and any((source / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json"))
    return "model" if own else "bpe"


def check_early(config: TrainConfig, model_config: PreTrainedConfig, source: Path | None) -> LayeredModel:
    """The model with as many tokens as it may get. Raises ConfigError, ModelError, PartitionError or InjectionError for
    settings that cannot work with it, whatever the text is."""
    asked = {"bytes": BYTES, "bpe": config.vocabulary}.get(tokenizer_kind(config, source))
    model_config, own = copy.deepcopy(model_config), config.model in PRESETS
    if own:
        model_config.vocab_size = asked or config.vocabulary
    elif asked is not None and asked > int(model_config.vocab_size):
        raise ConfigError(
            f"tokenizer {config.tokenizer!r} has {asked} tokens; model {config.model!r} allows at most "
            f"{model_config.vocab_size}" + ("; see vocabulary" if asked != BYTES else "")
        )
    longest = getattr(model_config, "max_position_embeddings", None)
    require(
        longest is None or config.sequence_length <= longest, "sequence_length", config.sequence_length,
        f"at most {longest} for model {config.model}",
    )  # fmt: skip
    model = LayeredModel(model_config, lora=config.lora(), trained=config.patterns())
    check_compile(config, model)
    rehearse.require_room(config, model)
    if config.scheduler == "roundpipe":
        ends = 0 if not own else 1  # which depend on the tokenizer
        require_room(config, model, range(ends, model.num_layers - ends))
    elif config.scheduler == "skippipe":
        config.faults(find_routes(config, model, config.evaluate_samples).num_stages)
    else:
        require_layers(config, model.num_layers)
    return model


def check_compile(config: TrainConfig, model: LayeredModel) -> None:
    """Raise ConfigError where blocks are to be compiled that cannot be."""
    if not config.compile:
        return
    require(not model.has_dropout, "compile", True, "unset: the model has dropout, which is keyed by sample")
    require(not config.is_procedure, "compile", True, "unset: the method looks into the blocks")
    if config.cluster:  # no worker is here: one that cannot compile ends the run by name
        return
    kind = "cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu"
    missing = lacking(kind)
    require(not missing, "compile", True, f"unset, since {missing} is not here")


def set_dropout(model_config: PreTrainedConfig, config: TrainConfig) -> None:
    """Set every dropout probability that the model's family has. Raises ConfigError where it has none."""
    names = [n for n in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout") if hasattr(model_config, n)]
    require(bool(names), "dropout", config.dropout, f"nothing for {model_config.model_type}, which has no dropout")
    for name in names:
        setattr(model_config, name, config.dropout)
