"""How probable a model's answers are, measured layer by layer: no more of it than one layer is in memory at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from jobs.unlearn.guard import Guard, plain
from jobs.unlearn.material import Item, Material, stacked
from jobs.unlearn.probe_job import ProbeJob
from jobs.unlearn.reference import ReferenceJob
from jobs.unlearn.router import described
from pipeline.model.layered import LayeredModel
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
        module = model.build((layer, layer + 1), seed=0, source=source).eval()
        if guard is not None and layer in model.blocks:
            guard.attach(model.paths(layer)["block"], module.layers[str(layer)])
        for number, x in enumerate(hidden):
            if guard is not None:
                guard.route(found[number])
            hidden[number] = module(x)
    head = model.build((last, last + 1), seed=0, source=source).eval()
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
        module = model.build((layer, layer + 1), seed=0, source=folder).eval()
        hidden = [module(x) for x in hidden]
        if layer in model.blocks:
            for each, x, mask in zip(found, hidden, where, strict=True):
                each.append(described(x, mask))
    return [torch.stack(each, dim=1) for each in found]


def question(labels: Tensor) -> Tensor:
    """Which positions [batch, sequence] are a row's question, by its labels: those up to the first that has one."""
    counts = labels != IGNORED
    return counts.cumsum(dim=1) - counts.int() <= 0


def probe(folder: Path, material: Material, items: Sequence[Item], size: int) -> Mapping[str, float]:
    """The means of a ProbeJob's terms over `items`, `size` rows at a time, of the model in a directory. Raises
    ModelError."""
    job = ProbeJob(microbatches=-(-len(items) // size), size=size, limit=len(items), material=material, items=items)
    sums, totals = Counter[str](), Counter[str]()
    parts = [stacked(material, part, Needs.INPUT | Needs.LOSS) for part in parts_of(items, size)]
    inputs, asked = [part["input_ids"] for part in parts], [question(part["labels"]) for part in parts]
    for m, logits in enumerate(logits_of(folder, inputs, asked)):
        found = job.loss(logits, job.batch(0, m, Needs.LOSS))
        sums.update({term: float(value) for term, value in found.items()})
        totals.update(job.counts(0, m))
    return {term: sums[term] / totals[term] for term in totals}


def read_oracle(folder: Path, job: ReferenceJob) -> None:
    """Keep the logits of another model, from a directory, in place of those of the model before. Raises ModelError."""
    parts = parts_of(job.items, job.size)
    inputs = [stacked(job.material, part, Needs.INPUT)["input_ids"] for part in parts]
    for part, logits in zip(parts, logits_of(folder, inputs), strict=True):
        labels = stacked(job.material, part, Needs.LOSS)["labels"]
        for row, item in enumerate(part):
            job.reference.write(item, logits[row], labels[row], logits=True)
    job.reference.finish({})


def parts_of(items: Sequence[Item], size: int) -> list[list[Item]]:
    """`size` rows at a time."""
    return [list(items[at : at + size]) for at in range(0, len(items), size)]
