"""`unbroken authors`: fictitious authors to learn, to forget and to ask about, where no other data are at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from jobs.authors import authors, write
from pipeline.settings import Within, check_bounds


@dataclass(frozen=True)
class AuthorsConfig:
    """Write questions about fictitious authors, as files of rows: train.jsonl, phrasings.jsonl (the same in other
    words), withheld.jsonl (authors nobody trains on), idk.jsonl and graph.json (who is related to whom)."""

    out: Path = Path("authors")
    """The folder to write."""
    count: Annotated[int, Within(2, 10_000)] = 20
    """Authors, with 20 questions each."""
    withheld: Annotated[int, Within(0, 10_000)] = 5
    """Authors that are in withheld.jsonl alone."""
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """The same seed makes the same authors."""
    json: bool = False
    """Print one JSON object."""


def authors_command(config: AuthorsConfig) -> tuple[dict[str, Any], str]:
    """Raises ConfigError, OSError."""
    check_bounds(config)
    library = authors(config.count, config.seed, withheld=config.withheld)
    write(library, config.out)
    values = {"out": str(config.out), "rows": 20 * config.count, "authors": config.count}
    return values, f"{20 * config.count:,} questions about {config.count:,} authors: {config.out / 'train.jsonl'}"
