"""A plan's picture, read back: every node and link is where, as wide and as coloured as the plan says."""

from __future__ import annotations

import math
import random
import re
import xml.etree.ElementTree as ET
from itertools import combinations

import pytest

from pipeline.drawing.network_picture import network_svg
from pipeline.drawing.svg import text_width

NS = "{http://www.w3.org/2000/svg}"
Case = tuple[list[list[float]], list[list[int]], list[tuple[int, ...]]]
LINK = re.compile(
    r"node (\d+)(?: \((.*?)\))? - node (\d+)(?: \((.*?)\))?: (\d+) microbatch(?:es)?, ([\d.]+|inf) s per hop"
)


def case(nodes: int, stages: int, *, places: int = 6, seed: int = 0, microbatches: int | None = None) -> Case:
    """Nodes crowded at a few places of a plane, dealt to stages; paths skip a stage where there are three or more."""
    rng = random.Random(seed)
    at = [(10 * rng.random(), 6 * rng.random()) for _ in range(places)]
    spots = [at[i % places] for i in range(nodes)]
    hops = [[0.0 if a is b else 0.3 + math.dist(p, q) for b, q in enumerate(spots)] for a, p in enumerate(spots)]
    for n in range(nodes):
        hops[n][n] = 0.0
    cut = [list(range(i, nodes, stages)) for i in range(stages)]
    paths = []
    for m in range(microbatches or 2 * len(cut[0])):
        some = sorted(rng.sample(range(1, stages), max(0, min(stages - 1, max(1, stages - 2)))))
        paths.append((cut[0][m % len(cut[0])], *(rng.choice(cut[s]) for s in some)))
    return hops, cut, paths


def links(root: ET.Element) -> list[tuple[re.Match[str], ET.Element]]:
    found = [(LINK.match(p.findtext(f"{NS}title", "")), p) for p in root.iter(f"{NS}path")]
    return [(match, path) for match, path in found if match]


def circle(root: ET.Element, node: int) -> ET.Element:
    found = root.find(f".//{NS}g[@id='node{node}']/{NS}circle")
    assert found is not None, node
    return found


def words(root: ET.Element) -> list[str]:
    return [t.text or "" for t in root.iter(f"{NS}text")]


def number(element: ET.Element, name: str) -> float:
    return float(element.attrib[name])


@pytest.mark.parametrize(("nodes", "stages"), [(1, 1), (2, 2), (2, 1), (3, 2), (20, 6), (50, 5), (100, 8)])
def test_every_node_and_every_used_link_is_drawn_inside_the_sheet(nodes: int, stages: int) -> None:
    hops, cut, paths = case(nodes, stages)
    root = ET.fromstring(network_svg(hops, cut, paths, names=[f"place {n % 6}" for n in range(nodes)]))
    at = {n: (number(circle(root, n), "cx"), number(circle(root, n), "cy")) for n in range(nodes)}
    numbers = [root.findtext(f".//{NS}g[@id='node{n}']/{NS}text") for n in range(nodes)]
    assert numbers == [str(n) for n in range(nodes)]
    used = {(path[0], a, b) for path in paths for a, b in zip(path, (*path[1:], path[0]), strict=True) if a != b}
    drawn = links(root)
    assert {(int(match[1]), int(match[3])) for match, _ in drawn} == {(a, b) for _, a, b in used}
    assert sum(int(match[5]) for match, _ in drawn) == sum(len(path) for path in paths if len(path) > 1)
    for match, path in drawn:
        a, b = int(match[1]), int(match[3])
        assert float(match[6]) == pytest.approx(hops[a][b], abs=0.006)
        numbers_of_d = [float(v) for v in re.findall(r"-?[\d.]+", path.attrib["d"])]
        assert numbers_of_d[:2] == pytest.approx(at[a], abs=0.1)
        assert numbers_of_d[-2:] == pytest.approx(at[b], abs=0.1)

    plan = next(g for g in root.iter(f"{NS}g") if g.find(f"{NS}g[@id='node0']") is not None)
    right, down = (float(v) for v in re.findall(r"[\d.]+", plan.attrib["transform"]))
    middles = [[float(v) for v in re.findall(r"-?[\d.]+", p.attrib["d"])] for _, p in drawn]
    places = [*at.values(), *(((d[0] + 2 * d[2] + d[4]) / 4, (d[1] + 2 * d[3] + d[5]) / 4) for d in middles)]
    table = next(t for t in root.iter(f"{NS}text") if (t.text or "").startswith("Paths of each home"))
    for x, y in places:
        assert 0 <= x + right <= 1200
        assert 40 <= y + down <= number(table, "y") - 20


@pytest.mark.parametrize("places", [1, 2, 12])
@pytest.mark.parametrize("nodes", [20, 40, 100])
def test_no_node_or_label_covers_another(nodes: int, places: int) -> None:
    hops, cut, paths = case(nodes, 5, places=places)
    name = "Singapore"
    root = ET.fromstring(network_svg(hops, cut, paths, names=[name] * nodes))
    boxes = []
    for node in range(nodes):
        it = circle(root, node)
        x, y, radius = (number(it, k) for k in ("cx", "cy", "r"))
        radius += number(it, "stroke-width") / 2
        label = root.findall(f".//{NS}g[@id='node{node}']/{NS}text")[1:]
        assert [t.text for t in label] == ([name] if nodes <= 50 else [])
        half = max(radius, text_width(name, 10) / 2) if label else radius
        boxes.append((x - half, x + half, y - radius, number(label[0], "y") + 2 if label else y + radius))
    for (a, b, c, d), (e, f, g, h) in combinations(boxes, 2):
        assert b <= e or f <= a or d <= g or h <= c


def test_a_link_is_as_wide_as_it_is_busy_and_as_coloured_as_its_home() -> None:
    hops, cut = case(6, 3)[0], [[0, 1], [2, 3], [4, 5]]
    paths = [(0, 2, 4)] * 5 + [(0, 3, 4)] + [(1, 2, 5)] * 3
    root = ET.fromstring(network_svg(hops, cut, paths))
    by_hop = {(int(match[1]), int(match[3])): path for match, path in links(root)}
    wide = {hop: number(path, "stroke-width") for hop, path in by_hop.items()}
    assert wide[0, 3] < wide[1, 2] < wide[0, 2] < wide[4, 0]  # 1, 3, 5 and 6 microbatches
    for home, hops_of in ((0, [(0, 2), (2, 4), (0, 3), (3, 4), (4, 0)]), (1, [(1, 2), (2, 5), (5, 1)])):
        ring = circle(root, home)
        assert {by_hop[hop].attrib["stroke"] for hop in hops_of} == {ring.attrib["stroke"]}
        assert number(ring, "stroke-width") > 2 * number(circle(root, 2), "stroke-width")
    assert {hop for hop, path in by_hop.items() if "stroke-dasharray" in path.attrib} == {(4, 0), (5, 1)}
    fills = [circle(root, n).attrib["fill"] for n in range(6)]
    assert fills[::2] == fills[1::2]
    assert len(set(fills)) == 3


def test_two_homes_on_one_link_are_two_curves() -> None:
    hops = [[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]
    root = ET.fromstring(network_svg(hops, [[0, 1], [2]], [(0, 2), (1, 2)]))
    assert len({path.attrib["d"] for _, path in links(root)}) == 4
    both = ET.fromstring(network_svg([[0.0, 1.0], [4.5, 0.0]], [[0], [1]], [(0, 1)]))
    said = [path.findtext(f"{NS}title") for _, path in links(both)]
    assert said == [
        "node 0 - node 1: 1 microbatch, 1.00 s per hop, 4.50 s back",
        "node 1 - node 0: 1 microbatch, 4.50 s per hop, 1.00 s back; home for the loss",
    ]


def test_nodes_with_short_hops_lie_near_each_other() -> None:
    near = [[0.0, 0.1, 5.0, 5.0], [0.1, 0.0, 5.0, 5.0], [5.0, 5.0, 0.0, 0.1], [5.0, 5.0, 0.1, 0.0]]
    root = ET.fromstring(network_svg(near, [[0, 2], [1, 3]], [(0, 1), (2, 3)]))
    x = [number(circle(root, n), "cx") for n in range(4)]
    assert abs(x[0] - x[1]) < 100 < 500 < abs(x[0] - x[2])


def test_a_broken_link_does_not_squash_the_rest() -> None:
    hops, cut, paths = case(20, 4, places=20)
    for seconds in (1e6, math.inf):
        hops[0][7] = hops[7][0] = seconds
        root = ET.fromstring(network_svg(hops, cut, paths))
        x = [number(circle(root, n), "cx") for n in range(20)]
        assert sum(max(x) - 100 > v > min(x) + 100 for v in x) >= 8


def test_the_list_has_each_home_with_its_paths_and_says_what_it_leaves_out() -> None:
    hops, cut, _ = case(40, 2)
    paths = [(cut[0][0], n) for n in cut[1]] + [(cut[0][1], 1)] * 6
    names = ["somewhere"] * 40
    said = words(ET.fromstring(network_svg(hops, cut, paths, names=names)))
    assert "2 somewhere:" in said
    assert "2-1 × 6" in said
    assert "none" in said
    assert "… and 8 more" in said  # homes: 20, of which 12 are listed
    many = next(w for w in said if w.startswith("0-1 × 1, 0-3 × 1"))
    shown, rest = many.count("×"), re.search(r"… and (\d+) more$", many)
    assert rest is not None
    assert shown + int(rest[1]) == 20
    assert text_width(many) < 1200


def test_title_note_and_names_are_escaped_and_long_names_shortened() -> None:
    names = ['<b> & "Köln"', "x" * 60, "\x00"]
    hops = [[0.0 if a == b else 1.0 for b in range(3)] for a in range(3)]
    picture = network_svg(hops, [[0], [1], [2]], [(0, 1, 2)], names=names, title="a < b", note="1 s & more")
    root = ET.fromstring(picture)
    said = words(root)
    assert {"a < b", "1 s & more", names[0], "x" * 17 + "…"} <= set(said)
    assert names[1] not in said
    assert any(names[1] in (t.text or "") for t in root.iter(f"{NS}title"))
    assert root.findtext(f"{NS}desc") == "3 nodes, 3 stages, 1 microbatch over 3 links; 1 s & more"


def test_the_same_plan_gives_the_same_file_and_leaves_its_input_alone() -> None:
    hops, cut, paths = case(20, 6)
    before = repr((hops, cut, paths))
    assert network_svg(hops, cut, paths) == network_svg(hops, cut, paths)
    assert repr((hops, cut, paths)) == before


def test_a_node_of_no_stage_is_grey_and_says_so() -> None:
    root = ET.fromstring(network_svg(case(4, 2)[0], [[0], [1, 3]], [(0, 1)]))
    assert root.findtext(f".//{NS}g[@id='node2']/{NS}title") == "node 2: in no stage"
    assert root.findtext(f".//{NS}g[@id='node3']/{NS}title") == "node 3: stage 1, 0 microbatches"
    assert root.findtext(f".//{NS}g[@id='node0']/{NS}title") == "node 0: stage 0, 1 microbatch, their home"


SQUARE = [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("hops", "stages", "paths", "about", "expected"),
    [
        ([], [[0]], [(0,)], {}, "hop_s is 0 rows"),
        ([[0.0, 1.0]], [[0]], [(0,)], {}, r"hop_s is 1 rows of \[2\]; expected a square"),
        ([[0.0, math.nan], [1.0, 0.0]], [[0], [1]], [(0, 1)], {}, r"hop_s\[0\]\[1\] is nan; expected 0 or more"),
        ([[0.0, 1.0], [-1.0, 0.0]], [[0], [1]], [(0, 1)], {}, r"hop_s\[1\]\[0\] is -1.0"),
        (SQUARE, [], [(0, 1)], {}, r"stages is \[\]; expected one or more"),
        (SQUARE, [[0], []], [(0,)], {}, r"stages is \[\[0\], \[\]\]; expected one or more"),
        (SQUARE, [[0], [2]], [(0, 2)], {}, "of nodes 0 to 1 in each"),
        (SQUARE, [[0], [0, 1]], [(0, 1)], {}, "none twice"),
        (SQUARE, [[0], [1]], [], {}, "paths is empty; expected"),
        (SQUARE, [[0], [1]], [(0, 1), ()], {}, r"paths\[1\] is \[\]; expected nodes of stages, the first of \[0\]"),
        (SQUARE, [[0], [1]], [(1, 0)], {}, r"paths\[0\] is \[1, 0\]"),
        (SQUARE, [[0]], [(0, 1)], {}, r"paths\[0\] is \[0, 1\]"),
        (SQUARE, [[0], [1]], [(0, 1)], {"names": ["one"]}, "names has 1 entries; expected 2"),
        (SQUARE, [[0], [1]], [(0, 1)], {"width": 399}, "width is 399; expected at least 400"),
    ],
)
def test_what_is_empty_or_does_not_match_is_named(hops, stages, paths, about, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        network_svg(hops, stages, paths, **about)


@pytest.mark.parametrize("width", [400, 700])
def test_a_narrow_sheet_is_enough(width: int) -> None:
    hops, cut, paths = case(20, 6)
    root = ET.fromstring(network_svg(hops, cut, paths, names=["Frankfurt am Main"] * 20, width=width))
    x = [number(circle(root, n), "cx") for n in range(20)]
    half = text_width("Frankfurt am Main", 10) / 2
    assert min(x) - half >= -16
    assert max(x) + half <= width - 16
    legend = [g for g in root.iter(f"{NS}g") if re.fullmatch(r"translate\([\d.]+ [\d.]+\)", g.get("transform", ""))]
    ends = [
        float(g.attrib["transform"][10:].split()[0]) + number(t, "x") + text_width(t.text or "", 11)
        for g in legend
        for t in g.findall(f"{NS}text")
    ]
    assert len(ends) > 8
    assert max(ends) <= width
