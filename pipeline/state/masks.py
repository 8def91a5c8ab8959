"""Which elements of the weights are updated, where it is not all of them: a mask by parameter, in a file by layer.

    FOLDER/layer-00003.safetensors      full name -> bool, of the parameter's shape or one that broadcasts to it

Whoever holds a layer reads its file: a layer that moves or is rebuilt has the same mask wherever it is. A parameter of
which a file says nothing is not updated at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.model.layered import NamedState
from pipeline.model.weights import ModelError

Masks = Mapping[str, Tensor]
"""Full name -> bool; what is True is updated."""


def mask_file(folder: Path, layer: int) -> Path:
    """Where the masks of a layer lie."""
    return folder / f"layer-{layer:05d}.safetensors"


def read_masks(folder: Path, spec: NamedState) -> Masks:
    """Those of a state's parameters. Raises ModelError for a file that is gone or none: without it nobody knows what
    may change."""
    path = mask_file(folder, spec.owner)
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}; it says which weights may change") from error
    return {name: mask.bool() for name, mask in found.items() if name in spec.keys}


@torch.no_grad()
def mask_gradients(parameters: Mapping[str, nn.Parameter], masks: Masks) -> None:
    """Make gradients 0 where nothing is updated. What is no number there stays none: it is a fault all the same."""
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            parameter.grad.mul_(masks.get(name, 0.0))


@torch.no_grad()
def put_back(parameters: Mapping[str, nn.Parameter], masks: Masks, before: Mapping[str, Tensor]) -> None:
    """Have the weights of before, to the bit, where nothing is updated."""
    for name, parameter in parameters.items():
        old = before[name]
        parameter.copy_(torch.where(masks[name], parameter, old) if name in masks else old)
