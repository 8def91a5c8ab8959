"""Cross-entropy unlearning (CE-U; Yang, arXiv 2503.01224): the model learns its own distribution over the next token,
without the one to forget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as functional
from torch import Tensor

from jobs.unlearn.method import FORGET, Method, State
from pipeline.runtime.batch import IGNORED
from pipeline.settings import Within


@dataclass(frozen=True)
class CEU(Method):
    """Minimises CE(softmax(z where z_y = -inf), softmax z)(F), a mean over labels; no gradient goes through the target.
    The first label of each row is left out (the paper's footnote on training settings)."""

    name = "ceu"
    goal = "untraining"
    kinds = (FORGET,)

    skip_tokens: Annotated[int, Within(0, 2**24)] = 1
    """Labels at the start of each answer that do not count."""

    def terms(self, state: State) -> Mapping[str, float]:
        """See Method."""
        return {FORGET: 1.0}

    def counts(self, kind: str, labels: Tensor) -> Mapping[str, int]:
        """See Method."""
        return {FORGET: int(self._later(labels).sum())}

    def loss(self, kind: str, output: Tensor, labels: Tensor, before: Tensor | None) -> Mapping[str, Tensor]:
        """See Method."""
        where = self._later(labels)
        logits = output[where].float()  # [positions, vocabulary]
        target = logits.detach().scatter(-1, labels[where][:, None], float("-inf")).softmax(dim=-1)
        return {FORGET: functional.cross_entropy(logits, target, reduction="sum")}

    def _later(self, labels: Tensor) -> Tensor:
        """The positions that count [batch, sequence], bool."""
        answer = labels != IGNORED
        return answer & (answer.cumsum(dim=1) > self.skip_tokens)
