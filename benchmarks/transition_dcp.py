"""The bugs of transition_bugs.py planted where torch's distributed checkpoint (DCP) carries a state to another size.

Two gloo processes train a small GPT-2 under FSDP2 and AdamW and save it with `get_state_dict` and `dcp.save`; three
others load it with `dcp.load` and `set_state_dict`, all with their defaults. A bug changes what a rank hands to the
save, as code that reshards or snapshots would, or the files. What was loaded is compared with what was trained, entry
by entry, so that a load which passes is seen to be right or wrong.
"""

from __future__ import annotations

import copy
import json
import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from benchmarks.transition_bugs import RATE_SCALE, config
from benchmarks.transition_dcp_bugs import FAULTS, LR, WEIGHT, Saved, whole

SIZES = {"save": 2, "load": 3}
"""Processes, by what they do."""


class _Alias(AsyncStager):
    """Hands over the live tensors, as a snapshot that forgets to copy does."""

    def stage(self, state_dict: Any) -> Any:
        return state_dict

    def synchronize_staging(self) -> None: ...

    def close(self) -> None: ...


class _Waiting(dcp.FileSystemWriter):
    """Writes when it is told to: a disk that is slower than a step."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.go = threading.Event()

    def write_data(self, *args: Any) -> Any:
        self.go.wait(10.0)
        return super().write_data(*args)


class Ranks:
    """One rank of a world: its model, its optimizer and what stands beside them in a checkpoint."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.mesh = rank, init_device_mesh("cpu", (world,))
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(config())
        self.model.transformer.wpe.weight.requires_grad_(False)
        for block in self.model.transformer.h:
            fully_shard(block, mesh=self.mesh)
        fully_shard(self.model, mesh=self.mesh)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LR)

    def step(self, number: int) -> None:
        """A step on made-up gradients."""
        made = torch.Generator().manual_seed(number)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                gradient = torch.randn(parameter.shape, generator=made)
                parameter.grad = distribute_tensor(gradient, self.mesh, parameter.placements)
        self.optimizer.step()

    def state(self, ignore_frozen: bool = False) -> dict[str, Any]:
        """What is saved, or is to be filled; the tensors are live."""
        options = StateDictOptions(ignore_frozen_params=ignore_frozen)
        model, optim = get_state_dict(self.model, self.optimizer, options=options)
        extra = {f"rng/{rank}": torch.Generator().manual_seed(rank).get_state() for rank in range(SIZES["save"])}
        extra |= {f"cursor/{rank}": 8 * rank for rank in range(SIZES["save"])}
        extra |= {"batch": {"microbatches": 8, "samples": 32}, "master": model[WEIGHT].clone()}
        states = {name: dict(each) for name, each in optim["state"].items()}
        groups = [dict(group) for group in optim["param_groups"]]
        return {"model": dict(model), "optim": {"state": states, "param_groups": groups}, "extra": extra}

    def forget(self) -> None:
        """Everything is something else, so that what a load leaves alone is seen."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(0.5)
            for moments in self.optimizer.state.values():
                for tensor in moments.values():
                    tensor.fill_(7.0)
        self.optimizer.param_groups[0]["lr"] = 0.5


def blank(value: Any) -> Any:
    """Of the same form, with nothing right in it."""
    if isinstance(value, dict):
        return {key: blank(each) for key, each in value.items()}
    return value.zero_() if isinstance(value, Tensor) else -1


def flat(state: Any, form: Callable[[Any], Any], name: str = "") -> dict[str, Any]:
    """Name -> tensor, in a form, or number."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else None
    if items is None:
        return {name: form(state)}
    return {key: value for part, each in items for key, value in flat(each, form, f"{name}.{part}").items()}


def first_words(error: BaseException) -> str:
    """Of the first rank's own error."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:110]


def save_all(rank: int, world: int, folder: Path) -> None:
    """Every fault saved into a folder of its own; `folder`/save.json says which were refused."""
    ranks, refused = Ranks(rank, world), dict[str, str]()
    ranks.step(0)
    old = copy.deepcopy(ranks.state())
    dcp.save(old, checkpoint_id=folder / "old")
    ranks.step(1)
    ranks.optimizer.param_groups[0]["lr"] = LR * RATE_SCALE
    truth = flat(ranks.state(), whole)
    if rank == 0:
        torch.save(truth, folder / "truth.pt")
    for number, (name, fault) in enumerate(FAULTS.items()):
        saved = Saved(ranks.state(fault.ignore_frozen), old, rank, folder / str(number))
        fault.plant(saved)
        try:
            if fault.aliased == "no":
                dcp.save(saved.state, checkpoint_id=saved.folder)
            else:
                stager = None if fault.aliased == "by default" else _Alias()
                _save_beside(ranks, saved, stager)
            dist.barrier()
            fault.after(saved)
        except (Exception, CheckpointException) as error:
            refused[name] = first_words(error)
        dist.barrier()
    if rank == 0:
        (folder / "save.json").write_text(json.dumps(refused))


def _save_beside(ranks: Ranks, saved: Saved, stager: AsyncStager | None) -> None:
    """In the background, while a step changes the weights, which are put back afterwards."""
    writer = _Waiting(saved.folder)
    writing: Any = dcp.async_save(saved.state, storage_writer=writer, async_stager=stager)
    with torch.no_grad():
        for parameter in ranks.model.parameters():
            parameter.mul_(2.0)
        writer.go.set()
        writing.result()
        for parameter in ranks.model.parameters():
            parameter.mul_(0.5)


def load_all(rank: int, world: int, folder: Path) -> None:
    """Every fault that was saved; `folder`/load.json has the error of each, or which entries came out wrong."""
    ranks, found = Ranks(rank, world), dict[str, dict[str, Any]]()
    ranks.step(0)
    truth, refused = torch.load(folder / "truth.pt"), json.loads((folder / "save.json").read_text())
    for number, (name, fault) in enumerate(FAULTS.items()):
        if name in refused:
            found[name] = {"at": "save", "error": refused[name]}
            continue
        ranks.forget()
        state = ranks.state(fault.ignore_frozen)
        state["extra"] = blank(state["extra"])
        fault.take(state)
        error, wrong = "", list[str]()
        try:
            dcp.load(state, checkpoint_id=folder / str(number))
            set_state_dict(
                ranks.model, ranks.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"],
                options=StateDictOptions(ignore_frozen_params=fault.ignore_frozen),
            )  # fmt: skip
        except (Exception, CheckpointException) as refusal:
            error = first_words(refusal)
        else:
            now = flat({**ranks.state(), "extra": state["extra"]}, lambda tensor: tensor)
            everywhere: list[Any] = [None] * world
            dist.all_gather_object(everywhere, [key for key, was in truth.items() if not _same(was, now.get(key))])
            wrong = sorted({key for each in everywhere for key in each})
        found[name] = {"at": "load", "error": error, "wrong": wrong, "of": len(truth)}
        dist.barrier()
    if rank == 0:
        (folder / "load.json").write_text(json.dumps(found))


def _same(was: Any, now: Any) -> bool:
    """Whether this rank's shard is that of the whole tensor that was."""
    if isinstance(now, DTensor):
        wanted = distribute_tensor(was, now.device_mesh, now.placements, src_data_rank=None)
        return torch.equal(wanted.to_local(), now.to_local())
    return torch.equal(was, now) if isinstance(now, Tensor) else was == now


def rank_main(payload: Mapping[str, Any]) -> int:
    """One rank of a world that saves or loads: the entry of a ForkServer."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # DCP warns of what it then raises
    world, folder = SIZES[payload["act"]], Path(payload["folder"])
    store = dist.FileStore(str(folder / f"store-{payload['act']}"), world)
    dist.init_process_group("gloo", store=store, rank=payload["rank"], world_size=world, timeout=timedelta(seconds=30))
    try:
        {"save": save_all, "load": load_all}[payload["act"]](payload["rank"], world, folder)
    finally:
        dist.destroy_process_group()
    return 0
