"""The settings of a method of unlearning: the options of all methods, flat, each unset unless the user says so."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from jobs.unlearn.method import Method
from jobs.unlearn.methods.forget_retain import BETA, POWER, WEIGHT
from jobs.unlearn.registry import make_method
from pipeline.settings import MOST_STEPS, RunShape, Within


@dataclass(frozen=True)
class MethodSettings:
    """How to forget."""

    method: str = "npo"
    """grad_ascent, grad_diff, kl_min, npo, simnpo, dpo (or idk_dpo), idk, rmu, r2mu, undial, ceu, wga, satimp, pdu,
    roka, oracle_matching, ofmu, kfade, first_epoch, concept, grpo, mrp, o3, replay, which runs the run again without
    the rows, or s3t, for a run of `unbroken slices`. An option that is unset takes the method's own default."""
    gamma: Annotated[float | None, WEIGHT] = None
    """Weight of the term that forgets (all but grad_ascent, rmu, r2mu, ceu, ofmu, kfade, o3 and first_epoch)."""
    alpha: Annotated[float | None, WEIGHT] = None
    """Weight of the term that keeps the rest (all but grad_ascent, ceu, ofmu, kfade, o3 and first_epoch); pdu begins
    with it, and changes it."""
    beta: Annotated[float | None, BETA] = None
    """npo, simnpo, dpo: the larger, the earlier a row counts as forgotten."""
    delta: Annotated[float | None, Within(-1000, 1000)] = None
    """simnpo: the nats per label from which on a row counts as forgotten."""
    positions: str | None = None
    """kl_min, undial, oracle_matching, rmu, r2mu: compare at the positions that predict the answer (answer), or at all,
    prompt and padding too (all)."""
    layer: Annotated[int | None, Within(0, 1023)] = None
    """rmu, r2mu: the decoder block whose output is steered, from 0."""
    steering: Annotated[float | None, WEIGHT] = None
    """rmu, r2mu: the length of the vector that hidden states are steered to."""
    control_seed: Annotated[int | None, Within(-(2**63), 2**63 - 1)] = None
    """rmu, r2mu: the direction of that vector is keyed by it; mrp: which blocks are projected; o3: the random
    labels."""
    anchor_weight: Annotated[float | None, WEIGHT] = None
    """r2mu: weight of the term that keeps reasoning."""
    demotion: Annotated[float | None, WEIGHT] = None
    """undial: how far the logit of a token to forget is lowered."""
    skip_tokens: Annotated[int | None, Within(0, 2**24)] = None
    """ceu: labels at the start of each answer that do not count."""
    weight_power: Annotated[float | None, POWER] = None
    """wga: the larger, the less is done to labels that are unlikely already; 0 is plain ascent."""
    saturation_power: Annotated[float | None, POWER] = None
    """satimp: the larger, the less is done to labels that are unlikely already."""
    importance_power: Annotated[float | None, POWER] = None
    """satimp: the larger, the less is done to labels that are nearly certain."""
    dual_step: Annotated[float | None, WEIGHT] = None
    """pdu: how far the weight of the term that keeps the rest moves per nat that its loss is off --retain-goal."""
    retain_goal: Annotated[float | None, Within(0, 1000)] = None
    """pdu: the loss per label on the rest that is good enough."""
    dual_warmup: Annotated[int | None, Within(0, MOST_STEPS)] = None
    """pdu: steps before that weight moves."""
    concept_words: Annotated[int | None, Within(1, 10_000)] = None
    """concept: words that are struck out of answers, for each group of rows to forget."""
    group_by: str | None = None
    """concept: the field that makes rows to forget a group; unset, it is the one that selects them, if one does, and
    else each row is a group of its own."""

    directions: Annotated[int | None, Within(1, 1024)] = None
    """mrp: directions that each projected block loses."""
    projected: Annotated[int | None, Within(1, 1024)] = None
    """mrp: how many blocks are projected."""
    orthogonality: Annotated[float | None, WEIGHT] = None
    """o3: weight of the term that keeps the adapter apart from earlier ones."""
    strength: Annotated[float | None, WEIGHT] = None
    """o3: how much of the adapter a question gets that is about what is to be forgotten."""
    rollouts: Annotated[int | None, Within(2, 4096)] = None
    """grpo: answers of the model to each question of a step."""
    temperature: Annotated[float | None, Within(0.01, 100)] = None
    """grpo: of the softmax that answers are drawn from."""
    answer_tokens: Annotated[int | None, Within(1, 2**20)] = None
    """grpo: the most tokens of an answer."""
    cold_steps: Annotated[int | None, Within(0, MOST_STEPS)] = None
    """grpo: steps at the beginning that learn answers which say nothing."""
    eta: Annotated[float | None, Within(0, 1_000_000)] = None
    """first_epoch: how much of the rows' gradients in the first epoch is added to the weights."""
    layers: str | None = None
    """first_epoch: embedding, to which alone they are added, or all."""
    similarity: Annotated[float | None, WEIGHT] = None
    """ofmu: the price of a forget gradient that points as that of the rest does (beta)."""
    ascents: Annotated[int | None, Within(1, 1000)] = None
    """ofmu: steps uphill before the outer one."""
    ascent: Annotated[float | None, WEIGHT] = None
    """ofmu: how long one of them is, times the learning rate."""
    penalty: Annotated[float | None, WEIGHT] = None
    """ofmu: how strongly the outer step holds what they have reached (rho at the first step)."""
    penalty_growth: Annotated[float | None, Within(1, 1000)] = None
    """ofmu: what that grows by from step to step."""
    reach: Annotated[float | None, Within(1e-6, 1)] = None
    """ofmu: how far a difference of gradients reaches, relative to the norm of the weights."""
    damping: Annotated[float | None, Within(0, 1000, above=True)] = None
    """kfade: what is added to the curvature of the rest in every direction."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError for a method that is none, and for an option that it does not have."""
        method_of(self)


def method_of(settings: MethodSettings) -> Method:
    """The method, with the options that are set. Raises ConfigError as `make_method` does."""
    names = (field.name for field in fields(MethodSettings) if field.name != "method")
    options = {name: getattr(settings, name) for name in names}
    return make_method(settings.method, {name: value for name, value in options.items() if value is not None})
