"""Metamorphosis representation projection (MRP; Wu et al., arXiv 2508.15449): hidden states lose some directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from jobs.unlearn.methods.forget_retain import WEIGHT
from jobs.unlearn.methods.grad_diff import GradDiff
from pipeline.settings import Within


@dataclass(frozen=True)
class MRP(GradDiff):
    """Minimises -gamma CE(F) + alpha CE(R) over W alone, where the outputs of `projected` random blocks become
    h - h Q Q^T with Q of QR([W of earlier requests; W]): as intended. In the authors' code LoRA is never trained, a row
    of zeros takes coordinate 0 along, and the blocks are off by one. Ours: AdamW where they have SGD.

    The model's weights do not change, so this suppresses, and forgets nothing: what comes out is a guarded model.
    """

    name = "mrp"
    goal = "suppression"

    alpha: Annotated[float, WEIGHT] = 1.2
    """Weight of the term that keeps the rest."""
    directions: Annotated[int, Within(1, 1024)] = 2
    """Directions that each projected block loses."""
    projected: Annotated[int, Within(1, 1024)] = 2
    """How many blocks are projected."""
    control_seed: Annotated[int, Within(-(2**63), 2**63 - 1)] = 0
    """Which blocks these are is keyed by it."""
