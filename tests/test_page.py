"""The report of a run, from the lines that runs leave: what it says, what it never loads, and what it bears."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launch.page.blocks import Bar, Strip, Table
from launch.page.chart import Curve, chart, thinned
from launch.page.compare import compared
from launch.page.draw import page
from launch.page.faults import in_recovery, losses
from launch.page.files import Lines, RunFiles, RunReader
from launch.page.goodput import AGAIN, FIRST_STEP, RECOVERY, REST, STANDS, RunClock, goodput
from launch.page.keeper import PageKeeper, draw_last
from launch.page.sheet import sheet, state_of
from launch.page.workers import stays

BEGAN = 1_795_966_000.0
VOID = {"meta", "link", "img", "br", "path", "input"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}</style>\x1b[31m\x00&lt;"


def write(folder: Path, **files: Sequence[dict[str, Any]] | str) -> Path:
    """A run folder with these files: lines of JSON, or text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        if isinstance(lines, str):
            (folder / f"{name}.toml").write_text(lines)
        else:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def event(second: float, event: str, **fields: Any) -> dict[str, Any]:
    return {"time": BEGAN + second, "event": event, **fields}


def step(number: int, *, view: int = 1, again: int = 0, loss: float | None = None) -> dict[str, Any]:
    return {
        "step": number, "loss": 8 - number / 20 if loss is None else loss, "tokens": 4096, "tokens_per_s": 4096.0,
        "grad_norm": 1.0, "lr": 0.001, "view": view, "again": again, "tflops": 0.5, "mfu": 0.25,
        "peak_host_bytes": 3 << 28, "peak_host_bytes_sum": 3 << 30,
    }  # fmt: skip


CONFIG = """
workers = 3
scheduler = "one_f_one_b"
model = "llama-2m"
steps = 40
lr = 0.5
recovery = "auto"
data = "stdlib"
"""
DESCRIBED = {
    "model": "llama-2m", "parameters": 2_100_000, "layer_bytes": [1 << 20] * 10,
    "layers": {"0": ["0:4"], "1": ["4:7"], "2": ["7:10"]}, "peak_activations": {"0": 3, "1": 2, "2": 1},
    "groups": {"Schedule": ["workers", "scheduler", "recovery"], "Optimizer": ["lr"]},
    "defaults": {"workers": 4, "scheduler": "one_f_one_b", "recovery": "auto", "lr": 0.002},
    "environment": {"python": "3.11.2", "cores": 2, "memory": 1 << 34},
}  # fmt: skip
EVENTS = [
    event(0.0, "started", step=0, workers=3, view=1, torch="2.13.0", threads=1),
    event(0.0, "described", step=0, **DESCRIBED),
    event(4.1, "timeline", step=3),
    event(21.1, "fault", worker=1, step=20, fault="kill", at="backward"),
    event(21.2, "detected", worker=1, reason="was killed by SIGKILL", step=20),
    event(21.2, "view", view=2, workers=[0, 2, 3], joined={"3": 1}, step=20),
    event(21.2, "remedy", worker=1, replacement=3, remedy="checkfree", view=2, step=20),
    event(21.5, "resumed", step=20, view=2, seconds={"view": 0.1, "ready": 0.25, "total": 0.25},
          restores=[[3, "4:7", "checkfree"]], woken=BEGAN + 21.2, there=0),
    event(30.0, "detected", worker=2, reason="was killed by SIGKILL", step=27),
    event(30.0, "view", view=3, workers=[0, 3, 4], joined={"4": 2}, step=27),
    event(30.0, "remedy", worker=2, replacement=4, remedy="checkpoint", view=3, step=27),
    event(30.4, "resumed", step=20, view=3, seconds={"view": 0.1, "total": 0.4}, restores=[], woken=0.0, there=0),
    event(30.4, "rolled_back", step=20, to="step-00000020", steps_lost=7),
    event(52.0, "evaluation", step=40, loss=5.5, perplexity=244.0, means={"text": 5.5}),
    event(52.5, "checkpoint", step=40),
    event(52.6, "exported", step=40, path="/x/model"),
]  # fmt: skip
FIRST = [step(n) for n in range(1, 21)] + [step(n, view=2) for n in range(21, 28)]
METRICS = FIRST + [step(n, view=3, again=int(n < 28)) for n in range(21, 41)]
COMMITS = [1.0 + n for n in range(20)] + [23.0 + n for n in range(7)] + [31.9 + n for n in range(20)]
LEDGER = [
    {"step": m["step"], "view": m["view"], "first_sample": 32 * (m["step"] - 1), "samples": 32, "time": BEGAN + at}
    for m, at in zip(METRICS, COMMITS, strict=True)
]


def whole(folder: Path) -> Path:
    """A run of two kills, the second of which went back to a checkpoint."""
    return write(folder, config=CONFIG, metrics=METRICS, events=EVENTS, ledger=LEDGER)


def read(folder: Path, running: bool = False) -> RunFiles:
    return RunReader(folder).read(running)


class Elements(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


def block(run: RunFiles, section: str, kind: type) -> Any:
    """The first block of a kind in a section."""
    (found,) = [each for each in sheet(run).sections if each.key == section]
    return next(each for each in found.blocks if isinstance(each, kind))


# ---- what it says ----


def test_each_loss_says_what_was_done_what_it_took_and_what_was_run_again(tmp_path: Path) -> None:
    first, second = losses(read(whole(tmp_path)))
    assert (first.worker, first.replacement, first.remedy, first.redone) == (1, 3, "checkfree", 0)
    assert first.seconds == pytest.approx(23.0 - 21.1), "from the moment of the fault that was injected"
    assert first.moved == 3 << 20, "three layers of a MiB"
    assert dict(first.parts) == pytest.approx({"view": 0.1, "ready": 0.15})
    assert (second.worker, second.remedy, second.redone, second.moved) == (2, "checkpoint", 7, None)
    assert second.seconds == pytest.approx(31.9 - 30.0)
    rows = block(read(tmp_path), "losses", Table).rows
    assert [row[1] for row in rows] == ["20", "27"]
    assert rows[0][-1] == "3 MiB"


def test_a_loss_without_a_later_commit_has_no_end_and_ends_nothing(tmp_path: Path) -> None:
    events = [*EVENTS[:9], event(31.0, "failed", error="worker 2 was killed; no remedy is left", step=27)]
    run = read(write(tmp_path, config=CONFIG, metrics=FIRST, events=events, ledger=LEDGER[:27]))
    found = losses(run)
    assert [loss.until for loss in found[1:]] == [None, None]
    assert found[-1].kind == "failed"
    assert state_of(run) == ("failed", "ended at step 27: worker 2 was killed; no remedy is left")
    assert "none since" in page(sheet(run))


def test_the_time_of_a_run_is_accounted_for_to_the_last_second(tmp_path: Path) -> None:
    run = read(whole(tmp_path))
    clock, found = RunClock.of(run), losses(run)
    account = goodput(run, clock, found)
    parts = dict(account.parts)
    assert account.total == pytest.approx(52.6)
    assert sum(parts.values()) == pytest.approx(52.6)
    assert (parts[STANDS], parts[AGAIN]) == (pytest.approx(40.0), pytest.approx(7.0))
    assert parts[RECOVERY] == pytest.approx(1.9 - 1 + 1.9 - 1), "without the step itself"
    assert parts[FIRST_STEP] == pytest.approx(0.0)
    assert parts[REST] == pytest.approx(52.6 - 40 - 7 - 1.8)
    assert sum(share.share for share in block(run, "time", Bar).shares) == pytest.approx(1.0)


def test_the_clock_of_a_run_stands_still_between_its_starts(tmp_path: Path) -> None:
    later = [event(9000.0, "started", step=40, workers=2), event(9010.0, "stopped", step=45)]
    run = read(write(tmp_path, events=[*EVENTS, *later], ledger=LEDGER, metrics=METRICS))
    clock = RunClock.of(run)
    assert clock.total == pytest.approx(52.6 + 10)
    assert [clock.at(BEGAN + second) for second in (-5, 10, 60, 9000, 9004, 1e6)] == pytest.approx(
        [0, 10, 52.6, 52.6, 56.6, 62.6]
    )
    assert state_of(run)[0] == "stopped"


def test_who_takes_a_place_lies_behind_who_had_it(tmp_path: Path) -> None:
    run = read(whole(tmp_path))
    found = stays(run, RunClock.of(run))
    assert [(s.worker, s.lane, s.layers) for s in found] == [
        (0, 0, "0:4"), (1, 1, "4:7"), (2, 2, "7:10"), (3, 1, "4:7"), (4, 2, "7:10"),
    ]  # fmt: skip
    assert found[1].end == found[3].start == pytest.approx(21.2)
    assert found[1].ended == "was killed by SIGKILL"
    assert [s.end for s in found if not s.ended] == pytest.approx([52.6] * 3)
    strip = block(run, "workers", Strip)
    assert len(strip.bands) == 2
    assert strip.lanes == 3


def test_layers_that_move_are_seen_and_the_workers_of_a_pool_too(tmp_path: Path) -> None:
    events = [
        *EVENTS[:2],
        event(5.0, "detected", worker=1, reason="was killed by SIGKILL", step=4),
        event(5.0, "view", view=2, workers=[0, 2], joined={}, step=4),
        event(5.0, "resized", workers=2, layers={"0": ["0:6"], "2": ["6:10"]}, view=2, step=4),
        event(9.0, "view", view=3, workers=[0, 2, 3], joined={"3": 1}, step=8),
        event(9.0, "resized", workers=3, layers=DESCRIBED["layers"], view=3, step=8),
        event(12.0, "stopped", step=9),
    ]
    run = read(write(tmp_path / "elastic", events=events))
    found = [(s.worker, s.lane, s.layers, s.start, s.end) for s in stays(run, RunClock.of(run))]
    assert (0, 0, "0:6", 5.0, 9.0) in found
    assert (3, 1, "4:7", 9.0, 12.0) in found
    assert (2, 2, "7:10", 9.0, 12.0) in found
    pool = [
        event(0.0, "started", step=0, workers=2, host_bytes=1 << 30), event(0.5, "joined", worker=0),
        event(0.6, "joined", worker=1), event(3.0, "detected", worker=1, reason="was killed by SIGKILL"),
        event(3.0, "redealt", worker=1, units=2, remedy="its units are dealt to the others", replacement=2),
        event(3.5, "joined", worker=2), event(6.0, "exported", step=5),
    ]  # fmt: skip
    run = read(write(tmp_path / "pool", events=pool))
    assert [(s.worker, s.lane) for s in stays(run, RunClock.of(run))] == [(0, 0), (1, 1), (2, 1)]
    assert "1 GiB" in page(sheet(run)), "what the host store was laid out with"


def test_losses_at_once_are_one_recovery(tmp_path: Path) -> None:
    both = event(21.3, "detected", worker=0, reason="was killed by SIGKILL", step=20)
    run = read(write(tmp_path, events=[*EVENTS[:5], both, *EVENTS[5:]], ledger=LEDGER, metrics=METRICS))
    assert in_recovery(losses(run)) == [(BEGAN + 21.1, BEGAN + 23.0), (BEGAN + 30.0, BEGAN + 31.9)]


def test_the_page_tells_all_parts_of_a_run(tmp_path: Path) -> None:
    folder = whole(tmp_path / "a run")
    (folder / "timeline.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    (folder / "data").mkdir()
    meta = {"num_tokens": 1000, "held_out_tokens": 20, "fingerprint": "6ee65b7c", "request": {"data": "stdlib"}}
    (folder / "data" / "meta.json").write_text(json.dumps(meta))
    (folder / "certificates").mkdir()
    certificate = {"view": 2, "step": 20, "generation": 0, "workers": [0, 2, 3], "moves": [], "states": {"1": {}}}
    (folder / "certificates" / "view-000002.json").write_text(json.dumps(certificate))
    request = folder / "requests" / "0001"
    request.mkdir(parents=True)
    asked = {"number": 1, "generation": 1, "asked": "author=author-003", "method": "npo", "rows": [{}] * 20,
             "status": "complete"}  # fmt: skip
    (request / "request.json").write_text(json.dumps(asked))
    report = {
        which: {"forget_probability": p, "retain_probability": 0.4} for which, p in (("before", 0.5), ("after", 0.01))
    }
    (request / "report.json").write_text(json.dumps(report))
    (request / "manifest.json").write_text("{}")
    (folder / "generation.json").write_text('{"generation": 1}')
    text = Elements(page(sheet(read(folder)))).text
    for said in (
        "a run done", "40 / 40", "from 7.95", "perplexity 244", "MFU 25.0 %", "76.0 %", "p50 1.9 s, 7 steps again",
        "worker 3 · layers 4:7", "was killed by SIGKILL checkfree", "step 3 as it was measured",
        "Peak host memory, GiB", "workers 3 (changed) 4", "2.00 %, never trained on",
        "more microbatches than: 3, 2, 1", "lr 0.5 (changed) 0.002",
        "6ee65b7c", "python", "16 GiB", "generation 1", "author=author-003", "0.5000 → 0.0100", "not signed",
        "1 certified views", "1 checkpoints were saved, the newest at step 40",
    ):  # fmt: skip
        assert said in text, said
    assert "scheduler (changed)" not in text


# ---- what it is made of ----


def test_a_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    text = page(sheet(read(whole(tmp_path))))
    found = Elements(text)
    assert found.open == []
    links = [a.get(name, "") for _, a in found.found for name in ("href", "src", "srcset", "action") if name in a]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = [m["content"] for m in found.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy, "the one script that is the page's own, or none runs"


def test_a_page_is_sane_for_who_hears_it(tmp_path: Path) -> None:
    found = Elements(page(sheet(read(whole(tmp_path)))))
    ids = Counter(a["id"] for _, a in found.found if "id" in a)
    assert max(ids.values()) == 1
    assert all(a["href"][1:] in ids for a in found.of("a")), "every link leads somewhere"
    headings = [name for name, _ in found.found if name in ("h1", "h2", "h3")]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert all(a.get("aria-label") and a.get("role") == "img" for a in found.of("svg"))
    assert all(a.get("alt") for a in found.of("img"))
    assert all(a.get("scope") in ("col", "row") for a in found.of("th"))
    assert len(found.of("caption")) == len(found.of("table"))
    assert all(a.get("aria-label") for a in found.of("nav"))
    assert found.of("html") == [{"lang": "en"}]


def test_what_a_run_says_is_text_and_never_markup(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "-").replace("\0", "")
    events = json.loads(json.dumps(EVENTS).replace("was killed by SIGKILL", "@").replace("checkfree", "@"))
    events = [{name: HOSTILE if value == "@" else value for name, value in each.items()} for each in events]
    described = {**DESCRIBED, "model": HOSTILE, "groups": {HOSTILE: ["lr", HOSTILE]}, "environment": {HOSTILE: HOSTILE}}
    events[1] = event(0.0, "described", **described)
    events += [event(53.0, HOSTILE, step=40, **{HOSTILE: HOSTILE}), event(53.0, "failed", error=HOSTILE, step=40)]
    write(folder, config=CONFIG, metrics=METRICS, events=events, ledger=LEDGER)
    (folder / "config.toml").write_text(CONFIG + f"data2 = {json.dumps(HOSTILE)}\n")
    request = folder / "requests" / "0001"
    request.mkdir(parents=True)
    (request / "request.json").write_text(
        json.dumps({"number": 1, "asked": HOSTILE, "method": HOSTILE, "status": HOSTILE})
    )
    for made in (sheet(read(folder)), compared([read(folder), read(whole(tmp_path / "other"))])):
        text = page(made)
        found = Elements(text)
        assert len([a for a in found.of("script") if not a.get("type")]) == 1
        assert not [name for _, a in found.found for name in a if name.startswith("on")]
        assert not [a for a in found.of("img") if not a["src"].startswith("data:")]
        assert "<script>alert(1)" in found.text
        assert "{{7*7}}" in found.text
        assert "49" not in [a.strip() for a in found.texts]
        assert "\x1b" not in text
        assert "\x00" not in text


@pytest.mark.parametrize(
    "gone", ["config.toml", "metrics.jsonl", "events.jsonl", "ledger.jsonl", "all but the settings"]
)
def test_a_folder_that_lacks_a_file_has_a_page_all_the_same(tmp_path: Path, gone: str) -> None:
    whole(tmp_path)
    for name in ("metrics.jsonl", "events.jsonl", "ledger.jsonl") if " " in gone else (gone,):
        (tmp_path / name).unlink()
    found = Elements(page(sheet(read(tmp_path))))
    assert found.open == []
    if " " in gone:
        assert "nothing is known of how it went" in found.text


def test_a_run_that_failed_before_its_first_step_says_why(tmp_path: Path) -> None:
    run = read(write(tmp_path, config=CONFIG, events=[*EVENTS[:2], event(2.0, "failed", error="no memory", step=0)]))
    text = Elements(page(sheet(run))).text
    assert "ended at step 0: no memory" in text
    assert "until the first step" in text


def _damaged(value: Any, chance: random.Random) -> Any:
    """A value of which something is something else."""
    odd = [None, True, -1, 0, 1e308, 10**400, "x" * 300, [], {}, [[]], {"a": {"b": []}}, 1.5, "7", -(10**18)]
    if chance.random() < 0.15:
        return chance.choice(odd)
    if isinstance(value, dict):
        return {name: _damaged(each, chance) for name, each in value.items()}
    return [_damaged(each, chance) for each in value] if isinstance(value, list) else value


def test_whatever_stands_in_its_files_there_is_a_page(tmp_path: Path) -> None:
    chance = random.Random(18)
    whole(tmp_path)
    for _ in range(30):
        files = {"metrics": METRICS[:30], "events": EVENTS, "ledger": LEDGER[:30]}
        write(tmp_path, **{name: [_damaged(line, chance) for line in lines] for name, lines in files.items()})
        with (tmp_path / "events.jsonl").open("ab") as file:
            file.write(b'{"half": \xff\n[1]\n{"time": 1e999, "event": "view"}\n{"time": NaN}\n{"ti')
        run = read(tmp_path)
        assert Elements(page(sheet(run))).open == []
        assert Elements(page(compared([run, run]))).open == []


# ---- long runs, and files that grow ----


def test_a_curve_of_a_long_run_keeps_its_peaks_and_few_points() -> None:
    points = [(float(n), float(n == 77_777)) for n in range(100_000)]
    found = thinned(points)
    assert len(found) <= 802
    assert (77_777.0, 1.0) in found
    assert (found[0], found[-1]) == (points[0], points[-1])
    made = chart("k", "t", [Curve("c", [*points, (1e5, float("nan"))])])
    assert made is not None
    assert len(made.svg) < 30_000
    assert chart("k", "t", [Curve("c", [(1.0, float("nan"))])]) is None


def test_a_file_is_read_on_from_where_it_was_read_to(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path, ("step",))
    assert not lines.more()
    path.write_bytes(b'{"step": 1}\n{"step"')
    assert lines.more()
    assert not lines.more(), "the last line is not whole"
    with path.open("ab") as file:
        file.write(b': 2}\nnone\n{"no": 3}\n')
    assert lines.more()
    assert lines.lines == [{"step": 1}, {"step": 2}]
    (tmp_path / "new").write_bytes(b'{"step": 9}\n')
    os.replace(tmp_path / "new", path)
    assert lines.more()
    assert lines.lines == [{"step": 9}], "a resumed run writes it anew"


def test_runs_are_compared_by_their_curves_their_settings_and_their_faults(tmp_path: Path) -> None:
    calm = write(tmp_path / "calm", config=CONFIG.replace("0.5", "0.25"), metrics=METRICS[-20:], ledger=LEDGER[-20:],
                 events=[*EVENTS[:2], *EVENTS[-3:]])  # fmt: skip
    text = Elements(page(compared([read(whole(tmp_path / "kills")), read(calm)]))).text
    for said in ("kills · calm", "lr 0.5 0.25", "worker 1 was killed by SIGKILL: checkfree", "2 runs", "as far as"):
        assert said.lower() in text.lower(), said
    assert "scheduler" not in text
    twins = compared([read(tmp_path / "kills"), read(whole(tmp_path / "b" / "kills"))])
    assert twins.title == f"{tmp_path / 'kills'} · {tmp_path / 'b' / 'kills'}"


# ---- while a run goes on ----


@pytest.fixture
def said() -> list[str]:
    return []


def _await(path: Path, words: str) -> str:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if path.is_file() and words in (text := path.read_text()):
            return text
        time.sleep(0.05)
    raise AssertionError(f"{words} does not come")


@pytest.fixture
def keeper(tmp_path: Path, said: list[str]) -> Iterator[PageKeeper]:
    write(tmp_path, config=CONFIG, metrics=METRICS[:5], events=EVENTS[:2], ledger=LEDGER[:5])
    kept = PageKeeper(tmp_path, said.append, first_s=0.0)
    yield kept
    kept.close()


def test_the_page_is_there_while_the_run_goes_on_and_is_the_last_word_at_its_end(
    tmp_path: Path, keeper: PageKeeper, said: list[str]
) -> None:
    process = keeper._process
    assert process is not None
    assert "5 / 40" in _await(tmp_path / "report.html", "the run goes on")
    whole(tmp_path)
    keeper.close()
    assert process.returncode == 0
    assert "done: all 40 steps" in (tmp_path / "report.html").read_text()
    assert (said, list(tmp_path.glob("*.tmp"))) == ([], [])


def test_a_run_that_is_killed_leaves_a_page_that_says_so(tmp_path: Path, keeper: PageKeeper) -> None:
    _await(tmp_path / "report.html", "the run goes on")
    process = keeper._process
    assert process is not None
    assert process.stdin is not None
    keeper._process = None
    process.stdin.close()  # as the system does for who is killed
    assert process.wait(60) == 0
    assert "it ended without a word" in (tmp_path / "report.html").read_text()


def test_a_page_that_cannot_be_written_costs_the_page_alone(tmp_path: Path, said: list[str]) -> None:
    whole(tmp_path)
    (tmp_path / "report.html").mkdir()
    PageKeeper(tmp_path, said.append).close()
    assert len(said) == 1
    assert said[0].startswith("report.html is not drawn: ")
    draw_last(tmp_path / "nowhere", said.append)
    assert len(said) == 2
    assert list(tmp_path.glob("*.tmp")) == []
