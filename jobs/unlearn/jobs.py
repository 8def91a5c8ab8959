"""The jobs of a request, made alike in every process of it: its steps, its evaluation, and what is read beforehand."""

from __future__ import annotations

import hashlib

from jobs.forgettable import open_forgettable
from jobs.job import RunJob, Start
from jobs.row_data import RowDataset
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.job import UnlearnJob
from jobs.unlearn.material import IDK, Item, Material, Rows
from jobs.unlearn.method import FORGET, PAIR, RETAIN, ROLLOUT, TRACE, Method, Reads
from jobs.unlearn.methods.grpo import GRPO
from jobs.unlearn.on_policy import OnPolicyJob
from jobs.unlearn.probe_job import ProbeJob
from jobs.unlearn.reference import REFERENCE, Reference, ReferenceJob
from jobs.unlearn.request import Request
from jobs.unlearn.rollout import RolloutJob
from jobs.unlearn.settings import method_of
from jobs.unlearn.traces import traces_of
from pipeline.schedule.layout import EVALUATE, TRAIN


def material_of(config: UnlearnConfig, request: Request) -> Material:
    """The rows of a request. Raises CorpusError."""
    data, others = open_forgettable(config.run / "data"), dict[str, tuple[Rows, int]]()
    for kind in request.others:
        if kind == TRACE and config.trace is None:
            assert isinstance(data, RowDataset)  # it has questions
            others[kind] = traces_of(config, data), len(request.forget)
        else:
            opened = RowDataset.open(config.out / kind)
            others[kind] = opened, len(opened.rows)
    return Material(data, request.forget, request.near or request.retain, config.seed, request.idk, others)


def end_token(material: Material) -> int:
    """What an answer ends with."""
    assert isinstance(material.data, RowDataset)
    return material.data.end_token


def reference_of(config: UnlearnConfig, method: Method) -> Reference:
    """Where what the method reads of the model before is kept."""
    everywhere = getattr(method, "positions", "answer") == "all"
    return Reference(config.out / "reference", config.reference_top, everywhere)


def wanted_of(method: Method, material: Material) -> dict[Item, Reads]:
    """What is read beforehand, of which rows."""
    found: dict[Item, Reads] = {}
    for kind in method.kinds:
        if (reads := method.reads(kind)) is not Reads.NOTHING:
            sources = (FORGET, IDK) if kind == PAIR else (kind,)
            found |= {Item(source, row): reads for source in sources for row in material.indices(kind)}
    return found


def probed(request: Request, most: int) -> list[Item]:
    """The rows of an evaluation: of those to forget and those to keep `most` each at most, evenly spread."""
    return [
        Item(kind, rows[i * len(rows) // count])
        for kind, rows in ((FORGET, request.forget), (RETAIN, request.retain))
        for count in [min(most, len(rows))]
        for i in range(count)
    ]


def unlearn_jobs(config: UnlearnConfig, start: Start) -> dict[str, RunJob]:
    """TRAIN, EVALUATE and, where the method reads anything, REFERENCE, or where the model answers, ROLLOUT."""
    request, method = Request.read(config.out), method_of(config)
    material, reference = material_of(config, request), reference_of(config, method)
    items, size = probed(request, config.evaluate_samples), config.microbatch_size
    at_once = start.at_once or -(-len(items) // size)
    found: dict[str, RunJob] = {}
    if isinstance(method, GRPO):
        found[ROLLOUT] = asks = RolloutJob(
            microbatches=at_once, size=size, sequence_length=config.sequence_length, end_token=end_token(material),
            seed=config.seed, temperature=method.temperature, cut=start.at_once is None,
        )  # fmt: skip
        train = OnPolicyJob(
            method, material, reference, config.microbatches, size, start.step, start.sample, asks,
            config.out / "tokenizer",
        )  # fmt: skip
    else:
        train = UnlearnJob(
            method, material, reference, config.microbatches, size, start.step, start.sample,
            forgotten_below=config.forgotten_below,
        )  # fmt: skip
    if start.carried is not None:
        train.restore(start.carried)
    found[TRAIN] = train
    if method.depth is None:
        found[EVALUATE] = ProbeJob(microbatches=at_once, size=size, limit=len(items), material=material, items=items)
    else:  # what comes out are hidden states
        found[EVALUATE] = UnlearnJob(method, material, reference, at_once, size, limit=len(items))
    if wanted := wanted_of(method, material):
        found[REFERENCE] = ReferenceJob(
            microbatches=at_once, size=size, material=material, reference=reference, wanted=wanted
        )
    return found


def reference_job(config: UnlearnConfig, request: Request) -> ReferenceJob:
    """What is read beforehand, on its own."""
    method, material = method_of(config), material_of(config, request)
    wanted, reference = wanted_of(method, material), reference_of(config, method)
    return ReferenceJob(
        microbatches=1, size=config.microbatch_size, material=material, reference=reference, wanted=wanted
    )  # fmt: skip


def unlearn_fingerprint(config: UnlearnConfig) -> str:
    """A hash of what all rows of a request follow from."""
    request = Request.read(config.out)
    data = open_forgettable(config.run / "data").fingerprint
    known = (data, request.forget, request.retain, request.idk, *([request.near] if request.near else ()))
    return hashlib.blake2b(repr(known).encode(), digest_size=16).hexdigest()
