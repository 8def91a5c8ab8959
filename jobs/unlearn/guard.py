"""A guarded model: plain weights that still know, and beside them what keeps them from saying it.

    model/guard.json               by which method, and its settings
    model/guard.safetensors        projections of blocks (mrp), or an adapter, those before it and routers (o3)
    model/base/                    the plain model

There is no config.json above `base`, so nothing loads the model without its guard by accident. A guard
works by hooks on a model's decoder blocks, whoever built them: transformers, or this project a layer at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jobs.unlearn.method import Method
from jobs.unlearn.methods.mrp import MRP
from jobs.unlearn.methods.o3 import O3
from jobs.unlearn.router import Router, weight
from pipeline.model.lora import A, Adapters, B, Lora
from pipeline.model.projection import PROJECTION, Projections, project
from pipeline.model.weights import ModelError
from pipeline.settings import ConfigError
from recovery.disk import write_flushed

SETTINGS, TENSORS, BASE = "guard.json", "guard.safetensors", "base"
GUARD = "guard"
"""Where a request keeps the guard that the run had when it began."""
GUARDS = (MRP.name, O3.name)
"""The methods that guard."""
O3_RANK, O3_ALPHA = 8, 16.0
"""Of an adapter of o3 where --lora-rank is unset, as in its authors' code."""
_EARLIER, _ROUTER = "earlier", "router"


@dataclass
class Guard:
    """What changes the outputs of a model's blocks. `projections` are by the path of a block, [directions, hidden];
    `adapter` has A and B by full name; `scale` multiplies B A; `earlier` are the adapters' A of the requests before,
    one mapping each. `given` is how much of the adapter each row gets: None leaves it out."""

    method: str
    projections: Mapping[str, Tensor] = field(default_factory=dict)
    adapter: Mapping[str, Tensor] = field(default_factory=dict)
    scale: float = 0.0
    strength: float = 0.0
    earlier: Sequence[Mapping[str, Tensor]] = ()
    routers: Sequence[Router] = ()
    given: Tensor | None = None

    # ---- on the disk ----

    @classmethod
    def read(cls, folder: Path) -> Guard | None:
        """The guard of a model directory; None for a plain one. Raises ModelError for one that is damaged."""
        if not is_guarded(folder):
            return None
        try:
            said = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            # copied: the file may be shredded while they are in use
            tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
            earlier: list[dict[str, Tensor]] = [{} for _ in range(int(said["earlier"]))]
            routers: list[dict[str, Tensor]] = [{} for _ in range(int(said["routers"]))]
            plain: dict[str, Tensor] = {}
            for name, tensor in tensors.items():
                kind, _, rest = name.partition("/")
                if kind in (_EARLIER, _ROUTER):
                    number, _, key = rest.partition("/")
                    (earlier if kind == _EARLIER else routers)[int(number)][key] = tensor
                else:
                    plain[name] = tensor
            return cls(
                str(said["method"]),
                {name.removesuffix(PROJECTION): t for name, t in plain.items() if name.endswith(PROJECTION)},
                {name: t for name, t in plain.items() if not name.endswith(PROJECTION)},
                float(said["scale"]), float(said["strength"]), earlier, [Router.of(each) for each in routers],
            )  # fmt: skip
        except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ModelError(f"{folder}: the guard of its model cannot be read: {error}") from error

    def write(self, base: Path, into: Path) -> None:
        """Make a guarded model of the plain one in `base`, in place of what is in `into`. Raises OSError."""
        unfinished = into.with_name(f"{into.name}.guarded.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(base, unfinished / BASE)
        tensors = {path + PROJECTION: tensor for path, tensor in self.projections.items()} | dict(self.adapter)
        for number, each in enumerate(self.earlier):
            tensors |= {f"{_EARLIER}/{number}/{name}": tensor for name, tensor in each.items()}
        for number, router in enumerate(self.routers):
            tensors |= {f"{_ROUTER}/{number}/{name}": tensor for name, tensor in router.tensors().items()}
        save_file(
            {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, unfinished / TENSORS
        )
        said = {
            "method": self.method, "scale": self.scale, "strength": self.strength, "earlier": len(self.earlier),
            "routers": len(self.routers), "note": "the weights in base still know what is suppressed here",
        }  # fmt: skip
        write_flushed(unfinished / SETTINGS, json.dumps(said, indent=1).encode())
        shutil.rmtree(into, ignore_errors=True)
        os.replace(unfinished, into)

    # ---- at work ----

    def attach(self, path: str, block: nn.Module) -> None:
        """Have the block at a path of the model give what the guard makes of it."""
        if path in self.projections:
            block.register_forward_hook(partial(_take, self.projections[path]))
        prefix = f"{path}."
        for name in [name for name in self.adapter if name.startswith(prefix) and name.endswith(A)]:
            linear = name.removesuffix(A)
            low, high = self.adapter[name], self.adapter[linear + B]
            block.get_submodule(linear.removeprefix(prefix)).register_forward_hook(partial(self._add, low, high))

    def _add(self, low: Tensor, high: Tensor, _: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self.given is None or not bool(self.given.any()):
            return output
        change = (inputs[0].float() @ low.to(inputs[0].device).T) @ high.to(inputs[0].device).T
        given = self.given.to(device=output.device, dtype=torch.float32)[:, None, None]
        return (output + self.scale * given * change).to(output.dtype)

    def route(self, found: Tensor | None) -> None:
        """Decide how much of the adapter each row gets, by descriptions of their questions [rows, blocks, hidden] in
        the plain model; None leaves it out."""
        self.given = None if found is None else weight(self.routers, found, self.strength)


def _take(directions: Tensor, _: nn.Module, __: Any, output: Any) -> Any:
    whole = isinstance(output, Tensor)
    hidden = output if whole else output[0]
    found = project(hidden, directions.to(hidden.device))
    return found if whole else (found, *output[1:])


def adapters_of(method: Method, lora: Adapters | None, folder: Path) -> Adapters | None:
    """What a method that guards trains, with the guard in `folder` before it; `lora` for any other. Raises
    ModelError."""
    if not isinstance(method, MRP | O3):
        return lora
    before = Guard.read(folder)
    if isinstance(method, MRP):
        taken = {} if before is None else before.projections
        kept = {int(path.rpartition(".")[2]): tensor for path, tensor in taken.items()}
        return Projections(method.directions, method.projected, method.control_seed, kept, digest_of(folder))
    if not isinstance(lora, Lora):
        lora = Lora(O3_RANK, O3_ALPHA)
    if before is None:
        return lora
    stacked = {
        name: torch.cat([each[name] for each in (*before.earlier, before.adapter) if name in each])
        for name in before.adapter if name.endswith(A)
    }  # fmt: skip
    return replace(lora, first=before.adapter, earlier=stacked, apart=method.orthogonality, digest=digest_of(folder))


def digest_of(folder: Path) -> str:
    """sha256 [64 hex digits] of a guard's tensors; "" where there is no guard. Raises OSError."""
    return hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest() if is_guarded(folder) else ""


def is_guarded(folder: Path) -> bool:
    """Whether a model directory has a guard."""
    return (folder / SETTINGS).is_file()


def plain(folder: Path) -> Path:
    """Where the plain weights of a model directory lie: in it, or in a guarded one beside the guard."""
    return folder / BASE if is_guarded(folder) else folder


def check_guard(run: Path, method: str) -> None:
    """Raise ConfigError for another method where the model of a run is guarded: it would begin with weights that know
    what is only suppressed, and end with them."""
    guard = Guard.read(run / "model")
    if guard is not None and guard.method != method:
        raise ConfigError(
            f"method is {method!r}; allowed: {guard.method}, as before: the weights of {str(run / 'model')!r} still "
            "know what its guard suppresses, and any other model made of them would say it"
        )


def require_plain(run: Path) -> None:
    """Raise ConfigError for a run whose model is guarded: what trained on would come without the guard."""
    guard = Guard.read(run / "model")
    if guard is not None:
        raise ConfigError(
            f"out is {str(run)!r}, whose model is guarded by {guard.method}: its weights still know what was to be "
            "forgotten, and would say it when they are trained on; allowed: a run that has forgotten by another method"
        )
