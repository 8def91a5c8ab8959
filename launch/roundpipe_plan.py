"""`unbroken plan --scheduler roundpipe`: a published partition, timed, and a planned one beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.commands import Result
from launch.run_folder import write_whole
from pipeline.drawing.draw import svg
from pipeline.schedule.ops import Span, dumps
from pipeline.schedule.simulate import Costs, Network, simulate
from pipeline.schedule.verify import verify
from pipeline.schedule.work_units import units
from schedulers import build
from schedulers.roundpipe import Dealt, RoundsProblem, dealt, repeated, rounds_from_json, search
from schedulers.roundpipe_search.problem import spans_from

_ITERATIONS = 10
"""Of the asynchronous rows: enough for filling and draining to be a small part, which is counted."""


def plan_roundpipe(
    values: Any, model: str, rule: str, at_once: int | None, workers: int | None, out: Path | None
) -> Result:
    """bubble and makespan_ms of the published partition and of the planned one. Raises CostError."""
    problem, cut = rounds_from_json(values, model)
    changes = {name: n for name, n in (("at_once", at_once), ("workers", workers)) if n is not None}
    asked = RoundsProblem(**{**vars(problem), **changes})
    rows: dict[str, dict[str, Any]] = {}
    if cut is not None:
        row = units(cut, problem.microbatches, problem.round, by_stage=False)
        rows["published"] = {
            **_row(dealt(problem, cut, row, "round_robin", early_head=True), "by_round"),
            "counted": "as its authors do: a loss' forward may begin before the last forward has ended",
        }
        rows["published, in order"] = _row(dealt(problem, cut, row, "round_robin"), "by_round")
    found = search(asked, rule=rule)
    rows["planned"] = {**_row(found.best, found.order), "lower_bound_ms": _ms(found.lower_bound), "gap": found.gap,
                       "tried": found.tried}  # fmt: skip
    verify(schedule := found.best.schedule())
    timeline = simulate(schedule, asked.costs, asked.network)
    entry = values["models"][model]
    others = baselines(problem, entry) if cut is not None else {}
    written: list[str] = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in (("timeline.svg", svg(timeline)), ("schedule.txt", dumps(schedule))):
            write_whole(out / name, text)
            written.append(str(out / name))
    result = {
        "scheduler": "roundpipe", "model": model, "workers": asked.workers, "microbatches": asked.microbatches,
        "at_once": asked.round, "rule": rule, **rows, "baselines": others, "simulated": True,
        "simulated_ms": _ms(timeline.makespan_s), "written": written,
    }  # fmt: skip
    return result, _text(result, rows, others, entry)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)


def _row(plan: Dealt, order: str) -> dict[str, Any]:
    problem, cut = plan.problem, plan.cut
    total = repeated(problem, plan.row, "round_robin", _ITERATIONS)
    return {
        "forward": [list(span) for span in cut.forward], "fused": list(cut.fused),
        "backward": [list(span) for span in cut.backward], "order": order,
        "makespan_ms": _ms(plan.makespan), "bubble": plan.bubble,
        "async_ms": _ms(total / _ITERATIONS), "async_iterations": _ITERATIONS,
        "async_bubble": problem.bubble(cut, total / _ITERATIONS),
    }  # fmt: skip


def baselines(problem: RoundsProblem, entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """GPipe, 1F1B and interleaved 1F1B on the partitions that were published for them: every stage recomputes its
    blocks before their backward, the head is not recomputed."""
    last = problem.num_layers - 1
    again = [f + b for f, b in zip(problem.forward, problem.backward, strict=True)]
    again[last] = problem.backward[last]
    costs, network = Costs(problem.forward, again), Network.uniform(problem.workers, problem.hop_s)
    work = problem.microbatches * (sum(problem.forward) + sum(again))
    rows: dict[str, dict[str, float]] = {}
    for names, field in ((("gpipe", "one_f_one_b"), "published_line"), (("interleaved",), "published_interleaved")):
        if field not in entry:
            continue
        spans = _with_head(entry[field], last)
        for name in names:
            options = {"chunks": len(spans) // problem.workers} if name == "interleaved" else {}
            timeline = simulate(build(name, spans, problem.microbatches, **options), costs, network)
            seconds = timeline.makespan_s
            rows[name] = {"makespan_ms": _ms(seconds), "bubble": 1 - work / (problem.workers * seconds)}
    return rows


def _with_head(blocks: Sequence[int], last: int) -> tuple[Span, ...]:
    """Spans of so many blocks each; the head goes with the last of them, or is it."""
    spans = spans_from(blocks, last)
    if blocks[-1] == 0:
        return (*spans, (last, last + 1))
    return (*spans[:-1], (spans[-1][0], last + 1))


def _text(
    result: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], others: Mapping[str, Mapping[str, float]],
    entry: Mapping[str, Any],
) -> str:  # fmt: skip
    lines = [f"{result['model']}: {result['workers']} workers, {result['microbatches']} microbatches, "
             f"{result['at_once']} at once"]  # fmt: skip
    said = entry.get("published_bubble_percent", {})
    names = {"published": "roundpipe_sync"}
    for name, row in {**others, **rows}.items():
        known = said.get(names.get(name, name)) if isinstance(said, Mapping) else None
        tail = f", published {known:.2f} %" if isinstance(known, int | float) else ""
        lines.append(f"{name:<20} {row['makespan_ms']:9.1f} ms  bubble {row['bubble']:7.2%}{tail}")
        if "async_bubble" in row:
            lines.append(f"{'  one step behind':<20} {row['async_ms']:9.1f} ms  bubble {row['async_bubble']:7.2%}, "
                         f"over {row['async_iterations']} iterations with filling and draining")  # fmt: skip
    planned = rows["planned"]
    sides = (planned["forward"], [planned["fused"]], planned["backward"])
    spans = [" ".join(f"{lo}:{hi}" for lo, hi in side) for side in sides]
    lines.append(f"planned: forward {spans[0]} | with the loss {spans[1]} | backward {spans[2]}; "
                 f"{planned['order']}; "
                 f"no plan takes less than {planned['lower_bound_ms']:.1f} ms, "
                 f"and this one at most {planned['gap']:.2%} more")  # fmt: skip
    lines.append("all times are simulated")
    return "\n".join([*lines, *(f"wrote {path}" for path in result["written"])])
