"""Model FLOPs against a hand count, against the plain transformers model, and against spans that really run; and what
a device could do."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.utilisation import gpu_peak, middle, of_run, reached, step_flops
from jobs.pipeline_engine import PipelineEngine
from pipeline.model.flops import LayerFlops, ModelFlops
from pipeline.model.layered import LayeredModel
from pipeline.model.lora import Lora
from pipeline.runtime import peak_flops
from pipeline.runtime.compute import Settings
from pipeline.runtime.peak_flops import PEAK_TFLOPS, UNKNOWN, Capability, known_peak, products_of, together
from pipeline.runtime.peak_memory import PEAK_BYTES, PeakMemory, peak_memory, told
from pipeline.runtime.worker import StepResult
from pipeline.schedule.ops import Route
from pipeline.wire import WireError
from tests.test_model import CASES, config_of

BATCH, SEQUENCE = 3, 20
TOKENS = BATCH * SEQUENCE
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def all_of(model: LayeredModel) -> range:
    return range(model.num_layers)


def hand_count(model: LayeredModel) -> int:
    """Forward: a multiply-add for every token and weight of a matrix, but for the lookup of an embedding, and two
    products of the queries [sequence, head] with all keys, and of the scores [sequence, sequence] with all values."""
    weights = sum(
        shape[0] * shape[1] for layer in all_of(model) if layer for shape in model.shapes(layer).values()
        if len(shape) == 2
    )  # fmt: skip
    config = model.config
    inner = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return 2 * weights * TOKENS + len(model.blocks) * 2 * (2 * BATCH * SEQUENCE * SEQUENCE * inner)


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_three_times_the_forward_of_a_hand_count(case: str) -> None:
    model = LayeredModel(config_of(case))
    flops = ModelFlops.of(model, BATCH, SEQUENCE)
    forward = hand_count(model)
    assert flops.microbatch(all_of(model), trains=False) == forward
    assert flops.microbatch(all_of(model)) == 3 * forward
    assert flops.layers[0] == LayerFlops(0, 0, 0), "a lookup is no product"
    assert all(each.backward == 2 * each.forward for each in flops.layers)


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma3", "qwen2 window"])
def test_it_is_what_torch_counts_of_the_plain_model(case: str) -> None:
    """Eager attention on real tensors: none of the paths by which the count is made."""
    model = LayeredModel(config_of(case))
    whole = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager", dtype=torch.float32)
    ids = torch.zeros((BATCH, SEQUENCE), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        whole(input_ids=ids, use_cache=False).logits.sum().backward()
    rotary = sum(
        count for name, each in counter.get_flop_counts().items() if "rotary" in name for count in each.values()
    )
    assert ModelFlops.of(model, BATCH, SEQUENCE).microbatch(all_of(model)) == counter.get_total_flops() - rotary


def really(model: LayeredModel) -> tuple[int, int]:
    """(forward, backward) of the whole model as one span, as a worker builds it, on real tensors."""
    module = model.build((0, model.num_layers), seed=1)
    with FlopCounterMode(display=False) as counter:
        y = module(torch.zeros((BATCH, SEQUENCE), dtype=torch.long))
        forward = counter.get_total_flops()
        y.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize(
    "how",
    [
        {"lora": Lora(2)}, {"lora": Lora(2, targets="q_proj,v_proj", blocks=(1, 3))}, {"trained": ("lm_head.weight",)},
        {"trained": ("*layers.1.mlp.down_proj*",)}, {"trained": ("*layers.2.*", "*embed_tokens*")},
    ],
)  # fmt: skip
def test_what_is_frozen_has_no_gradient_and_nothing_goes_back_further_than_is_trained(how: dict[str, Any]) -> None:
    model = LayeredModel(config_of("llama"), attention="eager", **how)
    flops = ModelFlops.of(model, BATCH, SEQUENCE)
    forward, backward = really(model)
    assert flops.microbatch(all_of(model), trains=False) == forward
    assert flops.microbatch(all_of(model)) == forward + backward
    assert backward < 2 * forward


def test_frozen_layers_by_hand() -> None:
    """Only the head: the gradient of its weight, and of nothing else. Only the end of the MLP of block 2: that
    gradient, and those of the inputs of all that comes after it."""
    head = LayeredModel(config_of("llama"), trained=("lm_head.weight",))
    flops = ModelFlops.of(head, BATCH, SEQUENCE)
    assert flops.microbatch(all_of(head)) == hand_count(head) + 2 * TOKENS * 32 * 61
    inside = LayeredModel(config_of("llama"), trained=("*layers.1.mlp.down_proj*",))
    flops = ModelFlops.of(inside, BATCH, SEQUENCE)
    block, attention = flops.layers[3].forward, 2 * (2 * BATCH * SEQUENCE * SEQUENCE * 32)
    after = (
        block + attention
    ) + 2 * TOKENS * 32 * 61  # scores and values are both inputs: each product goes back twice
    assert flops.microbatch(all_of(inside)) == hand_count(inside) + 2 * TOKENS * 48 * 32 + after


def test_a_microbatch_counts_only_the_layers_that_it_visits() -> None:
    model = LayeredModel(config_of("llama"))
    flops = ModelFlops.of(model, BATCH, SEQUENCE)
    every, block = flops.microbatch(all_of(model)), flops.layers[1]
    assert flops.microbatch([0, 1, 3, 4]) == every - block.forward - block.backward
    partly = LayeredModel(config_of("llama"), trained=("*layers.0.mlp.down_proj*", "*layers.2.mlp.down_proj*"))
    found = ModelFlops.of(partly, BATCH, SEQUENCE)
    assert found.layers[3].first < found.layers[3].backward
    without = found.layers[1].forward + found.layers[2].forward + found.layers[2].backward
    lower = found.layers[1].first + found.layers[3].backward - found.layers[3].first
    assert found.microbatch([0, 3, 4]) == found.microbatch(all_of(partly)) - without - lower


def test_it_is_the_same_for_any_positions_and_any_depth_and_dropout() -> None:
    plain = ModelFlops.of(LayeredModel(config_of("llama")), BATCH, SEQUENCE)
    dynamic = LayeredModel(config_of("llama", rope_parameters=DYNAMIC))  # asks how far the positions go
    assert ModelFlops.of(dynamic, BATCH, SEQUENCE) == plain
    shallow = ModelFlops.of(LayeredModel(config_of("llama"), depth=2), BATCH, SEQUENCE)
    assert shallow.layers == plain.layers[:3]
    assert ModelFlops.of(LayeredModel(config_of("llama")), 2 * BATCH, SEQUENCE).microbatch(range(5)) == 2 * (
        plain.microbatch(range(5))
    )
    drops = LayeredModel(config_of("gpt2", attn_pdrop=0.1, resid_pdrop=0.1))
    assert ModelFlops.of(drops, BATCH, SEQUENCE) == ModelFlops.of(LayeredModel(config_of("gpt2")), BATCH, SEQUENCE)


def test_of_layers_that_are_alike_one_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LayeredModel(config_of("llama", num_hidden_layers=12))
    built: list[Any] = []
    monkeypatch.setattr(
        model, "build", lambda span, **how: built.append(span) or LayeredModel.build(model, span, **how)
    )
    ModelFlops.of(model, BATCH, SEQUENCE)
    assert built == [(0, 1), (1, 2), (13, 14)]


def test_it_travels_as_json_that_is_checked() -> None:
    flops = ModelFlops.of(LayeredModel(config_of("gemma2")), BATCH, SEQUENCE)
    values = json.loads(json.dumps(flops.as_json()))
    assert ModelFlops.from_json(values) == flops
    assert len(values["kinds"]) == 3
    for bad in ({}, {**values, "kinds": [[1, 2]]}, {**values, "layers": [3]}, {**values, "layers": [-1]},
                {**values, "kinds": [[1, 2, "3"]]}, {**values, "kinds": [7]}, {**values, "learning": 1}):  # fmt: skip
        with pytest.raises(WireError, match="FLOPs"):
            ModelFlops.from_json(bad)


# ---- of a step ----


def test_a_step_counts_its_routes_and_how_often_they_were_taken() -> None:
    """Two microbatches, of which one skips a span; a step that is a procedure says how often each went by."""
    flops = ModelFlops((LayerFlops(1, 2, 2), LayerFlops(10, 20, 20), LayerFlops(100, 200, 200)), frozenset(range(3)))
    routes = (Route(((0, 1), (1, 2), (2, 3)), ((2, 3), (1, 2), (0, 1))), Route(((0, 1), (2, 3)), ((2, 3), (0, 1))))
    member: Any = SimpleNamespace(excerpt=lambda purpose: SimpleNamespace(routes=routes))
    engine = PipelineEngine(member, {}, 1, flops=flops)
    plain = StepResult(1.0, {}, {})
    assert engine._flops("train", plain) == 333 + 303
    assert engine._flops("train", StepResult(1.0, {}, {}, passes={0: 3})) == 3 * 333
    assert PipelineEngine(member, {}, 1)._flops("train", plain) is None


# ---- what devices could do ----


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5), ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756, 51.2), ("NVIDIA H100 NVL", 835.5, 60), ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA GH200 480GB", 989.4, 66.9), ("NVIDIA H200 NVL", 835.5, 60), ("NVIDIA B200", 2250, 75),
        ("NVIDIA L40S", 362.05, 91.6), ("NVIDIA L4", 121, 30.3), ("NVIDIA A10", 125, 31.2), ("NVIDIA H20", 148, 44),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6), ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("Tesla V100-SXM2-32GB", None, 15.7), ("Tesla V100-PCIE-16GB", None, 14), ("Tesla T4", None, 8.1),
        ("NVIDIA GeForce RTX 3090 Ti", None, None), ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None), ("NVIDIA A10G", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None), ("NVIDIA A1000", None, None), ("a toaster", None, None),
    ],
)  # fmt: skip
def test_a_device_is_known_by_its_whole_name_and_no_other_is_taken_for_it(
    name: str, bf16: float | None, fp32: float | None
) -> None:
    for products, tflops in (("bf16", bf16), ("fp32", fp32)):
        found = known_peak(name, products)
        assert found == (None if tflops is None else pytest.approx(1e12 * tflops)), products


def test_lower_precision_is_never_slower() -> None:
    for _, peaks in PEAK_TFLOPS:
        assert peaks["fp16"] == peaks.get("bf16", peaks["fp16"]) >= peaks.get("tf32", 0)
        assert peaks.get("tf32", peaks["fp32"]) >= peaks["fp32"]


def test_products_are_those_that_the_settings_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products_of(torch.bfloat16) == "bf16"
    assert products_of(torch.float16) == "fp16"
    for precision, expected in (("highest", "fp32"), ("high", "tf32")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert products_of(None) == expected


def test_a_device_has_the_peak_that_is_stated_else_that_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert Capability.of(Settings(cpu), 3).peak is None
    assert Capability.of(Settings(cpu, peak_tflops=0.25), 3) == Capability("cpu of worker 3", 0.25e12)
    monkeypatch.setattr(peak_flops.torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(peak_flops.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-7"))
    gpu = Settings(torch.device("cuda:1"), autocast=torch.bfloat16)
    assert Capability.of(gpu, 3) == Capability("GPU-7", pytest.approx(989.4e12))
    assert Capability.of(Settings(gpu.device, peak_tflops=5.0), 4) == Capability("GPU-7", 5e12)
    for capability in (Capability("a", 1.5), UNKNOWN):
        assert Capability.from_json(json.loads(json.dumps(capability.as_json()))) == capability
    with pytest.raises(WireError, match="capability"):
        Capability.from_json({"device": "a", "peak": "much"})


def test_devices_are_counted_once_and_only_if_all_are_known() -> None:
    a, b = Capability("a", 2.0), Capability("b", 3.0)
    assert together([a, b, a]) == 5.0
    assert together([a, UNKNOWN]) is None
    assert together([]) is None


# ---- memory ----


def test_the_peak_of_a_process_is_what_it_has_had_and_that_of_a_device_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = peak_memory(torch.device("cpu"))
    assert before.device == 0
    assert before.host > 50 << 20, "torch alone takes more"
    there = torch.ones(16 << 20)
    resident = psutil.Process().memory_info().rss
    assert there.nbytes < resident <= 1.01 * (full := peak_memory(torch.device("cpu")).host)
    del there
    assert peak_memory(torch.device("cpu")).host >= full, "a peak stays"
    most, asked = {"cuda:1": 7}, list[str]()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: most[str(device)])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(str(device)))
    assert peak_memory(torch.device("cuda:1")).device == 7
    assert asked == ["cuda:1"]


def test_a_record_says_the_most_of_one_and_all_together() -> None:
    found = told([PeakMemory(5, 20), PeakMemory(7, 10)])
    assert found == dict(zip(PEAK_BYTES, (7, 12, 20, 30)))
    assert told([PeakMemory(5), PeakMemory(7)]) == {"peak_host_bytes": 7, "peak_host_bytes_sum": 12}
    assert told([]) == {}
    assert PeakMemory(5, 20).up_to(PeakMemory(7, 10)) == PeakMemory(7, 20)
    with pytest.raises(WireError, match="memory"):
        PeakMemory.from_json({"host": 1.5, "device": 0})


# ---- what benchmarks say ----


def test_what_a_benchmark_says_of_its_speed_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("llama")
    flops = step_flops(config, 4, BATCH, SEQUENCE)
    assert flops == 4 * 3 * hand_count(LayeredModel(config))
    peak = {"peak_tflops": 0.5, "peak_of": "a stone"}
    assert reached(0.25e12, 2.0, peak) == {"tflops": 0.125, "mfu": 0.25, **peak}
    lines = [{"tflops": rate, "peak_host_bytes": size, "peak_host_bytes_sum": 2 * size}
             for rate, size in ((9.0, 7), (0.1, 5), (0.2, 6), (0.3, 5))]  # fmt: skip
    found = of_run(lines, peak, 1)
    assert found == {"tflops": 0.2, "mfu": 0.4, **peak, "peak_host_bytes": 7, "peak_host_bytes_sum": 14}
    faster = {**found, "tflops": 0.4, "mfu": 0.8, "peak_host_bytes": 3}
    assert middle([found, faster]) == {**found, "tflops": pytest.approx(0.3), "mfu": pytest.approx(0.6)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert gpu_peak(torch.device("cuda"), 2)["peak_tflops"] == pytest.approx(2 * 66.9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a toaster")
    assert reached(1e12, 1.0, gpu_peak(torch.device("cuda")))["mfu"] is None
