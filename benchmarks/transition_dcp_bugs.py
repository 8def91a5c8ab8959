"""The bugs of transition_bugs.py as code around torch's distributed checkpoint (DCP) would have them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from benchmarks.transition_bugs import flip, swap, twice

WEIGHT, LIKE_IT = "transformer.h.1.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"
NORM, FROZEN, ALIAS = "transformer.h.1.ln_1.weight", "transformer.wpe.weight", "lm_head.weight"
LR = 1e-2


@dataclass(frozen=True)
class Saved:
    """What a rank is about to save, how it stood a step before, and where it goes."""

    state: dict[str, Any]
    old: Mapping[str, Any]
    rank: int
    folder: Path

    def set(self, key: str, change: Callable[[Tensor], Tensor], kind: str = "") -> None:
        """Put another tensor in place of a weight or a moment, on all ranks, sharded as it was."""
        place = self.state["optim"]["state"][key] if kind else self.state["model"]
        was, key = place[kind or key], kind or key
        if isinstance(was, DTensor):
            place[key] = distribute_tensor(change(whole(was).clone()), was.device_mesh, was.placements)
        else:
            place[key] = change(was.clone())

    def file(self, rank: int) -> Path:
        """What a rank has written."""
        return self.folder / f"__{rank}_0.distcp"


@dataclass(frozen=True)
class Fault:
    """A bug class as code around DCP would have it: `plant` before the save, `after` it in the files, or `take`, in
    what a loading rank asks for."""

    plant: Callable[[Saved], object] = lambda saved: None
    after: Callable[[Saved], object] = lambda saved: None
    take: Callable[[dict[str, Any]], object] = lambda state: None
    aliased: Literal["no", "by default", "by a stager of one's own"] = "no"
    ignore_frozen: bool = False


def whole(tensor: Any) -> Any:
    """All shards of a tensor together; anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _moments_of_another(saved: Saved) -> None:
    state = saved.state["optim"]["state"]
    for kind in ("exp_avg", "exp_avg_sq"):
        saved.set(WEIGHT, lambda _, kind=kind: whole(state[LIKE_IT][kind]), kind)


def _on(rank: int, act: Callable[[Saved], object]) -> Callable[[Saved], object]:
    return lambda saved: act(saved) if saved.rank == rank else None


def _replicated(key: str, change: Callable[[Tensor], object], rank: int = 1) -> Callable[[Saved], None]:
    """Both ranks hold the whole tensor, and `rank`, whose copy is saved, another one than was trained."""

    def plant(saved: Saved) -> None:
        held = whole(saved.state["model"][key]).clone()
        saved.state["model"][key] = held
        if saved.rank == rank:
            change(held)

    return plant


def _flip_in_file(saved: Saved) -> None:
    content = saved.state["model"][WEIGHT].to_local().contiguous().numpy().tobytes()
    data = bytearray(saved.file(saved.rank).read_bytes())
    at = data.find(content)
    assert at >= 0
    data[at] ^= 1
    saved.file(saved.rank).write_bytes(data)


def _set(key: str, kind: str, change: Callable[[Tensor], Tensor]) -> Callable[[Saved], None]:
    return lambda saved: saved.set(key, change, kind)


def _extra(key: str, value: Callable[[Saved], Any]) -> Callable[[Saved], None]:
    return lambda saved: saved.state["extra"].update({key: value(saved)})


FAULTS: dict[str, Fault] = {
    "clean": Fault(),
    "fused halves permuted: two parts of the fused weight": Fault(_set(WEIGHT, "", swap)),
    "a tensor dropped: the tied alias": Fault(lambda s: s.state["model"].pop(ALIAS)),
    "a tensor dropped: a frozen parameter": Fault(ignore_frozen=True),
    "a tensor dropped: the share of one worker": Fault(_on(1, lambda s: s.state["model"].pop(WEIGHT))),
    "a tensor dropped: by who takes it": Fault(take=lambda state: state["model"].pop(WEIGHT)),
    "moments of another or empty: those of another tensor": Fault(_moments_of_another),
    "moments of another or empty: zeros": Fault(_set(WEIGHT, "exp_avg_sq", torch.zeros_like)),
    "moments of another or empty: none": Fault(lambda s: s.state["optim"]["state"][WEIGHT].pop("exp_avg_sq")),
    "step counter or rate scale lost: the step counter": Fault(_set(WEIGHT, "step", torch.zeros_like)),
    "step counter or rate scale lost: the rate's scale": Fault(
        lambda s: s.state["optim"]["param_groups"][0].update(lr=LR)
    ),
    "master and working copy differ: one of the two": Fault(
        lambda s: s.state["extra"].update(master=s.old["model"][WEIGHT])
    ),
    "a replica differs or is NaN: differs": Fault(_replicated(WEIGHT, flip)),
    "a replica differs or is NaN: NaN": Fault(_set(WEIGHT, "", lambda t: t.fill_(torch.nan))),
    "a shard or an owner twice: a shard for two": Fault(_set(WEIGHT, "", twice)),
    "a shard or an owner twice: two owners": Fault(_replicated(NORM, lambda t: t.mul_(2))),
    "stale tensor of an earlier step: one tensor": Fault(
        lambda s: s.state["model"].update({WEIGHT: s.old["model"][WEIGHT]})
    ),
    "stale tensor of an earlier step: all that moves": Fault(
        after=_on(1, lambda s: shutil.copy(s.folder.parent / "old" / s.file(1).name, s.file(1)))
    ),
    "RNG key or cursor of another: the RNG key": Fault(
        _on(1, _extra("rng/1", lambda s: torch.Generator().manual_seed(0).get_state()))
    ),
    "RNG key or cursor of another: the data cursor": Fault(_on(1, _extra("cursor/1", lambda s: 0))),
    "snapshot aliases live memory: a step writes into it": Fault(aliased="by a stager of one's own"),
    "batch of the old world: microbatches, one worker": Fault(
        _extra("batch", lambda s: {"microbatches": 4 if s.rank else 8, "samples": 32})
    ),
    "batch of the old world: samples, one worker": Fault(
        _extra("batch", lambda s: {"microbatches": 8, "samples": 64 if s.rank else 32})
    ),
    "a byte flipped in flight: of the weights": Fault(after=_on(0, _flip_in_file)),
    "batch of the old world: the same on all workers": Fault(
        _extra("batch", lambda s: {"microbatches": 4, "samples": 32})
    ),
    "wrong before the view began: an only copy": Fault(_set(WEIGHT, "", lambda t: t.mul_(2))),
    "clean: async_save, and a step meanwhile": Fault(aliased="by default"),
}
"""By the name of the same bug in transition_bugs.py."""
