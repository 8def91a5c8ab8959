"""What models say of rows, measured layer by layer: how probable the answers are, and how far two models are apart.

No more of a model than one layer is in memory at once, and no more of what it says than some rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from jobs.unlearn.guard import Guard, plain
from jobs.unlearn.material import Item, Material, stacked
from jobs.unlearn.method import FORGET, RETAIN
from jobs.unlearn.probe_job import ProbeJob
from jobs.unlearn.reference import ReferenceJob
from jobs.unlearn.router import described
from pipeline.model.layered import LayeredModel
from pipeline.model.span_module import SpanModule
from pipeline.model.weights import read_config
from pipeline.runtime.batch import IGNORED, Needs


@torch.no_grad()
def logits_of(folder: Path, inputs: Sequence[Tensor], asked: Sequence[Tensor] = ()) -> Iterator[Tensor]:
    """What the model in a directory gives for ids [batch, sequence], one after another: [batch, sequence, vocabulary],
    in fp32 on the CPU. `asked` [batch, sequence] says which of them are the question, by which a guard is routed;
    without it, all are. Raises ModelError."""
    guard, source = Guard.read(folder), plain(folder)
    model = LayeredModel(read_config(source))
    hidden, last = list(inputs), model.num_layers - 1
    found = descriptions(source, inputs, asked) if guard is not None and guard.routers else [None] * len(hidden)
    for layer in range(last):
        go_through(model, source, layer, hidden, guard, found)
    head = build_layer(model, source, last)
    for x in hidden:
        yield head(x)


@torch.no_grad()
def descriptions(folder: Path, inputs: Sequence[Tensor], asked: Sequence[Tensor] = ()) -> list[Tensor]:
    """What a router reads of a plain model for ids [batch, sequence]: [batch, blocks, hidden] each. Raises
    ModelError."""
    model = LayeredModel(read_config(folder))
    hidden, found = list(inputs), [list[Tensor]() for _ in inputs]
    where = [*asked] or [torch.ones_like(ids, dtype=torch.bool) for ids in inputs]
    for layer in range(model.blocks.stop):
        go_through(model, folder, layer, hidden)
        if layer in model.blocks:
            for each, x, mask in zip(found, hidden, where, strict=True):
                each.append(described(x, mask))
    return [torch.stack(each, dim=1) for each in found]


def build_layer(model: LayeredModel, folder: Path, layer: int) -> SpanModule:
    """One layer of the model in a directory, which is not trained. Raises ModelError."""
    return model.build((layer, layer + 1), seed=0, source=folder).eval().requires_grad_(False)


@torch.no_grad()
def go_through(
    model: LayeredModel, folder: Path, layer: int, hidden: list[Tensor], guard: Guard | None = None,
    found: Sequence[Tensor | None] = (),
) -> None:  # fmt: skip
    """Have one layer take what is in `hidden`, in its place; it is gone when this returns. A `guard` is routed by what
    is `found` of each."""
    module = build_layer(model, folder, layer)
    if guard is not None and layer in model.blocks:
        guard.attach(model.paths(layer)["block"], module.layers[str(layer)])
    for number, x in enumerate(hidden):
        if guard is not None:
            guard.route(found[number])
        hidden[number] = module(x)


def question(labels: Tensor) -> Tensor:
    """Which positions [batch, sequence] are a row's question, by its labels: those up to the first that has one."""
    counts = labels != IGNORED
    return counts.cumsum(dim=1) - counts.int() <= 0


def divergence(kind: str) -> str:
    """What the distance of a kind's rows from an oracle is called: KL(oracle || model) in nats, the mean over the
    tokens of all answers."""
    return f"{kind}_kl"


def probe(folder: Path, material: Material, items: Sequence[Item], size: int) -> Mapping[str, float]:
    """The means of a ProbeJob's terms over `items`, `size` rows at a time, of the model in a directory. Raises
    ModelError."""
    return compare({"": folder}, material, items, size)[""]


@torch.no_grad()
def compare(
    folders: Mapping[str, Path], material: Material, items: Sequence[Item], size: int, oracle: str | None = None
) -> dict[str, dict[str, float]]:
    """Name -> what `probe` tells, of models that take the same rows side by side; with the name of an `oracle` among
    them, the distance of each other one from it, too. Raises ModelError."""
    job = ProbeJob(microbatches=-(-len(items) // size), size=size, limit=len(items), material=material, items=items)
    totals, sums = Counter[str](), {which: defaultdict[str, float](float) for which in folders}
    inputs, asked = asked_of(material, items, size)
    streams = {which: logits_of(folder, inputs, asked) for which, folder in folders.items()}
    for m in range(len(inputs)):
        batch, counts = job.batch(0, m, Needs.LOSS), job.counts(0, m)
        totals.update(counts)
        said = {which: next(stream) for which, stream in streams.items()}
        for which, logits in said.items():
            found = {term: float(value) for term, value in job.loss(logits, batch).items()}
            if oracle is not None and which != oracle:
                found |= _apart(said[oracle], logits, batch["labels"], batch["forget"])
            for term, value in found.items():
                sums[which][term] += value
        if oracle is not None:
            totals.update({divergence(kind): counts[kind] for kind in (FORGET, RETAIN) if kind in counts})
    return {which: {term: found[term] / totals[term] for term in totals if term in found}
            for which, found in sums.items()}  # fmt: skip


def _apart(oracle: Tensor, model: Tensor, labels: Tensor, forget: Tensor) -> dict[str, float]:
    """The sums of KL(oracle || model) over the tokens of the answers, a row at a time: a vocabulary may be large."""
    found = dict.fromkeys((divergence(FORGET), divergence(RETAIN)), 0.0)
    for row, mine in enumerate(labels != IGNORED):
        p, q = (torch.log_softmax(logits[row][mine].double(), dim=-1) for logits in (oracle, model))
        found[divergence(FORGET if forget[row] else RETAIN)] += float((p.exp() * (p - q)).sum())
    return found


def read_oracle(folder: Path, job: ReferenceJob) -> None:
    """Keep the logits of another model, from a directory, in place of those of the model before. Raises ModelError."""
    parts = parts_of(job.items, job.size)
    inputs = [stacked(job.material, part, Needs.INPUT)["input_ids"] for part in parts]
    for part, logits in zip(parts, logits_of(folder, inputs), strict=True):
        labels = stacked(job.material, part, Needs.LOSS)["labels"]
        for row, item in enumerate(part):
            job.reference.write(item, logits[row], labels[row], logits=True)
    job.reference.finish({})


def asked_of(material: Material, items: Sequence[Item], size: int) -> tuple[list[Tensor], list[Tensor]]:
    """The ids [batch, sequence] of rows, `size` rows at a time, and which of them are the question."""
    parts = [stacked(material, part, Needs.INPUT | Needs.LOSS) for part in parts_of(items, size)]
    return [part["input_ids"] for part in parts], [question(part["labels"]) for part in parts]


def parts_of(items: Sequence[Item], size: int) -> list[list[Item]]:
    """`size` rows at a time."""
    return [list(items[at : at + size]) for at in range(0, len(items), size)]
