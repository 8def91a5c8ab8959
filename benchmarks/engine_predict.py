"""What the simulator says of a measured run of ours: the same schedule from the median times of the ops of that run.

Forwards, backwards, optimizer steps and gradient sums cost what they cost; links, votes, norms, data and the engine's
own code cost nothing. So measured over predicted is what the engine itself loses.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from launch.pictures import Lanes, measured_costs, measured_timeline
from pipeline.schedule.costs import Costs
from pipeline.schedule.ops import STEP, Schedule, Span
from pipeline.schedule.simulate import simulate
from pipeline.schedule.timeline import Timeline

COMPUTED = ("forward", "backward", "input_gradient", "weight_gradient")


def predict(schedule: Schedule, lanes: Sequence[Lanes], seconds: Sequence[float], sums: Mapping[Span, float]) -> Any:
    """The prediction as plain data. `lanes[k]` are the ops of timed step k, which took `seconds[k]`; `sums` the seconds
    of summing a span's gradient over its holders."""
    timelines = [measured_timeline(schedule.name, each) for each in lanes]
    costs = typical_costs(timelines, sums)
    planned = simulate(schedule, costs)
    workers = len(schedule.lanes)
    idle = [1 - sum(t.busy_s.values()) / workers / s for t, s in zip(timelines, seconds, strict=True)]
    return {
        "predicted_step_s": planned.makespan_s,
        "predicted_bubble": planned.bubble,
        "measured_bubble": statistics.median(idle),
        "spans": {str(w): sorted(op.span for op in lane if op.kind == STEP) for w, lane in schedule.lanes.items()},
        "seconds": {
            kind: {f"{lo}:{hi}": s for (lo, hi), s in getattr(costs, kind).items()}
            for kind in (*COMPUTED, "step_s", "reduce_s")
        },
    }


def typical_costs(timelines: Sequence[Timeline], sums: Mapping[Span, float]) -> Costs:
    """The median over iterations of the mean seconds of each kind of op on each span."""
    costs = [measured_costs(t) for t in timelines]
    steps: dict[Span, list[float]] = {}
    for event in (e for t in timelines for e in t.events if e.op.kind == STEP):
        steps.setdefault(event.op.span, []).append(event.end - event.start)

    def typical(name: str) -> dict[Span, float]:
        return {span: statistics.median(getattr(c, name)[span] for c in costs) for span in getattr(costs[0], name)}

    middle = {span: statistics.median(values) for span, values in steps.items()}
    return Costs(**{name: typical(name) for name in COMPUTED}, reduce_s=sums, step_s=middle)
