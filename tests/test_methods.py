"""Every method of unlearning against its formula in plain PyTorch, a row and a token at a time, and against the
function of OpenUnlearning where there is one and it lies beside this repository."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jobs.config import TrainConfig
from jobs.unlearn.method import ANCHOR, FORGET, PAIR, POISON, RETAIN, ROLLOUT, TRACE, Method, Reads, State
from jobs.unlearn.methods.dpo import DPO
from jobs.unlearn.methods.grpo import REWARD, advantages
from jobs.unlearn.methods.pdu import PDU
from jobs.unlearn.methods.rmu import RMU, control_vector
from jobs.unlearn.registry import METHODS, make_method, options_of
from jobs.unlearn.settings import MethodSettings, method_of
from pipeline.names import nearest
from pipeline.runtime.batch import IGNORED
from pipeline.settings import ConfigError, bounds_of, check_bounds

ROWS, SEQUENCE, VOCABULARY, HIDDEN = 4, 7, 11, 5
NAMES = sorted({method.name for method in METHODS.values()} - {"replay", "s3t", "first_epoch"})
"""Those that minimise something."""
LOGIT_METHODS = [name for name in NAMES if make_method(name, {}).depth is None]


class Part:
    """The microbatches of one kind of a step: outputs to be differentiated, labels, and what was before."""

    def __init__(self, method: Method, kind: str, seed: int, rows: int = ROWS, full: bool = False) -> None:
        made = torch.Generator().manual_seed(1000 * seed + sum(map(ord, kind)))
        rows *= 2 if kind == PAIR else 1
        dim = VOCABULARY if method.depth is None else HIDDEN
        self.kind = kind
        self.output = (2 * torch.randn(rows, SEQUENCE, dim, generator=made)).requires_grad_()
        self.labels = torch.randint(VOCABULARY, (rows, SEQUENCE), generator=made)
        if not full:
            for labels in self.labels:  # a prompt, an answer and padding, each of its own length
                first = int(torch.randint(SEQUENCE - 1, (), generator=made))
                end = first + 1 + int(torch.randint(SEQUENCE - first, (), generator=made))
                labels[:first], labels[end:] = IGNORED, IGNORED
        shape = {Reads.SCORE: (rows,), Reads.LOGITS: self.output.shape, Reads.HIDDEN: self.output.shape}
        reads = method.reads(kind)
        drawn = None if reads is Reads.NOTHING else 2 * torch.randn(shape[reads], generator=made)
        self.before = drawn.abs() * 9 if drawn is not None and reads is Reads.SCORE else drawn
        if kind == ROLLOUT:  # advantages and rewards
            self.before = torch.randn(rows, 2, generator=made)

    def rows(self, chosen: list[int]) -> Part:
        """Some of its rows, or of its pairs."""
        part, half = object.__new__(Part), len(self.labels) // 2
        index = [*chosen, *(half + each for each in chosen)] if self.kind == PAIR else chosen
        part.kind, part.labels, part.output = self.kind, self.labels[index], self.output[index]
        part.before = None if self.before is None else self.before[index]
        return part

    def sums(self, method: Method) -> tuple[Mapping[str, int], Mapping[str, Tensor]]:
        counts = method.counts(self.kind, self.labels)
        sums = method.loss(self.kind, self.output, self.labels, self.before)
        assert list(counts) == list(sums)
        assert set(sums) <= set(method.terms(method.start()))
        assert all(value.dtype == torch.float32 and value.shape == () for value in sums.values())
        return counts, sums


Step = Mapping[str, Part]


def step_of(method: Method, seed: int = 0, **how: Any) -> Step:
    return {kind: Part(method, kind, seed, **how) for kind in method.kinds}


def minimised(method: Method, step: Step, state: State | None = None) -> Tensor:
    """What the engine makes of the sums of a step."""
    terms, total = method.terms(method.start() if state is None else state), torch.zeros(())
    for part in step.values():
        counts, sums = part.sums(method)
        total = total + sum(terms[term] / max(1, counts[term]) * value for term, value in sums.items())
    return total


# ---- the formulas, a row and a token at a time, in float64 ----


def nlls(outputs: Tensor, labels: Tensor) -> list[list[Tensor]]:
    """-log p of each label, by row."""
    return [
        [z.logsumexp(0) - z[y] for z, y in zip(row, own) if y != IGNORED] for row, own in zip(outputs.double(), labels)
    ]


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def flat(rows: list[list[Tensor]]) -> list[Tensor]:
    return [value for row in rows for value in row]


def ce(part: Part) -> Tensor:
    return mean(flat(nlls(part.output, part.labels)))


def at(part: Part, positions: str) -> list[tuple[int, int]]:
    """Row and place of what counts."""
    every = [(r, t) for r in range(len(part.labels)) for t in range(SEQUENCE)]
    return [(r, t) for r, t in every if positions == "all" or part.labels[r, t] != IGNORED]


def kl(part: Part, positions: str) -> Tensor:
    assert part.before is not None
    found = []
    for r, t in at(part, positions):
        p, q = part.before[r, t].double().softmax(0), part.output[r, t].double().softmax(0)
        found.append((p * (p / q).log()).sum())
    return mean(found)


def faded(beta: float, margins: list[Tensor]) -> Tensor:
    return 2 / beta * mean([(1 + (-beta * margin).exp()).log() for margin in margins])


def was(part: Part) -> Tensor:
    assert part.before is not None
    return part.before.double()


def npo(m: Any, step: Step) -> Tensor:
    part = step[FORGET]
    margins = [sum(row) - score for row, score in zip(nlls(part.output, part.labels), was(part))]
    return m.gamma * faded(m.beta, margins) + m.alpha * ce(step[RETAIN])


def simnpo(m: Any, step: Step) -> Tensor:
    margins = [mean(row) - m.delta for row in nlls(step[FORGET].output, step[FORGET].labels)]
    return m.gamma * faded(m.beta, margins) + m.alpha * ce(step[RETAIN])


def dpo(m: Any, step: Step) -> Tensor:
    part = step[PAIR]
    ratios = [-(sum(row) - score) for row, score in zip(nlls(part.output, part.labels), was(part))]
    margins = [ratios[ROWS + i] - ratios[i] for i in range(ROWS)]
    return m.gamma * faded(m.beta, margins) + m.alpha * ce(step[RETAIN])


def idk(m: Any, step: Step) -> Tensor:
    return m.gamma * mean(flat(nlls(step[PAIR].output, step[PAIR].labels)[ROWS:])) + m.alpha * ce(step[RETAIN])


def grpo(m: Any, step: Step) -> Tensor:
    part = step[ROLLOUT]
    each = [advantage * nll for (advantage, _), row in zip(was(part), nlls(part.output, part.labels)) for nll in row]
    return m.gamma * mean(each) + m.alpha * ce(step[RETAIN])


def spread(m: Any, part: Part, target: Tensor) -> Tensor:
    each = []
    for r in range(len(part.labels)):
        places = [t for row, t in at(part, m.positions) if row == r]
        each.append(mean([((part.output[r, t] - target.expand_as(part.output)[r, t]) ** 2).mean() for t in places]))
    return mean(each)


def rmu(m: Any, step: Step) -> Tensor:
    drawn = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(m.control_seed))
    steered = m.steering * drawn / (drawn**2).sum().sqrt()
    weights = {FORGET: 1.0, TRACE: 1.0, RETAIN: m.alpha, ANCHOR: getattr(m, "anchor_weight", None)}
    found = torch.zeros(())
    for kind, part in step.items():
        target = steered if part.before is None else part.before
        found = found + weights[kind] * spread(m, part, target)
    return found


def undial(m: Any, step: Step) -> Tensor:
    part, found = step[FORGET], []
    for r, t in at(part, m.positions):
        teacher = was(part)[r, t].clone()
        if part.labels[r, t] != IGNORED:
            teacher[part.labels[r, t]] -= m.demotion
        found.append(-(teacher.softmax(0) * part.output[r, t].double().log_softmax(0)).sum())
    return m.gamma * mean(found) + m.alpha * ce(step[RETAIN])


def ceu(m: Any, step: Step) -> Tensor:
    part, found = step[FORGET], []
    for r in range(len(part.labels)):
        for t in [t for row, t in at(part, "answer") if row == r][m.skip_tokens :]:
            z, y = part.output[r, t].double(), int(part.labels[r, t])
            p = z.detach().softmax(0)
            others = [v for v in range(VOCABULARY) if v != y]
            found.append(-sum(p[v] / (1 - p[y]) * (z[v] - z.logsumexp(0)) for v in others))
    return mean(found)


def wga(m: Any, step: Step) -> Tensor:
    weighted = [(-n.detach()).exp() ** m.weight_power * n for n in flat(nlls(step[FORGET].output, step[FORGET].labels))]
    return -m.gamma * mean(weighted) + m.alpha * ce(step[RETAIN])


def satimp(m: Any, step: Step) -> Tensor:
    found = [(n, (-n.detach()).exp()) for n in flat(nlls(step[FORGET].output, step[FORGET].labels))]
    weighted = [p**m.saturation_power * (1 - p) ** m.importance_power * n for n, p in found]
    return -m.gamma * mean(weighted) + m.alpha * ce(step[RETAIN])


def pdu(m: Any, step: Step) -> Tensor:
    part = step[FORGET]
    tops = [(part.output[r, t].max() - part.output[r, t].mean()) ** 2 for r, t in at(part, "answer")]
    return m.gamma * mean(tops) + m.alpha * ce(step[RETAIN])


def roka(m: Any, step: Step) -> Tensor:
    part = step[RETAIN]
    own = []
    for r, t in at(part, "answer"):
        z = part.output[r, t].double()
        own.append(z.logsumexp(0) - z[int(was(part)[r, t].argmax())])
    return -m.gamma * ce(step[FORGET]) + m.alpha * mean(own)


def o3(m: Any, step: Step) -> Tensor:
    """Of labels that are drawn in plain whole numbers."""
    part, mask, own = step[FORGET], (1 << 31) - 1, []
    for r, t in at(part, "answer"):
        drawn = (int(part.labels[r, t]) * 0x9E3779B1 + t * 0x85EBCA77 + m.control_seed % mask * 0xC2B2AE3D) & mask
        for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
            drawn = ((drawn ^ (drawn >> shift)) * factor) & mask
        z = part.output[r, t].double()
        own.append(z.logsumexp(0) - z[(drawn ^ (drawn >> 15)) % VOCABULARY])
    return mean(own)


FORMULAS: dict[str, Callable[[Any, Step], Tensor]] = {
    "grad_ascent": lambda m, step: -ce(step[FORGET]),
    "grad_diff": lambda m, step: -m.gamma * ce(step[FORGET]) + m.alpha * ce(step[RETAIN]),
    "kl_min": lambda m, step: -m.gamma * ce(step[FORGET]) + m.alpha * kl(step[RETAIN], m.positions),
    "oracle_matching": lambda m, step: sum(
        (w * kl(step[k], m.positions) for w, k in ((m.gamma, FORGET), (m.alpha, RETAIN))), torch.zeros(())
    ),
    "npo": npo, "simnpo": simnpo, "dpo": dpo, "idk": idk, "rmu": rmu, "r2mu": rmu, "undial": undial, "ceu": ceu,
    "wga": wga, "satimp": satimp, "pdu": pdu, "roka": roka, "grpo": grpo,
    "concept": lambda m, step: m.gamma * ce(step[POISON]) + m.alpha * ce(step[RETAIN]),
    "mrp": lambda m, step: -m.gamma * ce(step[FORGET]) + m.alpha * ce(step[RETAIN]), "o3": o3,
    "ofmu": lambda m, step: ce(step[RETAIN]) - ce(step[FORGET]),  # what it tells of; for its steps see test_procedure
    "kfade": lambda m, step: -ce(step[FORGET]),
}  # fmt: skip

OTHERS: dict[str, dict[str, object]] = {
    "grad_diff": {"gamma": 0.5, "alpha": 3.0},
    "kl_min": {"positions": "all", "gamma": 0.5, "alpha": 3.0},
    "oracle_matching": {"positions": "all", "gamma": 0.5, "alpha": 3.0},
    "npo": {"beta": 0.5, "gamma": 2.0, "alpha": 0.0},
    "simnpo": {"beta": 1.5, "delta": 2.0, "gamma": 1.0, "alpha": 0.5},
    "dpo": {"beta": 0.3, "gamma": 2.0, "alpha": 3.0},
    "idk": {"gamma": 2.0, "alpha": 3.0},
    "rmu": {"steering": 6.5, "alpha": 12.0, "positions": "all", "control_seed": 5},
    "r2mu": {"steering": 2.0, "alpha": 3.0, "positions": "answer", "anchor_weight": 0.3},
    "undial": {"demotion": 3.0, "positions": "all", "alpha": 2.0, "gamma": 0.5},
    "ceu": {"skip_tokens": 0},
    "wga": {"weight_power": 0.5, "gamma": 2.0, "alpha": 3.0},
    "satimp": {"saturation_power": 0.5, "importance_power": 0.3, "gamma": 2.0, "alpha": 3.0},
    "pdu": {"gamma": 2.0, "alpha": 3.0},
    "roka": {"gamma": 2.0, "alpha": 3.0},
    "concept": {"gamma": 2.0, "alpha": 3.0},
    "grpo": {"gamma": 2.0, "alpha": 3.0},
    "mrp": {"gamma": 0.5, "alpha": 3.0},
    "o3": {"control_seed": 5},
}
MADE = [
    *((name, make_method(name, {})) for name in NAMES),
    *((name, make_method(name, options)) for name, options in OTHERS.items()),
]
EACH = pytest.mark.parametrize(("name", "method"), MADE, ids=[f"{n}-{i}" for i, (n, _) in enumerate(MADE)])


def gradients(value: Tensor, step: Step) -> list[Tensor]:
    found = torch.autograd.grad(value, [part.output for part in step.values()], allow_unused=True)
    return [torch.zeros_like(p.output) if g is None else g for g, p in zip(found, step.values())]


@EACH
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_are_those_of_the_formula(name: str, method: Method, seed: int) -> None:
    step = step_of(method, seed)
    found, wanted = minimised(method, step), FORMULAS[name](method, step)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-5)
    for mine, plain in zip(gradients(found, step), gradients(wanted, step)):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


def test_every_method_has_a_formula_and_says_what_it_is() -> None:
    assert set(FORMULAS) == set(NAMES) == set(METHODS) - {"idk_dpo", "replay", "s3t", "first_epoch"}
    assert METHODS["idk_dpo"] is DPO
    for name in NAMES:
        assert METHODS[name].name == name
        assert set(METHODS[name].kinds) <= {FORGET, RETAIN, PAIR, TRACE, ANCHOR, POISON, ROLLOUT}
        assert METHODS[name].goal in ("untraining", "concept removal", "suppression")


@EACH
def test_a_step_may_be_dealt_to_microbatches_in_any_way(name: str, method: Method) -> None:
    @settings(max_examples=8)
    @given(st.lists(st.integers(0, 2), min_size=ROWS, max_size=ROWS), st.integers(0, 99))
    def dealt(piles: list[int], seed: int) -> None:
        for part in step_of(method, seed).values():
            counts, sums = part.sums(method)
            pieces = [part.rows([i for i, p in enumerate(piles) if p == pile]).sums(method) for pile in set(piles)]
            for term, whole in sums.items():
                assert sum(each[0][term] for each in pieces) == counts[term]
                together = torch.stack([each[1][term] for each in pieces]).sum()
                torch.testing.assert_close(together, whole, rtol=1e-5, atol=1e-5)
                if not whole.requires_grad:
                    assert term == REWARD
                    continue
                want, have = (torch.autograd.grad(x, part.output, retain_graph=True)[0] for x in (whole, together))
                torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)

    dealt()


# ---- rows without labels, what was before, and what is computed in ----


@EACH
@pytest.mark.parametrize("blank", [[1], [0, 1, 2, 3]])
def test_a_row_without_labels_counts_for_nothing(name: str, method: Method, blank: list[int]) -> None:
    for kind in method.kinds:
        part = Part(method, kind, seed=3)
        rest = [i for i in range(ROWS) if i not in blank]
        gone = [*blank, *(ROWS + i for i in blank)] if kind == PAIR else blank
        terms = part.sums(method)[0]
        wanted = part.rows(rest).sums(method) if rest else (
            dict.fromkeys(terms, 0), dict.fromkeys(terms, torch.zeros(()))
        )  # fmt: skip
        part.labels[gone] = IGNORED
        if part.before is not None:
            part.before[gone] = float("nan")  # nobody has computed it
        counts, sums = part.sums(method)
        assert counts == wanted[0]
        torch.testing.assert_close(sums, wanted[1])
        (gradient,) = torch.autograd.grad(sums[kind], part.output)
        assert bool(gradient.isfinite().all())
        assert not gradient[gone].any(), "exactly 0"


@pytest.mark.parametrize(("name", "blank"), [("dpo", 2), ("dpo", ROWS + 2), ("idk", 2), ("idk", ROWS + 2)])
def test_a_pair_of_which_one_row_is_blank_counts_for_nothing(name: str, blank: int) -> None:
    method = make_method(name, {})
    part = Part(method, PAIR, seed=4)
    wanted = part.rows([0, 1, 3]).sums(method)
    part.labels[blank] = IGNORED
    if part.before is not None:
        part.before[[2, ROWS + 2]] = float("nan")
    counts, sums = part.sums(method)
    assert counts == wanted[0]
    torch.testing.assert_close(sums, wanted[1])
    gradient = torch.autograd.grad(sums[PAIR], part.output)[0]
    assert bool(gradient.isfinite().all())
    assert not gradient[[2, ROWS + 2]].any()


@EACH
def test_what_was_before_gets_no_gradient(name: str, method: Method) -> None:
    for part in step_of(method).values():
        if part.before is None:
            assert method.reads(part.kind) is Reads.NOTHING
            continue
        part.before.requires_grad_()
        _, sums = part.sums(method)
        assert torch.autograd.grad(sums[part.kind], part.before, allow_unused=True) == (None,)


@EACH
def test_losses_are_computed_in_float32(name: str, method: Method) -> None:
    for part in step_of(method).values():
        half = part.output.detach().bfloat16()
        found = [method.loss(part.kind, o, part.labels, part.before)[part.kind] for o in (half, half.float())]
        assert found[0].dtype == torch.float32
        assert torch.equal(found[0], found[1])


@EACH
def test_terms_and_counts_are_the_kinds(name: str, method: Method) -> None:
    terms = method.terms(method.start())
    assert list(terms) == [*method.kinds, *([REWARD] if ROLLOUT in method.kinds else [])]
    later = method.advance(method.start(), dict.fromkeys(terms, 1.5), 1000)
    assert list(method.terms(later)) == list(terms)


# ---- single methods ----


def test_the_control_vector_is_one_whoever_asks() -> None:
    u = control_vector(64, 0)
    assert torch.equal(u, control_vector(64, 0))
    assert not torch.equal(u, control_vector(64, 1))
    assert float(u.norm()) == pytest.approx(1)
    assert bool((u >= 0).all())
    state = torch.get_rng_state()
    control_vector(64, 2)
    assert torch.equal(state, torch.get_rng_state()), "nothing else's chance is touched"


def test_rmu_computes_up_to_its_layer_and_reads_there() -> None:
    method = make_method("r2mu", {"layer": 3})
    assert method.depth == 4
    reads = {kind: method.reads(kind) for kind in method.kinds}
    assert reads == {FORGET: Reads.NOTHING, TRACE: Reads.NOTHING, RETAIN: Reads.HIDDEN, ANCHOR: Reads.HIDDEN}
    assert {make_method(name, {}).depth for name in LOGIT_METHODS} == {None}


def test_pdu_pays_more_for_what_it_loses_and_less_once_it_is_within_its_goal() -> None:
    method = PDU(alpha=2.0, gamma=3.0, dual_step=0.5, retain_goal=1.0, dual_warmup=2)
    state = method.start()
    assert method.terms(state) == {FORGET: 3.0, RETAIN: 2.0}
    for step, (loss, price) in enumerate([(9, 2.0), (9, 2.0), (3, 3.0), (0.5, 2.75), (-20, 0.0), (2, 0.5)]):
        state = method.advance(state, {FORGET: 7.0, RETAIN: loss}, step)
        assert method.terms(state) == {FORGET: 3.0, RETAIN: price}


def test_an_advantage_is_within_the_answers_to_a_question() -> None:
    found = advantages([1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0], 4)
    third = 1 / 3**0.5
    assert found == pytest.approx([3 * third, -third, -third, -third, *[0.0] * 8, 1, 1, -1, -1])
    assert advantages([2.0, 2.0, 5.0, 1.0], 2) == [0, 0, 1, -1]


def test_extreme_probabilities_do_no_harm() -> None:
    for name in ("wga", "satimp", "npo", "simnpo", "dpo", "ceu", "undial"):
        for options in ({}, OTHERS[name]):
            method = make_method(name, options)
            step = step_of(method)
            for part in step.values():
                part.output = (part.output.detach() * 1e4).requires_grad_()
            value = minimised(method, step)
            assert bool(value.isfinite()), name
            assert all(bool(g.isfinite().all()) for g in gradients(value, step)), name


# ---- options ----


def test_defaults_are_the_published_ones() -> None:
    published = {
        "npo": {"beta": 0.1, "alpha": 1.0, "gamma": 1.0},
        "simnpo": {"beta": 4.5, "delta": 0.0, "gamma": 0.125, "alpha": 1.0},
        "dpo": {"beta": 0.1, "alpha": 1.0},
        "rmu": {"steering": 2.0, "alpha": 1.0, "layer": 7, "positions": "answer"},
        "r2mu": {"steering": 6.5, "alpha": 1.7, "layer": 7, "anchor_weight": 1.0, "positions": "all"},
        "undial": {"demotion": 10.0, "alpha": 0.0, "gamma": 1.0},
        "ceu": {"skip_tokens": 1},
        "wga": {"weight_power": 1.0, "alpha": 1.0, "gamma": 1.0},
        "satimp": {"saturation_power": 5.0, "importance_power": 1.0, "alpha": 1.0, "gamma": 0.1},
        "concept": {"concept_words": 5, "alpha": 1.0, "gamma": 1.0},
    }
    for name, options in published.items():
        method = make_method(name, {})
        assert {option: getattr(method, option) for option in options} == options


def test_made_methods_are_equal_where_their_options_are() -> None:
    for name in METHODS:
        method = make_method(name, {})
        assert type(method) is METHODS[name]
        assert method == make_method(name, {option: getattr(method, option) for option in options_of(METHODS[name])})
        check_bounds(method)
    assert make_method("idk_dpo", {"beta": 0.2}) == DPO(beta=0.2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "nop",
            {},
            r"method is 'nop'; allowed: one of grad_ascent, .*, oracle_.*, replay, s3t, idk_dpo \(did you mean npo\?\)",
        ),
        ("npo", {"steering": 2.0}, "steering is 2.0; allowed: nothing for method npo, which has gamma, alpha, beta$"),
        (
            "npo",
            {"bet": 2.0},
            r"bet is 2.0; allowed: nothing for .*, which has gamma, alpha, beta \(did you mean beta\?",
        ),
        ("grad_ascent", {"alpha": 1.0}, "alpha is 1.0; allowed: nothing for method grad_ascent, which has no options$"),
        ("npo", {"beta": 0.0}, "beta is 0.0; allowed: 1e-06 to 1000"),
        ("npo", {"beta": float("nan")}, "beta is nan; allowed: 1e-06 to 1000"),
        ("rmu", {"layer": -1}, "layer is -1; allowed: 0 to 1023"),
        ("kl_min", {"positions": "prompt"}, "positions is 'prompt'; allowed: one of answer, all"),
    ],
)
def test_a_bad_option_is_refused_by_name(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(name, options)
    if "bet" not in options:
        given: Any = options
        with pytest.raises(ConfigError, match=message):
            MethodSettings(name, **given).check(TrainConfig())


def test_the_settings_have_every_option_of_every_method_once_unset_and_with_the_same_bounds() -> None:
    options = {option for method in METHODS.values() for option in options_of(method)}
    assert {field.name for field in fields(MethodSettings)} == {"method", *options}
    assert all(field.default is None for field in fields(MethodSettings) if field.name != "method")
    for method in METHODS.values():
        for option in options_of(method):
            assert bounds_of(MethodSettings).get(option) == bounds_of(method).get(option), option
            if option not in ("positions", "layers"):  # any text, which the method checks
                assert get_type_hints(MethodSettings)[option] == get_type_hints(method)[option] | None, option


def test_no_option_has_the_name_of_a_setting_of_training() -> None:
    assert not {field.name for field in fields(MethodSettings)} & {field.name for field in fields(TrainConfig)}


def test_options_mean_the_same_wherever_methods_share_them() -> None:
    """One text an option, but that a default differs."""
    for option in {"gamma", "alpha", "beta", "positions", "layer", "steering", "control_seed"}:
        hints = {
            repr(get_type_hints(m, include_extras=True)[option]) for m in METHODS.values() if option in options_of(m)
        }
        assert len(hints) == 1, option


def test_settings_make_the_method_with_what_is_set() -> None:
    assert method_of(MethodSettings()) == make_method("npo", {})
    assert method_of(MethodSettings(method="rmu", layer=2, alpha=9.0)) == RMU(layer=2, alpha=9.0)
    for name in METHODS:
        MethodSettings(method=name).check(TrainConfig())
    assert nearest("np", METHODS) == "npo"


# ---- other people's code ----

ORACLES = Path(os.environ.get("UNBROKEN_ORACLES", Path(__file__).parents[2] / "shared/oracles")) / "open_unlearning/src"
needs_oracles = pytest.mark.skipif(not ORACLES.is_dir(), reason=f"no oracles at {ORACLES}; see UNBROKEN_ORACLES")


@pytest.fixture(scope="module")
def oracle() -> Iterator[Callable[[str], ModuleType]]:
    """Loads a file of OpenUnlearning by its path below src/trainer."""
    names = ("trainer", "trainer.utils", "trainer.unlearn", "trainer.unlearn.base", "trainer.unlearn.grad_diff")
    stubs = {name: ModuleType(name) for name in (*names, "deepspeed")}
    stubs["trainer.unlearn.base"].UnlearnTrainer = object  # type: ignore[attr-defined]
    stubs["trainer.unlearn.grad_diff"].GradDiff = object  # type: ignore[attr-defined]

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location("oracle_" + Path(path).stem, ORACLES / "trainer" / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
        return module

    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        stubs["trainer.utils"].compute_batch_nll = load("utils.py").compute_batch_nll  # type: ignore[attr-defined]
        yield load


def inputs(part: Part, chosen: slice = slice(None)) -> dict[str, Tensor]:
    """As a model's: there a label stands beside the token that it is, one to the right of here."""
    edge = torch.full((len(part.labels), 1), IGNORED)
    wide = functional.pad(part.output, (0, 0, 0, 1))  # the logits of the last token, which predict nothing
    found = {"labels": torch.cat([edge, part.labels], dim=1)[chosen], "logits": wide[chosen]}
    if part.before is not None and part.before.dim() == 3:
        found["before"] = functional.pad(part.before, (0, 0, 0, 1))[chosen]
    return found


def model(logits: Tensor, **_: Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=logits)


def model_before(before: Tensor, **_: Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=before)


def assert_same(part: Part, found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    mine, theirs = (torch.autograd.grad(value, part.output)[0] for value in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def forget_term(method: Method, part: Part) -> Tensor:
    counts, sums = part.sums(method)
    return sums[part.kind] / counts[part.kind]


@needs_oracles
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_npo_and_dpo_are_the_oracles(oracle: Callable[[str], ModuleType], beta: float, seed: int) -> None:
    for name, kind in (("npo", FORGET), ("dpo", PAIR)):
        method = make_method(name, {"beta": beta})
        part = Part(method, kind, seed)
        reference = torch.randn(part.output.shape, generator=torch.Generator().manual_seed(seed))
        part.before = torch.tensor([float(sum(row)) for row in nlls(reference, part.labels)])
        sides = [inputs(part, s) for s in (slice(None, ROWS), slice(ROWS, None))]
        for side, chosen in zip(sides, (slice(None, ROWS), slice(ROWS, None))):
            side["before"] = functional.pad(reference, (0, 0, 0, 1))[chosen]
        win = sides[1] if kind == PAIR else None
        wanted, _ = oracle("utils.py").compute_dpo_loss(model, model_before, win, sides[0], beta)
        assert_same(part, forget_term(method, part), wanted)


@needs_oracles
def test_kl_at_all_positions_is_the_oracles(oracle: Callable[[str], ModuleType]) -> None:
    method = make_method("kl_min", {"positions": "all"})
    part = Part(method, RETAIN, 0)
    wanted, _ = oracle("utils.py").compute_kl_divergence(
        lambda: SimpleNamespace(logits=part.output), lambda: SimpleNamespace(logits=part.before), {}
    )
    assert_same(part, forget_term(method, part), wanted)


@needs_oracles
def test_undial_where_every_position_has_a_label_is_the_oracles(oracle: Callable[[str], ModuleType]) -> None:
    for positions in ("answer", "all"):
        method = make_method("undial", {"demotion": 3.0, "positions": positions})
        part = Part(method, FORGET, 0, full=True)
        wanted, _ = oracle("utils.py").compute_undial_loss(model, model_before, inputs(part), 3.0)
        assert_same(part, forget_term(method, part), wanted)


@needs_oracles
@pytest.mark.parametrize("seed", [0, 1])
def test_weighted_ascents_are_the_oracles(oracle: Callable[[str], ModuleType], seed: int) -> None:
    for method, name, powers in (
        (make_method("wga", {}), "wga", (1.0,)),
        (make_method("wga", {"weight_power": 0.3}), "wga", (0.3,)),
        (make_method("satimp", {}), "satimp", (5.0, 1.0)),
        (make_method("satimp", {"saturation_power": 0.5, "importance_power": 2.0}), "satimp", (0.5, 2.0)),
    ):
        part = Part(method, FORGET, seed)
        wanted, _ = getattr(oracle("utils.py"), f"compute_{name}_loss")(model, inputs(part), *powers)
        assert_same(part, -forget_term(method, part), wanted)


@needs_oracles
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_ceu_is_the_oracles(oracle: Callable[[str], ModuleType], skip: int) -> None:
    method = make_method("ceu", {"skip_tokens": skip})
    part = Part(method, FORGET, 1)
    wanted, _ = oracle("unlearn/ceu.py").compute_batch_ceu(model, inputs(part), skip)
    assert_same(part, forget_term(method, part), wanted)


@needs_oracles
def test_simnpo_is_the_oracles(oracle: Callable[[str], ModuleType]) -> None:
    method = make_method("simnpo", {"beta": 2.0, "delta": 0.7})
    part = Part(method, FORGET, 2)
    trainer = SimpleNamespace(delta=0.7, beta=2.0, gamma=1.0, alpha=1.0, compute_retain_loss=lambda **_: 0.0)
    nothing = dict.fromkeys(("input_ids", "attention_mask", "labels"))
    batch = {"forget": inputs(part), "retain": nothing}
    wanted = oracle("unlearn/simnpo.py").SimNPO.compute_loss(trainer, model, batch)
    assert_same(part, forget_term(method, part), wanted)


@needs_oracles
def test_rmu_on_answers_of_one_length_is_the_oracles(oracle: Callable[[str], ModuleType]) -> None:
    method = RMU(steering=3.0)
    trainer = oracle("unlearn/rmu.py").RMU
    for kind in method.kinds:
        part = Part(method, kind, 0, full=True)
        part.labels[:, :3] = IGNORED
        target = 3.0 * control_vector(HIDDEN, 0) if part.before is None else part.before
        mask = part.labels != IGNORED
        wanted = trainer.compute_activation_loss(None, part.output, target.expand_as(part.output), mask)
        assert_same(part, forget_term(method, part), wanted)


@needs_oracles
def test_pdu_on_aligned_logits_and_its_price_are_the_oracles(oracle: Callable[[str], ModuleType]) -> None:
    method = PDU(gamma=2.0, alpha=3.0, dual_step=0.5, retain_goal=0.2, dual_warmup=0)
    step = step_of(method)
    module, retained = oracle("unlearn/pdu.py"), step[RETAIN]
    trainer = object.__new__(module.PDU)
    trainer.preferences, trainer.retain_loss_eps, trainer.primal_dual = [2.0, 3.0], 0.2, True
    trainer.dual_step_size, trainer.dual_update_upon, trainer.can_update = 0.5, "step", True
    trainer.loss_names, trainer.log = ["forget", "retain"], lambda _: None
    mean_nll = ce(retained).float()
    trainer.compute_retain_loss = lambda **_: mean_nll
    batch = {
        kind: {"labels": part.labels, "logits": part.output, "input_ids": part.labels, "attention_mask": part.labels}
        for kind, part in step.items()
    }
    outputs = iter([step[FORGET].output])
    wanted = trainer.compute_loss(lambda **_: SimpleNamespace(logits=next(outputs)), batch)
    found = minimised(method, step) - 3.0 * 0.2  # what the goal adds is constant
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients(found, step), gradients(wanted, step)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    later = method.advance(method.start(), {FORGET: 0.0, RETAIN: float(mean_nll.detach())}, 0)
    assert method.terms(later)[RETAIN] == pytest.approx(trainer.preferences[1])
