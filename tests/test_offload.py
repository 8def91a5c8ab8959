"""A model that comes layer by layer from host memory: the same numbers as the whole one, within the bytes that were
said, and an error in time where a copy fails, never ends, or would come too early."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from jobs.text import token_loss
from launch.cli import main
from launch.inference import InferenceSettings, Source, ready
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import ModelError, finish_export, write_shard
from pipeline.runtime.copy_engine import CopyEngine, Ticket
from pipeline.runtime.footprint import Live
from pipeline.runtime.forward_bytes import generation_bytes, scoring_bytes
from pipeline.runtime.offload import Offload, OffloadError, Placement, place, skeleton
from pipeline.settings import ConfigError
from pipeline.state.host_store import HostMemoryError
from pipeline.state.host_weights import HostWeights, WeightLayout
from tests.test_cli import exported
from tests.test_guard import guard_of
from tests.test_model import CASES, config_of

CPU = torch.device("cpu")
LAYERS = 5  # of the models of CASES: embedding, three blocks, head
PAIRS = ((0, 2), (1, 1), (2, 2), (5, 1))
IDS = torch.tensor([[3, 17, 5, 60, 9, 3, 41, 8, 22, 11]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `made` puts what is asked for."""
    return tmp_path_factory.mktemp("models")


def made(models: Path, case: str, dtype: torch.dtype = torch.float32) -> tuple[Path, PreTrainedModel]:
    """A model directory, and the whole model as transformers loads it."""
    folder = models / f"{case}-{dtype}"
    if not folder.exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(case))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)  # else the likeliest token is the same throughout
        model.to(dtype).save_pretrained(folder)
    return folder, AutoModelForCausalLM.from_pretrained(folder).eval()


@contextmanager
def offloaded(
    folder: Path, resident: int, in_flight: int, dtype: torch.dtype = torch.float32, working: int = 0,
    device: torch.device = CPU, **more: Any,
) -> Iterator[Offload]:  # fmt: skip
    config = AutoConfig.from_pretrained(folder)
    layout = WeightLayout(LayeredModel(config), dtype)
    host, placement = HostWeights.read(layout, folder), place(layout, resident, in_flight, working)
    with Offload(skeleton(config, dtype, device), host, placement, device, **more) as found:
        yield found


def answers(model: PreTrainedModel, ids: Tensor = IDS, tokens: int = 6) -> list[Tensor]:
    """Logits, a greedy and a sampled continuation, and a search by two beams, which reorders the cache."""
    ids = ids.to(model.device)

    def go_on(**how: Any) -> Tensor:
        torch.manual_seed(5)
        return model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=0, **how
        )  # fmt: skip

    with torch.no_grad():
        logits = model(ids).logits
    return [logits, go_on(do_sample=False), go_on(do_sample=True, top_k=40), go_on(do_sample=False, num_beams=2)]


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# ---- the same numbers ----


@pytest.mark.parametrize("case", CASES)
def test_every_family_gives_the_same_bits(models: Path, case: str) -> None:
    folder, whole = made(models, case)
    with offloaded(folder, 0, 1) as offload:
        assert equal(answers(offload.model), answers(whole))
        buffers, wanted = dict(offload.model.named_buffers()), dict(whole.named_buffers())
        assert buffers.keys() == wanted.keys()
        assert all(torch.equal(buffers[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(("resident", "in_flight"), PAIRS)
def test_every_pair_of_knobs_gives_the_same_bits(models: Path, case: str, resident: int, in_flight: int) -> None:
    folder, whole = made(models, case)
    with offloaded(folder, resident, in_flight) as offload:
        found = offload.placement
        assert (found.resident, found.in_flight) == ((5, 0) if resident + in_flight >= 5 else (resident, in_flight))
        assert equal(answers(offload.model), answers(whole))


def test_bfloat16(models: Path) -> None:
    folder, whole = made(models, "gemma2", torch.bfloat16)
    with offloaded(folder, 1, 2, torch.bfloat16) as offload:
        assert offload.model.dtype == torch.bfloat16
        assert equal(answers(offload.model), answers(whole))


def test_a_forward_that_is_broken_off_does_not_spoil_the_next(models: Path) -> None:
    """Whichever layer comes next, it gets its own weights."""
    folder, whole = made(models, "llama")
    with offloaded(folder, 1, 2) as offload:
        spoilt = offload.model.get_submodule("model.layers.1").register_forward_pre_hook(lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                offload.model(IDS)
        spoilt.remove()
        assert equal(answers(offload.model), answers(whole))


@pytest.mark.parametrize("method", ["mrp", "o3"])
def test_a_guarded_model(tmp_path: Path, method: str) -> None:
    """The router of o3 reads a prompt in a forward of its own."""
    base = exported(tmp_path / "base", "llama-tiny")
    ids, alone = IDS + 100, AutoModelForCausalLM.from_pretrained(base).eval()
    guard_of("llama-tiny", method).write(base, tmp_path / "model")
    source = Source.open(tmp_path / "model")
    found = []
    for settings in (InferenceSettings(device="cpu"), InferenceSettings(device="cpu", offload=True, layers_resident=1)):
        with ready(source, settings, ids.shape[1]) as each:
            found.append(answers(each.model, ids, 3))
    assert equal(*found)
    assert not torch.equal(found[0][0], answers(alone, ids, 3)[0])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("resident", "in_flight"), [(0, 1), (1, 2)])
def test_on_a_cuda_device(models: Path, resident: int, in_flight: int) -> None:
    folder, whole = made(models, "llama")
    device = torch.device("cuda:0")
    wanted = answers(whole.to(device))
    with offloaded(folder, resident, in_flight, device=device) as offload:
        offload.host.pin()
        try:
            assert equal(answers(offload.model), wanted)
        finally:
            offload.host.unpin()


# ---- within the bytes that were said ----


def on_device(model: PreTrainedModel) -> dict[int, int]:
    """Address -> bytes of the storages in which parameters have more than one element's memory."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return {at: size for at, size in storages.items() if size > 4}


@pytest.mark.parametrize("case", ["llama", "llama tied", "gpt2", "gemma3"])
@pytest.mark.parametrize(("resident", "in_flight"), [(0, 1), (0, 2), (2, 1), (1, 3)])
def test_no_more_layers_are_on_the_device_than_allowed(models: Path, case: str, resident: int, in_flight: int) -> None:
    """Counted at every call of every module: whose parameters have memory, and in how many pieces it ever was."""
    folder, _ = made(models, case)
    seen: dict[int, int] = {}
    with offloaded(folder, resident, in_flight) as offload:
        layers, at_once = offload.layers, 0

        def look(*_: Any) -> None:
            nonlocal at_once
            here = on_device(offload.model)
            seen.update(here)
            with_memory = {
                layer for layer in range(LAYERS) for path in layers.paths(layer).values()
                for p in offload.model.get_submodule(path).parameters() if p.untyped_storage().nbytes() > 4
            }  # fmt: skip
            at_once = max(at_once, len(with_memory))

        for module in offload.model.modules():
            module.register_forward_hook(look)
        with torch.no_grad():
            offload.model(IDS)
            offload.model(IDS[:, :3])
        given = sum(flat.numel() for flat in (*offload._stay, *offload._buffers))
        assert {flat.data_ptr() for flat in (*offload._stay, *offload._buffers)} == seen.keys(), "weights lie elsewhere"
    assert at_once == resident + 1
    assert len(seen) == resident + in_flight
    assert sum(seen.values()) == given == offload.placement.weight_bytes


@pytest.mark.parametrize("case", ["llama", "gpt2", pytest.param("gemma2", marks=pytest.mark.long), "mistral window"])
def test_the_limit_holds_for_all_that_is_made(models: Path, case: str) -> None:
    """Every storage that an operator makes is counted: buffers, activations, caches, masks, what sampling takes."""
    folder, _ = made(models, case)
    config = AutoConfig.from_pretrained(folder)
    layout = WeightLayout(LayeredModel(config), torch.float32)
    host = HostWeights.read(layout, folder)

    def peak(working: int, work: Any) -> tuple[int, int]:
        model, placement = skeleton(config, torch.float32, CPU), place(layout, 1, 2, working)
        with torch.no_grad(), Live() as live, Offload(model, host, placement, CPU):
            assert live.now == placement.weight_bytes
            work(model)
            return live.peak, placement.num_bytes

    for prompt, tokens in ((10, 14), (1, 16), (40, 42)):
        ids = torch.arange(prompt)[None] % 61
        sampled = {"max_new_tokens": tokens - prompt, "do_sample": True, "top_k": 40, "pad_token_id": 0}
        working = generation_bytes(config, torch.float32, CPU, prompt, tokens)
        most, limit = peak(working, lambda model, ids=ids, how=sampled: model.generate(ids, **how))
        assert most <= limit < 1.5 * most
    ids = torch.arange(50)[None]
    working = scoring_bytes(config, torch.float32, CPU, 50, token_loss)
    most, limit = peak(working, lambda model: token_loss(model(ids).logits, ids))
    assert most <= limit < 1.5 * most


def test_as_many_layers_stay_as_there_is_room_for(models: Path) -> None:
    folder, _ = made(models, "llama")
    layout = WeightLayout(LayeredModel(AutoConfig.from_pretrained(folder)), torch.float32)
    sizes = [layout.layer_bytes(layer) for layer in range(LAYERS)]
    whole = sum(sizes)
    assert whole == layout.num_bytes
    assert place(layout, None, 2, 100, whole + 100) == Placement(5, 0, whole, 0, 100)
    for stay in range(3):
        needed = sum(sizes[:stay]) + 2 * max(sizes[stay:]) + 100
        assert place(layout, None, 2, 100, needed).resident == stay
    assert place(layout, None, 2, 100).resident == 0, "it is not known how much room there is"
    for resident in (None, 0):
        with pytest.raises(OffloadError, match=rf"0 layers resident and 2 in flight need {needed_by(sizes)} bytes on"):
            place(layout, resident, 2, 100, needed_by(sizes) - 1)


def needed_by(sizes: list[int]) -> int:
    return 2 * max(sizes) + 100


@pytest.mark.parametrize(
    ("resident", "in_flight", "message"),
    [
        (6, 2, "layers_resident is 6; allowed: 0 to 5"),
        (-1, 2, "layers_resident is -1; allowed: 0 to 5"),
        (0, 0, "layers_in_flight is 0; allowed: 1 to 5"),
        (0, 6, "layers_in_flight is 6; allowed: 1 to 5"),
    ],
)
def test_knobs_that_the_model_does_not_have(models: Path, resident: int, in_flight: int, message: str) -> None:
    layout = WeightLayout(LayeredModel(config_of("llama")), torch.float32)
    with pytest.raises(ConfigError, match=message):
        place(layout, resident, in_flight, 0)


# ---- copies ----


class Immediate:
    """Copies at the first moment that is allowed: what is queued too early destroys what is computed with."""

    def __init__(self, story: list[Any] | None = None) -> None:
        self.story = [] if story is None else story

    def move(self, pairs: list[tuple[Tensor, Tensor]], urgency: int, after: Any = None) -> Ticket:
        self.story.append(("fill", pairs[0][0].untyped_storage().data_ptr(), after))
        ticket = Ticket()
        self.copy(pairs)
        ticket.finish()
        return ticket

    def mark(self) -> tuple[str, int]:
        """An event that follows all that was done so far."""
        self.story.append(event := ("event", len(self.story)))
        return event

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for target, source in pairs:
            target.copy_(source)

    def close(self, timeout_s: float = 0.0) -> None:
        pass


class Lazy(Immediate):
    """Copies at the last moment: until then, what is to come is not a number."""

    def move(self, pairs: list[tuple[Tensor, Tensor]], urgency: int, after: Any = None) -> Ticket:
        for target, _ in pairs:
            target.fill_(255)  # all bits set: not a number
        ticket = Ticket()
        waited = ticket.wait

        def wait(timeout_s: float) -> None:
            self.copy(pairs)
            ticket.finish()
            waited(timeout_s)

        ticket.wait = wait  # type: ignore[method-assign]
        return ticket


@pytest.mark.parametrize("kind", [Immediate, Lazy])
@pytest.mark.parametrize(("resident", "in_flight"), [(0, 1), (0, 3), (2, 2)])
def test_no_buffer_is_filled_while_its_layer_computes(
    models: Path, kind: type[Immediate], resident: int, in_flight: int
) -> None:
    folder, whole = made(models, "llama")
    with offloaded(folder, resident, in_flight, copies=kind()) as offload:
        assert equal(answers(offload.model), answers(whole))


def test_a_buffer_is_filled_again_after_the_event_that_its_compute_leaves(
    models: Path,
) -> None:
    """What a CUDA stream does with the event cannot be seen here; which one a copy waits for can."""
    folder, _ = made(models, "llama")
    story: list[Any] = []
    with offloaded(folder, 1, 2, copies=Immediate(story)) as offload:
        for path in (path for layer in range(1, LAYERS) for path in offload.layers.paths(layer).values()):
            offload.model.get_submodule(path).register_forward_hook(
                lambda module, *_: story.append(("end", next(module.parameters()).untyped_storage().data_ptr()))
            )
        for _ in range(3):
            offload.model(IDS)
    ends: dict[int, int] = {}
    refilled = 0
    for at, (kind, about, *after) in enumerate(story):
        if kind == "end":
            ends[about] = at
        elif kind == "fill" and about in ends:
            assert after[0][1] > ends[about], "the copy waits for something that was before the buffer's last use"
            refilled += 1
    assert refilled == 3 * (LAYERS - 1) - 1  # all but the last one's


def broken(monkeypatch: pytest.MonkeyPatch, good: int, what: Any) -> None:
    """All copies but the first ones do something else."""
    copy, count = CopyEngine._copy, iter(range(10**6))
    monkeypatch.setattr(
        CopyEngine, "_copy", lambda self, *about: copy(self, *about) if next(count) < good else what()
    )  # fmt: skip


def _lost() -> None:
    raise RuntimeError("the device is lost")


@pytest.mark.parametrize(("good", "layer"), [(0, 0), (3, 3), (7, 2)])
def test_a_copy_that_fails_is_an_error_by_name(
    models: Path, monkeypatch: pytest.MonkeyPatch, good: int, layer: int
) -> None:
    folder, _ = made(models, "llama")
    broken(monkeypatch, good, _lost)
    with offloaded(folder, 0, 2) as offload:
        for _ in range(2):  # and from then on
            with pytest.raises(OffloadError, match=rf"bytes of layer {layer}'s weights cannot be copied to cpu: the d"):
                answers(offload.model)


@pytest.mark.parametrize("resident", [0, 2])
def test_a_copy_that_never_ends_is_an_error_at_the_deadline(
    models: Path, monkeypatch: pytest.MonkeyPatch, resident: int
) -> None:
    folder, _ = made(models, "llama")
    end = threading.Event()
    broken(monkeypatch, 1, lambda: end.wait(60))
    engine = CopyEngine(CPU, "never")
    try:
        with pytest.raises(OffloadError, match=r"bytes of layer 1's weights have not come to cpu within 0\.2 s"):
            with offloaded(folder, resident, 2, deadline_s=0.2, copies=engine) as offload:
                answers(offload.model)
    finally:
        end.set()
        engine._thread.join(10)
    assert not engine._thread.is_alive()


# ---- host memory ----


def test_weights_that_do_not_fit_in_host_memory_are_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = made(models, "llama")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 1000}))
    with pytest.raises(HostMemoryError, match=r"are needed, .* are available in .*; bfloat16 needs half of float32"):
        with offloaded(folder, 0, 1):
            pass
    monkeypatch.undo()
    with offloaded(folder, 0, 1) as offload:
        assert not offload.host.path.exists(), "it goes with the process, however that ends"


def test_one_weight_of_two_values_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config_of("llama tied"))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for change in (0.0, 1.0):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
        finish_export(tmp_path, model.config, write_shard(tmp_path, 1, 1, tensors))
        layout = WeightLayout(LayeredModel(model.config), torch.float32)
        if not change:
            assert torch.equal(HostWeights.read(layout, tmp_path)["model.norm.weight"], tensors["model.norm.weight"])
            continue
        with pytest.raises(ModelError, match=r"model.embed_tokens.weight and lm_head.weight differ"):
            HostWeights.read(layout, tmp_path)


# ---- the commands ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("tiny") / "model", "gpt2-tiny")


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("command", [("generate", "--tokens", 12), ("eval", "--samples", 3)])
def test_the_report_is_that_of_the_whole_model_and_what_was_loaded(
    capsys: pytest.CaptureFixture[str], tiny: Path, command: tuple[object, ...]
) -> None:
    run = partial(told, capsys, *command, "--model", tiny, "--device", "cpu")
    code, out, _ = run("--json")
    whole = json.loads(out)
    assert code == 0
    assert whole.pop("tokens_per_s") > 0
    for resident, in_flight in ((0, 1), (3, 2), (6, 1)):
        knobs = ("--offload", "--layers-resident", resident, "--layers-in-flight", in_flight)
        code, out, err = run("--json", *knobs)
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert found.pop("tokens_per_s") > 0
        about = found.pop("offload")
        assert found == whole
        assert (about["layers"], about["layers_resident"]) == (6, resident)
        assert about["layers_in_flight"] == (in_flight if resident < 6 else 0)
        assert about["peak_weight_bytes"] + about["working_bytes"] == about["limit_bytes"]
        if resident == 6:
            assert about["loaded_bytes"] == about["host_bytes"] == about["peak_weight_bytes"]
        else:
            assert about["loaded_bytes"] > about["host_bytes"]
    code, out, err = run("--offload")
    assert code == 0
    assert err.startswith("offload: 0 of 6 layers stay on cpu, 2 in flight; at most ")
    assert out == run()[1]


def test_another_dtype(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        for more in ((), ("--offload",)):
            code, out, _ = told(capsys, "eval", "--model", tiny, "--samples", 2, "--dtype", dtype, "--json", *more)
            assert code == 0
            losses[dtype, bool(more)] = (found := json.loads(out))["loss"]
            assert found["dtype"] == dtype
    assert losses["float32", True] == losses["float32", False] != losses["bfloat16", False]
    assert losses["bfloat16", True] == losses["bfloat16", False]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers-resident", "2"], "layers_resident is 2; allowed: None without offload"),
        (["--layers-in-flight", "3"], "layers_in_flight is 3; allowed: 2 without offload"),
        (["--offload", "--layers-resident", "7"], "layers_resident is 7; allowed: 0 to 6, the model's"),
        (["--offload", "--layers-resident", "-1"], "layers_resident is -1; allowed: 0 to 4098"),
        (["--offload", "--layers-in-flight", "0"], "layers_in_flight is 0; allowed: 1 to 4098"),
        (["--offload", "--layers-in-flight", "7"], "layers_in_flight is 7; allowed: 1 to 6, the model's layers"),
        (["--dtype", "float16"], "dtype is 'float16'; allowed: "),
        (["--device", "gpu"], "device is 'gpu'; allowed: "),
    ],
)
@pytest.mark.parametrize("command", ["generate", "eval"])
def test_bad_knobs_are_refused(
    capsys: pytest.CaptureFixture[str], tiny: Path, command: str, flags: list[str], message: str
) -> None:
    code, out, err = told(capsys, command, "--model", tiny, *flags)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    code, _, err = told(capsys, "generate", "--model", tiny, "--device", "cuda")
    assert (code, "device is 'cuda', but no CUDA device is present; allowed here: cpu, auto" in err) == (2, True)


def test_a_copy_that_fails_ends_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    broken(monkeypatch, 4, _lost)
    code, out, err = told(capsys, "generate", "--model", tiny, "--offload", "--json")
    assert (code, out) == (1, "")
    assert "layer 4's weights cannot be copied to cpu: the device is lost" in err


def test_a_directory_with_adapters_beside_its_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    exported(tmp_path / "model", "llama-tiny")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    code, _, err = told(capsys, "eval", "--model", tmp_path / "model", "--offload")
    assert code == 2
    assert "allowed with offload: adapters merged into the weights" in err


def test_a_model_that_does_not_fit_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    code, _, err = told(capsys, "generate", "--model", tiny)
    assert (code, "does not fit on cpu: out of memory; allowed: --offload" in err) == (1, True)
