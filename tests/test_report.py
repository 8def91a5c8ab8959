"""The loss curve says what the records say: points where they belong, gaps where there is nothing, events marked."""

from __future__ import annotations

import math
import random
import re
import xml.etree.ElementTree as ET

import pytest

from launch.report import loss_svg, loss_terminal, performance, performance_text, smoothed

NS = "{http://www.w3.org/2000/svg}"


def run(steps: int, **extra: float) -> list[dict]:
    """A falling loss, 1 + 4 * 2^(-step / 20), in the form of metrics.jsonl."""
    return [{"step": s, "loss": 1 + 4 * 2 ** (-s / 20), "tokens": 100, "view": 1, **extra} for s in range(1, steps + 1)]


def parse(text: str) -> ET.Element:
    return ET.fromstring(text)


def words(root: ET.Element) -> str:
    return "\n".join(t.text or "" for t in root.iter(f"{NS}text"))


def noisy_line(root: ET.Element) -> list[list[tuple[float, float]]]:
    """The pieces of the line that shows each step, in pixels."""
    path = next(p for p in root.iter(f"{NS}path") if p.get("clip-path"))
    pieces = path.get("d", "").split("M")[1:]
    return [[(float(x), float(y)) for x, y in (xy.split() for xy in piece.split("L"))] for piece in pieces]


def test_the_line_is_the_loss() -> None:
    records = run(60)
    (line,) = noisy_line(parse(loss_svg(records)))
    assert len(line) == 60
    (x0, y0), (x1, y1) = line[0], line[-1]
    slope = (y1 - y0) / (records[-1]["loss"] - records[0]["loss"])
    assert slope < 0  # a falling loss falls: SVG counts y from the top
    for record, (x, y) in zip(records, line, strict=True):
        assert x == pytest.approx(x0 + (x1 - x0) * (record["step"] - 1) / 59, abs=0.02)
        assert y == pytest.approx(y0 + slope * (record["loss"] - records[0]["loss"]), abs=0.05)


def test_caption_axes_and_speed() -> None:
    shown = words(parse(loss_svg(run(60, tokens_per_s=1234.0), title="my run")))
    assert "my run" in shown
    assert "in 60 steps · 6,000 tokens · median 1,234 tokens/s" in shown
    assert re.search(r"^step$", shown, re.MULTILINE)
    assert {"loss", "tokens/s", "20", "40", "60"} <= set(shown.splitlines())
    assert "tokens/s" not in words(parse(loss_svg(run(60))))


def test_held_out_losses_are_points_and_their_perplexity_is_said() -> None:
    evaluations = [{"event": "evaluation", "step": s, "loss": 2.0, "perplexity": math.exp(2)} for s in (20, 40)]
    root = parse(loss_svg(run(60), evaluations))
    assert [c.findtext(f"{NS}title") for c in root.iter(f"{NS}circle")] == [
        "held-out loss 2 at step 20",
        "held-out loss 2 at step 40",
    ]
    assert "held-out 2, perplexity 7.39" in words(root)
    assert "held out" in words(root)


def test_events_are_marked_and_labelled_where_they_happened() -> None:
    events = [
        {"event": "killed", "worker": 2, "step": 1},
        {"label": "link <cut>", "step": 60},
        {"event": "started"},  # no step: there is no place to mark
    ]
    root = parse(loss_svg(run(60), events))
    marks = {
        p.findtext(f"{NS}title"): p.get("d", "") for p in root.iter(f"{NS}path") if p.find(f"{NS}title") is not None
    }
    (line,) = noisy_line(root)
    at = [float(re.findall(r"[\d.]+", d)[0]) for d in marks.values()]
    assert list(marks) == ["killed worker 2, step 1", "link <cut>, step 60"]
    assert at == [line[0][0], line[-1][0]]
    assert {"killed worker 2", "link <cut>", "event"} <= set(words(root).splitlines())


def test_labels_never_run_into_each_other() -> None:
    events = [{"event": "killed", "worker": w, "step": 30} for w in range(9)]
    root = parse(loss_svg(run(60), events))
    labels = [t for t in root.iter(f"{NS}text") if (t.text or "").startswith("killed")]
    places = {(t.get("x"), t.get("y")) for t in labels}
    assert 1 <= len(labels) == len(places) < 9
    assert sum(p.find(f"{NS}title") is not None for p in root.iter(f"{NS}path")) == 9


def test_a_loss_that_is_not_finite_leaves_a_gap() -> None:
    records = run(40)
    records[10]["loss"] = float("nan")
    records[20]["loss"] = float("inf")
    text = loss_svg(records)
    assert [len(piece) for piece in noisy_line(parse(text))] == [10, 9, 19]
    assert "nan" not in text
    assert "inf" not in text.replace("infer", "")


def test_a_step_that_was_run_again_counts_once_as_it_ended() -> None:
    records = run(20)
    again = {**records[-1], "loss": 1.0}
    (line,) = noisy_line(parse(loss_svg([*records, again])))
    (once,) = noisy_line(parse(loss_svg([*records[:-1], again])))
    assert line == once


def test_a_long_run_keeps_its_extremes_in_a_small_file() -> None:
    noise = random.Random(0)
    records = [{"step": s, "loss": 2 + noise.gauss(0, 0.01)} for s in range(50_000)]
    records[25_000]["loss"] = 1.0  # one step among sixty in a pixel column
    text = loss_svg(records)
    assert len(text) < 80_000
    (line,) = noisy_line(parse(text))
    lowest = max(line, key=lambda p: p[1])
    assert lowest[0] == pytest.approx((line[0][0] + line[-1][0]) / 2, abs=1.5)
    assert lowest[1] > sorted(p[1] for p in line)[-2] + 50


def test_smoothing_keeps_a_straight_line_straight_and_takes_the_noise_away() -> None:
    line = [(float(s), 3.0 * s) for s in range(200)]
    got = smoothed(line)
    assert got[:190] == [pytest.approx(p) for p in line[:190]]
    noise = random.Random(1)
    rough = [(float(s), noise.gauss(0, 1)) for s in range(1000)]
    spread = [value for _, value in smoothed(rough)[100:]]
    assert max(map(abs, spread)) < 1.0
    assert smoothed([(0.0, float("nan")), (1.0, 2.0)]) == [(1.0, 2.0)]


def test_one_step_is_a_dot() -> None:
    root = parse(loss_svg([{"step": 5, "loss": 3.0}]))
    assert len(list(root.iter(f"{NS}circle"))) == 1


@pytest.mark.parametrize(
    "records", [[], [{"step": 1, "loss": float("nan")}], [{"loss": 1.0}], [{"step": 1, "loss": None}]]
)
def test_no_loss_is_an_error_in_a_picture_and_a_sentence_in_a_terminal(records: list[dict]) -> None:
    with pytest.raises(ValueError, match=f"no finite loss in {len(records)} records"):
        loss_svg(records)
    assert loss_terminal(records) == f"no finite loss in {len(records)} records"


def test_refuses_a_picture_without_room() -> None:
    with pytest.raises(ValueError, match="width is 100"):
        loss_svg(run(5), width=100)
    with pytest.raises(ValueError, match="width 19 and height 12"):
        loss_terminal(run(5), 19)


# ---- terminal ----


def test_terminal_in_ascii_draws_a_straight_line() -> None:
    records = [{"step": s, "loss": 9.0 - s} for s in range(9)]
    lines = loss_terminal(records, 20, 9, ascii_only=True).splitlines()
    assert [line[11:] for line in lines[:-1]] == [" " * i + "*" for i in range(9)]
    assert [line[:11] for line in lines] == [
        f"{label:>9} |" if label is not None else " " * 11 for label in (9, "", "", "", 5, "", "", "", 1, None)
    ]
    assert lines[-1][11:] == "0 step  8"


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(("width", "height"), [(20, 3), (72, 12), (131, 40)])
def test_terminal_keeps_to_its_size(width: int, height: int, ascii_only: bool) -> None:
    lines = loss_terminal(run(500), width, height, ascii_only=ascii_only).splitlines()
    assert len(lines) == height + 1
    assert max(map(len, lines)) <= width
    assert len(lines[-1]) == width
    assert all(line.isascii() for line in lines) == ascii_only


def test_braille_shows_the_same_curve_as_ascii_only_finer() -> None:
    records = run(300)
    fine, coarse = (loss_terminal(records, 60, 10, ascii_only=a).splitlines()[:-1] for a in (False, True))
    for a, b in zip(fine, coarse, strict=True):
        left = {i for i, c in enumerate(a[11:]) if c not in " "}
        right = {i for i, c in enumerate(b[11:]) if c == "*"}
        assert min(left, default=0) == pytest.approx(min(right, default=0), abs=4)


def test_a_run_comes_to_medians_and_to_the_most_memory() -> None:
    lines = [{"step": n, "loss": 1.0, "tokens_per_s": 100.0 * n, "tflops": 0.1 * n, "peak_host_bytes": n << 20,
              "peak_host_bytes_sum": 2 * n << 20} for n in (1, 2, 6)]  # fmt: skip
    assert performance(lines) == {
        "tokens_per_s": 200.0, "tflops": 0.2, "peak_host_bytes": 6 << 20, "peak_host_bytes_sum": 12 << 20
    }  # fmt: skip
    assert performance_text(lines) == (
        "median 200 tokens/s, 0.2 TFLOP/s, host memory 6 MiB at most in one process, 12 in all"
    )
    known = [{**line, "mfu": 0.25, "peak_device_bytes": 3 << 20, "peak_device_bytes_sum": 5 << 20} for line in lines]
    assert "MFU 25.0 %" in performance_text(known)
    assert performance_text(known).endswith("device memory 3 MiB at most in one process, 5 in all")
    assert "median 200 tokens/s · 0.2 TFLOP/s" in loss_svg(lines)
    assert performance_text([{"step": 1, "loss": 1.0}]) == "", "of a run that was made before these were told"
