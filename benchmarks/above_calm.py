"""How far above the run without a loss each remedy leaves the held-out loss: of the runs of lost_stage.py, and of
checkfree_trained.py. A run has an arm ("none" lost nothing), a stage, a seed and a curve: step -> held-out loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks.checkfree_report import spread

NONE, ALL = "none", "all"
Summary = dict[str, dict[str, dict[str, dict[str, float]]]]
"""Arm -> stage, or "all" of them -> steps since the loss -> `spread` over seeds, and over stages."""


def summarise(runs: Sequence[dict[str, Any]], lost_at: int = 0) -> Summary:
    """Of each run less that of its seed without a loss, from step `lost_at` of the curves on."""
    calm = {each["seed"]: each["curve"] for each in runs if each["arm"] == NONE}
    gaps: dict[str, dict[str, dict[str, list[float]]]] = {}
    for each in runs:
        usual = calm.get(each["seed"], {}) if each["arm"] != NONE else {}
        for step in sorted(set(each["curve"]) & set(usual), key=int):
            if int(step) >= lost_at:
                for stage in (str(each["stage"]), ALL):
                    by_step = gaps.setdefault(each["arm"], {}).setdefault(stage, {})
                    by_step.setdefault(str(int(step) - lost_at), []).append(each["curve"][step] - usual[step])
    return {
        arm: {stage: {step: _spread(each) for step, each in by_step.items()} for stage, by_step in stages.items()}
        for arm, stages in gaps.items()
    }


def _spread(gaps: Sequence[float]) -> dict[str, float]:
    """`spread`, without an error of a single value: that is no number, and JSON has none that is not."""
    return {name: value for name, value in spread(gaps).items() if not math.isnan(value)}


def table(summary: Summary) -> Table:
    """The summary for a person."""
    steps = sorted({step for stages in summary.values() for by_step in stages.values() for step in by_step}, key=int)
    made = Table("remedy", "stage", *("at once" if step == "0" else f"+{step} steps" for step in steps))
    for arm, stages in summary.items():
        for stage, by_step in sorted(stages.items()):
            cells = [by_step.get(step, {}) for step in steps]
            means = [f"{cell['mean']:+.3f}" if cell else "" for cell in cells]
            errors = [f" ± {cell['error']:.3f}" if "error" in cell else "" for cell in cells]
            made.add_row(arm, stage, *map(str.__add__, means, errors))
    return made
