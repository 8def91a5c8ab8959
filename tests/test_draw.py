"""Pictures are tested by reading them back: every op is where, as long as and as coloured as the timeline says."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import replace

import pytest
from rich.text import Text

from pipeline.drawing.draw import compare_svg, perfetto, svg, terminal
from pipeline.schedule.ops import LOAD, REDUCE, STEP, B, F, I, Op, W
from pipeline.schedule.timeline import Event, Timeline, Transfer

NS = "{http://www.w3.org/2000/svg}"


def one_f_one_b(
    stages: int, batches: int, *, forward: float = 1.0, backward: float = 2.0, link: float = 0.0, **about
) -> Timeline:
    """The textbook 1F1B schedule, timed by hand; stage s of worker s is the span (s, s + 1)."""
    lanes = []
    for stage in range(stages):
        warm = min(batches, stages - 1 - stage)
        lane = [(F, m) for m in range(warm)]
        for m in range(batches - warm):
            lane += [(F, warm + m), (B, m)]
        lanes.append(lane + [(B, m) for m in range(batches - warm, batches)])
    done: dict[tuple[str, int, int], float] = {}
    clock = [0.0] * stages
    events: list[Event] = []
    transfers: list[Transfer] = []
    while any(lanes):
        for stage, lane in enumerate(lanes):
            while lane:
                kind, m = lane[0]
                other = stage - 1 if kind == F else stage + 1
                start = clock[stage]
                if 0 <= other < stages:
                    if (kind, m, other) not in done:
                        break
                    sent = done[kind, m, other]
                    transfers.append(Transfer(other, stage, Op(kind, (other, other + 1), m), sent, sent + link))
                    start = max(start, sent + link)
                clock[stage] = done[kind, m, stage] = start + (forward if kind == F else backward)
                events.append(Event(stage, Op(kind, (stage, stage + 1), m), start, clock[stage]))
                lane.pop(0)
    held = {stage: min(batches, stages - stage) for stage in range(stages)}
    return Timeline("1F1B", tuple(events), tuple(transfers), held, **about)


def parse(text: str) -> ET.Element:
    return ET.fromstring(text)


def boxes(root: ET.Element) -> dict[str, ET.Element]:
    """Tooltip -> the box of an op."""
    return {r.findtext(f"{NS}title", ""): r for r in root.iter(f"{NS}rect") if r.find(f"{NS}title") is not None}


def words(root: ET.Element) -> list[str]:
    return [t.text or "" for t in root.iter(f"{NS}text")]


def test_every_op_is_a_box_as_long_as_it_took() -> None:
    timeline = one_f_one_b(4, 8)
    found = boxes(parse(svg(timeline)))
    assert len(found) == len(timeline.events) == 64
    first = next(r for said, r in found.items() if said.startswith("forward of microbatch 0, layer 0, worker 0"))
    left, unit = float(first.get("x", 0)), float(first.get("width", 0)) + 0.6
    for event in timeline.events:
        kind = "forward" if event.op.kind == F else "backward"
        said = f"{kind} of microbatch {event.op.microbatch}, layer {event.worker}, worker {event.worker}"
        box = next(r for text, r in found.items() if text.startswith(said + ","))
        assert float(box.get("x", 0)) == pytest.approx(left + event.start * unit, abs=0.5)
        assert float(box.get("width", 0)) + 0.6 == pytest.approx((event.end - event.start) * unit, abs=0.05)


def test_rows_are_workers_from_the_top_each_over_a_hatched_bubble() -> None:
    root = parse(svg(one_f_one_b(3, 4)))
    rows = [g for g in root.iter(f"{NS}g") if any(r.get("fill") == "url(#bubble)" for r in g.findall(f"{NS}rect"))]
    assert [g.findtext(f"{NS}text") for g in rows] == ["worker 0", "worker 1", "worker 2"]
    heights = [float(re.findall(r"[\d.]+", g.get("transform", ""))[1]) for g in rows]
    assert heights == sorted(heights)
    assert len(set(heights)) == 3
    for worker, row in enumerate(rows):
        assert {said.split("worker ")[1].split(",")[0] for said in boxes(row)} == {str(worker)}


def test_hue_is_the_microbatch_and_lightness_the_kind() -> None:
    fills: dict[tuple[str, str], set[str]] = defaultdict(set)
    for said, box in boxes(parse(svg(one_f_one_b(4, 8)))).items():
        kind, _, _, number = said.split(",")[0].split()
        fills[kind, number].add(box.get("fill", ""))
    assert all(len(colours) == 1 for colours in fills.values())
    assert len(set.union(*fills.values())) == 16

    def light(colour: str) -> int:
        return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))

    for m in map(str, range(8)):
        assert light(*fills["forward", m]) > light(*fills["backward", m]) + 60


def test_caption_states_makespan_bubble_and_peaks() -> None:
    timeline = one_f_one_b(4, 8, measured=True)
    shown = words(parse(svg(timeline, title="a title")))
    assert "a title" in shown
    assert "measured" in shown
    # (p - 1) / (m + p - 1) of the makespan, which is (m + p - 1) (forward + backward)
    assert f"makespan 33 s · bubble {300 / 11:.1f} % · peak activations 4, 3, 2, 1 per worker" in shown
    noted = words(parse(svg(replace(timeline, peak_messages={0: 12, 1: 20, 2: 19, 3: 10}))))
    assert any(line.endswith("1 per worker · messages at most 12, 20, 19, 10 per worker") for line in noted)
    legend = {"forward (F)", "backward (B)", "bubble", "transfer", "microbatch 0 to 7"}
    assert legend <= set(shown)
    assert "weight gradient (W)" not in shown


def test_axis_has_round_ticks_in_a_readable_unit() -> None:
    root = parse(svg(one_f_one_b(2, 4, forward=0.001, backward=0.002)))
    shown = words(root)
    assert "ms" in shown
    assert [t for t in ("0", "2", "8", "14") if t not in shown] == []


def test_input_and_weight_gradients_and_optimizer_ops_are_told_apart() -> None:
    ops = [Op(F, (0, 1), 0), Op(I, (0, 1), 0), Op(W, (0, 1), 0), Op(REDUCE, (0, 1)), Op(STEP, (0, 1)), Op(LOAD, (0, 1))]
    root = parse(svg(Timeline("all", tuple(Event(0, op, t, t + 1.0) for t, op in enumerate(ops)))))
    assert len({box.get("fill") for box in boxes(root).values()}) == 6
    assert {"input gradient (I)", "weight gradient (W)", "reduce", "step", "load"} <= set(words(root))


def test_spans_are_named_and_barred_where_a_worker_has_several() -> None:
    events = [Event(0, Op(F, (s, s + 2), 0), s, s + 1) for s in (0, 4, 8)]
    timeline = Timeline("interleaved", tuple(events))
    root = parse(svg(timeline))
    assert "0:2, 4:6, 8:10" in words(root)
    assert "F0 4:6" in words(root)
    bars = next(p.get("d", "") for p in root.iter(f"{NS}path") if p.get("pointer-events") == "none")
    heights = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)", bars)]
    assert heights == sorted(heights)
    assert len(set(heights)) == 3
    assert not any(p.get("pointer-events") for p in parse(svg(one_f_one_b(2, 2))).iter(f"{NS}path"))


def test_few_transfers_are_arrows_many_are_lines() -> None:
    def tooltips(timeline: Timeline) -> int:
        return sum(p.find(f"{NS}title") is not None for p in parse(svg(timeline)).iter(f"{NS}path"))

    few, many = one_f_one_b(4, 8, link=0.1), one_f_one_b(4, 64, link=0.1)
    assert tooltips(few) == len(few.transfers) == 48
    assert tooltips(many) == 0
    assert 'stroke="#57606a"' in svg(many)


def test_two_timelines_share_one_scale() -> None:
    planned, measured = one_f_one_b(2, 3), one_f_one_b(2, 3, forward=1.5, measured=True)
    root = parse(compare_svg(planned, measured))
    panels = [g for g in root.findall(f"{NS}g") if boxes(g)]
    widths = [
        next(float(b.get("width", 0)) for said, b in boxes(panel).items() if said.startswith("forward")) + 0.6
        for panel in panels
    ]
    assert widths[1] / widths[0] == pytest.approx(1.5, rel=1e-3)
    assert f"{measured.makespan_s / planned.makespan_s:.3g} × the plan" in words(root)
    assert {"planned", "measured"} <= set(words(root))


@pytest.mark.parametrize(("stages", "batches"), [(32, 256), (128, 160)])
def test_a_large_timeline_stays_a_small_file_that_shows_the_work(stages: int, batches: int) -> None:
    timeline = one_f_one_b(stages, batches)
    picture = svg(timeline)
    assert len(timeline.events) > 10_000
    assert len(picture) < 900_000
    root = parse(picture)
    bubble = next(r for r in root.iter(f"{NS}rect") if r.get("fill") == "url(#bubble)" and not r.get("y"))
    covered = 0.0
    for group in root.iter(f"{NS}g"):
        if scale := re.search(r"scale\(([\d.]+) ", group.get("transform", "")):
            runs = [float(n) for p in group for n in re.findall(r"h([\d.]+)v", p.get("d", ""))]
            covered += sum(runs) * float(scale[1])
    share = covered / (float(bubble.get("width", 0)) * stages)
    assert 1 - timeline.bubble - 0.02 < share < 1 - timeline.bubble + 0.1


def test_words_from_outside_cannot_break_the_file() -> None:
    name = 'a <b> & "c" \x00\x1b'
    shown = words(parse(svg(Timeline(name, (Event(0, Op(F, (0, 1), 0), 0.0, 1.0),)))))
    assert any('a <b> & "c"' in line for line in shown)


def test_an_op_without_duration_is_no_division_by_zero() -> None:
    timeline = Timeline("instant", (Event(0, Op(F, (0, 1), 0), 5.0, 5.0),))
    parse(svg(timeline))
    parse(compare_svg(timeline, timeline))
    assert terminal(timeline)
    assert perfetto(timeline)["traceEvents"]


def test_refuses_what_it_cannot_draw() -> None:
    empty = Timeline("nothing", ())
    for draw in (svg, terminal, lambda t: compare_svg(one_f_one_b(1, 1), t)):
        with pytest.raises(ValueError, match="'nothing' has no events"):
            draw(empty)
    with pytest.raises(ValueError, match="width is 399"):
        svg(one_f_one_b(1, 1), width=399)
    with pytest.raises(ValueError, match="width 49"):
        terminal(one_f_one_b(1, 1), 49)


# ---- terminal ----


def test_terminal_shows_microbatches_kinds_and_bubbles() -> None:
    assert terminal(one_f_one_b(2, 3), 57).splitlines() == [
        "1F1B, planned: makespan 12 s, bubble 25.0 %",
        "worker 0 0>>>1>>>........0<<<<<<<2>>>1<<<<<<<....2<<<<<<<",
        "worker 1 ....0>>>0<<<<<<<1>>>1<<<<<<<2>>>2<<<<<<<........",
        "         |                                          12 s|",
        "         number: microbatch  > forward  < backward",
        "         . bubble",
    ]


@pytest.mark.parametrize("width", [50, 77, 160])
def test_terminal_keeps_to_its_width_and_says_what_it_left_out(width: int) -> None:
    lines = terminal(one_f_one_b(40, 30), width, rows=8).splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("worker ") for line in lines) == 8
    assert "8 of 40 workers shown" in lines
    assert "digit: microbatch in tenths of 30" in "\n".join(lines)


def test_terminal_in_colour_says_the_same() -> None:
    timeline = one_f_one_b(3, 5)
    odd = Timeline("a [b]name[/b]", timeline.events)
    assert Text.from_markup(terminal(odd, rich=True)).plain == terminal(odd)
    styles = {str(span.style) for span in Text.from_markup(terminal(odd, rich=True)).spans}
    assert len(styles) == 11  # five microbatches forward and backward, and the bubble


# ---- Perfetto ----


def test_trace_has_a_slice_per_op_and_per_transfer_on_named_threads() -> None:
    timeline = one_f_one_b(4, 8, link=0.25)
    trace = json.loads(json.dumps(perfetto(timeline)))
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    ops = {(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in slices if e["pid"] == 1}
    assert ops == {
        (f"worker {e.worker}", str(e.op), round(e.start * 1e6, 3), round((e.end - e.start) * 1e6, 3))
        for e in timeline.events
    }
    assert sum(e["pid"] == 2 for e in slices) == len(timeline.transfers)
    assert {"link 0 to 1", "link 1 to 0"} <= set(names.values())
    assert trace["otherData"]["bubble"] == timeline.bubble


def test_trace_flows_lead_from_the_maker_over_the_link_to_the_user() -> None:
    trace = perfetto(one_f_one_b(4, 8, link=0.25))["traceEvents"]
    flows = defaultdict(dict)
    for event in trace:
        if event["ph"] in "stf":
            flows[event["id"]][event["ph"]] = event

    def around(flow: dict) -> dict:
        found = [
            e
            for e in trace
            if e["ph"] == "X" and e["tid"] == flow["tid"] and e["ts"] <= flow["ts"] < e["ts"] + e["dur"]
        ]
        assert len(found) == 1
        return found[0]

    assert len(flows) == 48
    for flow in flows.values():
        maker, link, user = (around(flow[phase]) for phase in "stf")
        assert maker["name"] == link["name"]
        assert (maker["cat"], maker["args"]["microbatch"]) == (user["cat"], user["args"]["microbatch"])
        assert maker["ts"] + maker["dur"] <= link["ts"] + 1e-3
        assert link["ts"] + link["dur"] <= user["ts"] + 1e-3


def test_slices_of_one_trace_thread_never_overlap() -> None:
    beside = Timeline(
        "copies",
        (
            Event(0, Op(F, (0, 1), 0), 0.0, 2.0),
            Event(0, Op(LOAD, (1, 2)), 0.5, 1.5),
            Event(0, Op(LOAD, (2, 3)), 1.0, 3.0),
        ),
    )
    slices = [e for e in perfetto(beside)["traceEvents"] if e["ph"] == "X"]
    assert len({e["tid"] for e in slices}) == 3
    threads = {e["args"]["name"] for e in perfetto(beside)["traceEvents"] if e["name"] == "thread_name"}
    assert threads == {"worker 0", "worker 0 copies", "worker 0 copies (2)"}
