"""Every engine path against plain single-process PyTorch: losses, gradients and weights to 1e-5 over 20 steps."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from jobs.config import TrainConfig
from launch.forkserver import ForkServer
from schedulers import PLANNERS
from tests.harness import Outcome, plain_training, relative_difference, run_workers

TOLERANCE = 1e-5
STEPS = 20
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=64, tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=6, n_head=4, vocab_size=96, n_positions=64, resid_pdrop=0.1, embd_pdrop=0.1,
                       attn_pdrop=0.1, bos_token_id=0, eos_token_id=0),
}  # fmt: skip
"""The GPT-2 has dropout everywhere and a tied head."""


def settings(**changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "workers": 2, "microbatches": 4, "microbatch_size": 2, "sequence_length": 16, "steps": STEPS, "lr": 1e-3,
        "warmup": 5, "deadline": 60.0, "evaluate_samples": 4,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


@cache
def reference(model: str, device: str = "cpu", microbatches: int = 4) -> Outcome:
    return plain_training(settings(microbatches=microbatches), MODELS[model], device)


def check(found: Outcome, expected: Outcome, tolerance: float = TOLERANCE) -> None:
    assert found.replicas_equal, "replicas of a span differ"
    for step, (ours, theirs) in enumerate(zip(found.losses, expected.losses, strict=True)):
        assert abs(ours - theirs) <= tolerance * max(1.0, abs(theirs)), f"loss at step {step}: {ours} and {theirs}"
    for step, (ours, theirs) in enumerate(zip(found.norms, expected.norms, strict=True)):
        assert abs(ours - theirs) <= 10 * tolerance * theirs, f"gradient norm at step {step}: {ours} and {theirs}"
    assert relative_difference(found.gradients, expected.gradients) <= tolerance
    assert relative_difference(found.weights, expected.weights) <= tolerance
    assert expected.losses[-1] < expected.losses[0]


CHOSEN = [  # every order of work, each family in several layouts; the others take their turn in `make soak`
    ("gpipe", 4, 2, "llama"), ("one_f_one_b", 2, 2, "gpt2"), ("one_f_one_b", 4, 1, "gpt2"),
    ("zero_bubble", 4, 1, "gpt2"), ("zero_bubble", 4, 2, "llama"), ("interleaved", 4, 1, "gpt2"),
    ("balanced", 4, 2, "llama"),
]  # fmt: skip
LAYOUTS = [
    pytest.param(*layout, marks=() if layout in CHOSEN else pytest.mark.long)
    for layout in itertools.product(PLANNERS, (2, 4), (1, 2), MODELS)
]


@pytest.mark.parametrize(("scheduler", "workers", "replicas", "model"), LAYOUTS)
def test_equals_plain_torch(
    forkserver: ForkServer, tmp_path: Path, scheduler: str, workers: int, replicas: int, model: str
) -> None:
    config = settings(scheduler=scheduler, workers=workers, replicas=replicas)
    check(run_workers(forkserver, config, MODELS[model], tmp_path), reference(model))


def test_a_pipeline_that_is_folded_and_keeps_to_memory(forkserver: ForkServer, tmp_path: Path) -> None:
    config = settings(scheduler="balanced", workers=2, balanced_shape="v", balanced_memory="fullest")
    check(run_workers(forkserver, config, MODELS["llama"], tmp_path), reference("llama"))


@pytest.mark.parametrize("model", MODELS)
def test_head_with_embedding(forkserver: ForkServer, tmp_path: Path, model: str) -> None:
    config = settings(workers=4, replicas=2, ends="home")
    check(run_workers(forkserver, config, MODELS[model], tmp_path), reference(model))


@pytest.mark.parametrize(
    ("scheduler", "model"),
    [
        ("zero_bubble", "gpt2"), ("balanced", "llama"),
        pytest.param("one_f_one_b", "gpt2", marks=pytest.mark.long),
        pytest.param("zero_bubble", "llama", marks=pytest.mark.long),
        pytest.param("one_f_one_b", "llama", marks=pytest.mark.long),
        pytest.param("balanced", "gpt2", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_recomputation_changes_nothing(forkserver: ForkServer, tmp_path: Path, scheduler: str, model: str) -> None:
    config = settings(scheduler=scheduler, recompute=True)
    check(run_workers(forkserver, config, MODELS[model], tmp_path), reference(model))


def test_microbatches_that_are_no_multiple_of_the_stages(forkserver: ForkServer, tmp_path: Path) -> None:
    config = settings(scheduler="interleaved", workers=4, microbatches=5)
    check(run_workers(forkserver, config, MODELS["llama"], tmp_path), reference("llama", microbatches=5))


def test_a_rerun_is_bitwise_equal(forkserver: ForkServer, tmp_path: Path) -> None:
    config = settings(workers=4, replicas=2)
    runs = [run_workers(forkserver, config, MODELS["gpt2"], tmp_path / str(n)) for n in range(2)]
    assert runs[0].losses == runs[1].losses
    assert all(torch.equal(runs[0].weights[n], runs[1].weights[n]) for n in runs[0].weights)


def test_bfloat16_keeps_float32_masters(forkserver: ForkServer, tmp_path: Path) -> None:
    """Autocast rounds activations to 8 bits, so this stays near fp32 and moves weights by less than bf16 can."""
    found = run_workers(forkserver, settings(dtype="bfloat16"), MODELS["llama"], tmp_path)
    assert all(t.dtype == torch.float32 for t in found.weights.values())
    assert any(not torch.equal(t, t.bfloat16().float()) for t in found.weights.values())
    expected = reference("llama")
    assert found.losses != expected.losses, "bfloat16 computed nothing"
    assert max(abs(a - b) for a, b in zip(found.losses, expected.losses, strict=True)) < 0.03
    assert found.losses[-1] < found.losses[0]


ON_CUDA = {
    ("gpipe", 2, 1, "llama"), ("one_f_one_b", 2, 2, "gpt2"), ("interleaved", 2, 1, "gpt2"),
    ("zero_bubble", 4, 1, "llama"), ("balanced", 2, 1, "llama"), ("balanced", 4, 2, "gpt2"),
}  # fmt: skip
"""Every process has a context, which takes seconds: the other cases are left to `-m long`."""


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("scheduler", "workers", "replicas", "model"),
    [
        pytest.param(*case, marks=() if case in ON_CUDA else pytest.mark.long)
        for case in itertools.product(PLANNERS, (2, 4), (1, 2), MODELS)
    ],
)
def test_equals_plain_torch_on_cuda(
    forkserver: ForkServer, tmp_path: Path, scheduler: str, workers: int, replicas: int, model: str
) -> None:
    """Workers share the first device, and its memory."""
    config = settings(scheduler=scheduler, workers=workers, replicas=replicas)
    found = run_workers(forkserver, config, MODELS[model], tmp_path, device="cuda:0")
    check(found, reference(model, "cuda"), tolerance=2e-5)
