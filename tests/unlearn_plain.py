"""One process with transformers alone: what the engines' steps of `unlearn_rows.py` are held against.

A step is what the definition says: the sum over terms of weight * (the term's sum over all microbatches / what counts
for it), by autograd through a plain model. Of the code that is tested it takes the rows and the formula of a method,
which tests of their own hold; not how rows are dealt, what is read of the model before, nor how anything is summed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from jobs.unlearn.material import IDK, Item, stacked
from jobs.unlearn.method import FORGET, PAIR, Reads
from pipeline.runtime.batch import IGNORED, Needs
from tests import unlearn_rows as rows

RANK, ALPHA = 4, 8.0
"""Of adapters."""
Microbatch = tuple[str, list[Item]]


@dataclass(frozen=True)
class Expected:
    """What a step comes to. `of_terms` has the gradient of each term's mean, by parameter."""

    means: Mapping[str, float]
    counts: Mapping[str, int]
    weights: Mapping[str, float]
    of_terms: Mapping[str, Mapping[str, Tensor]]

    @property
    def loss(self) -> float:
        return sum(self.weights[term] * mean for term, mean in self.means.items())

    @property
    def gradients(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for term, gradients in self.of_terms.items():
            for name, gradient in gradients.items():
                found[name] = found.get(name, torch.zeros_like(gradient)) + self.weights[term] * gradient
        return found


def norm(gradients: Mapping[str, Tensor]) -> float:
    """Of all of them together."""
    return sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5


class Plain:
    """A plain model, or one with adapters of peft, and two sets of weights for it: `before`, and `now`, which is
    elsewhere. Names are those of the engine."""

    def __init__(self, adapters: bool = False) -> None:
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(rows.SHAPE, dtype=torch.float32, attn_implementation="sdpa")
        if adapters:
            import peft  # only where it is asked for: an import of seconds

            wanted = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")
            peft.get_peft_model(model, wanted, autocast_adapter_dtype=False)  # changed in place
        self.model: Any = model.eval()
        self.named = {n.replace(".base_layer", "").replace(".default", ""): p for n, p in model.named_parameters()}
        self.trained = {name: p for name, p in self.named.items() if p.requires_grad}
        self._gave: dict[tuple[Item, Reads], Tensor] = {}
        self._steps: dict[str, Expected] = {}
        self.before = {name: p.detach().clone() for name, p in self.named.items()}
        chance = torch.Generator().manual_seed(12)
        self.now = {
            name: old + 0.1 * torch.randn(old.shape, generator=chance) if name in self.trained else old
            for name, old in self.before.items()
        }

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.named.items():
            parameter.copy_(weights[name])

    def output(self, input_ids: Tensor, reads: Reads) -> Tensor:
        """Logits [batch, sequence, vocabulary], or what block LAYER gives [batch, sequence, hidden]."""
        found: list[Any] = []
        hook = self.model.model.layers[rows.LAYER].register_forward_hook(lambda _, __, given: found.append(given))
        logits = self.model(input_ids, use_cache=False).logits
        hook.remove()
        hidden = found[0] if isinstance(found[0], Tensor) else found[0][0]
        return hidden if reads is Reads.HIDDEN else logits

    def gave(self, item: Item, reads: Reads) -> Tensor:
        """What the model before gives for a row at all positions: logits, or hidden states."""
        if (item, reads) not in self._gave:
            self.fill(self.before)
            with torch.no_grad():
                found = stacked(rows.material(), [item], Needs.INPUT)
                self._gave[item, reads] = self.output(found["input_ids"], reads)[0]
        return self._gave[item, reads]

    def read(self, case: rows.Case, item: Item, reads: Reads) -> Tensor:
        """What a method reads of a row: a score, or [sequence, ...] at all positions, kept or not."""
        if reads is Reads.HIDDEN:
            return self.gave(item, reads)
        logits = self.gave(item, Reads.LOGITS)
        if reads is Reads.LOGITS:
            return likeliest(logits, case.top) if case.top else logits
        labels = stacked(rows.material(), [item], Needs.LOSS)["labels"][0]
        logp = torch.log_softmax(logits.double(), dim=-1)
        return -torch.tensor([float(logp[at, label]) for at, label in enumerate(labels) if label != IGNORED]).sum()

    def kept(self, case: rows.Case) -> dict[Item, tuple[Reads, Tensor]]:
        """All that is kept for a case."""
        method, material = case.make(), rows.material()
        found: dict[Item, tuple[Reads, Tensor]] = {}
        for kind in method.kinds:
            if (reads := method.reads(kind)) is not Reads.NOTHING:
                for source in (FORGET, IDK) if kind == PAIR else (kind,):
                    for index in material.indices(kind):
                        item = Item(source, index)
                        found[item] = reads, self.read(case, item, reads)
        return found

    def step(self, name: str) -> Expected:
        """STEP of a case, at the weights `now`."""
        if name not in self._steps:
            self._steps[name] = self.step_of(rows.CASES[name], dealt(rows.CASES[name]))
        return self._steps[name]

    def step_of(
        self, case: rows.Case, microbatches: Sequence[Microbatch],
        changed: Callable[[Tensor], Tensor] = lambda before: before,
    ) -> Expected:  # fmt: skip
        """A step on these microbatches. What is read of the model before is `changed` where the step is to be wrong."""
        method, material = case.make(), rows.material()
        sums, counts = dict[str, Tensor](), Counter[str]()
        read = [
            torch.stack([self.read(case, item, reads) for item in items]) if reads is not Reads.NOTHING else None
            for kind, items in microbatches
            for reads in [method.reads(kind)]
        ]
        self.fill(self.now)
        for (kind, items), before in zip(microbatches, read, strict=True):
            tensors = stacked(material, items, Needs.INPUT | Needs.LOSS)
            output = self.output(tensors["input_ids"], Reads.LOGITS if method.depth is None else Reads.HIDDEN)
            counts.update(method.counts(kind, labels := tensors["labels"]))
            given = None if before is None else changed(before)
            for term, value in method.loss(kind, output, labels, given).items():
                sums[term] = sums.get(term, torch.zeros(())) + value
        means = {term: value / counts[term] for term, value in sums.items()}
        of_terms = {
            term: {name: gradient for name, gradient in zip(self.trained, found, strict=True) if gradient is not None}
            for term, mean in means.items()
            for found in [torch.autograd.grad(mean, [*self.trained.values()], retain_graph=True, allow_unused=True)]
        }
        values = {term: float(mean.detach()) for term, mean in means.items()}
        return Expected(values, counts, method.terms(rows.after_first(method)), of_terms)


def dealt(case: rows.Case) -> list[Microbatch]:
    """The microbatches of STEP: kinds in turn, and of each kind the rows of its order one after another."""
    method, material, taken = case.make(), rows.material(), Counter[str]()
    found: list[Microbatch] = []
    for number in range((rows.STEP + 1) * rows.MICROBATCHES):
        kind = method.kinds[number % len(method.kinds)]
        size = rows.SIZE // 2 if kind == PAIR else rows.SIZE
        drawn = [material.drawn(kind, taken[kind] + i) for i in range(size)]
        taken[kind] += size
        sources = (FORGET, IDK) if kind == PAIR else (kind,)
        found.append((kind, [Item(source, row) for source in sources for row in drawn]))
    return found[-rows.MICROBATCHES :]


def likeliest(logits: Tensor, top: int) -> Tensor:
    """log p of the `top` likeliest tokens, and of all others the same: what is left, spread evenly."""
    p = torch.softmax(logits.double(), dim=-1)
    best = p.topk(top, dim=-1)
    rest = (1 - best.values.sum(dim=-1, keepdim=True)) / (p.shape[-1] - top)
    return rest.expand_as(p).scatter(-1, best.indices, best.values).log().float()
