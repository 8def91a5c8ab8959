"""The `unbroken` command: a subcommand per job. Its settings come from defaults, then --config FILE, then flags."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, make_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launch.signals import NotStarted
from launch.whose import foreign

ERROR, USAGE, STOPPED = 1, 2, 75  # as in pipeline/exit_codes.py, which is not read before it is known to be ours
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True)
class _Command:
    """How a subcommand is run. `load` imports what it needs only when it is asked for."""

    summary: str
    load: Callable[[], tuple[type, Callable[[Any], Any]]]
    first: str = ""
    """The setting that a word before all flags gives."""
    many: bool = False
    """Whether several words do, with `:` between them as in PATH."""
    base: Callable[[], Callable[[Mapping[str, Any]], Mapping[str, Any]]] | None = None
    """Loads what gives settings that come before those asked for, by those."""


@dataclass(frozen=True)
class TerminalSettings:
    """What is printed."""

    json: bool = False
    """Show no progress; print one JSON object at the end."""


def _train() -> tuple[type, Callable[[Any], Any]]:
    from jobs.config import TrainConfig
    from launch.train import train
    from pipeline.settings import of_kind

    @dataclass(frozen=True)
    class Train(TrainConfig, TerminalSettings):
        __doc__ = TrainConfig.__doc__

    def run(config: Train) -> int:
        return train(of_kind(TrainConfig, config), config.json)

    return Train, run


def _evaluate() -> tuple[type, Callable[[Any], Any]]:
    from launch.evaluate import EvalConfig, evaluate

    return EvalConfig, evaluate


def _generate() -> tuple[type, Callable[[Any], Any]]:
    from launch.generate import GenerateConfig, generate

    return GenerateConfig, generate


def _export() -> tuple[type, Callable[[Any], Any]]:
    from launch.export import ExportConfig, export

    return ExportConfig, export


def _clean() -> tuple[type, Callable[[Any], Any]]:
    from launch.clean import CleanConfig, clean

    return CleanConfig, clean


def _simulate() -> tuple[type, Callable[[Any], Any]]:
    from launch.commands import SimulateConfig, simulate_command

    return SimulateConfig, simulate_command


def _plan() -> tuple[type, Callable[[Any], Any]]:
    from launch.plan_command import PlanConfig, plan_command

    return PlanConfig, plan_command


def _explain() -> tuple[type, Callable[[Any], Any]]:
    from jobs.config import TrainConfig
    from launch.explain import TopicSettings, explain_command

    @dataclass(frozen=True)
    class Explain(TrainConfig, TerminalSettings, TopicSettings):
        """Tell what would be done about each worker that is lost, in order, at what cost. Nothing is run."""

    return Explain, explain_command


def _draw() -> tuple[type, Callable[[Any], Any]]:
    from launch.commands import DrawConfig, draw

    return DrawConfig, draw


def _unlearn() -> tuple[type, Callable[[Any], Any]]:
    from jobs.slices import FILE
    from jobs.unlearn.config import UnlearnConfig
    from jobs.unlearn.methods.s3t import S3T
    from launch.slice_unlearn import forget_slices
    from launch.unlearn import unlearn
    from pipeline.settings import of_kind

    @dataclass(frozen=True)
    class EndSettings:
        """What is given up."""

        abandon: bool = False
        """Give up the request that is not complete: the run stays as it was."""

    @dataclass(frozen=True)
    class Unlearn(UnlearnConfig, TerminalSettings, EndSettings):
        __doc__ = UnlearnConfig.__doc__

    def run(config: Unlearn) -> Any:
        of_slices = config.method == S3T.name or (config.run / FILE).is_file()
        return (forget_slices if of_slices else unlearn)(of_kind(UnlearnConfig, config), config.json, config.abandon)

    return Unlearn, run


def _of_the_run() -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    from launch.unlearn import of_the_run

    return of_the_run


def _slices() -> tuple[type, Callable[[Any], Any]]:
    from jobs.slices import SlicesConfig
    from launch.slices import slices
    from pipeline.settings import of_kind

    @dataclass(frozen=True)
    class SlicesCommand(SlicesConfig, TerminalSettings):
        __doc__ = SlicesConfig.__doc__

    def run(config: SlicesCommand) -> Any:
        return slices(of_kind(SlicesConfig, config), config.json)

    return SlicesCommand, run


def _of_the_slices() -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    from launch.slices import of_the_slices

    return of_the_slices


def _audit() -> tuple[type, Callable[[Any], Any]]:
    from launch.audit import AuditConfig, audit_command

    return AuditConfig, audit_command


def _authors() -> tuple[type, Callable[[Any], Any]]:
    from launch.authors_command import AuthorsConfig, authors_command

    return AuthorsConfig, authors_command


def _replay() -> tuple[type, Callable[[Any], Any]]:
    from launch.replay import ReplayConfig, replay

    return ReplayConfig, replay


def _report() -> tuple[type, Callable[[Any], Any]]:
    from launch.report_command import ReportConfig, report_command

    return ReportConfig, report_command


def _doctor() -> tuple[type, Callable[[Any], Any]]:
    from launch.doctor import DoctorConfig, doctor

    return DoctorConfig, doctor


COMMANDS = {
    "train": _Command("train a model through a pipeline of workers", _train),
    "unlearn": _Command("have a trained model forget rows of its data", _unlearn, first="run", base=_of_the_run),
    "slices": _Command("train adapters slice by slice, to forget a slice at once", _slices, base=_of_the_slices),
    "audit": _Command("search a run for what it has forgotten", _audit, first="run"),
    "authors": _Command("write fictitious authors to learn and to forget", _authors),
    "replay": _Command("run a step of a run again, and compare every bit", _replay, first="run"),
    "eval": _Command("perplexity of an exported model", _evaluate),
    "generate": _Command("sample a continuation from an exported model", _generate),
    "export": _Command("write a checkpoint as a model directory", _export, first="run"),
    "simulate": _Command("time a schedule without running it", _simulate),
    "plan": _Command("search for routes through a network", _plan),
    "explain": _Command("tell what recovers from a lost worker, at what cost", _explain, first="topic"),
    "draw": _Command("draw a schedule as SVG, Perfetto trace or text", _draw),
    "report": _Command("draw the report of a run, or of several compared", _report, first="runs", many=True),
    "doctor": _Command("check versions, devices, cores, store and ports", _doctor),
    "clean": _Command("remove what runs that are over have left behind", _clean, first="run"),
}


def usage() -> str:
    """What `unbroken --help` prints."""
    rows = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: unbroken COMMAND [--config FILE.toml] [flags]\n\n{rows}\n\n`unbroken COMMAND --help` lists the flags, "
        "`unbroken --version` says which version this is."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 error, 2 usage, 75 stopped, with all saved that there was."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # who asks CUDA for devices cannot fork who uses them
    if (found := foreign()) is not None:
        return _refuse("unbroken", found)
    if not arguments or arguments[0] in ("-h", "--help"):
        return _say(usage(), 0 if arguments else USAGE)
    if arguments[0] == "--version":
        return _say(f"unbroken {version('unbroken')}")
    if arguments[0] not in COMMANDS:
        from pipeline.names import did_you_mean

        near = did_you_mean(arguments[0], COMMANDS)
        return _refuse("unbroken", f"command {arguments[0]!r} is unknown; allowed: {', '.join(COMMANDS)}{near}")
    level = os.environ.get("UNBROKEN_LOG") or "WARNING"
    if level.upper() not in _LEVELS:
        return _refuse("unbroken", f"UNBROKEN_LOG is {level!r}; allowed: {', '.join(_LEVELS)}")
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every wait on a store that times out is a warning
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    command, name = COMMANDS[arguments[0]], f"unbroken {arguments[0]}"
    from pipeline.garbage import keep_all, no_collection

    with no_collection():
        settings, function = command.load()
    keep_all()
    try:
        try:
            config = configured(settings, name, named(command, arguments[1:]), command.base)
        except (SystemExit, BrokenPipeError):  # the help has been printed, or its reader has enough
            return _say()
        result = function(config)
    except (ValueError, RuntimeError, OSError) as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        from pipeline.exit_codes import exit_code

        return _refuse(name, error, exit_code(error))
    except NotStarted:
        return _refuse(name, "asked to stop before the first step: nothing was saved, and nothing is left", STOPPED)
    except KeyboardInterrupt:
        return _refuse(name, "interrupted; what was not saved is lost", ERROR)
    if isinstance(result, int):
        return result
    values, text = result
    return _say(json.dumps(values) if config.json else text, 0 if values.get("ok", True) else ERROR)


def _say(text: str = "", code: int = 0) -> int:
    """Print a text, at once: at its own end Python would find out who is gone, and give a code of its own."""
    try:
        print(text, end="\n" if text else "", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # else the reader, such as `head`, has enough
            return _refuse("unbroken", f"what it says cannot be written: {error.strerror}", ERROR)
    return code


def _refuse(name: str, told: object, code: int = USAGE) -> int:
    with suppress(OSError):  # nobody reads it: the code says enough
        print(f"{name}: {told}", file=sys.stderr)
    return code


def configured(
    settings: type, name: str, arguments: Sequence[str],
    base: Callable[[], Callable[[Mapping[str, Any]], Mapping[str, Any]]] | None = None,
) -> Any:  # fmt: skip
    """The settings of a command: defaults, those that a run to be resumed has kept, those of --config FILE, then flags.

    Raises ConfigError for what is no setting or does not fit, SystemExit after the help.
    """
    from launch.config import config_from_dict, toml_values
    from launch.words import given

    words, file = _take_config(list(arguments))
    asked = {} if file is None else toml_values(file, settings)
    if {"-h", "--help"} & set(words):
        import tyro  # the slowest to import, and needed for the help alone

        about = "Settings may also come from a TOML file: --config FILE; flags come last."
        tyro.cli(
            _by_owner(settings, asked),
            args=["--help"],
            prog=name,
            description=f"{settings.__doc__} {about}",
            config=(tyro.conf.OmitArgPrefixes,),
        )
    asked |= given(settings, words)
    kept: Mapping[str, Any] = {}
    if base is not None:
        kept = base()(asked)
    elif asked.get("resume"):
        from launch.resume import kept_values

        kept = kept_values(Path(asked.get("out", settings().out)))
    config = config_from_dict(settings, {**kept, **asked})
    return config.with_batch(asked) if hasattr(config, "with_batch") else config


def named(command: _Command, arguments: list[str]) -> list[str]:
    """The arguments, the first of which, or the first few, may be a setting without its name."""
    flags = next((at for at, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    count = flags if command.many else min(flags, 1)
    if not command.first or not count:
        return arguments
    return [f"--{command.first}={os.pathsep.join(arguments[:count])}", *arguments[count:]]


def _by_owner(settings: type, asked: Mapping[str, Any]) -> type:
    """A dataclass with a field for each group of settings, of which the help is made."""
    from pipeline.settings import declared, tables

    if not (found := tables(settings)):
        return settings
    made: list[tuple[str, type, Any]] = []
    for name, group in found.items():
        own = {key: asked[key] for key in declared(group) if key in asked}
        made.append((name, group, field(default=group(**own))))
    return make_dataclass("Settings", made, frozen=True)


def _take_config(arguments: list[str]) -> tuple[list[str], Path | None]:
    """--config FILE, taken out of the arguments."""
    from pipeline.settings import ConfigError

    for at, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return arguments[:at] + arguments[at + 1 :], Path(argument.partition("=")[2])
        if argument == "--config":
            if at + 1 == len(arguments):
                raise ConfigError("config is missing its value; allowed: the path of a TOML file")
            return arguments[:at] + arguments[at + 2 :], Path(arguments[at + 1])
    return arguments, None
