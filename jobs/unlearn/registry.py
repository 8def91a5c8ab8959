"""The methods by the names that a user calls them, and the one place where they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jobs.unlearn.method import Method
from jobs.unlearn.methods.ceu import CEU
from jobs.unlearn.methods.concept import Concept
from jobs.unlearn.methods.dpo import DPO
from jobs.unlearn.methods.first_epoch import FirstEpoch
from jobs.unlearn.methods.grad_ascent import GradAscent
from jobs.unlearn.methods.grad_diff import GradDiff
from jobs.unlearn.methods.grpo import GRPO
from jobs.unlearn.methods.idk import IDK
from jobs.unlearn.methods.kfade import KFADE
from jobs.unlearn.methods.kl_min import KLMin
from jobs.unlearn.methods.matching import OracleMatching
from jobs.unlearn.methods.mrp import MRP
from jobs.unlearn.methods.npo import NPO
from jobs.unlearn.methods.o3 import O3
from jobs.unlearn.methods.ofmu import OFMU
from jobs.unlearn.methods.pdu import PDU
from jobs.unlearn.methods.r2mu import R2MU
from jobs.unlearn.methods.replay import Replay
from jobs.unlearn.methods.rmu import RMU
from jobs.unlearn.methods.roka import ROKA
from jobs.unlearn.methods.s3t import S3T
from jobs.unlearn.methods.satimp import SatImp
from jobs.unlearn.methods.simnpo import SimNPO
from jobs.unlearn.methods.undial import Undial
from jobs.unlearn.methods.wga import WGA
from pipeline.names import did_you_mean
from pipeline.settings import check_bounds, require, require_known

_ALL: tuple[type[Method], ...] = (
    GradAscent, GradDiff, KLMin, NPO, SimNPO, DPO, IDK, RMU, R2MU, Undial, CEU, WGA, SatImp, PDU, ROKA, OracleMatching,
    OFMU, KFADE, FirstEpoch, Concept, GRPO, MRP, O3, Replay, S3T,
)  # fmt: skip

METHODS: Mapping[str, type[Method]] = {**{each.name: each for each in _ALL}, "idk_dpo": DPO}
"""Name -> method; what is called idk_dpo elsewhere is dpo here."""


def options_of(method: type[Method]) -> tuple[str, ...]:
    """The options that a method has."""
    return tuple(field.name for field in fields(method))


def make_method(name: str, options: Mapping[str, object]) -> Method:
    """A method with these options, and its defaults for the others. Raises ConfigError for a name that is none, an
    option that the method does not have, and a value that is not allowed."""
    require_known("method", name, METHODS)
    made, has = METHODS[name], options_of(METHODS[name])
    for option, value in options.items():
        known = f"which has {', '.join(has) or 'no options'}{did_you_mean(option, has)}"
        require(option in has, option, value, f"nothing for method {name}, {known}")
    chosen: Mapping[str, Any] = options
    method = made(**chosen)
    check_bounds(method)
    hints = get_type_hints(made)
    for option in has:
        if get_origin(hints[option]) is Literal:
            require_known(option, getattr(method, option), get_args(hints[option]))
    return method
