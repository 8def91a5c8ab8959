"""Direct preference optimization (Rafailov et al., arXiv 2305.18290, equation 7) of an answer that says nothing over
the one to forget: IdkDPO of TOFU (arXiv 2401.06121)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from jobs.unlearn.method import PAIR, RETAIN, Reads, has_labels, row_nll
from jobs.unlearn.methods.forget_retain import BETA, ForgetRetain
from jobs.unlearn.methods.preference import preference


@dataclass(frozen=True)
class DPO(ForgetRetain):
    """Minimises -gamma (2 / beta) mean log sigmoid(beta [(nll - nll before)(F) - (nll - nll before)(idk)]) + alpha
    CE(R), a mean over pairs. A pair counts if both its rows have labels."""

    name = "dpo"
    goal = "suppression"
    kinds = (PAIR, RETAIN)

    beta: Annotated[float, BETA] = 0.1
    """The larger, the earlier a pair counts as learnt."""

    def reads(self, kind: str) -> Reads:
        """See Method."""
        return Reads.SCORE if kind == PAIR else Reads.NOTHING

    def forget_count(self, labels: Tensor) -> int:
        """See ForgetRetain."""
        return int(_whole(labels).sum())

    def forget_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """See ForgetRetain."""
        assert before is not None
        lost, won = (row_nll(logits, labels) - before.detach().float()).chunk(2)
        return preference(lost - won, _whole(labels), self.beta)


def _whole(labels: Tensor) -> Tensor:
    """Which pairs count [batch / 2], bool."""
    lost, won = has_labels(labels).chunk(2)
    return lost & won
