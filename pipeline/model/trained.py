"""Which parameters of a model are trained: all, or those whose names match shell patterns. The others are frozen: they
have neither gradient nor moments, and are the same at the end as at the start.

The frozen weights of a lost stage are no mean of its neighbours', and half of a mean is no remedy: what is lost comes
back exactly where weights are frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pipeline.model.weights import ModelError
from pipeline.names import did_you_mean
from pipeline.settings import RunShape, require

ALL = "all"
_AVERAGES = ("rehearse", "checkfree", "checkfree+", "copy", "copy-after", "identity", "random")


@dataclass(frozen=True)
class TrainedSettings:
    """What is trained."""

    trained: str = ALL
    """Train these parameters and freeze the others: all, or shell patterns of full names, separated by commas, such as
    *.layers.[567].mlp.down_proj.weight. With --lora-rank it is all, and the adapters alone are trained."""

    def patterns(self) -> tuple[str, ...]:
        """The patterns; none where all is trained."""
        return () if self.trained == ALL else tuple(part.strip() for part in self.trained.split(","))

    def check(self, run: RunShape) -> None:
        """Raise ConfigError for patterns that are none, beside adapters, and with a remedy that changes what is
        frozen."""
        require(
            all(self.patterns()) or self.trained == ALL, "trained", self.trained,
            f"{ALL}, or patterns separated by commas",
        )  # fmt: skip
        adapters = run.lora_rank > 0
        require(not adapters or self.trained == ALL, "trained", self.trained, f"{ALL} with lora_rank")
        what = "adapters: the mean of two is neither's" if adapters else "frozen weights, which it would change"
        require(
            (self.trained == ALL and not adapters) or run.recovery not in _AVERAGES, "recovery", run.recovery,
            f"auto, exact, replica, redundant, checkpoint or none with {what}",
        )  # fmt: skip


def matching(patterns: Iterable[str], names: Mapping[str, tuple[str, ...]]) -> frozenset[str]:
    """Those of the parameters that match a pattern by one of their names (a shared weight has several). Raises
    ModelError for a pattern that matches nothing."""
    found: set[str] = set()
    for pattern in patterns:
        hit = {name for name, known in names.items() if any(fnmatchcase(each, pattern) for each in known)}
        if not hit:
            every = sorted({each for known in names.values() for each in known})
            near = did_you_mean(pattern, every) or f"; they are called like {every[0]!r} and {every[-1]!r}"
            raise ModelError(
                f"trained has {pattern!r}, which matches none of the model's {len(every)} parameters{near}"
            )
        found |= hit
    return frozenset(found)
