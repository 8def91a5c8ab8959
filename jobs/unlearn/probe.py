"""How probable a model's answers are, measured layer by layer: no more of it than one layer is in memory at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from jobs.unlearn.material import Item, Material, stacked
from jobs.unlearn.probe_job import ProbeJob
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import read_config
from pipeline.runtime.batch import Batch, Needs


@torch.no_grad()
def probe(folder: Path, material: Material, items: Sequence[Item], size: int) -> Mapping[str, float]:
    """The means of a ProbeJob's terms over `items`, `size` rows at a time, of the model in a directory, in fp32 on the
    CPU. Raises ModelError."""
    model = LayeredModel(read_config(folder))
    job = ProbeJob(microbatches=-(-len(items) // size), size=size, limit=len(items), material=material, items=items)
    parts = [items[at : at + size] for at in range(0, len(items), size)]
    hidden = [stacked(material, list(part), Needs.INPUT)["input_ids"] for part in parts]
    last = model.num_layers - 1
    for layer in range(last):
        module = model.build((layer, layer + 1), seed=0, source=folder).eval()
        hidden = [module(x) for x in hidden]
    head = model.build((last, last + 1), seed=0, source=folder).eval()
    sums: dict[str, float] = {}
    totals: dict[str, int] = {}
    for m, x in enumerate(hidden):
        batch: Batch = job.batch(0, m, Needs.LOSS)
        for term, value in job.loss(head(x), batch).items():
            sums[term] = sums.get(term, 0.0) + float(value)
        for term, count in job.counts(0, m).items():
            totals[term] = totals.get(term, 0) + count
    return {term: sums[term] / totals[term] for term in sums}
