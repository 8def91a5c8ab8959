"""`unbroken eval`: the loss of an exported model, on the very samples on which its run evaluated it or on others.

A run keeps the tokens that it holds out in its folder, beside the model that it exports. On them this loss is that of
the run's last evaluation, if the run computed in fp32 as this does. Of rows the answers count. Rows and documents that
a run keeps apart in a sample are scored each by itself.
"""

from __future__ import annotations

import math
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from jobs.config import TrainConfig
from jobs.corpus import TEXT_FIELD, documents
from jobs.data import META, Dataset
from jobs.mixture import MIXTURE, Mixture
from jobs.plan import evaluation_samples
from jobs.prepare import blocks
from jobs.prepare_data import open_data
from jobs.row_data import RowDataset, Sample
from jobs.row_prepare import Encoded
from jobs.rows import read_rows
from jobs.text import document_positions, inputs_of, token_loss
from launch.commands import Result
from launch.inference import InferenceSettings, Source, ready
from pipeline.runtime.batch import IGNORED
from pipeline.runtime.forward_bytes import scoring_bytes
from pipeline.settings import ConfigError, Within, check_groups, require

HELD_OUT = "held-out"
_SEQUENCE_LENGTH, _SAMPLES = 128, 64


@dataclass(frozen=True)
class EvalConfig(InferenceSettings):
    """Perplexity of an exported model on text."""

    model: Path = Path("runs/default/model")
    """A directory that a run exported, or any transformers model directory."""
    data: str = "auto"
    """`held-out` (the samples on which the run that exported --model evaluates it), or data as for training: `stdlib`,
    files of text or JSON, of rows the answers, globs, or hf:NAME. auto is held-out where the model lies in a run
    folder, else stdlib."""
    text_field: str = TEXT_FIELD
    """The field of a JSON object or of a dataset's row that holds the text. With one, rows are documents of text."""
    sequence_length: Annotated[int | None, Within(1, 2**24)] = None
    """Tokens per sample; unset, 128 or what the model takes, and those of the run for held-out."""
    samples: Annotated[int | None, Within(1, 1_000_000)] = None
    """Samples that are evaluated at most; unset, 64, or as many as the run evaluates for held-out."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class _Scored:
    """What is scored: samples of at most `sequence_length` tokens, and of what they are the samples, in words."""

    data: str
    whose: str
    sequence_length: int
    samples: Iterator[Sample]


def evaluate(config: EvalConfig) -> Result:
    """Mean loss per token and its exponential, and which text that was. Raises ConfigError, CorpusError,
    OffloadError and HostMemoryError."""
    check_groups(config)
    source = Source.open(config.model)
    run = config.model.resolve().parent
    found = any((run / "data" / name).is_file() for name in (META, MIXTURE))
    if config.data == HELD_OUT and not found:
        raise ConfigError(
            f"data is {HELD_OUT!r}, but model {str(config.model)!r} does not lie in a run folder: "
            f"{str(run / 'data')!r} holds no prepared tokens; allowed: a model in the folder of its run, or text"
        )
    if config.data == HELD_OUT or (config.data == "auto" and found):
        text = _held_out(config, run, int(source.config.vocab_size))
    else:
        text = _other(config, source.tokenizer, source.context_length)
    length, total, took, count, tokens = text.sequence_length, 0.0, 0.0, 0, 0
    working = partial(scoring_bytes, length=length, loss=token_loss)
    with ready(source, config, length, working, quiet=config.json) as found, torch.no_grad():
        for sample in text.samples:
            for one in sample.apart():
                ids, labels = (torch.from_numpy(each)[None].to(found.device) for each in (one.input_ids, one.labels))
                began = time.monotonic()
                total += float(token_loss(found.model(ids).logits, labels))
                took += time.monotonic() - began
                tokens += int((labels != IGNORED).sum())
            count += 1
        about = found.about() | {"tokens_per_s": tokens / max(took, 1e-9)}
    require(tokens > 0, "data", text.data, f"at least {length + 1} tokens of text, or rows, of which some count")
    mean = total / tokens
    scored = f"{count} samples of {length} tokens, {text.whose}"
    values = {
        "loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": tokens, "samples": count,
        "sequence_length": length, "data": text.data, "scored": scored, "model": str(config.model),
        **about,
    }  # fmt: skip
    return values, f"loss {mean:.4f}  perplexity {values['perplexity']:.2f}  over {tokens:,} tokens: {scored}"


def _held_out(config: EvalConfig, run: Path, vocabulary: int) -> _Scored:
    """The samples on which the run evaluates."""
    data = open_data(run / "data")
    parts = data.parts if isinstance(data, Mixture) else (data,)
    highest = max(int(_held_tokens(part).max()) for part in parts)
    length = parts[0].sequence_length
    require(
        config.sequence_length in (None, length), "sequence_length", config.sequence_length,
        f"{length}, as the held-out samples of the run in {str(run)!r} have, or nothing",
    )  # fmt: skip
    require(
        config.text_field == TEXT_FIELD, "text_field", config.text_field,
        f"nothing with data {HELD_OUT!r}, which is tokens already",
    )  # fmt: skip
    require(
        highest < vocabulary, "model", str(config.model),
        f"the one that the run in {str(run)!r} has exported; this one knows {vocabulary} tokens, not number {highest}",
    )  # fmt: skip
    asked = TrainConfig(evaluate_samples=config.samples or _evaluated(run))
    count = evaluation_samples(asked, data)
    whose = f"spread over the {data.num_held_out} that the run in {str(run)!r} has held out"
    found: Iterator[Any] = map(data.held_out_spread(count), range(count))
    apart, end = _apart(run), parts[0].end_token
    samples = (each if isinstance(each, Sample) else _of_text(each, end, apart) for each in found)
    return _Scored(HELD_OUT, whose, length, samples)


def _held_tokens(part: Dataset | RowDataset) -> np.ndarray:
    return part.tokens if isinstance(part, RowDataset) else part.tokens[: part.held_out_tokens]


def _of_text(sample: np.ndarray, end_token: int, apart: bool) -> Sample:
    """A sample of packed text [sequence + 1] int64, with IGNORED for what was forgotten."""
    inputs = inputs_of(torch.from_numpy(sample)[None], end_token)
    positions = document_positions(inputs, end_token)[0].numpy() if apart else None
    return Sample(inputs[0].numpy(), sample[1:], positions)


def _settings(run: Path) -> dict[str, Any]:
    """Those that a run has kept; raises OSError and ValueError."""
    return tomllib.loads((run / "config.toml").read_text())


def _apart(run: Path) -> bool:
    """Whether the run keeps the documents of a sample apart, as far as it tells."""
    try:
        return bool(_settings(run).get("document_mask"))
    except (OSError, ValueError):
        return False


def _evaluated(run: Path) -> int:
    """How many samples a run evaluates, by its config.toml."""
    path = run / "config.toml"
    try:
        return int(_settings(run)["evaluate_samples"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"samples is unset, and {str(path)!r} does not tell how many the run evaluates: {error}; allowed: a number"
        ) from error


def _other(config: EvalConfig, tokenizer: PreTrainedTokenizerBase, longest: int) -> _Scored:
    """The first samples of any text or rows. Raises ConfigError for more tokens than the model takes."""
    data = "stdlib" if config.data == "auto" else config.data
    length = config.sequence_length or min(_SEQUENCE_LENGTH, longest)
    require(length <= longest, "sequence_length", length, f"at most {longest}")
    most = config.samples or _SAMPLES
    rows = read_rows(data) if config.text_field == TEXT_FIELD else None
    if rows is not None:
        encoded = [Encoded.of(row, tokenizer) for row in rows[:most]]
        length = max(len(row.ids) - 1 for row in encoded)
        allowed = config.sequence_length or longest
        require(length <= allowed, "sequence_length", allowed, f"{length} or more, which the longest of the rows has")
        samples = (Sample.of(np.array(row.ids), row.answer) for row in encoded)
        return _Scored(data, f"the answers of the first {len(encoded)} rows of {data!r}", length, samples)
    found = blocks(documents(data, text_field=config.text_field), tokenizer, length)
    samples = (_of_text(each, 0, apart=False) for each in islice(found, most))
    return _Scored(data, f"the first of {data!r}", length, samples)
