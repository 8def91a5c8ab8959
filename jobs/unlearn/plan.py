"""The plan of a request: its rows, its model and what it begins with are in its folder already."""

from __future__ import annotations

from pathlib import Path

from jobs.documents import DOCUMENTS
from jobs.early import check_compile
from jobs.pipelines import require_layers
from jobs.plan import Plan, Progress, find_start, planned
from jobs.resume import check_resumed
from jobs.space import in_words
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.jobs import probed, reference_job
from jobs.unlearn.method import POISON
from jobs.unlearn.reference import needed_bytes
from jobs.unlearn.request import Request
from jobs.unlearn.settings import method_of
from jobs.unlearn.traces import TraceConfig
from pipeline.model.weights import read_config


def make_unlearn_plan(
    config: UnlearnConfig, progress: Progress, before: UnlearnConfig | None = None, prepared: bool = True
) -> Plan:
    """Everything up to the first view; its data are always prepared. Raises ConfigError, CorpusError, ModelError or
    CheckpointError by name."""
    config = config.resolved()
    config.validate()
    found, request, method = find_start(config), Request.read(config.out), method_of(config)
    said: list[str] = []
    if found.manifest is not None and before is not None and (changed := check_resumed(before, config)):
        said.append(f"changed since the last start: {', '.join(changed)}")
    shape = read_config(config.out / "model-config")
    model = config.computed(shape)
    check_compile(config, model)
    if config.scheduler not in ("roundpipe", "skippipe"):
        require_layers(config, model.num_layers)
    text = (config.run / "data" / DOCUMENTS).is_file()
    told, whose = ("parts", f" of {len(request.rows):,} documents") if text else ("rows", "")
    said.append(
        f"{len(request.forget):,} {told}{whose} to forget, {len(request.retain):,} to keep; {method.name}: "
        f"{method.goal}, {config.steps:,} steps, {config.rows_per_step:,} {told} to forget in each"
    )
    if request.near:
        said.append(
            f"{len(request.near):,} of the {len(request.retain):,} rows to keep are taken: the {config.neighbours:,} "
            "nearest ones of each row to forget"
        )
    if POISON in request.others:
        said.append(f"{len(request.forget):,} answers are poisoned: the words in which the concept lies are struck out")
    if request.neurons:
        said.append(f"{request.neurons:,} neurons of the blocks' MLPs are updated, and no other weight")
    job = reference_job(config, request)
    if isinstance(config, TraceConfig):
        said = [f"the model writes its traces: of {len(request.forget):,} rows, {config.trace_tokens:,} tokens each"]
    elif job.wanted:
        size = needed_bytes(job, int(shape.vocab_size), model.hidden_size)
        kept = f"{in_words(size)} on the disk" if size else "one number each"
        said.append(f"read of the model before: {len(job.wanted):,} {told}, {kept}; no second model is held")
    return planned(config, model, Path(config.model), found, len(probed(request, config.evaluate_samples)), said)
