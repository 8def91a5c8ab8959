"""A model that is larger than the device: peak memory and tokens per second, whole and through host memory.

    python benchmarks/offload.py --out benchmarks/results      # a minute and a half on two cores

This is a measurement on a CPU, on which host memory and the device are the same memory. The small device is one of
accounting: what weights take there is counted in their buffers, what is made beside them by following every storage
that an operator makes (pipeline/runtime/footprint.py), and both are held against the limit that was said before. A
copy costs what a memory copy costs here, not what a PCIe link would: the times show what overlaps and what more layers
that stay are worth, and say nothing about a GPU. The bound of a row is the larger of what its copies take alone and
what the whole model takes; nothing that loads as much per token is faster. Cases take turns; the first turn, in which
memory is followed, is not timed. Every continuation must be that of the whole model, token by token.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from pipeline.model.layered import LayeredModel
from pipeline.runtime.copy_engine import LATER, CopyEngine
from pipeline.runtime.footprint import Live
from pipeline.runtime.forward_bytes import generation_bytes
from pipeline.runtime.offload import Offload, place, skeleton
from pipeline.state.host_weights import HostWeights, WeightLayout

CPU, MIB = torch.device("cpu"), 2**20
WHOLE = "whole"
PAIRS = ((0, 1), (0, 2), (0, 4), (4, 2), (8, 2), (14, 2))
"""Layers resident, layers in flight. The model has 14 layers."""
PROMPT = 32


def shape() -> LlamaConfig:
    """47 M parameters: 12 blocks, embedding and head."""
    return LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip


def go_on(model: PreTrainedModel, tokens: int) -> Tensor:
    """A greedy continuation of a made-up prompt."""
    ids = torch.arange(PROMPT)[None] * 7
    return model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )  # fmt: skip


def copies_s(host: HostWeights, resident: int) -> float:
    """Seconds that the copies of one token take alone, on the engine's thread: the least of three."""
    layers = range(resident, host.layout.model.num_layers)
    target = torch.empty(max((host.layout.layer_bytes(n) for n in layers), default=0), dtype=torch.uint8)
    engine, times = CopyEngine(CPU, "alone"), []
    for _ in range(3):
        began = time.perf_counter()
        for layer in layers:
            (piece,) = host.pieces(layer)
            engine.move([(target[: piece.numel()], piece)], LATER).wait(60.0)
        times.append(time.perf_counter() - began)
    engine.close()
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape()).save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        layout = WeightLayout(LayeredModel(config), torch.float32)
        host = HostWeights.read(layout, Path(folder))
        working = generation_bytes(config, torch.float32, CPU, PROMPT, PROMPT + options.tokens)
        models: dict[str, PreTrainedModel] = {WHOLE: AutoModelForCausalLM.from_pretrained(folder).eval()}
        offloads: dict[str, Offload] = {}
        for resident, in_flight in PAIRS:
            name, placement = f"{resident} resident, {in_flight} in flight", place(layout, resident, in_flight, working)
            models[name] = skeleton(config, torch.float32, CPU)
            offloads[name] = stack.enter_context(Offload(models[name], host, placement, CPU))
            rows[name] = {"limit_bytes": placement.num_bytes, "copies_s_per_token": copies_s(host, placement.resident)}
        weights = sum(parameter.nbytes for parameter in models[WHOLE].parameters())
        rows = {WHOLE: {"limit_bytes": weights + working, "copies_s_per_token": 0.0}, **rows}
        wanted = go_on(models[WHOLE], options.tokens)
        for name, model in models.items():
            with Live() as live:
                same = torch.equal(go_on(model, options.tokens), wanted)
            held = offloads[name].weight_bytes if name in offloads else weights
            rows[name] |= {"weight_bytes": held, "peak_bytes": held + live.peak, "same_tokens": same}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(options.turns):
            for name, model in models.items():
                before = offloads[name].loaded_bytes if name in offloads else 0
                began = time.perf_counter()
                go_on(model, options.tokens)
                times[name].append(options.tokens / (time.perf_counter() - began))
                if name in offloads:
                    rows[name]["loaded_bytes_per_token"] = (offloads[name].loaded_bytes - before) / options.tokens
    alone = 1 / statistics.median(times[WHOLE])
    for name, row in rows.items():
        row["tokens_per_s"] = statistics.median(times[name])
        row["spread"] = [min(times[name]), max(times[name])]
        row["bound_tokens_per_s"] = 1 / max(alone, row["copies_s_per_token"])
        row["within_limit"] = row["peak_bytes"] <= row["limit_bytes"]
    found = {
        "measured_on": "CPU: the device is one of accounting, and a copy is a memory copy",
        "parameters": weights // 4, "layers": layout.model.num_layers, "dtype": "float32", "prompt": PROMPT,
        "tokens": options.tokens, "turns": options.turns, "threads": options.threads, "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0], "torch": torch.__version__, "machine": platform.machine(), "rows": rows,
    }  # fmt: skip
    if options.out:
        (options.out / "offload.json").write_text(json.dumps(found, indent=1) + "\n")
    table = Table(title=f"{weights / MIB:,.0f} MiB of weights, measured on a CPU; the device is one of accounting")
    for heading in ("", "weights there", "peak", "limit", "loaded a token", "tokens/s", "spread", "bound"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in rows.items():
        sizes = [row[key] / MIB for key in ("weight_bytes", "peak_bytes", "limit_bytes")]
        table.add_row(
            name, *(f"{size:,.1f} MiB" for size in sizes), f"{row.get('loaded_bytes_per_token', 0) / MIB:,.1f} MiB",
            f"{row['tokens_per_s']:.2f}", "{:.2f}-{:.2f}".format(*row["spread"]), f"{row['bound_tokens_per_s']:.2f}",
        )  # fmt: skip
    Console(width=130).print(table)
    wrong = [name for name, row in rows.items() if not (row["same_tokens"] and row["within_limit"])]
    print(wrong if wrong else "every continuation is that of the whole model, and every peak is within its limit")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
