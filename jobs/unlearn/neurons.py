"""Which neurons of the blocks' MLPs know what is to be forgotten: only these are updated. KLUE (FaithUn, arXiv
2502.19207), our reading of notes on the paper, whose formula was not found.

A neuron's score on a row is its activation times the gradient, with respect to it, of the answer's log-likelihood,
summed over the positions that predict the answer. What also has a high score where the question is put to another
answer is about the form and not about the fact: so the scores on pairs of a question of one row to forget and the
answer of another are taken off. The neurons with the highest scores in the whole model are updated: what writes to them
and what reads them. With a single row there is no other answer, and nothing is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from jobs.corpus import permutation
from jobs.row_data import Sample
from jobs.unlearn.material import Item, Material, Rows, stacked
from jobs.unlearn.method import FORGET
from jobs.unlearn.samples import answer_of, answered
from jobs.unlearn.sweep import sweep_rows
from pipeline.model.layered import LayeredModel
from pipeline.model.rng import derive
from pipeline.model.weights import read_config
from pipeline.runtime.batch import IGNORED, Needs
from pipeline.state.masks import Masks, mask_file
from recovery.disk import write_flushed

NEURONS = "neurons"
"""The folder of a request that has the masks."""
Scores = Mapping[int, Tensor]
"""Block -> one number for each neuron of its MLP, float64."""


@dataclass(frozen=True)
class Mismatched:
    """Questions of rows with the answers of others among them: which, the seed decides."""

    data: Rows
    other: Mapping[int, int]

    @classmethod
    def of(cls, material: Material) -> Mismatched:
        """Of the rows to forget; each row's answer goes to one other question."""
        order = [material.forget[int(at)] for at in permutation(len(material.forget), derive(material.seed, NEURONS))]
        return cls(material.data, dict(zip(order, [*order[1:], *order[:1]])))

    def row(self, index: int, /) -> Sample:
        """The question of the row with this index."""
        return answered(self.data.row(index), answer_of(self.data.row(self.other[index])))


def choose_neurons(folder: Path, material: Material, share: float, depth: int | None, size: int, into: Path) -> int:
    """Write the masks of the neurons that are updated to `into`, a file for each layer: of those in the first `depth`
    blocks the `share` with the highest scores, by the model in a directory. Returns how many. Raises ModelError."""
    model, scores = LayeredModel(read_config(folder)), scores_of(folder, material, size)
    chosen = highest({block: found for block, found in scores.items() if depth is None or block <= depth}, share)
    into.mkdir(parents=True, exist_ok=True)
    for layer in range(model.num_layers):
        masks = masks_of(model, layer, chosen[layer]) if layer in chosen else {}
        write_flushed(mask_file(into, layer), save(dict(masks)))
    return sum(int(each.sum()) for each in chosen.values())


def scores_of(folder: Path, material: Material, size: int) -> Scores:
    """How much every neuron has to do with the answers to forget, and not with their form."""
    known = attributions(folder, material, size)
    if len(material.forget) == 1:
        return known
    form = attributions(folder, Material(Mismatched.of(material), material.forget, (), material.seed), size)
    return {block: score - form[block] for block, score in known.items()}


def attributions(folder: Path, material: Material, size: int) -> Scores:
    """Activation times gradient, summed over the positions that predict the answers of all rows to forget."""
    items, found = [Item(FORGET, row) for row in material.forget], dict[int, Tensor]()

    def add(part: int, block: int, activation: Tensor, gradient: Tensor) -> None:
        labels = stacked(material, items[part * size : (part + 1) * size], Needs.LOSS)["labels"]
        score = (activation * gradient)[labels != IGNORED].double().sum(dim=0)
        found[block] = found[block] + score if block in found else score

    for _ in sweep_rows(folder, material, items, size, add):
        pass
    return found


def highest(scores: Scores, share: float) -> dict[int, Tensor]:
    """Block -> which of its neurons [neurons] are among the `share` with the highest scores of all blocks together, one
    at least; of equal ones the earlier."""
    blocks = sorted(scores)
    every = torch.cat([scores[block] for block in blocks])
    chosen = torch.zeros(len(every), dtype=torch.bool)
    chosen[every.argsort(descending=True, stable=True)[: max(1, round(share * len(every)))]] = True
    return dict(zip(blocks, chosen.split([len(scores[block]) for block in blocks])))


def masks_of(model: LayeredModel, block: int, chosen: Tensor) -> Masks:
    """The parameters of a block that belong to the `chosen` neurons [neurons], bool: the rows of what writes to them,
    biases included, and the columns of what reads them."""
    path, family, found = model.paths(block)["block"], model.family, dict[str, Tensor]()
    for name in (*family.into_neurons, family.out_of_neurons):
        module, writes = model.module(f"{path}.{name}"), name in family.into_neurons
        of_rows = writes != isinstance(module, Conv1D)  # Conv1D has [in, out], nn.Linear [out, in]
        found[model.full_name(f"{path}.{name}", "weight")] = chosen[:, None] if of_rows else chosen[None, :]
        if writes and getattr(module, "bias", None) is not None:
            found[model.full_name(f"{path}.{name}", "bias")] = chosen
    return {name: mask.clone() for name, mask in found.items()}
