"""How a request whose method guards ends: its weights are those that it began with, and a guard goes beside them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.guard import GUARD, GUARDS, SETTINGS, TENSORS, Guard, digest_of, is_guarded
from jobs.unlearn.jobs import material_of, probed
from jobs.unlearn.material import Material
from jobs.unlearn.method import FORGET
from jobs.unlearn.methods.mrp import MRP
from jobs.unlearn.methods.o3 import O3
from jobs.unlearn.probe import asked_of, descriptions
from jobs.unlearn.request import Request
from jobs.unlearn.router import Router
from jobs.unlearn.settings import method_of
from pipeline.model.lora import A, Lora, adapter_of
from pipeline.model.projection import PROJECTION

_ROUTED = 256
"""Rows of each kind that a router is made of, at most."""


def keep_guard(run: Path, folder: Path) -> None:
    """Keep the guard that a run has now, for its next request."""
    if is_guarded(run / "model"):
        (folder / GUARD).mkdir(parents=True, exist_ok=True)
        for name in (SETTINGS, TENSORS):
            shutil.copy(run / "model" / name, folder / GUARD / name)


def put_guard(config: UnlearnConfig, request: Request) -> None:
    """Have the model of a request be the one that it began with and a guard, made of what was trained. Raises
    ModelError."""
    if config.method not in GUARDS or is_guarded(config.out / "model"):
        return
    before, trained = Guard.read(config.out / GUARD), adapter_of(config.out / "adapter")
    if config.method == MRP.name:
        kept = {} if before is None else before.projections
        projections = {name.removesuffix(PROJECTION): tensor for name, tensor in trained.items()}
        joined = {path: torch.cat([kept[path], new]) if path in kept else new for path, new in projections.items()}
        guard = Guard(MRP.name, joined)
    else:
        method, lora = method_of(config), config.lora()
        assert isinstance(method, O3)
        assert isinstance(lora, Lora)
        earlier = [] if before is None else [*before.earlier, first_halves(before.adapter)]
        router = _router(config, material_of(config, request), request)
        routers = [*(() if before is None else before.routers), router]
        guard = Guard(O3.name, {}, trained, lora.scale, method.strength, earlier, routers)
    guard.write(config.out / "start", config.out / "model")


def first_halves(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A of each adapted layer, by full name."""
    return {name: tensor for name, tensor in adapter.items() if name.endswith(A)}


def _router(config: UnlearnConfig, material: Material, request: Request) -> Router:
    """Of some rows of each kind."""
    items = probed(request, max(config.evaluate_samples, _ROUTED))
    found = torch.cat(descriptions(config.out / "start", *asked_of(material, items, config.microbatch_size)))
    forget = torch.tensor([item.source == FORGET for item in items])
    return Router.fit(found[forget], found[~forget])


def told_of_guard(folder: Path) -> dict[str, dict[str, str]]:
    """What a manifest says of a guarded model."""
    if not is_guarded(folder):
        return {}
    note = "the weights have not changed and still know; the guard suppresses it"
    return {"guard": {"sha256": digest_of(folder), "note": note}}
