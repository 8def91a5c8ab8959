"""How a plan uses a slow network, as a picture: which nodes a microbatch visits, over which links, on whose behalf.

Nodes lie near each other where hops are short; their fill is their stage. A link that microbatches cross has the colour
of their home, as the home's ring has, and is the wider the more they are. Other links are not drawn. Imports no torch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.drawing.svg import INK, MUTED, PAPER, RULE, coord, document, mix, oklch, tag, text, text_width, tooltip

_Points = NDArray[np.float64]
_Hops = Sequence[Sequence[float]]
_Inks = Mapping[int, str]
_Texts = Sequence[str]
_Lists = Sequence[Sequence[int]]
_Link = tuple[int, int, int, bool]  # home, from, to, and whether it is the way home for the loss, with which all end

_SLOWEST = 95.0  # percentile of hops beyond which a link counts as no slower: one broken link squashes no picture
_ROOMY, _LABELLED = 25, 50  # nodes at most that are drawn in full size, and that have their location beneath them
_ROWS, _NAME, _EFFORT = 12, 18, 60_000  # homes listed; characters of a location; links times nodes that they avoid


class _Map(NamedTuple):
    """Circles of `radius` px about `at`, and the boxes that they take with their labels, from `low` to `high`."""

    at: _Points
    radius: float
    low: _Points
    high: _Points
    labels: _Texts


def network_svg(
    hop_s: _Hops, stages: _Lists, paths: _Lists, *, names: Sequence[str] = (), title: str = "network plan",
    note: str = "", width: int = 1200,
) -> str:  # fmt: skip
    """The plan on its network, `width` pixels wide. Returns the SVG file's text, the same for the same input.

    `hop_s[a][b]` is in seconds from node a to b, infinite where there is no link; `stages` has the nodes of each stage,
    and a node of none is grey; `paths` has the nodes of each microbatch, from its home in the first stage on. `names`
    has the nodes' locations or is empty; `note` goes below the title. Raises ValueError for input that is empty or does
    not match, naming it, and where there is no room (`width` under 400).
    """
    _check(hop_s, stages, paths, names, width)
    # Many hues are too near each other, so lightness then tells neighbours apart. Fills are pale, as no link is.
    tones = (0.6, 0.46, 0.7) if len(stages[0]) > 8 else (0.57,)
    homes = {n: oklch(tones[i % len(tones)], 0.19, 28 + 360 * i / len(stages[0])) for i, n in enumerate(stages[0])}
    fills = [oklch(0.88, 0.085, 60 + 315 * i / len(stages)) for i in range(len(stages))]
    hops = [(path[0], a, b, i == len(path)) for path in paths for i, (a, b) in enumerate(pairwise((*path, path[0])), 1)]
    crossed = Counter(hop for hop in hops if hop[1] != hop[2])
    names = names or [""] * len(hop_s)
    called = [f"node {node}" + (name and f" ({name})") for node, name in enumerate(names)]
    short = [name if len(name) <= _NAME else name[: _NAME - 1] + "…" for name in names]
    where = _layout(hop_s, short if len(hop_s) <= _LABELLED else [""] * len(hop_s), width - 32.0)
    curves, low, high = _curves(where, crossed, hop_s, called, homes)

    body = [text(16, 28, title, font_size=16, font_weight="600")] + [text(16, 48, note, fill=MUTED)] * bool(note)
    legend, y = _legend(fills, where.radius, max(crossed.values(), default=0), width, 72.0 if note else 52.0)
    drawn = "\n".join(curves + _nodes(where, stages, paths, called, homes, fills))
    plan = tag("g", drawn, transform=f"translate(16 {coord(y - low)})")
    table, y = _table(paths, short, homes, width, y + high - low + 8)
    used = len({frozenset(link[1:3]) for link in crossed})
    told = f"{len(hop_s)} nodes, {len(stages)} stages, {_many(len(paths))} over {used} links" + (note and f"; {note}")
    return document(width, y, [*body, *legend, plan, *table], title=title, description=told)


def _check(hop_s: _Hops, stages: _Lists, paths: _Lists, names: _Texts, width: int) -> None:
    size, placed = len(hop_s), Counter(node for stage in stages for node in stage)
    if not size or [len(row) for row in hop_s] != [size] * size:
        raise ValueError(f"hop_s is {size} rows of {sorted({len(row) for row in hop_s})}; expected a square of seconds")
    if bad := [(a, b, hop) for a, row in enumerate(hop_s) for b, hop in enumerate(row) if not hop >= 0]:
        raise ValueError("hop_s[{}][{}] is {}; expected 0 or more seconds".format(*bad[0]))
    if not stages or not all(map(len, stages)) or max(placed.values()) > 1 or not placed.keys() <= set(range(size)):
        raise ValueError(f"stages is {list(stages)}; expected one or more of nodes 0 to {size - 1} in each, none twice")
    if not paths:
        raise ValueError("paths is empty; expected the nodes of one or more microbatches")
    for m, path in enumerate(paths):
        if not path or path[0] not in stages[0] or not placed.keys() >= set(path):
            raise ValueError(f"paths[{m}] is {list(path)}; expected nodes of stages, the first of {list(stages[0])}")
    if names and len(names) != size:
        raise ValueError(f"names has {len(names)} entries; expected {size}, one per node, or none")
    if width < 400:
        raise ValueError(f"width is {width}; expected at least 400 pixels")


def _many(count: int) -> str:
    return f"{count} microbatch" + ("es" if count != 1 else "")


def _wide(count: float, most: int, radius: float) -> float:
    """Pixels of a link that `count` microbatches cross, of `most` at most."""
    return (1.2 + 4.3 * count / max(most, 4)) * min(1.0, radius / 12)


def _scaled(hop_s: _Hops) -> _Points:
    """A point per node, about as far apart as `hop_s` says: classical scaling (Torgerson, 1952), wider than high."""
    hops, other = np.array(hop_s, dtype=float), ~np.eye(len(hop_s), dtype=bool)
    apart = (hops + hops.T) / 2
    known = apart[np.isfinite(apart) & other]
    apart = np.where(other, np.minimum(apart, np.percentile(known, _SLOWEST) if known.size else 1.0), 0.0)
    middle = np.eye(len(hops)) - 1.0 / len(hops)
    values, vectors = np.linalg.eigh(-0.5 * middle @ apart**2 @ middle)
    points = vectors[:, :-3:-1] * np.sqrt(np.maximum(values[:-3:-1], 0.0))
    # An eigenvector is one up to its sign: the first of its largest entries decides.
    first = np.argmax(np.abs(points) >= 0.999 * np.abs(points).max(axis=0), axis=0)
    points *= np.sign(points[first, range(points.shape[1])])
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))


def _layout(hop_s: _Hops, labels: _Texts, width: float) -> _Map:
    """The nodes on a sheet `width` pixels wide from x = 0, as high as it takes about y = 0."""
    size, below = len(hop_s), 14.0 if any(labels) else 0.0
    radius, gap = 13.0 * min(1.0, (_ROOMY / size) ** 0.25), 9.0 if size <= _ROOMY else 3.0
    half = np.full((size, 2), (radius + gap, radius + gap / 2 + below / 2))
    half[:, 0] = np.maximum(half[:, 0], [text_width(label, 10) / 2 + 3 for label in labels])
    boxes = _scaled(hop_s)
    boxes -= (boxes.min(axis=0) + boxes.max(axis=0)) / 2
    room = np.array([min(width, 200.0 * size), 0.46 * width]) - 2 * half.max(axis=0)
    scale = room / np.maximum(np.ptp(boxes, axis=0), 1e-9)
    boxes *= np.minimum(scale, 1.4 * scale.min())  # one axis may be stretched a little, where there is room
    boxes = np.add(_pushed(boxes, half, width / 2), (width / 2, 0.0))
    return _Map(boxes - (0.0, below / 2), radius, boxes - half, boxes + half, labels)


def _pushed(boxes: _Points, half: _Points, end: float) -> _Points:
    """Boxes until none overlap: pairs part along the line between their centres, sideways as far as +- `end`."""
    size, edge = len(boxes), end - half[:, 0]
    turn = 2.4 * np.arange(size)  # the golden angle: what lies in one place parts in all directions
    boxes = boxes + 0.2 * half * np.column_stack([np.cos(turn), np.sin(turn)])
    for _ in range(min(4000, max(60, 20_000_000 // size**2))):
        boxes[:, 0] = np.clip(boxes[:, 0], -edge, edge)
        apart = boxes[:, None] - boxes[None]
        short = half[:, None] + half[None] - np.abs(apart)
        hit = (short > 0.0).all(axis=2) & ~np.eye(size, dtype=bool)
        if not hit.any():
            break
        # As far as parts them on one axis, and a little farther, so that this comes to an end.
        push = apart * ((short + 0.5) / np.maximum(np.abs(apart), 1e-3)).min(axis=2, keepdims=True) * hit[..., None]
        boxes = boxes + push.sum(axis=1) / (1.0 + hit.sum(axis=1))[:, None]
    return boxes


def _bent(where: _Map, a: int, b: int, taken: set[int], avoid: range) -> tuple[_Points, _Points]:
    """Of the curves not `taken`, one through the fewest of the nodes `avoid`: its control point, points along it."""
    start, end = where.at[min(a, b)], where.at[max(a, b)]
    aside = np.array([start[1] - end[1], end[0] - start[0]]) * (0.1 + 12 / np.hypot(*(end - start)))
    bends = [sign * k for k in range(1, 5 + len(taken)) for sign in (1, -1) if sign * k not in taken]
    pulls = (start + end) / 2 + np.array(bends)[:, None] * aside
    t = np.linspace(0.02, 0.98, 49)[:, None]
    lines = (1 - t) ** 2 * start + 2 * t * (1 - t) * pulls[:, None] + t**2 * end
    at, others = lines[:, :, None], np.array([n for n in avoid if n not in (a, b)], dtype=int)
    boxes = ((at > where.low[others]) & (at < where.high[others])).all(axis=3).any(axis=1).sum(axis=1)
    nodes = (np.linalg.norm(at - where.at[others], axis=3) < where.radius + 2).any(axis=1).sum(axis=1)
    outside = ((lines < where.low.min(axis=0) - 12) | (lines > where.high.max(axis=0) + 12)).any(axis=(1, 2))
    best = int(np.argmin(boxes + 4 * nodes + 50 * outside + 0.3 * np.abs(bends)))
    taken.add(bends[best])
    return pulls[best], lines[best]


def _curves(
    where: _Map, crossed: Mapping[_Link, int], hop_s: _Hops, called: _Texts, homes: _Inks
) -> tuple[list[str], float, float]:
    """The links, the busiest below the others; and the least and the greatest y of links and nodes."""
    most, taken = max(crossed.values(), default=1), defaultdict[frozenset[int], set[int]](set)
    avoid = range(len(where.at) if len(where.at) * len(crossed) <= _EFFORT else 0)
    lines, tips, ys = [], [], [where.low[:, 1].min(), where.high[:, 1].max()]
    for (home, a, b, loss), count in sorted(crossed.items(), key=lambda item: (-item[1], item[0])):
        pull, line = _bent(where, a, b, taken[frozenset((a, b))], avoid)
        ys += (line[:, 1].min() - 4, line[:, 1].max() + 4)
        start, end, thick = where.at[a], where.at[b], _wide(count, most, where.radius)
        there, back = f"{hop_s[a][b]:.2f} s", f"{hop_s[b][a]:.2f} s"
        said = f"{called[a]} - {called[b]}: {_many(count)}, {there} per hop"
        said += (f", {back} back" if there != back else "") + ("; home for the loss" if loss else "")
        d = "M{:.1f} {:.1f}Q{:.1f} {:.1f} {:.1f} {:.1f}".format(*start, *pull, *end)
        dash = f"{coord(3 * thick)} {coord(1.6 * thick)}" if loss else None
        lines.append(tag("path", d=d, stroke=PAPER, stroke_width=thick + 2.5, stroke_opacity=0.7))
        lines.append(tag("path", tooltip(said), d=d, stroke=homes[home], stroke_width=thick, stroke_dasharray=dash))
        ahead = (end - start) / np.hypot(*(end - start)) * (3.0 + 1.05 * thick)
        side, middle = np.array([-ahead[1], ahead[0]]) * 0.75, (start + 2 * pull + end) / 4
        corners = (*(middle - ahead + side), *(middle + ahead), *(middle - ahead - side))
        tips.append(tag("path", d="M{:.1f} {:.1f}L{:.1f} {:.1f}L{:.1f} {:.1f}z".format(*corners), fill=homes[home]))
    return [tag("g", "\n".join(lines), fill="none"), *tips], float(min(ys)), float(max(ys))


def _nodes(where: _Map, stages: _Lists, paths: _Lists, called: _Texts, homes: _Inks, fills: _Texts) -> list[str]:
    stage_of = {node: i for i, stage in enumerate(stages) for node in stage}
    visits, size, out = Counter(node for path in paths for node in set(path)), min(12.0, where.radius), []
    halo = {"stroke": PAPER, "stroke_width": 3, "stroke_opacity": 0.85, "paint_order": "stroke"}
    for node, (x, y) in enumerate(where.at.tolist()):
        stage = stage_of.get(node, -1)
        fill, said = (fills[stage], f"stage {stage}, {_many(visits[node])}") if stage >= 0 else (RULE, "in no stage")
        ring, thick = (homes[node], where.radius / 3.5) if node in homes else (mix(fill, INK, 0.45), 1.0)
        parts = tooltip(f"{called[node]}: {said}{', their home' if node in homes else ''}")
        parts += tag("circle", cx=x, cy=y, r=where.radius - thick / 2, fill=fill, stroke=ring, stroke_width=thick)
        parts += text(x, y + 0.36 * size, str(node), font_size=size * (1 if node < 100 else 0.8))
        if where.labels[node]:
            parts += text(x, y + where.radius + 11, where.labels[node], font_size=10, **halo)
        out.append(tag("g", parts, id=f"node{node}", text_anchor="middle"))
    return out


def _legend(fills: _Texts, radius: float, most: int, width: float, y: float) -> tuple[list[str], float]:
    """What colours, widths and places mean, on as many lines as it takes; returns the y below it."""
    line = {"d": "M0 -4h30", "stroke": INK}
    discs = [tag("circle", cx=9, cy=-4, r=6.5, fill=fill, stroke=MUTED) for fill in fills]
    entries = [(18, disc, f"stage {i}") for i, disc in enumerate(discs)]
    home = tag("circle", cx=9, cy=-4, r=5.5, fill=fills[0], stroke=INK, stroke_width=3.5)
    entries.append((18, home, "home of microbatches, in the colour of its links"))
    for k in sorted({1, (most + 1) // 2, most}) if most else ():
        entries.append((30, tag("path", stroke_width=_wide(k, most, radius), **line), _many(k)))
    if most:
        entries.append((30, tag("path", stroke_width=2, stroke_dasharray="6 3", **line), "home for the loss"))
        entries.append((14, tag("path", d="M2 -9L13 -4L2 1z", fill=INK), "forward; the backward returns along it"))
        entries.append((14, text(0, 0, "↔"), "near each other: short hops"))
    out, x = [], 16.0
    for size, mark, words in entries:
        need = size + 6 + text_width(words, 11)
        if x + need > width - 16 and x > 16:
            x, y = 16.0, y + 20
        mark += text(size + 6, 0, words, fill=MUTED, font_size=11)
        out.append(tag("g", mark, transform=f"translate({coord(x)} {coord(y)})"))
        x += need + 14
    return out, y + 18


def _table(paths: _Lists, names: _Texts, homes: _Inks, width: float, y: float) -> tuple[list[str], float]:
    """A row per home: its paths, and how many microbatches take each; returns the y below it."""
    heads = {home: f"{home} {names[home]}".strip() + ":" for home in list(homes)[:_ROWS]}
    left = 48 + max(map(text_width, heads.values()))
    out = [tag("path", d=f"M16 {coord(y)}H{coord(width - 16)}", stroke=RULE)]
    out.append(text(16, y + 20, "Paths of each home × microbatches on them", font_weight="600"))
    for row, (home, head) in enumerate(heads.items()):
        taken = Counter("-".join(map(str, path)) for path in paths if path[0] == home)
        ways = [f"{way} × {count}" for way, count in taken.most_common()] or ["none"]
        fit = max(1, int((width - left - 110) / text_width(max(ways, key=len) + ", ")))
        ways[fit:] = [f"… and {len(ways) - fit} more"] if len(ways) > fit else []
        at = y + 40 + 18 * row
        out += [text(42, at, head), text(left, at, ", ".join(ways))]
        out.append(tag("path", d=f"M16 {coord(at - 4)}h18", stroke=homes[home], stroke_width=4))
    if rest := len(homes) - len(heads):
        out.append(text(42, y + 40 + 18 * len(heads), f"… and {rest} more", fill=MUTED))
    return out, y + 40 + 18 * (len(heads) + bool(rest))
