"""Packed text whose documents do not see each other: what each token is given is what its document alone would give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from jobs.text import TextJob, document_positions
from launch.forkserver import ForkServer
from pipeline.model.layered import LayeredModel
from pipeline.runtime.batch import IGNORED, Needs
from tests.harness import run_command
from tests.test_recovery import metrics, settings

END = 5
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=16,
        max_position_embeddings=32,
    ),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=16, embd_pdrop=0, resid_pdrop=0,
                       attn_pdrop=0),
}  # fmt: skip


def test_positions_begin_anew_after_each_end() -> None:
    inputs = torch.tensor([[1, 2, END, 3, 4, 4, END, END, 1], [1, 1, 1, 1, 1, 1, 1, 1, END]])
    assert document_positions(inputs, END).tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 0], [*range(9)]]


@pytest.mark.parametrize("name", MODELS)
def test_a_document_is_computed_as_if_it_were_alone(name: str) -> None:
    one, two = [1, 2, 3, END], [4, 6, 7, 8, 9]
    sample = np.array([*one, *two, 10])
    job = TextJob(lambda _: sample, 9, None, END, True, microbatches=1, size=1)
    batch = job.batch(0, 0, Needs.INPUT)
    assert "position_ids" in job.batch(0, 0, Needs.NOTHING).tensors, "a stage between the ends needs them as well"
    blueprint = LayeredModel(MODELS[name])
    model = blueprint.build((0, blueprint.num_layers), seed=1).eval()
    with torch.no_grad():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"])
        alone = torch.cat([model(torch.tensor([part])) for part in (one, two)], dim=1)
        seeing = model(batch["input_ids"])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seeing, alone, atol=1e-3)


def test_forgotten_tokens_stand_alone() -> None:
    job = TextJob(lambda _: np.array([1, IGNORED, IGNORED, 2, 3]), 4, None, END, True, microbatches=1, size=1)
    batch = job.batch(0, 0, Needs.INPUT | Needs.LOSS)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0]]
    assert job.counts(0, 0) == {"text": 2}


def test_a_run_keeps_documents_apart(forkserver: ForkServer, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{n} is a number of {n % 7}"}) for n in range(400)]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    flags = ["--data", str(tmp_path / "short.jsonl"), "--workers", "2", "--steps", "2", "--evaluate-samples", "4"]
    for name, more in (("seeing", []), ("apart", ["--document-mask"])):
        done = run_command(forkserver, tmp_path / "log", *settings(tmp_path / name, *flags, *more))
        assert done.code == 0, done.output
    apart, seeing = (metrics(tmp_path / name)[0]["loss"] for name in ("apart", "seeing"))
    assert apart != seeing
    assert apart == pytest.approx(seeing, rel=0.02)
