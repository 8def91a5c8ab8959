"""Unbroken from Python: train a language model through a pipeline of workers, watch it, have it forget, evaluate it.

    import unbroken

    run = unbroken.Run(model="llama-2m", data="stdlib", workers=4, steps=240, out="runs/one").start()
    for record in run:
        print(record["step"], record["loss"])
    print(run.result().perplexity)

This package is the one name that users import. What it offers lies in `launch.api`; it looks first whether the packages
of plain names that belong to it are ours.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any


def _refuse_foreign() -> None:
    """Raise ImportError where a package of ours would be taken from elsewhere. `launch` itself may be one, so that
    what looks is found by where it lies: beside this package, or above it in a checkout."""
    path = next(
        path for folder in Path(__file__).resolve().parents if (path := folder / "launch" / "whose.py").is_file()
    )
    spec = spec_from_file_location("unbroken.whose", path)
    assert spec is not None
    assert spec.loader is not None
    whose = module_from_spec(spec)
    spec.loader.exec_module(whose)
    if (found := whose.foreign()) is not None:
        raise ImportError(f"unbroken: {found}", name="unbroken")


_refuse_foreign()

from launch.agent import RunFailed  # noqa: E402
from launch.api.result import Result  # noqa: E402
from launch.api.run import Run, load  # noqa: E402
from pipeline.settings import ConfigError  # noqa: E402

if TYPE_CHECKING:
    from launch.ray_train import ray_train as ray_train

__all__ = ["ConfigError", "Result", "Run", "RunFailed", "load"]
"""And `ray_train`, where Ray is installed: to import it imports Ray."""


def __getattr__(name: str) -> Any:
    if name != "ray_train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from launch.ray_train import ray_train
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ImportError("unbroken.ray_train needs Ray; pip install 'unbroken[ray]'", name="ray") from error
    return ray_train
