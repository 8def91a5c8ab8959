"""A run of slices (see jobs.s3t): its settings, and what its folder says of it.

RUN/slices.json             this: slices, sequences, spans, which row is in which slice, and the stages that are there
RUN/stages/2-0/adapter      what the stage learned that has seen slice 2, then slice 0
RUN/data                    all rows, as tokens
RUN/ledger.jsonl            every step of every stage, with its rows
RUN/model                   the weights that it began with and the adapters of the stage that has seen the most
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from jobs.config import ConfigError, TrainConfig, require
from jobs.s3t import Prefix, left, matched, name_of, prefixes, rotations, stage_of
from pipeline.model.lora import EVERY
from pipeline.model.weights import has_weights
from pipeline.schedule.ops import Span, parse_span, span_text
from pipeline.settings import Within
from pipeline.wire import WireError, checked, parse
from recovery.disk import write_flushed

FILE, STAGES = "slices.json", "stages"


@dataclass(frozen=True)
class SliceSettings:
    """Slices of the data, each of which can be forgotten without training."""

    slices: Annotated[int, Within(2, 64)] = 4
    """Slices to which the rows are dealt. Each is learned by adapters on decoder blocks of their own, so there are at
    most as many as the model has blocks."""
    sequences: Annotated[int, Within(1, 4096)] = 2
    """Orders in which the slices are learned, each a model of its own: the more, the more deletions are survived."""
    deletion_rates: str = ""
    """How likely a deletion is to be from each slice, as numbers separated by commas, where that is known: sequences
    are chosen by them. Unset, all are alike."""

    def rates(self) -> tuple[float, ...]:
        """One for each slice. Raises ConfigError for what is none."""
        parts = self.deletion_rates.split(",") if self.deletion_rates else ["1"] * self.slices
        try:
            found = tuple(float(part) for part in parts)
        except ValueError:
            found = ()
        require(
            len(found) == self.slices and all(0 < rate < math.inf for rate in found), "deletion_rates",
            self.deletion_rates, f"{self.slices} numbers above 0, one for each slice, separated by commas",
        )  # fmt: skip
        return found

    def chosen(self) -> tuple[Prefix, ...]:
        """The sequences. Raises ConfigError for more than there are."""
        rates = self.rates()
        most = math.factorial(self.slices) if not self.deletion_rates else self.slices
        why = "the orders of the slices" if not self.deletion_rates else "the slices, with deletion_rates"
        require(self.sequences <= most, "sequences", self.sequences, f"1 to {most}, {why}")
        if self.deletion_rates:
            return tuple(matched(rates, self.sequences))
        return tuple(rotations(range(self.slices), self.sequences))


@dataclass(frozen=True)
class SlicesConfig(SliceSettings, TrainConfig):
    """Train adapters slice by slice, so that rows can be forgotten by leaving adapters out."""

    def validate(self) -> None:
        """Raise ConfigError as TrainConfig does, and for what has no meaning here."""
        super().validate()
        self.chosen()
        require(self.lora_rank > 0, "lora_rank", self.lora_rank, "1 or more: a slice is learned by adapters")
        require(self.lora_blocks == EVERY, "lora_blocks", self.lora_blocks, f"{EVERY}: each slice has its own")
        require(has_weights(self.model), "model", self.model, "a model with weights, on which adapters are trained")
        require(self.nodes == 1, "nodes", self.nodes, "1 for a run of slices")
        require(not self.cluster, "cluster", self.cluster, "nothing for a run of slices")
        require(self.until == 0, "until", self.until, "0 for a run of slices")
        require(
            self.tokenizer in ("auto", "model"), "tokenizer", self.tokenizer,
            "auto or model: the model's own, which no row has changed",
        )  # fmt: skip


@dataclass(frozen=True)
class Slices:
    """What RUN/slices.json says. `slice_of` has the slice of each row; `base` is a hash of the weights that all begin
    with; `stages` are those that are there, with a hash of their adapters; of `gone` slices rows were forgotten."""

    slices: int
    sequences: tuple[Prefix, ...]
    rates: tuple[float, ...]
    spans: tuple[Span, ...]
    slice_of: tuple[int, ...]
    base: str
    stages: Mapping[Prefix, str] = field(default_factory=dict)
    gone: tuple[int, ...] = ()

    @property
    def missing(self) -> list[Prefix]:
        """The stages that are still to be trained, in order."""
        return [stage for stage in left(prefixes(self.sequences), self.gone) if stage not in self.stages]

    def without(self, slices: set[int]) -> Slices:
        """The same once these slices are gone: with the stages alone that have never seen them."""
        kept = {stage: self.stages[stage] for stage in left(self.stages, slices)}
        return replace(self, stages=kept, gone=tuple(sorted({*self.gone, *slices})))

    def write(self, run: Path) -> Slices:
        """Keep it, whole and on the disk before this returns."""
        values: dict[str, Any] = {
            "slices": self.slices, "sequences": [name_of(each) for each in self.sequences], "rates": list(self.rates),
            "spans": [span_text(span) for span in self.spans], "slice_of": list(self.slice_of), "base": self.base,
            "stages": {name_of(stage): said for stage, said in self.stages.items()}, "gone": list(self.gone),
        }  # fmt: skip
        write_flushed(run / FILE, json.dumps(values, indent=1).encode())
        return self

    @classmethod
    def read(cls, run: Path) -> Slices:
        """Raises ConfigError for a folder that has none."""
        path = run / FILE
        try:
            kinds: dict[str, Any] = {
                "slices": int, "sequences": list, "rates": list, "spans": list, "slice_of": list, "base": str,
                "stages": dict, "gone": list,
            }  # fmt: skip
            found = checked(parse(path.read_bytes(), FILE), FILE, **kinds)
            return cls(
                found["slices"], tuple(map(stage_of, found["sequences"])), tuple(map(float, found["rates"])),
                tuple(map(parse_span, found["spans"])), tuple(map(int, found["slice_of"])), found["base"],
                {stage_of(name): str(said) for name, said in found["stages"].items()}, tuple(map(int, found["gone"])),
            )  # fmt: skip
        except (OSError, WireError, TypeError, ValueError) as error:
            raise ConfigError(
                f"run is {str(run)!r}, whose {FILE} cannot be read ({error}); allowed: a folder of `unbroken slices`"
            ) from error


def folder_of(run: Path, stage: Prefix) -> Path:
    """Where a stage lies."""
    return run / STAGES / name_of(stage)


def adapter_hash(folder: Path) -> str:
    """sha256 [64 hex digits] of the adapters in a folder that peft loads. Raises OSError."""
    with (folder / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
