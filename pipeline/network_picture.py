"""How a plan uses a slow network, as a picture: which nodes a microbatch visits, over which links, on whose behalf.

Place is the network: nodes lie near each other where hops between them are short. A node's fill is its stage. A link's
colour is the home whose microbatches cross it, which the home's ring repeats, and its width is how many they are. A
plan leaves most links unused, and those are not drawn. Imports no torch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.svg import INK, MUTED, PAPER, RULE, coord, document, mix, oklch, tag, text, text_width, tooltip

_Points = NDArray[np.float64]
_Link = tuple[int, int, int, bool]
"""Home, from, to, and whether it is the way home for the loss, which every path ends with."""

_SLOWEST = 95.0  # percentile of hops beyond which a link counts as no slower: one broken link squashes no picture
_LABELLED = 50  # nodes at most that have their location beneath them; beyond it, in the tooltip alone
_ROWS = 12  # homes in the list of paths
_NAME = 18  # characters of a location's name
_GAP = 3.0  # px that nodes with their labels keep between them, on each side


@dataclass(frozen=True)
class _Map:
    """Circles at `at`, `radius` px, inside boxes about `boxes` that take in the label: `half` its width and height."""

    at: _Points
    radius: float
    boxes: _Points
    half: _Points
    width: float
    height: float


def network_svg(
    hop_s: Sequence[Sequence[float]], stages: Sequence[Sequence[int]], paths: Sequence[Sequence[int]], *,
    names: Sequence[str] = (), title: str = "network plan", note: str = "", width: int = 1200,
) -> str:  # fmt: skip
    """The plan on its network, `width` pixels wide. Returns the SVG file's text, the same for the same input.

    `hop_s[a][b]` is in seconds from node a to b, infinite where there is no link; `stages` has the nodes of each stage,
    a node of none is drawn grey; `paths` has the nodes of each microbatch, from its home in the first stage on. `names`
    has the nodes' locations or is empty; `note` goes below the title. Raises ValueError for input that is empty or does
    not match, naming it, and where there is no room (`width` under 400).
    """
    _check(hop_s, stages, paths, names, width)
    homes = {home: _ink(i, len(stages[0])) for i, home in enumerate(stages[0])}
    crossed = Counter(link for path in paths for link in _links(path))
    labels = [_short(name) for name in names] if len(hop_s) <= _LABELLED else []
    plan = _layout(hop_s, labels, width - 32.0)

    body = [text(16, 28, title, font_size=16, font_weight="600")]
    if note:
        body.append(text(16, 48, note, fill=MUTED))
    legend, y = _legend(len(stages), plan, crossed, width, 72.0 if note else 52.0)
    drawn = [*_curves(plan, crossed, hop_s, names, homes), *_nodes(plan, stages, paths, names, labels, homes)]
    body += [*legend, tag("g", "\n".join(drawn), transform=f"translate(16 {coord(y)})")]
    rows, y = _table(paths, names, homes, width, y + plan.height + 16)
    used = len({frozenset(link[1:3]) for link in crossed})
    told = f"{len(hop_s)} nodes, {len(stages)} stages, {_many(len(paths))} over {used} links"
    return document(width, y, [*body, *rows], title=title, description=f"{told}; {note}" if note else told)


def _check(
    hop_s: Sequence[Sequence[float]], stages: Sequence[Sequence[int]], paths: Sequence[Sequence[int]],
    names: Sequence[str], width: int,
) -> None:  # fmt: skip
    size = len(hop_s)
    if not size or [len(row) for row in hop_s] != [size] * size:
        raise ValueError(f"hop_s is {size} rows of {sorted({len(row) for row in hop_s})}; expected a square of seconds")
    if bad := [(a, b) for a, row in enumerate(hop_s) for b, seconds in enumerate(row) if not seconds >= 0]:
        (a, b) = bad[0]
        raise ValueError(f"hop_s[{a}][{b}] is {hop_s[a][b]}; expected 0 or more seconds")
    placed = [node for stage in stages for node in stage]
    if not stages or not all(len(stage) for stage in stages):
        raise ValueError(f"stages is {[list(stage) for stage in stages]}; expected one or more nodes in each")
    if wrong := [n for n, count in Counter(placed).items() if count > 1 or not 0 <= n < size]:
        raise ValueError(f"stages names node {wrong[0]}; expected each of 0 to {size - 1} at most once")
    if not paths:
        raise ValueError("paths is empty; expected the nodes of one or more microbatches")
    for m, path in enumerate(paths):
        if not path or path[0] not in stages[0]:
            raise ValueError(f"paths[{m}] is {list(path)}; expected to start in the first stage, {list(stages[0])}")
        if stray := set(path).difference(placed):
            raise ValueError(f"paths[{m}] visits node {min(stray)}, which is in no stage")
    if names and len(names) != size:
        raise ValueError(f"names has {len(names)} entries; expected {size}, one per node, or none")
    if width < 400:
        raise ValueError(f"width is {width}; expected at least 400 pixels")


def _links(path: Sequence[int]) -> set[_Link]:
    """What one microbatch crosses in its forward; its backward takes the same links the other way."""
    there = {(path[0], a, b, False) for a, b in pairwise(path)}
    return {link for link in {*there, (path[0], path[-1], path[0], True)} if link[1] != link[2]}


def _short(name: str) -> str:
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"


def _many(count: int) -> str:
    return f"{count} microbatch" + ("" if count == 1 else "es")


def _called(node: int, names: Sequence[str]) -> str:
    return f"node {node} ({names[node]})" if names and names[node] else f"node {node}"


def _ink(index: int, count: int) -> str:
    """A home's colour. Many hues are too near each other, so lightness then tells neighbours apart."""
    return oklch((0.6, 0.46, 0.7)[index % 3] if count > 8 else 0.57, 0.19, (28 + 360 * index / count) % 360)


def _fill(stage: int, count: int) -> str:
    """A stage's colour: pale, which no link's is; short of a full turn, so that the first and the last differ."""
    return oklch(0.88, 0.085, (60 + 315 * stage / count) % 360)


# ---- where nodes lie ----


def _scaled(hop_s: Sequence[Sequence[float]]) -> _Points:
    """A point per node whose distances are about those of `hop_s`: classical scaling (Torgerson, 1952), wider than
    high."""
    hops = np.array(hop_s, dtype=float)
    apart, size = (hops + hops.T) / 2, len(hops)
    np.fill_diagonal(apart, 0.0)
    known = apart[np.isfinite(apart) & ~np.eye(size, dtype=bool)]
    apart = np.minimum(apart, np.percentile(known, _SLOWEST) if known.size else 1.0)
    middle = np.eye(size) - 1.0 / size
    values, vectors = np.linalg.eigh(-0.5 * middle @ apart**2 @ middle)
    points = np.zeros((size, 2))
    for axis in range(min(2, size)):
        vector = vectors[:, -1 - axis]
        # An eigenvector is one up to its sign: the first of its largest entries decides.
        sign = np.sign(vector[np.argmax(np.abs(vector) > 0.999 * np.abs(vector).max())])
        points[:, axis] = sign * vector * np.sqrt(max(values[-1 - axis], 0.0))
    return points


def _layout(hop_s: Sequence[Sequence[float]], labels: Sequence[str], width: float) -> _Map:
    size = len(hop_s)
    radius = 13.0 if size <= 25 else max(4.0, 13.0 * (25 / size) ** 0.25)
    below = 14.0 if labels else 0.0
    half = np.full((size, 2), radius + _GAP)
    half[:, 1] += below / 2
    for node, label in enumerate(labels):
        half[node, 0] = max(half[node, 0], text_width(label, 10) / 2 + _GAP)
    boxes = _scaled(hop_s)
    low, high = boxes.min(axis=0), boxes.max(axis=0)
    room = np.array([width, 0.46 * width]) - 2 * half.max(axis=0)
    boxes = (boxes - (low + high) / 2) * min((room / np.maximum(high - low, 1e-9)).min(), 1e6)
    boxes = _pushed(boxes, half, width)
    top, bottom = (boxes - half)[:, 1].min() - 8, (boxes + half)[:, 1].max() + 8
    boxes += (width / 2, -top)
    return _Map(boxes - (0.0, below / 2), radius, boxes, half, width, bottom - top)


def _pushed(boxes: _Points, half: _Points, width: float) -> _Points:
    """Boxes about x = 0 until none overlap: pairs part along the line between their centres; sideways there is an end
    at `width`, up and down there is none."""
    size = len(boxes)
    turn = 2.4 * np.arange(size)  # the golden angle: what lies in one place parts in all directions
    boxes = boxes + 0.2 * half * np.column_stack([np.cos(turn), np.sin(turn)])
    need = half[:, None] + half[None]
    edge = width / 2 - half[:, 0]
    for _ in range(min(4000, max(60, 20_000_000 // size**2))):
        apart = boxes[:, None] - boxes[None]
        short = need - np.abs(apart)
        hit = (short > 0.0).all(axis=2) & ~np.eye(size, dtype=bool)
        if not hit.any():
            break
        # How far along that line until they part on one axis, and a little farther, so that this comes to an end.
        push = apart * ((short + 0.5) / np.maximum(np.abs(apart), 1e-3)).min(axis=2, keepdims=True) * hit[..., None]
        boxes = boxes + push.sum(axis=1) / (1.0 + hit.sum(axis=1))[:, None]
        boxes[:, 0] = np.clip(boxes[:, 0], -edge, edge)
    return boxes


# ---- links, nodes, legend, list ----


def _curves(
    plan: _Map, crossed: Counter[_Link], hop_s: Sequence[Sequence[float]], names: Sequence[str], homes: dict[int, str]
) -> list[str]:
    """The busiest first, so that the thin lie above the thick; each bent to where it runs through the fewest nodes."""
    most, taken = max(crossed.values(), default=1), defaultdict[frozenset[int], set[int]](set)
    lines, tips = [], []
    steps = np.linspace(0.02, 0.98, 49)[:, None]
    for (home, a, b, loss), count in sorted(crossed.items(), key=lambda item: (-item[1], item[0])):
        low, high = plan.at[min(a, b)], plan.at[max(a, b)]
        aside = np.array([low[1] - high[1], high[0] - low[0]])
        others = [n for n in range(len(plan.at)) if n not in (a, b)]
        best = (np.inf, 0, low)
        bends = [sign * k for k in range(1, 5 + len(taken[frozenset((a, b))])) for sign in (1, -1)]
        for bend in (k for k in bends if k not in taken[frozenset((a, b))]):
            pull = (low + high) / 2 + 0.13 * bend * aside
            line = (1 - steps) ** 2 * low + 2 * steps * (1 - steps) * pull + steps**2 * high
            through = (np.abs(line[:, None] - plan.boxes[others]) < plan.half[others]).all(axis=2).any(axis=0).sum()
            outside = ((line < 2) | (line > (plan.width - 2, plan.height - 2))).any()
            best = min(best, (float(through + 50 * outside + 0.3 * abs(bend)), bend, pull), key=lambda found: found[:2])
        taken[frozenset((a, b))].add(best[1])
        start, pull, end = plan.at[a], best[2], plan.at[b]
        d = f"M{_pair(start)}Q{_pair(pull)} {_pair(end)}"
        back = f", {hop_s[b][a]:.2f} s back" if f"{hop_s[a][b]:.2f}" != f"{hop_s[b][a]:.2f}" else ""
        said = f"{_called(a, names)} - {_called(b, names)}: {_many(count)}, {hop_s[a][b]:.2f} s per hop{back}"
        wide = _wide(count, most) * min(1.0, plan.radius / 11)
        lines.append(tag("path", d=d, stroke=PAPER, stroke_width=wide + 2.5, stroke_opacity=0.7))
        dash = f"{coord(3 * wide)} {coord(1.6 * wide)}" if loss else None
        tip = tooltip(said + ("; home for the loss" if loss else ""))
        lines.append(tag("path", tip, d=d, stroke=homes[home], stroke_width=wide, stroke_dasharray=dash))
        along = (end - start) / max(float(np.hypot(*(end - start))), 1e-9) * (3.5 + 1.1 * wide)
        across, centre = np.array([-along[1], along[0]]) * 0.7, (start + 2 * pull + end) / 4
        tips.append(f"M{_pair(centre - along + across)}L{_pair(centre + along)}L{_pair(centre - along - across)}z")
        tips[-1] = tag("path", d=tips[-1], fill=homes[home], stroke=PAPER, stroke_width=0.7)
    return [tag("g", "\n".join(lines), fill="none"), *tips]


def _pair(point: _Points) -> str:
    return f"{coord(point[0])} {coord(point[1])}"


def _wide(count: float, most: int) -> float:
    return 1.2 + 4.3 * count / max(most, 4)


def _nodes(
    plan: _Map, stages: Sequence[Sequence[int]], paths: Sequence[Sequence[int]], names: Sequence[str],
    labels: Sequence[str], homes: dict[int, str],
) -> list[str]:  # fmt: skip
    stage_of = {node: i for i, stage in enumerate(stages) for node in stage}
    visits = Counter(node for path in paths for node in set(path))
    out, small = [], min(12.0, plan.radius)
    for node, (x, y) in enumerate(plan.at.tolist()):
        stage = stage_of.get(node)
        said = "in no stage" if stage is None else f"stage {stage}, {_many(visits[node])}"
        fill = RULE if stage is None else _fill(stage, len(stages))
        ring, thick = (homes[node], plan.radius / 3.5) if node in homes else (mix(fill, INK, 0.45), 1.0)
        parts = tooltip(f"{_called(node, names)}: {said}{', their home' if node in homes else ''}")
        parts += tag("circle", cx=x, cy=y, r=plan.radius - thick / 2, fill=fill, stroke=ring, stroke_width=thick)
        if small >= 6:
            parts += text(x, y + 0.36 * small, str(node), font_size=small * (1 if node < 100 else 0.8))
        if labels and labels[node]:
            halo = {"stroke": PAPER, "stroke_width": 3, "stroke_opacity": 0.85, "paint_order": "stroke"}
            parts += text(x, y + plan.radius + 11, labels[node], font_size=10, **halo)
        out.append(tag("g", parts, id=f"node{node}", text_anchor="middle"))
    return out


def _legend(count: int, plan: _Map, crossed: Counter[_Link], width: float, y: float) -> tuple[list[str], float]:
    """What colours, widths and places mean, on as many lines as it takes; returns the y below it."""
    some = list(range(count)) if count <= 10 else [round(i * (count - 1) / 9) for i in range(10)]
    dots = [(18.0, tag("circle", cx=9, cy=-4, r=7, fill=_fill(s, count), stroke=MUTED)) for s in some]
    if count <= 10:
        entries = [(*dot, f"stage {s}") for s, dot in zip(some, dots)]
    else:  # too many to be named one by one: a row of ten, first to last
        row = "".join(tag("g", dot, transform=f"translate({15 * i} 0)") for i, (_, dot) in enumerate(dots))
        entries = [(153.0, row, f"stage 0 to {count - 1}")]
    ring = tag("circle", cx=9, cy=-4, r=6, fill=_fill(0, count), stroke=INK, stroke_width=3.5)
    entries.append((18.0, ring, "home: where microbatches start and end, in the colour of their links"))
    most = max(crossed.values(), default=0)
    for k in sorted({1, (most + 1) // 2, most} - {0}) if most else ():
        wide = _wide(k, most) * min(1.0, plan.radius / 11)
        entries.append((30.0, tag("path", d="M0 -4h30", stroke=INK, stroke_width=wide), _many(k)))
    if most:
        entries.append((30.0, tag("path", d="M0 -4h30", stroke=INK, stroke_width=2, stroke_dasharray="6 3"), "home for the loss"))
        entries.append((14.0, tag("path", d="M2 -9L13 -4L2 1z", fill=INK), "way of the forward; the backward returns along it"))
    entries.append((0.0, "", "near each other: short hops"))
    out, x = [], 16.0
    for size, mark, words in entries:
        need = size + 6 + text_width(words, 11) + 14
        if x + need > width - 16 and x > 16:
            x, y = 16.0, y + 20
        out.append(tag("g", mark + text(size + 6, 0, words, fill=MUTED, font_size=11), transform=f"translate({coord(x)} {coord(y)})"))
        x += need
    return out, y + 18


def _table(
    paths: Sequence[Sequence[int]], names: Sequence[str], homes: dict[int, str], width: float, y: float
) -> tuple[list[str], float]:
    """A row per home: its paths, and how many microbatches take each; returns the y below it."""
    taken: dict[int, Counter[str]] = {home: Counter() for home in homes}
    for path in paths:
        taken[path[0]]["-".join(map(str, path))] += 1
    shown = list(homes)[: _ROWS if len(homes) > _ROWS + 1 else _ROWS + 1]
    heads = {home: f"{home} {_short(names[home])}:" if names and names[home] else f"{home}:" for home in shown}
    left = 44 + max(text_width(head) for head in heads.values())
    out = [tag("path", d=f"M16 {coord(y)}H{coord(width - 16)}", stroke=RULE)]
    out.append(text(16, y + 20, "Paths of each home, and how many microbatches take them", font_weight="600"))
    y += 40
    for home in shown:
        out.append(tag("path", d=f"M16 {coord(y - 4)}h18", stroke=homes[home], stroke_width=4))
        out.append(text(42, y, heads[home]))
        words, ways = "", [f"{way} × {count}" for way, count in taken[home].most_common()]
        for i, way in enumerate(ways):
            longer = f"{words}, {way}" if words else way
            if i and left + text_width(f"{longer}, … and 999 more") > width - 16:
                words += f", … and {len(ways) - i} more"
                break
            words = longer
        out.append(text(left, y, words or "none"))
        y += 18
    if rest := len(homes) - len(shown):
        out.append(text(42, y, f"… and {rest} more", fill=MUTED))
        y += 18
    return out, y
