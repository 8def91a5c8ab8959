"""Decoder blocks through torch.compile: one block is compiled, and its code serves all blocks of its kind.

Shapes are static, so that what a worker computes does not depend on what it has computed before: whoever compiles a
block for a shape gets the same code. The code is kept where torch keeps it (TORCHINDUCTOR_CACHE_DIR), so that a worker
that takes a lost one's place finds it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

_MOST_VARIANTS = 256
"""Of a block's code in a process: kinds of attention, shapes, with and without gradients. More is an error, since torch
would go on without compiling."""


def run_compiled(block: nn.Module, arguments: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """A block on a hidden state [batch, sequence, hidden] and its other arguments, compiled when it is needed. That
    starts no process but the compiler."""
    return _compiled()(block, arguments, hidden)


@cache
def _compiled() -> Callable[[nn.Module, Mapping[str, Any], Tensor], Tensor]:
    prepare()
    return torch.compile(_run, fullgraph=True, dynamic=False)


def _run(block: nn.Module, arguments: Mapping[str, Any], hidden: Tensor) -> Tensor:
    return block(hidden, **arguments)


def prepare() -> None:
    """Import what compiles, and set it up: a few seconds, which workers that are forked afterwards do not take."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    inductor.compile_threads = 1  # before the rest: else a pool of processes, which would outlive a worker
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = _MOST_VARIANTS
    import_module("torch._inductor.compile_fx")


def lacking(kind: str) -> str:
    """What blocks cannot be compiled without on a "cpu" or "cuda", and is not here; "" where nothing lacks."""
    if kind == "cuda":
        return "" if find_spec("triton") is not None else "triton"
    prepare()
    builder, errors = import_module("torch._inductor.cpp_builder"), import_module("torch._inductor.exc")
    try:
        builder.get_cpp_compiler()
    except (errors.InvalidCxxCompiler, OSError):
        return "a C++ compiler (g++, or what CXX names)"
    return ""
