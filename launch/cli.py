"""The `unbroken` command: a subcommand per job, settings from defaults, then --config FILE, then flags."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from launch.signals import NotStarted

ERROR, USAGE, STOPPED = 1, 2, 75


@dataclass(frozen=True)
class _Command:
    """How a subcommand is run. `load` imports what it needs only when it is asked for."""

    summary: str
    load: Callable[[], tuple[type, Callable[[Any], Any]]]
    reports: bool = True


def _train() -> tuple[type, Callable[[Any], Any]]:
    from jobs.config import TrainConfig
    from launch.train import train

    @dataclass(frozen=True)
    class Train(TrainConfig):
        __doc__ = TrainConfig.__doc__

        json: bool = False
        """Show no progress; print one JSON object at the end."""

    def run(config: Train) -> int:
        from dataclasses import fields

        plain = TrainConfig(**{f.name: getattr(config, f.name) for f in fields(TrainConfig)})
        return train(plain, config.json)

    return Train, run


def _evaluate() -> tuple[type, Callable[[Any], Any]]:
    from launch.evaluate import EvalConfig, evaluate

    return EvalConfig, evaluate


def _generate() -> tuple[type, Callable[[Any], Any]]:
    from launch.commands import GenerateConfig, generate

    return GenerateConfig, generate


def _simulate() -> tuple[type, Callable[[Any], Any]]:
    from launch.commands import SimulateConfig, simulate_command

    return SimulateConfig, simulate_command


def _plan() -> tuple[type, Callable[[Any], Any]]:
    from launch.plan_command import PlanConfig, plan_command

    return PlanConfig, plan_command


def _draw() -> tuple[type, Callable[[Any], Any]]:
    from launch.commands import DrawConfig, draw

    return DrawConfig, draw


def _doctor() -> tuple[type, Callable[[Any], Any]]:
    from launch.doctor import DoctorConfig, doctor

    return DoctorConfig, doctor


COMMANDS = {
    "train": _Command("train a model through a pipeline of workers", _train, reports=False),
    "eval": _Command("perplexity of an exported model", _evaluate),
    "generate": _Command("sample a continuation from an exported model", _generate),
    "simulate": _Command("time a schedule without running it", _simulate),
    "plan": _Command("search for routes through a network", _plan),
    "draw": _Command("draw a schedule as SVG, Perfetto trace or text", _draw),
    "doctor": _Command("check versions, devices, cores, store and ports", _doctor),
}


def usage() -> str:
    """What `unbroken --help` prints."""
    rows = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: unbroken COMMAND [--config FILE.toml] [flags]\n\n{rows}\n\n`unbroken COMMAND --help` lists the flags."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 error, 2 usage, 75 stopped after saving."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else USAGE
    if arguments[0] not in COMMANDS:
        print(f"unbroken: command {arguments[0]!r} is unknown; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        return USAGE
    logging.basicConfig(level=os.environ.get("UNBROKEN_LOG", "WARNING").upper(), format="%(levelname)s %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every wait on a store that times out is a warning
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    command = COMMANDS[arguments[0]]
    settings, function = command.load()
    from jobs.config import ConfigError
    from launch.config import read_toml

    try:
        rest, file = _take_config(arguments[1:])
        default = read_toml(file, settings) if file else _default(settings)
        config = tyro.cli(
            settings, args=rest, default=default, prog=f"unbroken {arguments[0]}",
            description=f"{settings.__doc__} Settings may also come from a TOML file: --config FILE; flags come last.",
            config=(tyro.conf.OmitArgPrefixes,),
        )  # fmt: skip
        result = function(config)
    except ConfigError as error:
        print(f"unbroken {arguments[0]}: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        print(f"unbroken {arguments[0]}: {error}", file=sys.stderr)
        return USAGE if isinstance(error, ValueError) else ERROR
    except NotStarted:
        said = "asked to stop before the first step: nothing was saved, and nothing is left"
        print(f"unbroken {arguments[0]}: {said}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print(f"unbroken {arguments[0]}: interrupted; what was not saved is lost", file=sys.stderr)
        return ERROR
    if not command.reports:
        return int(result)
    values, text = result
    print(json.dumps(values) if config.json else text)
    return 0 if values.get("ok", True) else ERROR


def _default(settings: type) -> Any:
    """The settings' defaults; tyro is to ask for those that have none."""
    try:
        return settings()
    except TypeError:
        return tyro.MISSING_NONPROP


def _take_config(arguments: list[str]) -> tuple[list[str], Path | None]:
    """--config FILE, taken out of the arguments."""
    from jobs.config import ConfigError

    for at, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return arguments[:at] + arguments[at + 1 :], Path(argument.partition("=")[2])
        if argument == "--config":
            if at + 1 == len(arguments):
                raise ConfigError("config is missing its value; allowed: the path of a TOML file")
            return arguments[:at] + arguments[at + 2 :], Path(arguments[at + 1])
    return arguments, None
