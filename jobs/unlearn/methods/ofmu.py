"""OFMU (Asif and Amiri, arXiv 2509.22483): forgetting is an inner maximisation whose steps keep the gradients of both
sides apart; the outer step mends the rest, and holds what the inner one has reached.

With L_F and L_R the cross entropies per label of what is to be forgotten and of the rest,

    Phi(theta) = L_F - beta cos(grad L_F, grad L_R)                         to be climbed
    inner:  theta <- theta + ascent eta grad Phi, so many times
    outer:  theta <- theta - eta (grad L_R + 2 rho_k H_Phi grad Phi)        rho_k = penalty penalty_growth^k at step k

The outer direction is that of L_R + rho_k |grad Phi|^2, which is least where Phi is stationary. Our reading, of an
abstract and notes: the outer step is taken from where the inner ones end; both are part of one committed step, and
scale with the learning rate eta.

    grad cos = H_F u_F + H_R u_R,  u_F = (g_R / |g_R| - cos g_F / |g_F|) / |g_F|, and u_R with the sides changed

Products of a Hessian with a vector v are central differences of gradients, our choice: (g(theta + h v) - g(theta - h
v)) / 2 h with h = reach (1 + |theta|) / |v|. A gradient of Phi takes three forward and backward passes over the step's
microbatches where a step of others takes one, a step 3 ascents + 9 of them, with up to ten vectors of the size of the
weights beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from jobs.unlearn.method import FORGET, RETAIN, Method, State, cross_entropy, tokens
from jobs.unlearn.methods.forget_retain import WEIGHT
from pipeline.runtime.procedure import Oracle, Vector
from pipeline.settings import Within

_TINY = 1e-30


@dataclass(frozen=True)
class OFMU(Method):
    """Steps along grad L_R + 2 rho_k H_Phi grad Phi, from where the ascents of Phi end. What it tells of as its loss is
    L_R - L_F, before the step."""

    name = "ofmu"
    goal = "untraining"
    kinds = (FORGET, RETAIN)
    is_procedure = True
    optimizer = "sgd"
    by_differences = True
    rate = 0.1

    similarity: Annotated[float, WEIGHT] = 0.1
    """beta: the price of a forget gradient that points as that of the rest does."""
    ascents: Annotated[int, Within(1, 1000)] = 5
    """Inner steps."""
    ascent: Annotated[float, WEIGHT] = 1.0
    """How long an inner step is: times the learning rate."""
    penalty: Annotated[float, WEIGHT] = 0.01
    """rho at the first step."""
    penalty_growth: Annotated[float, Within(1, 1000)] = 1.1
    """What rho grows by from step to step."""
    reach: Annotated[float, Within(1e-6, 1)] = 1e-4
    """How far a difference of gradients reaches, relative to the norm of the weights."""

    def terms(self, state: State) -> Mapping[str, float]:
        """See Method."""
        return {FORGET: -1.0, RETAIN: 1.0}

    def counts(self, kind: str, labels: Tensor) -> Mapping[str, int]:
        """See Method."""
        return {kind: tokens(labels)}

    def loss(self, kind: str, output: Tensor, labels: Tensor, before: Tensor | None) -> Mapping[str, Tensor]:
        """See Method."""
        return {kind: cross_entropy(output, labels)}

    def direction(self, oracle: Oracle) -> Vector:
        """See Method."""
        weights = oracle.weights()
        (square,) = oracle.dots((weights, weights))
        phi = _Phi(oracle, self.similarity, self.reach * (1 + math.sqrt(square)))
        at: Vector | None = None
        for _ in range(self.ascents):
            climbed = phi.gradient(at).uphill * (self.ascent * oracle.rate)
            at = climbed if at is None else at + climbed
        assert at is not None
        here = phi.gradient(at)
        rho = self.penalty * self.penalty_growth**oracle.step
        outer = here.retain
        if rho > 0:
            outer = outer + phi.hessian_times(lambda where: phi.gradient(where).uphill, here.uphill, at) * (2 * rho)
        return outer - at * (1 / oracle.rate)


@dataclass(frozen=True)
class _There:
    """grad Phi and grad L_R somewhere."""

    uphill: Vector
    retain: Vector


@dataclass(frozen=True)
class _Phi:
    """What is climbed. `far` is how long a step of a difference is."""

    oracle: Oracle
    similarity: float
    far: float

    def gradient(self, at: Vector | None) -> _There:
        """`at` so far from the committed weights."""
        oracle = self.oracle
        forget, retain = oracle.gradient({FORGET: 1.0}, at), oracle.gradient({RETAIN: 1.0}, at)
        if self.similarity == 0:
            return _There(forget, retain)
        squares = oracle.dots((forget, forget), (retain, retain), (forget, retain))
        of_forget, of_retain = (max(math.sqrt(square), _TINY) for square in squares[:2])
        cos = squares[2] / (of_forget * of_retain)
        to_forget = retain * (1 / (of_retain * of_forget)) - forget * (cos / of_forget**2)
        to_retain = forget * (1 / (of_retain * of_forget)) - retain * (cos / of_retain**2)
        turning = self.hessian_times(lambda where: oracle.gradient({FORGET: 1.0}, where), to_forget, at)
        turning = turning + self.hessian_times(lambda where: oracle.gradient({RETAIN: 1.0}, where), to_retain, at)
        return _There(forget - turning * self.similarity, retain)

    def hessian_times(self, gradient: Callable[[Vector], Vector], vector: Vector, at: Vector | None) -> Vector:
        """The Hessian of what has this gradient, times a vector."""
        (square,) = self.oracle.dots((vector, vector))
        if square == 0:
            return vector
        h = self.far / math.sqrt(square)
        ahead, behind = vector * h, vector * -h
        if at is not None:
            ahead, behind = at + ahead, at + behind
        return (gradient(ahead) - gradient(behind)) * (1 / (2 * h))
