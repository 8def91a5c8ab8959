"""The bug classes of a transition, planted one by one in a move between three workers, for the certificate to refuse.

The list is that of the trackers of Megatron, DeepSpeed, DCP, Tenplex and transformers. Worker 0 gives its only copy of
layer 1 to worker 1, and all three testify. benchmarks/transition_faults.py makes a table of it, beside what torch's
distributed checkpoint says to the same; tests/test_certificate.py holds the certificate to it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.model.layered import TIED, LayeredModel
from pipeline.model.lora import Lora
from pipeline.model.weights import preset
from pipeline.state.layer_state import LayerState
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore
from recovery.certificate import Witness, certify
from recovery.membership import Move

MOVES = (Move(1, "1:2", "replica", ((0, "1:2"),)),)
HOLDERS: Mapping[str, tuple[int, ...]] = {"0": (0,), "1": (1,), "2": (1, 2), "3": (2,), "4": (2,), TIED: (0, 2)}
KEYS: Mapping[str, int] = {"seed": 0, "next_sample": 64, "microbatches": 8, "size": 4}
"""What workers count and draw by, as launch/worker_main.py says it."""
FUSED = "attn.c_attn.weight"
RATE_SCALE = 1.1
"""Of the layer that moves, as CheckFree raises it."""


def config() -> PreTrainedConfig:
    """A GPT-2 of three blocks, with a weight that both ends share."""
    made = preset("gpt2-tiny", vocab_size=64)
    made.n_layer = 3
    return made


def store(*spans: tuple[int, int], steps: int = 2, lora: Lora | None = None) -> ResidentStore:
    """Some steps on made-up gradients: the same states on every worker."""
    model = LayeredModel(config(), lora=lora)
    found = ResidentStore(model, spans, OptimizerConfig(lr=1e-2), seed=0, device=torch.device("cpu"))
    for step in range(steps):
        for state in found.states.values():
            made = torch.Generator().manual_seed(zlib.crc32(f"{state.name}/{step}".encode()))
            state.gradient.copy_(torch.randn(state.size, generator=made))
            state.apply(1.0, 1e-2)
    for state in found.states.values():
        if state.name == "1":
            state.lr_scale.fill_(RATE_SCALE)
    return found


@dataclass
class Moved:
    """Workers in the middle of a transition, the hashes of what each held when it began, and what each counts by."""

    workers: dict[int, ResidentStore]
    before: dict[int, dict[str, int]]
    keys: dict[int, dict[str, Any]]

    @property
    def source(self) -> LayerState:
        """The state that moves, on who gives it."""
        return (self.workers[0].aside | self.workers[0].states)["1"]

    @property
    def taken(self) -> LayerState:
        """The same on who takes it."""
        return self.workers[1].states["1"]

    def certificate(self) -> dict[str, Any]:
        """What all testimonies come to, each sent as text."""
        told = {
            w: Witness.of(w, s.states, s.aside | s.states, self.before[w], MOVES, self.keys[w])
            for w, s in self.workers.items()
        }
        names = [state.name for state in self.workers[0].model.states]
        votes = {w: json.loads(json.dumps(asdict(witness))) for w, witness in told.items()}
        return certify({name: HOLDERS[name] for name in names}, MOVES, votes)


@dataclass(frozen=True)
class Bug:
    """One form of a bug class. It is there `before` the view begins, comes `while` the state is on its way, or `after`
    that; `again` where making the same move once more may mend it."""

    kind: str
    form: str
    plant: Callable[[Moved], object]
    again: bool = True
    when: Literal["before", "while", "after"] = "after"
    lora: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.form}"


def transition(bug: Bug | None = None) -> Moved:
    """The move, with a bug or clean."""

    def now(when: str) -> None:
        if bug is not None and bug.when == when:
            bug.plant(moved)

    lora = Lora(2, 4.0, "c_attn") if bug is not None and bug.lora else None
    spans: dict[int, tuple[int, int]] = {0: (0, 2), 1: (2, 3), 2: (2, 5)}
    workers = {w: store(span, lora=lora) for w, span in spans.items()}
    moved = Moved(workers, {}, {w: dict(KEYS) for w in workers})
    now("before")
    moved.before = {w: {name: s.fingerprint() for name, s in each.states.items()} for w, each in workers.items()}
    workers[0].hold([(0, 1)])
    workers[1].hold([(1, 3)])
    now("while")
    moved.taken.load(moved.source.tensors())
    moved.taken.version = moved.source.version
    now("after")
    return moved


def tensor_of(state: LayerState, key: str) -> Tensor:
    """The first of its tensors whose key begins or ends so."""
    return next(t for k, t in sorted(state.tensors().items()) if k.startswith(key) or k.endswith(key))


def swap(tensor: Tensor) -> Tensor:
    """Two fused parts [in, 3 x out] that have changed places: norm and number of elements stay."""
    first, second, rest = tensor.chunk(3, -1)
    return torch.cat([second, first, rest], -1)


def twice(tensor: Tensor) -> Tensor:
    """Its first half in the place of its second as well."""
    half = tensor.shape[0] // 2
    return torch.cat([tensor[:half], tensor[:half], tensor[2 * half :]])


def flip(tensor: Tensor) -> None:
    """The lowest bit of its first byte."""
    tensor.view(-1).view(torch.uint8)[0] ^= 1


def _set(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Moved], object]:
    def plant(moved: Moved) -> None:
        tensor = tensor_of(moved.taken, key)
        tensor.copy_(change(tensor.clone()))

    return plant


def _count(worker: int | None = 2, **keys: int) -> Callable[[Moved], object]:
    """A worker, or all of them, counts by other keys."""
    return lambda moved: [each.update(keys) for w, each in moved.keys.items() if worker in (None, w)]


def _no_moments(moved: Moved) -> None:
    moved.taken._optimizers[0].state[next(iter(moved.taken.parameters.values()))].clear()


def _moments_of_another(moved: Moved) -> None:
    moments = moved.taken.moments
    names = list(moved.taken.parameters)
    a, b = next(
        (a, b) for a in names for b in names if a != b and moments(a)["exp_avg"].shape == moments(b)["exp_avg"].shape
    )
    for kind in ("exp_avg", "exp_avg_sq"):
        moments(a)[kind].copy_(moments(b)[kind])


def _stale(moved: Moved) -> None:
    tensor_of(moved.taken, FUSED).copy_(tensor_of(store((1, 2), steps=1).states["1"], FUSED))


def _all_stale(moved: Moved) -> None:
    old = store((1, 2), steps=1).states["1"]
    moved.taken.load(old.tensors())
    moved.taken.version = old.version


def _live_step(moved: Moved) -> None:
    """The training goes on in the memory of what is still said to be of the step before."""
    moved.source.apply(1.0, 1e-2)
    moved.source.version -= 1


def _nobody_holds(moved: Moved) -> None:
    moved.workers[1].hold([(2, 3)])
    moved.workers[1].let_go()


BUGS: tuple[Bug, ...] = (
    Bug("fused halves permuted", "two parts of the fused weight", _set(FUSED, swap)),
    Bug("a tensor dropped", "the tied alias", lambda m: m.workers[2].states.pop(TIED), again=False),
    Bug("a tensor dropped", "a frozen parameter", lambda m: m.taken.frozen.popitem(), lora=True),
    Bug("a tensor dropped", "the share of one worker", _nobody_holds, again=False),
    Bug("a tensor dropped", "by who takes it", lambda m: m.taken.parameters.popitem()),
    Bug("moments of another or empty", "those of another tensor", _moments_of_another),
    Bug("moments of another or empty", "zeros", _set("exp_avg_sq/", torch.zeros_like)),
    Bug("moments of another or empty", "none", _no_moments),
    Bug("step counter or rate scale lost", "the step counter", _set("step/", torch.zeros_like)),
    Bug("step counter or rate scale lost", "the rate's scale", lambda m: m.taken.lr_scale.fill_(1.0)),
    Bug(
        "master and working copy differ", "one of the two",
        lambda m: flip(tensor_of(m.workers[0].states[TIED], "param/")), again=False,
    ),
    Bug(
        "a replica differs or is NaN", "differs", lambda m: flip(tensor_of(m.workers[2].states["2"], "exp_avg/")),
        again=False,
    ),
    Bug("a replica differs or is NaN", "NaN", _set(FUSED, lambda t: t.fill_(torch.nan))),
    Bug("a shard or an owner twice", "a shard for two", _set(FUSED, twice)),
    Bug("a shard or an owner twice", "two owners", lambda m: m.workers[0].hold([(0, 2)]), again=False),
    Bug("stale tensor of an earlier step", "one tensor", _stale),
    Bug("stale tensor of an earlier step", "all that moves", _all_stale),
    Bug("RNG key or cursor of another", "the RNG key", _count(seed=1), again=False),
    Bug("RNG key or cursor of another", "the data cursor", _count(next_sample=72), again=False),
    Bug("snapshot aliases live memory", "a step writes into it", _live_step, again=False, when="while"),
    Bug("batch of the old world", "microbatches, one worker", _count(microbatches=4), again=False),
    Bug("batch of the old world", "samples, one worker", _count(size=8), again=False),
    Bug("a byte flipped in flight", "of the weights", lambda m: flip(tensor_of(m.taken, FUSED))),
)  # fmt: skip

BEYOND: tuple[Bug, ...] = (
    Bug("batch of the old world", "the same on all workers", _count(None, microbatches=4)),
    Bug("wrong before the view began", "an only copy", lambda m: flip(tensor_of(m.source, FUSED)), when="before"),
)  # fmt: skip
"""What the certificate cannot see: it compares workers with each other and with what they were, not with the truth."""
