"""Blocks through torch.compile: they compute what they computed before, and one code serves them all."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from jobs.config import ConfigError, TrainConfig
from jobs.early import check_compile
from launch.forkserver import ForkServer
from pipeline.model import compiled
from pipeline.model.layered import LayeredModel
from pipeline.model.lora import Lora
from pipeline.model.weights import preset
from tests.harness import run_command
from tests.test_model import config_of
from tests.test_parity import MODELS, check, reference, run_workers, settings
from tests.test_recovery import events, same_weights
from tests.test_recovery import settings as flags

INPUT = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """What compiles, without the compiler: graphs are traced, cut into forward and backward, and run as they are."""
    found = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled.prepare()
    fast = cache(lambda: torch.compile(compiled._run, fullgraph=True, dynamic=False, backend=found))
    monkeypatch.setattr(compiled, "_compiled", fast)
    return found


def gradients(model: LayeredModel, how: str, recompute: bool = False) -> dict[str, Tensor]:
    module = model.build((1, model.num_layers - 1), seed=0).train()
    x = INPUT.clone().requires_grad_()
    y = module(x, compiled=how == "compiled", recompute=recompute)
    y.square().mean().backward()
    found = {name: p.grad for layer in range(*module.span) for name, p in module.named_layer_parameters(layer).items()}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{name: grad for name, grad in found.items() if grad is not None}}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lora", [None, Lora(2)])
def test_all_blocks_share_one_code_and_give_what_they_gave(
    counter: CompileCounterWithBackend, lora: Lora | None, recompute: bool
) -> None:
    model = LayeredModel(MODELS["llama"], lora=lora)
    eager, fast = gradients(model, "eager"), gradients(model, "compiled", recompute)
    assert counter.frame_count == 1
    assert fast.keys() == eager.keys()
    for name, expected in eager.items():
        torch.testing.assert_close(fast[name], expected, rtol=1e-5, atol=1e-7)
    again = gradients(model, "compiled", recompute)
    assert counter.frame_count == 1, "other weights need no other code"
    assert all(torch.equal(again[name], fast[name]) for name in fast)


OTHERS = ("qwen2 window", "qwen3", "mistral window", "gpt2 untied", "gemma3")


@pytest.mark.parametrize("case", ["gemma2", *(pytest.param(case, marks=pytest.mark.long) for case in OTHERS)])
def test_every_family_compiles_whole_with_masks_under_autocast_and_without_gradients(
    counter: CompileCounterWithBackend, case: str
) -> None:
    """A graph that breaks is an error. A code for each kind of attention, and no more for more blocks."""
    model = LayeredModel(config_of(case), attention="eager" if case == "gemma2" else None)
    module = model.build((1, model.num_layers - 1), seed=5).train()
    x = torch.randn(2, 20, model.hidden_size, generator=torch.Generator().manual_seed(0))
    apart = torch.tensor([[*range(7), *range(13)], [*range(12), *range(8)]])
    padded = torch.ones(2, 20, dtype=torch.long).index_fill(1, torch.arange(16, 20), 0)
    for how, autocast, rtol in (
        ({}, False, 1e-5), ({"position_ids": apart}, True, 2e-2), ({"attention_mask": padded}, False, 1e-5),
    ):  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, found = module(x, **how), module(x, **how, compiled=True)
            assert found.requires_grad
            torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
            with torch.no_grad():
                torch.testing.assert_close(module(x, **how, compiled=True), expected, rtol=rtol, atol=rtol)
    kinds = {model.attention_type(layer) for layer in model.blocks}
    scaled = model.config.num_hidden_layers if case == "gpt2 untied" else 1  # by the number of the layer
    assert counter.frame_count <= 12 * len(kinds) * scaled, "under autocast the first block's input has another dtype"


def test_what_cannot_be_compiled_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(compile=True)
    llama, gpt2 = LayeredModel(preset("llama-tiny")), LayeredModel(MODELS["gpt2"])
    check_compile(replace(config, compile=False), gpt2)
    check_compile(config, llama)
    with pytest.raises(ConfigError, match="compile is True; allowed: unset: the method looks into the blocks"):
        check_compile(Procedure(compile=True), llama)
    with pytest.raises(ConfigError, match="compile is True; allowed: unset: the model has dropout"):
        check_compile(config, gpt2)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nowhere/g++"))
    with pytest.raises(ConfigError, match=r"compile is True; allowed: unset, since a C\+\+ compiler \(g\+\+, or what"):
        check_compile(config, llama)
    check_compile(replace(config, cluster="ray"), llama)  # its workers are elsewhere


class Procedure(TrainConfig):
    @property
    def is_procedure(self) -> bool:
        return True


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("scheduler", ["one_f_one_b", "balanced"])
def test_workers_that_compile_equal_plain_torch(forkserver: ForkServer, tmp_path: Path, scheduler: str) -> None:
    check(
        run_workers(forkserver, settings(scheduler=scheduler, compile=True), MODELS["llama"], tmp_path),
        reference("llama"),
    )


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("more", [(), ("--scheduler", "roundpipe")])
def test_a_worker_lost_among_those_that_compile_changes_no_bit(
    forkserver: ForkServer, tmp_path: Path, more: tuple[str, ...]
) -> None:
    common = ("--workers", "2", "--compile", *more)
    calm = run_command(forkserver, tmp_path / "log", *flags(tmp_path / "calm", *common), timeout_s=200)
    assert calm.code == 0, calm.output
    kill = ("--inject", "kill:worker=1,step=7,at=backward")
    done = run_command(forkserver, tmp_path / "log", *flags(tmp_path / "run", *common, *kill), timeout_s=200)
    assert done.code == 0, done.output
    assert events(tmp_path / "run", "fault")
    assert same_weights(tmp_path / "run", tmp_path / "calm")
