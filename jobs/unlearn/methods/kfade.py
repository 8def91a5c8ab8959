"""K-FADE (McKinney et al., "Gauss-Newton Unlearning for the LLM Era", arXiv 2602.10568): uphill steps on what is to be
forgotten, shortest in what they change about the outputs on the rest.

theta += eta (H_R + damping I)^-1 grad CE(F), where H_R is the Gauss-Newton matrix of the divergence of the outputs on
R, by the factors of KFAC (`pipeline.runtime.curvature`), damped exactly in the basis of their eigenvectors. The sign is
ours where the paper's own equation is told to be inconsistent: the loss on F rises. Our reading besides: curvature at
the positions up to the last label of R's rows; linear layers of the decoder blocks move, norms, embeddings and the head
do not. It is fitted on the rows to keep of the step's own microbatches, and dropped after it: --microbatches says on
how many. The paper takes one step, of 2.5e-3 to 1.1e-2, with a damping of 1e-8, after a fit on far more rows than a
step has here; on few of them H_R has directions of which it knows nothing, where only the damping holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from jobs.unlearn.method import FORGET, RETAIN, Method, State, cross_entropy, tokens
from pipeline.runtime.procedure import Oracle, Vector
from pipeline.settings import Within


@dataclass(frozen=True)
class KFADE(Method):
    """Steps along (H_R + damping I)^-1 grad CE(F). What it tells of as its loss is -CE(F)."""

    name = "kfade"
    goal = "untraining"
    kinds = (FORGET, RETAIN)
    is_procedure = True
    optimizer = "sgd"
    rate = 5e-3
    few_steps = 1

    damping: Annotated[float, Within(0, 1000, above=True)] = 1e-6
    """What is added to the curvature in every direction. The paper's 1e-8 is for a fit on far more rows."""

    def terms(self, state: State) -> Mapping[str, float]:
        """See Method."""
        return {FORGET: -1.0, RETAIN: 0.0}

    def counts(self, kind: str, labels: Tensor) -> Mapping[str, int]:
        """See Method."""
        return {kind: tokens(labels)}

    def loss(self, kind: str, output: Tensor, labels: Tensor, before: Tensor | None) -> Mapping[str, Tensor]:
        """See Method."""
        return {kind: cross_entropy(output, labels)}

    def direction(self, oracle: Oracle) -> Vector:
        """See Method."""
        uphill = oracle.gradient({FORGET: 1.0})
        return oracle.solve(oracle.fit(RETAIN), uphill, self.damping) * -1.0
