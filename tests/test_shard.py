"""Sharded optimizer state: the bits of the run that shares nothing, in memory that is as the formula says."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.config import ConfigError, TrainConfig
from pipeline.state.layer_state import LayerState, StateChanged
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.shard import Share, blocks, deal, range_holders
from pipeline.state.sharded import ShardedState
from recovery.certificate import Witness, certify
from recovery.policy import POLICIES
from recovery.remedy import CannotRestore, Loss
from recovery.shards import Shards, remedies_of

SHAPES = {"matrix": (67, 129), "norm": (129,), "odd": (7,), "large": (300, 300), "tiny": (1,)}


def made(share: Share | None = None) -> Any:
    drawn = torch.Generator().manual_seed(3)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=drawn)) for name, shape in SHAPES.items()}
    config = OptimizerConfig(weight_decay=0.3)
    return LayerState("1", parameters, config) if share is None else ShardedState("1", parameters, config, share)


def step(holders: list[Any], number: int, exact: bool) -> None:
    """What the holders of a state do in a step, with a sum of whole numbers between them."""
    size = holders[0].size
    summed = torch.randn(size, generator=torch.Generator().manual_seed(number))
    kind = torch.int64 if exact else torch.int32
    bits = [torch.zeros(size, dtype=kind) if exact else holder.gradient.view(torch.int32) for holder in holders]
    for holder, mine in zip(holders, bits, strict=True):
        holder.gradient.copy_(summed)
        holder.prepare(0.7, 0.01, mine)
    total = torch.stack(bits).sum(0, dtype=kind)
    for holder, mine in zip(holders, bits, strict=True):
        mine.copy_(total)
        holder.apply(0.7, 0.01)


def ored(states: list[dict[str, Tensor]], key: str) -> Tensor:
    total = torch.zeros_like(states[0][key]).view(torch.int32)
    for each in states:
        total |= each[key].view(torch.int32)
    return total.view(torch.float32)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("backup", [False, True])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_step_of_the_shares_is_bitwise_that_of_the_whole(count: int, backup: bool, exact: bool) -> None:
    holders = [made(Share(rank, count, backup)) for rank in range(count)]
    whole = made()
    for number in range(4):
        step(holders, number, exact)
        whole.gradient.copy_(torch.randn(whole.size, generator=torch.Generator().manual_seed(number)))
        whole.apply(0.7, 0.01)
    wanted, found = whole.tensors(), [holder.tensors() for holder in holders]
    assert whole.keys() == list(wanted) == list(found[0])
    for key, tensor in wanted.items():
        for each in found if "exp_avg" not in key else ():
            assert torch.equal(each[key], tensor), key
        assert torch.equal(ored(found, key), tensor), key
    assert {holder.version for holder in holders} == {4}
    assert not any(holder.gradient.any() for holder in holders)


LAYERS = {
    "llama 7b": {"q": 4096 * 4096, "k": 4096 * 4096, "mlp": 4096 * 11008, "norm": 4096},
    "small": {"q": 64 * 64, "up": 64 * 176, "norm": 64, "bias": 176},
    "head": {"norm": 256, "head": 256 * 4096},
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("count", range(1, 9))
def test_shares_are_even_and_one_more_takes_a_little_of_each(name: str, count: int) -> None:
    cut = blocks(LAYERS[name])
    assert sum(block.size for block in cut) == sum(LAYERS[name].values())
    sizes, total = [block.size for block in cut], sum(LAYERS[name].values())
    before, after = deal(sizes, count), deal(sizes, count + 1)
    held = [sum(s for s, rank in zip(sizes, after, strict=True) if rank == r) for r in range(count + 1)]
    assert max(held) <= 1.02 * total / (count + 1) + 2 * max(sizes)
    moved = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert {b for _, b in moved} == {count}, "nothing moves among those that were there"
    assert {a for a, _ in moved} == set(range(count)), "each gives a little"
    for rank in set(after):
        assert max(b.size for b, r in zip(cut, after, strict=True) if r == rank) < total / 4


def test_who_keeps_a_range() -> None:
    assert range_holders({"3": [5, 7, 9]}, backup=False) == {"3/0": [5], "3/1": [7], "3/2": [9]}
    assert range_holders({"3": [5, 7, 9]}, backup=True) == {"3/0": [5, 7], "3/1": [7, 9], "3/2": [5, 9]}


def test_a_checkpoint_of_the_whole_is_read_and_a_wrong_bit_is_seen_where_it_is() -> None:
    whole = made()
    whole.gradient.normal_(generator=torch.Generator().manual_seed(1))
    whole.apply(1.0, 0.1)
    holders = [made(Share(rank, 3, backup=True)) for rank in range(3)]
    for each in holders:
        each.load(whole.tensors())
        each.version = 1
    assert torch.equal(ored([each.tensors() for each in holders], "exp_avg/large"), whole.moments("large")["exp_avg"])
    prints = [each.fingerprints() for each in holders]
    assert prints[0].keys() == {"1", "1/0", "1/2"}
    assert prints[0]["1"] == prints[1]["1"]
    assert prints[0]["1/0"] == prints[1]["1/0"]
    wrong = {key: tensor.clone() for key, tensor in whole.tensors().items()}
    wrong["exp_avg_sq/large"].view(-1)[0] += 1.0
    holders[0].load(wrong)
    differs = {name for name, crc in holders[0].fingerprints().items() if crc != prints[0][name]}
    assert len(differs) <= 1
    assert "1" not in differs
    with pytest.raises(KeyError):
        holders[0].load({})
    with pytest.raises(RuntimeError, match="has shape"):
        holders[0].put({"exp_avg/large": torch.zeros(3)})
    holders[0].begin_anew()
    assert not any(tensor.any() for kind, tensor in holders[0].tensors().items() if "exp_avg" in kind)


def test_the_lost_share_is_put_together_from_both_sides() -> None:
    holders = [made(Share(rank, 4, backup=True)) for rank in range(4)]
    for number in range(2):
        step(holders, number, exact=False)
    holders[1]._kept["exp_avg"].neg_().mul_(0.0)  # zeros, of which some are negative
    holders[2]._kept["exp_avg"][-holders[2]._ends[1][1] + holders[2]._ends[1][0] :] = holders[1]._kept["exp_avg"][
        : holders[1]._ends[1][1]
    ]
    loss = Loss(9, "1:2", 3, (4, 6, 7), ring=(4, 9, 6, 7))
    move = Shards().plan(loss)
    assert move.sources == ((6, "1:2"), (4, "1:2"))
    heir = made(Share(1, 4, backup=True))
    heir.put(Shards().combine([holders[2].tensors(), holders[0].tensors()], []))
    heir.version = 2
    was, now = holders[1].fingerprints(), heir.fingerprints()
    assert (now["1"], now["1/1"]) == (was["1"], was["1/1"]), "zeros keep their sign"
    assert now["1/0"] == holders[0].fingerprints()["1/0"]
    with pytest.raises(CannotRestore, match=r"the shares of span 1:2 that worker\(s\) \[6\] kept are lost too"):
        Shards().plan(replace(loss, copies=(4, 7)))


@pytest.mark.parametrize("kept", [True, False])
def test_a_bit_that_changes_between_steps_is_seen_before_anybody_gets_a_weight_of_it(kept: bool) -> None:
    holders = [made(Share(rank, 2)) for rank in range(2)]
    step(holders, 1, exact=False)
    for each in holders:
        each.seal()
    step(holders, 2, exact=False)
    holders[0].seal()
    tensor = holders[0]._kept["exp_avg"] if kept else holders[0].parameters["odd"].detach()
    tensor[0] += 1.0
    with pytest.raises(StateChanged, match="bits changed in memory"):
        holders[0].prepare(1.0, 0.01, holders[0].gradient.view(torch.int32))


def test_which_remedies_hold() -> None:
    found = {name: (remedies_of(names, False), remedies_of(names, True)) for name, names in POLICIES.items()}
    assert found["auto"] == found["exact"] == (("checkpoint",), ("shards", "checkpoint"))
    assert found["checkpoint"] == (("checkpoint",), ("checkpoint",))
    assert found["none"] == ((), ())


def test_a_range_that_differs_is_named_and_healthy_shares_are_not_called_different() -> None:
    holders = [made(Share(rank, 3, backup=True)) for rank in range(3)]
    wanted = {"1": [0, 1, 2], **range_holders({"1": [0, 1, 2]}, backup=True)}

    def certified() -> dict[str, Any]:
        votes = {n: asdict(Witness.of(n, {"1": state}, {"1": state}, {}, (), {})) for n, state in enumerate(holders)}
        return certify(wanted, (), votes)

    step(holders, 1, exact=False)
    found = certified()
    assert not found["error"]
    assert {name: state["workers"] for name, state in found["states"].items()} == wanted
    holders[1]._kept["exp_avg_sq"][-1] += 1.0
    assert "the copies of state 1/0 differ, by checksum" in certified()["error"]


TWO = {"workers": 2, "replicas": 2, "shard_optimizer": True}
THRICE = {"workers": 3, "replicas": 3, "microbatches": 6, "shard_optimizer": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_optimizer": True}, "^shard_optimizer is True; allowed: False without replicas; --replicas 2 or more"),
        ({"shard_optimizer": True, "scheduler": "roundpipe"}, "shard_optimizer is True; allowed: False under sched"),
        ({**TWO, "recovery": "replica"}, "recovery is 'replica'; allowed: auto, exact, checkpoint or none with shard_"),
        ({**TWO, "recovery": "checkfree"}, "recovery is 'checkfree'; allowed: auto, exact, checkpoint or none with s"),
        ({**TWO, "min_workers": 1}, "workers is '1:2'; allowed: one number with shard_optimizer"),
        ({**TWO, "snapshot": "neighbour"}, "snapshot is 'neighbour'; allowed: off with shard_optimizer and 2 replicas"),
        ({**THRICE, "snapshot": "neighbour", "recovery": "checkpoint"}, "snapshot is 'neighbour'; allowed: off under"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes).validate()
    TrainConfig(**{**THRICE, "snapshot": "neighbour"}).validate()  # type: ignore[arg-type]
