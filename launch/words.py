"""The words of a command line: which settings they give, and nothing of what they leave out.

tyro writes the help. The words are read here, since a setting that was given must be told apart from one that was
not (`--resume` starts from the run's own), and since every mistake is answered in one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_type_hints

from pipeline.names import did_you_mean
from pipeline.settings import ConfigError


def given(settings: type, words: Sequence[str]) -> dict[str, Any]:
    """Setting -> value, of those that the words give. Raises ConfigError for what is no flag, or lacks its value."""
    hints, found = get_type_hints(settings), dict[str, Any]()
    left = iter(_joined(words))
    for word in left:
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--"):
            raise ConfigError(f"{word!r} is no flag; allowed: flags, as --name value")
        if name in hints and hints[name] is not bool:
            found[name] = _read(value if equals else _next(name, left), get_args(hints[name]) or (hints[name],))
        elif (plain := name.removeprefix("no_")) in hints and hints[plain] is bool:
            if equals:
                raise ConfigError(f"{plain} is {value!r}; allowed: --{_dashed(plain)} or --no-{_dashed(plain)}")
            found[plain] = plain == name
        else:
            raise ConfigError(f"{flag}: no such flag{did_you_mean(name, hints, '--')}; --help lists all")
    return found


def _joined(words: Sequence[str]) -> list[str]:
    """The words, in which those that follow `--data` are one, with commas: 'a.txt:0.7' 'b.txt:0.3'."""
    found: list[str] = []
    for at, word in enumerate(words):
        several = found[-2:-1] == ["--data"] and not word.startswith("--")
        if several and at and not words[at - 1].startswith("--"):
            found[-1] += f",{word}"
        else:
            found.append(word)
    return found


def _next(name: str, left: Iterator[str]) -> str:
    value = next(left, None)
    if value is None:
        raise ConfigError(f"{name} is missing its value; allowed: --{_dashed(name)} value")
    return value


def _read(text: str, kinds: tuple[Any, ...]) -> Any:
    """The value that a text stands for. What is not of its kind stays a text, to be refused by name as in a file."""
    if type(None) in kinds and text == "None":
        return None
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                pass
    return text


def _dashed(name: str) -> str:
    return name.replace("_", "-")
