"""Remedies as plans and as arithmetic: who is asked for what, what comes of it, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from pipeline.schedule.layout import EVALUATE, TRAIN, Layout
from pipeline.schedule.lower import add_redundant, lower
from pipeline.schedule.ops import Span, parse_span, span_text
from recovery import redundant
from recovery.checkfree import Average
from recovery.membership import Move, View, next_view
from recovery.policy import POLICIES, Recovery, cure, remedies
from recovery.remedy import CannotRestore, Loss, has, losses, swaps
from schedulers import plan, swapped
from schedulers.plan import Ends
from tests.passed_blocks import GEMMA2, GPT2, LLAMA, blocks

LAYERS = 10


LAYOUTS: dict[str, Layout] = {}


def view(layout: Layout) -> View:
    LAYOUTS[layout.key] = layout
    workers = tuple(layout.train.lanes)
    return View(1, workers, layout.key, places={w: w for w in workers}, next_worker=len(workers))


def lose(before: View, *lost: int) -> View:
    return next_view(before, lost)


def moving(after: View, layers: int, tied: bool = False) -> tuple[Loss, ...]:
    """What those who have joined need."""
    layout = LAYOUTS[after.layout]
    had = has(after, layout, layers, tied)
    return losses(after, layout, {w: s for w, s in had.items() if w not in after.joined}, layers, tied)


def cured(after: View, policy: str, layers: int, tied: bool, checkpoints: Path) -> View:
    """What the policy makes of a view, where the run cannot start again."""
    layout = LAYOUTS[after.layout]
    recovery = Recovery(policy, after, layout, layers, tied, checkpoints, source_changed=lambda: "its source is gone")
    return cure(after, moving(after, layers, tied), POLICIES[policy], recovery.rollback_target)


def in_line(stages: int = 4, replicas: int = 1) -> View:
    return view(Layout({TRAIN: plan("one_f_one_b", [1.0] * LAYERS, stages, 4, replicas)}))


def apart(stages: int, swap: bool = False) -> View:
    made = plan("one_f_one_b", [1.0] * (2 * stages), stages, 4, ends="apart", swap=swap)
    last = 2 * stages
    backups = (((0, 1), 1), ((last - 1, last), 1)) if swap else ()
    return view(Layout({TRAIN: made}, backups))


def test_a_new_worker_takes_each_place_and_ids_are_never_used_again() -> None:
    first = in_line()
    second = lose(first, 1, 3)
    third = lose(replace(second, joined={}), 4)
    assert second.workers == (0, 2, 4, 5)
    assert second.joined == {4: 1, 5: 3}
    assert third.workers == (0, 2, 5, 6)
    assert third.joined == {6: 4}
    assert third.places == {0: 0, 2: 2, 5: 3, 6: 1}
    assert third.layout == second.layout == first.layout, "what all do is the same, and is not read again"
    assert third.at == {0: 0, 1: 6, 2: 2, 3: 5}


def test_a_surviving_replica_comes_before_everything_else(tmp_path: Path) -> None:
    found = cured(lose(in_line(2, replicas=2), 0), "auto", LAYERS, False, tmp_path)
    assert found.moves == (Move(4, "0:5", "replica", ((2, "0:5"),)),)
    both = cured(lose(in_line(3, replicas=2), 1, 4), "auto", LAYERS, False, tmp_path)
    assert [r.remedy for r in both.moves] == ["checkfree", "checkfree"]
    assert len({r.sources for r in both.moves}) == 1, "replicas that are rebuilt must come out equal"


def test_a_tied_weight_comes_back_from_its_other_holder() -> None:
    wanted = {loss.part: loss for loss in moving(lose(in_line(), 3), LAYERS, tied=True)}
    assert wanted["tied"].copies == (0,)


def test_checkfree_asks_both_neighbours_and_weighs_them_by_their_norms(tmp_path: Path) -> None:
    found = cured(lose(apart(4), 2), "checkfree", 8, False, tmp_path)
    assert found.moves == (Move(4, "3:5", "checkfree", ((1, "1:3"), (3, "5:7"))),)
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


def test_a_copy_is_of_the_neighbour_that_is_asked_for_or_else_of_the_other(tmp_path: Path) -> None:
    for policy, (middle, first, last) in {"copy": (1, 2, 3), "copy-after": (3, 2, 3)}.items():
        sources = [cured(lose(apart(5), lost), policy, 10, False, tmp_path).moves[0].sources for lost in (2, 1, 4)]
        assert [worker for ((worker, _),) in sources] == [middle, first, last]
        state = {"param/w": torch.randn(2)}
        assert remedies()[policy].combine([state], [1.0]) == state


@pytest.mark.parametrize("config", [LLAMA, GPT2, GEMMA2], ids=lambda config: config.model_type)
def test_a_stage_that_adds_nothing_is_the_mean_of_its_neighbours_but_for_what_makes_outputs(
    config: PreTrainedConfig,
) -> None:
    sides = [blocks(config, seed) for seed in (1, 2)]
    for side in sides:
        for weight in side.parameters():
            torch.nn.init.normal_(weight.data)  # no bias, and no weight of a norm, is what it began with
    states = [{f"param/{name}": weight.detach() for name, weight in side.named_parameters()} for side in sides]
    found, mean = remedies()["identity"].combine(states, [1.0, 3.0]), Average().combine(states, [1.0, 3.0])
    assert found is not None
    assert mean is not None
    lost, hidden = blocks(config, 3), torch.randn(2, 5, 16)
    lost.load_state_dict({name.removeprefix("param/"): tensor for name, tensor in found.items()})
    assert torch.equal(lost(hidden), hidden)
    same = [key for key in mean if torch.equal(found[key], mean[key])]
    assert 0 < len(mean) - len(same) <= 8, "an output projection of attention and of the MLP a block, and their biases"
    assert not torch.equal(sides[0](hidden), hidden)


@pytest.mark.parametrize(
    ("before", "lost", "policy", "said"),
    [
        (apart(5), (2, 3), "checkfree", r"the neighbour after span 3:5 is lost too"),
        (apart(5), (0,), "checkfree", r"span 0:1 holds the embedding or the head, which no neighbour resembles"),
        (apart(5), (1,), "checkfree", r"the neighbour before span 1:3, 0:1, holds no decoder block"),
        (apart(5, swap=True), (0, 1), "checkfree+", r"no other worker holds span 0:1"),
        (apart(5, swap=True), (1, 2), "checkfree+", r"span 1:3 has no twin that is left"),
        (in_line(), (1,), "replica", r"no other worker holds span"),
        (in_line(), (1,), "none", r"what was lost cannot be brought back: recovery is off"),
        (in_line(), (1,), "checkpoint", r"checkpoint: '.*' holds no valid one"),
    ],
)
def test_what_cannot_be_restored_is_refused_with_every_reason(
    tmp_path: Path, before: View, lost: tuple[int, ...], policy: str, said: str
) -> None:
    layers = max(hi for _, hi in LAYOUTS[before.layout].train.holders)
    with pytest.raises(CannotRestore, match=said):
        cured(lose(before, *lost), policy, layers, False, tmp_path)


@pytest.mark.parametrize("stages", [4, 6, 8])
def test_checkfree_plus_restores_every_single_loss(tmp_path: Path, stages: int) -> None:
    before = apart(stages + 1, swap=True)
    layers = 2 * stages + 2
    first, last = 1, stages
    for worker in range(stages + 1):
        after = cured(lose(before, worker), "checkfree+", layers, False, tmp_path)
        found = {parse_span(r.part): r for r in after.moves}
        spans = [span for span, holders in LAYOUTS[before.layout].train.holders.items() if worker in holders]
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
    made = {TRAIN: lower(add_redundant(made, copies)), EVALUATE: lower(evaluated)}
    return view(Layout(made, tuple(sorted(copies))))


@pytest.mark.parametrize(
    ("stages", "replicas", "ends"), [(2, 1, "in-line"), (4, 1, "in-line"), (3, 2, "in-line"), (5, 1, "apart")]
)
def test_the_stage_before_takes_over_and_gives_back(tmp_path: Path, stages: int, replicas: int, ends: Ends) -> None:
    home = redundantly(stages, replicas, ends)
    recovery = Recovery("redundant", home, LAYOUTS[home.layout], LAYERS, False, tmp_path)
    for lost in home.workers:
        view = recovery.after_loss(home, (lost,))
        holder = lost - 1 if lost % stages else lost + stages - 1
        before, after = recovery.layout.train, recovery.layouts[view.layout].train
        assert view.workers == tuple(w for w in home.workers if w != lost)
        assert view.awaited == {len(home.workers): lost}
        assert view.moves == ()
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
        assert {r.remedy for r in back.moves} == {"replica"}
        assert {r.worker for r in back.moves} == {len(home.workers)}
        assert back.layout == home.layout
        assert back.at == {w: len(home.workers) if w == lost else w for w in home.workers}


def test_two_that_are_no_neighbours_are_taken_over_at_once_and_join_one_by_one(tmp_path: Path) -> None:
    home = redundantly(4)
    recovery = Recovery("redundant", home, LAYOUTS[home.layout], LAYERS, False, tmp_path)
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
    recovery = Recovery(
        "redundant", home, LAYOUTS[home.layout], LAYERS, False, tmp_path, source_changed=lambda: "its source is gone"
    )
    with pytest.raises(CannotRestore, match=r"redundant: stage 2: the stage that keeps the copy, 1, is lost too; "):
        recovery.after_loss(home, (1, 2))
    joining = replace(recovery.with_ready(recovery.after_loss(home, (1,)), (4,)), checkpoint=None)
    with pytest.raises(CannotRestore, match=r"redundant: replica: no other worker holds span"):
        recovery.after_loss(joining, (2,))  # worker 4 has joined as stage 1, and has no state yet


def test_rolling_back_is_for_all_or_for_none(tmp_path: Path) -> None:
    lost_both = lose(in_line(), 0, 2)
    with pytest.raises(CannotRestore, match=r"replica: .*checkfree: .*checkpoint: "):
        cured(lost_both, "auto", LAYERS, False, tmp_path)
    assert replace(lost_both, rollback="x").moves == ()
