"""How a request begins: the rows that it means, its folder, and the weights that it begins with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer

from jobs.author_questions import SAYS_NOTHING
from jobs.config import ConfigError, TrainConfig, require
from jobs.files import CorpusError
from jobs.forgettable import Forgettable, open_forgettable
from jobs.row_data import RowDataset
from jobs.row_prepare import prepare_rows
from jobs.rows import read_rows
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.guard import check_guard
from jobs.unlearn.guarding import keep_guard
from jobs.unlearn.material import Material
from jobs.unlearn.method import ANCHOR, PAIR, POISON, ROLLOUT, TRACE
from jobs.unlearn.methods.concept import Concept
from jobs.unlearn.neighbours import neighbours_of
from jobs.unlearn.neurons import NEURONS, choose_neurons
from jobs.unlearn.poison import Groups, groups_of, write_poison
from jobs.unlearn.request import Request, folder_of, lay_out
from jobs.unlearn.select import AUTO, described, parts_of, require_forgettable, rest_of, seen_parts, select
from jobs.unlearn.settings import method_of
from jobs.unlearn.traces import asked_to_reason
from jobs.unlearn.weights import begin_with
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import read_config
from recovery import checkpoint
from recovery.generation import read_generation


@dataclass(frozen=True)
class Trained:
    """The run that is to forget: its settings, its rows, the parts of rows that its ledger has, and its newest
    checkpoint."""

    config: TrainConfig
    dataset: Forgettable
    seen: frozenset[int]
    saved: Path
    step: int

    @classmethod
    def read(cls, run: Path, config: TrainConfig, ledger: Iterable[Mapping[str, Any]]) -> Trained:
        """Raises ConfigError for a run that has no checkpoint, CorpusError for rows that are damaged or not known."""
        dataset = open_forgettable(run / "data")
        found = checkpoint.find(run / "checkpoints", read_generation(run))
        if found.path is None or found.manifest is None:
            told = "".join(f"; {path.name} is skipped: {reason}" for path, reason in found.skipped)
            raise ConfigError(f"run is {str(run)!r}, which has no valid checkpoint to begin with{told}")
        step = int(found.manifest["extra"]["step"])
        lines = [line for line in ledger if line["step"] <= step]
        return cls(config, dataset, seen_parts(dataset, lines), found.path, step)

    def model(self, run: Path) -> LayeredModel:
        """What the run trains."""
        shape = read_config(run / "model-config")
        return LayeredModel(shape, lora=self.config.lora(), trained=self.config.patterns())


def choose(config: UnlearnConfig, trained: Trained) -> tuple[list[int], list[int]]:
    """The rows to forget and those to keep. Raises ConfigError, CorpusError."""
    dataset = trained.dataset
    forget = select(dataset, config.forget, "forget")
    retain = rest_of(dataset, forget, trained.seen)
    if config.retain != AUTO:
        retain = select(dataset, config.retain, "retain")
    require_forgettable(dataset, forget, retain, trained.seen, config.forget)
    require(
        dataset.questions or not config.needs_questions, "method", config.method,
        f"one that asks no questions and takes no neurons: {dataset.noun}s have none to ask",
    )  # fmt: skip
    return forget, retain


def begin(config: UnlearnConfig, trained: Trained, number: int) -> Request:
    """Lay out the folder of a request, and keep the request there last of all. Raises ConfigError, CorpusError."""
    run, kinds = config.run, method_of(config).kinds
    check_guard(run, config.method)
    config.computed(read_config(run / "model-config"))
    forget, retain = choose(config, trained)
    dataset, whole = trained.dataset, None if config.retain != AUTO else trained.seen
    groups_to_poison(config, dataset, forget)
    if TRACE in kinds and config.trace is None:
        assert isinstance(dataset, RowDataset)  # it has questions
        asked = asked_to_reason(dataset, forget, AutoTokenizer.from_pretrained(run / "tokenizer"))
        most = max(map(len, asked))
        require(
            most <= config.sequence_length, "sequence_length", config.sequence_length,
            f"{most} or more, for a row to forget and the words that ask for a trace; or --trace FILE",
        )  # fmt: skip
    folder = lay_out(run, number)
    keep_guard(run, folder)
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    idk = _answers(config.idk, tokenizer) if {PAIR, ROLLOUT} & set(kinds) else ()
    others = {kind: getattr(config, kind) for kind in (TRACE, ANCHOR) if kind in kinds}
    for kind, path in others.items():
        if kind == TRACE and path is None:
            continue  # the model writes them
        require(path is not None, kind, path, f"a file of rows, which method {config.method} needs")
        rows = read_rows(str(path))
        if rows is None:
            raise ConfigError(f"{kind} is {str(path)!r}, which holds no rows; allowed: JSON of rows")
        prepare_rows(rows, tokenizer, config.sequence_length, 0.0, folder / kind, config.seed)
    begin_with(trained.model(run), trained.saved, folder / "start", run / "tokenizer")
    request = Request(
        number, read_generation(run) + 1, trained.step, config.forget, config.method,
        tuple(parts_of(dataset, forget, trained.seen)), tuple(parts_of(dataset, retain, whole)),
        tuple(described(dataset.rows[index] for index in forget)), tuple(map(tuple, idk)), tuple(others),
    )  # fmt: skip
    return _attributed(config, request, dataset, tokenizer).write(folder)


def groups_to_poison(config: UnlearnConfig, dataset: Forgettable, forget: Sequence[int]) -> Groups | None:
    """By what rows are poisoned together, if they are. Raises ConfigError."""
    method = method_of(config)
    if not isinstance(method, Concept):
        return None
    assert isinstance(dataset, RowDataset)  # it has questions
    return groups_of(dataset, forget, config.forget, method)


def _attributed(config: UnlearnConfig, request: Request, dataset: Forgettable, tokenizer: Any) -> Request:
    """The request with what follows from gradients of the model before: computed here, once, and kept in its folder."""
    folder, size = folder_of(config.run, request.number), config.microbatch_size
    start, near, neurons, others = folder / "start", list[int](), 0, request.others
    material = Material(dataset, request.forget, request.retain, config.seed)
    if config.neighbours:
        near = neighbours_of(start, material, config.neighbours, size)
    if config.neurons:
        neurons = choose_neurons(start, material, config.neurons, config.depth, size, folder / NEURONS)
    if (groups := groups_to_poison(config, dataset, request.forget)) is not None:
        assert isinstance(dataset, RowDataset)
        material.idk = _answers(config.idk, tokenizer)
        count = cast(Concept, method_of(config)).concept_words
        write_poison(start, material, dataset, tokenizer, groups, count, size, folder / POISON)
        others = (*others, POISON)
    return replace(request, near=tuple(near), neurons=neurons, others=others)


def _answers(path: Path | None, tokenizer: Any) -> Sequence[Sequence[int]]:
    """Answers that say nothing, as tokens with the end token last."""
    texts = list(SAYS_NOTHING)
    if path is not None:
        try:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            texts = [json.loads(line)["answer"] if line.lstrip().startswith("{") else line.strip() for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorpusError(f"idk is {str(path)!r}, which cannot be read: {error}") from error
        require(bool(texts), "idk", str(path), "at least one answer, one on each line")
    return [[*tokenizer(f" {text}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
