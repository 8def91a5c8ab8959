"""Remedies as plans and as arithmetic: who is asked for what, what comes of it, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.schedule.lower import add_redundant, lower
from pipeline.schedule.ops import Schedule, Span, dumps, parse_span, span_text
from recovery import redundant
from recovery.checkfree import Average
from recovery.membership import Restore, View, replace_workers, substitute
from recovery.policy import POLICIES, Recovery, cure, remedies
from recovery.remedy import CannotRestore, losses, swaps
from schedulers import plan, swapped
from schedulers.plan import Ends

LAYERS = 10


def view(schedule: Schedule, **more: object) -> View:
    workers = tuple(schedule.lanes)
    return View(
        1, workers, {"train": dumps(schedule)}, places={w: w for w in workers}, next_worker=len(workers), **more
    )  # type: ignore[arg-type]


def lose(before: View, *lost: int) -> View:
    return replace_workers(before, lost)


def cured(after: View, policy: str, layers: int, tied: bool, checkpoints: Path) -> View:
    """What the policy makes of a view, where the run cannot start again."""
    recovery = Recovery(policy, after, layers, tied, checkpoints, source_changed=lambda: "its source is gone")
    return cure(after, policy, layers, tied, recovery.rollback_target)


def in_line(stages: int = 4, replicas: int = 1) -> View:
    return view(plan("one_f_one_b", [1.0] * LAYERS, stages, 4, replicas))


def apart(stages: int, swap: bool = False) -> View:
    made = plan("one_f_one_b", [1.0] * (2 * stages), stages, 4, ends="apart", swap=swap)
    last = 2 * stages
    backups = (((0, 1), 1), ((last - 1, last), 1)) if swap else ()
    return view(made, backups=backups)


def test_a_new_worker_takes_each_place_and_ids_are_never_used_again() -> None:
    first = in_line()
    second = lose(first, 1, 3)
    third = lose(replace(second, joined={}), 4)
    assert second.workers == (0, 2, 4, 5)
    assert second.joined == {4: 1, 5: 3}
    assert third.workers == (0, 2, 5, 6)
    assert third.joined == {6: 4}
    assert third.places == {0: 0, 2: 2, 5: 3, 6: 1}
    old, new = first.schedule("train"), third.schedule("train")
    assert [op[:3] for op in new.lanes[6]] == [op[:3] for op in old.lanes[1]]
    assert new.holders == {span: tuple(sorted({1: 6, 3: 5}.get(w, w) for w in ws)) for span, ws in old.holders.items()}


def test_a_surviving_replica_comes_before_everything_else(tmp_path: Path) -> None:
    found = cured(lose(in_line(2, replicas=2), 0), "auto", LAYERS, False, tmp_path)
    assert found.restores == (Restore(4, "0:5", "replica", ((2, "0:5"),)),)
    both = cured(lose(in_line(3, replicas=2), 1, 4), "auto", LAYERS, False, tmp_path)
    assert [r.remedy for r in both.restores] == ["checkfree", "checkfree"]
    assert len({r.sources for r in both.restores}) == 1, "replicas that are rebuilt must come out equal"


def test_a_tied_weight_comes_back_from_its_other_holder() -> None:
    wanted = {loss.part: loss for loss in losses(lose(in_line(), 3), LAYERS, tied=True)}
    assert wanted["tied"].copies == (0,)


def test_checkfree_asks_both_neighbours_and_weighs_them_by_their_norms(tmp_path: Path) -> None:
    found = cured(lose(apart(4), 2), "checkfree", 8, False, tmp_path)
    assert found.restores == (Restore(4, "3:5", "checkfree", ((1, "1:3"), (3, "5:7"))),)
    before, after = torch.randn(3, 4), torch.randn(3, 4)
    states = [{"param/w": before}, {"param/w": after}]
    for weights, (a, b) in {"norm": (2.0, 6.0), "norm_squared": (4.0, 36.0), "uniform": (1.0, 1.0)}.items():
        combined = Average(weights).combine(states, [2.0, 6.0])
        assert combined is not None
        expected = (a * before.double() + b * after.double()) / (a + b)
        assert float((combined["param/w"].double() - expected).abs().max()) < 1e-3 if a != b else 1e-6
        exact = {"norm": 1, "norm_squared": 2, "uniform": 0}[weights]
        raw = [(2.0 + 1e-4) ** exact, (6.0 + 1e-4) ** exact]
        precise = (raw[0] * before.double() + raw[1] * after.double()) / sum(raw)
        assert float((combined["param/w"].double() - precise).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("before", "lost", "policy", "said"),
    [
        (apart(5), (2, 3), "checkfree", r"the neighbour after span 3:5 is lost too"),
        (apart(5), (0,), "checkfree", r"span 0:1 holds the embedding or the head, which no neighbour resembles"),
        (apart(5), (1,), "checkfree", r"the neighbour before span 1:3, 0:1, holds no decoder block"),
        (apart(5, swap=True), (0, 1), "checkfree+", r"no other worker holds span 0:1"),
        (apart(5, swap=True), (1, 2), "checkfree+", r"span 1:3 has no twin that is left"),
        (in_line(), (1,), "replica", r"no other worker holds span"),
        (in_line(), (1,), "none", r"recovery 'none' cannot bring back what was lost: it is off"),
        (in_line(), (1,), "checkpoint", r"checkpoint: '.*' holds no valid one"),
    ],
)
def test_what_cannot_be_restored_is_refused_with_every_reason(
    tmp_path: Path, before: View, lost: tuple[int, ...], policy: str, said: str
) -> None:
    layers = max(hi for _, hi in before.schedule("train").holders)
    with pytest.raises(CannotRestore, match=said):
        cured(lose(before, *lost), policy, layers, False, tmp_path)


@pytest.mark.parametrize("stages", [4, 6, 8])
def test_checkfree_plus_restores_every_single_loss(tmp_path: Path, stages: int) -> None:
    before = apart(stages + 1, swap=True)
    layers = 2 * stages + 2
    first, last = 1, stages
    for worker in range(stages + 1):
        after = cured(lose(before, worker), "checkfree+", layers, False, tmp_path)
        found = {parse_span(r.part): r for r in after.restores}
        spans = [span for span, holders in before.schedule("train").holders.items() if worker in holders]
        assert set(spans) <= set(found)
        if worker == 0:
            assert {r.remedy for r in found.values()} == {"replica"}
            assert {r.sources[0][0] for r in found.values()} == {1}
        elif worker in (first, last):
            twin = {first: (3, 5), last: (layers - 5, layers - 3)}[worker]
            assert found[spans[0]].remedy == "checkfree+"
            assert found[spans[0]].sources[0][1] == span_text(twin)
            assert worker != first or {found[0, 1].remedy, found[layers - 1, layers].remedy} == {"replica"}
        else:
            assert found[spans[0]].remedy == "checkfree"


@pytest.mark.parametrize("stages", [4, 6, 8])
def test_swapped_routes_exchange_the_first_and_the_last_pair_for_every_other_microbatch(stages: int) -> None:
    spans = [(i, i + 1) for i in range(stages + 2)]
    schedule = swapped(spans, 8)
    even, odd = schedule.routes[0].forward, schedule.routes[1].forward
    assert even == tuple(spans)
    assert odd[:3] == (spans[0], spans[2], spans[1])
    assert odd[-3:] == (spans[-2], spans[-3], spans[-1])
    assert odd[3:-3] == even[3:-3]
    assert [route.forward for route in schedule.routes] == [even, odd] * 4
    assert swaps(schedule) == {
        spans[1]: (spans[2],), spans[2]: (spans[1],), spans[-3]: (spans[-2],), spans[-2]: (spans[-3],),
    }  # fmt: skip


def test_fewer_than_four_block_stages_cannot_swap() -> None:
    with pytest.raises(ValueError, match=r"block stages: 3; allowed with swapped routes: 4 or more"):
        swapped([(i, i + 1) for i in range(5)], 4)


def test_every_policy_names_remedies_that_exist() -> None:
    assert {name for names in POLICIES.values() for name in names} <= {*remedies(), "checkpoint", "redundant"}


def redundantly(stages: int, replicas: int = 1, ends: Ends = "in-line") -> View:
    made = plan("one_f_one_b", [1.0] * LAYERS, stages, 8, replicas, ends=ends)
    copies: list[tuple[Span, int]] = []
    for base in range(0, stages * replicas, stages):
        held = [[s for s, ws in made.holders.items() if base + k in ws] for k in range(stages)]
        copies += [(span, base + worker) for span, worker in redundant.copies(held)]
    evaluated = plan("one_f_one_b", [1.0] * LAYERS, stages, 8, replicas, ends=ends, evaluated=4)
    texts = {"train": dumps(lower(add_redundant(made, copies))), "evaluate": dumps(lower(evaluated))}
    workers = tuple(range(stages * replicas))
    return View(
        1, workers, texts, places={w: w for w in workers}, next_worker=len(workers), backups=tuple(sorted(copies))
    )


@pytest.mark.parametrize(
    ("stages", "replicas", "ends"), [(2, 1, "in-line"), (4, 1, "in-line"), (3, 2, "in-line"), (5, 1, "apart")]
)
def test_the_stage_before_takes_over_and_gives_back(tmp_path: Path, stages: int, replicas: int, ends: Ends) -> None:
    home = redundantly(stages, replicas, ends)
    recovery = Recovery("redundant", home, LAYERS, False, tmp_path)
    for lost in home.workers:
        view = recovery.after_loss(home, (lost,))
        holder = lost - 1 if lost % stages else lost + stages - 1
        before, after = home.schedule("train"), view.schedule("train")
        assert view.workers == tuple(w for w in home.workers if w != lost)
        assert view.awaited == {len(home.workers): lost}
        assert view.restores == ()
        mine = {op[:3] for w in (lost, holder) for op in before.lanes[w] if op.kind in "FB"}
        assert {op[:3] for op in after.lanes[holder] if op.kind in "FB"} == mine
        for span in {span for _, span, _ in mine}:
            order = [op[:3] for lane in after.lanes.values() for op in lane if op.kind == "B" and op.span == span]
            known = [op[:3] for lane in before.lanes.values() for op in lane if op.kind == "B" and op.span == span]
            assert replicas > 1 or order == known, "gradients would be summed in another order"
        back = recovery.with_ready(view, tuple(view.awaited))
        assert back.workers == tuple(sorted({*view.workers, len(home.workers)}))
        assert back.joined == {len(home.workers): lost}
        assert not back.awaited
        assert {r.remedy for r in back.restores} == {"replica"}
        assert {r.worker for r in back.restores} == {len(home.workers)}
        assert substitute(back.schedule("train"), {len(home.workers): lost}) == before
        assert len(back.backups) == len(home.backups)


def test_two_that_are_no_neighbours_are_taken_over_at_once_and_join_one_by_one(tmp_path: Path) -> None:
    recovery = Recovery("redundant", home := redundantly(4), LAYERS, False, tmp_path)
    view = recovery.after_loss(home, (0, 2))
    assert view.workers == (1, 3)
    assert view.awaited == {4: 0, 5: 2}
    one = recovery.with_ready(view, (5,))
    assert one.workers == (1, 3, 5)
    assert one.awaited == {4: 0}
    assert recovery.with_ready(replace(one, joined={}), (4,)).workers == (1, 3, 4, 5)
    again = recovery.after_loss(replace(one, joined={}), (4,))
    assert again.awaited == {6: 0}, "who was awaited and died is not started again"
    assert again.workers == (1, 3, 5)


def test_a_stage_and_who_keeps_its_copy_cannot_be_taken_over(tmp_path: Path) -> None:
    home = redundantly(4)
    recovery = Recovery("redundant", home, LAYERS, False, tmp_path, source_changed=lambda: "its source is gone")
    with pytest.raises(CannotRestore, match=r"redundant: stage 2: the stage that keeps the copy, 1, is lost too; "):
        recovery.after_loss(home, (1, 2))
    joining = replace(recovery.with_ready(recovery.after_loss(home, (1,)), (4,)), checkpoint=None)
    with pytest.raises(CannotRestore, match=r"redundant: stage 2: the stage that keeps the copy, 1, is lost too"):
        recovery.after_loss(joining, (2,))  # worker 4 has joined as stage 1, and has no state yet


def test_rolling_back_is_for_all_or_for_none(tmp_path: Path) -> None:
    lost_both = lose(in_line(), 0, 2)
    with pytest.raises(CannotRestore, match=r"replica: .*checkfree: .*checkpoint: "):
        cured(lost_both, "auto", LAYERS, False, tmp_path)
    assert replace(lost_both, rollback="x").restores == ()
