"""Keyword arguments that are the fields of a settings dataclass: editors complete them, and type checkers know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, signature
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from launch.config import config_from_dict
from pipeline.settings import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


def takes(settings: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[Concatenate[Any, P], T]]:
    """Have a method, declared with **settings, take those of a dataclass, by name."""

    def typed(method: Callable[..., T]) -> Callable[Concatenate[Any, P], T]:
        own = [each for each in signature(method).parameters.values() if each.kind != Parameter.VAR_KEYWORD]
        named = {each.name for each in own}
        fields = [
            each.replace(kind=Parameter.KEYWORD_ONLY) for each in signature(settings).parameters.values()
            if each.name not in named
        ]  # fmt: skip
        method.__signature__ = Signature([*own, *fields])  # type: ignore[attr-defined]
        return cast("Callable[Concatenate[Any, P], T]", method)

    return typed


def checked(settings: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass with these values, as a file or flags give them. Raises ConfigError, with what is near, for a name
    that it does not have."""
    try:
        return config_from_dict(settings, values)
    except TypeError as error:  # a value of no kind that a setting has
        raise ConfigError(str(error)) from error
