"""What has become of a run, as its folder tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.agent import RunFailed
from launch.report import performance
from pipeline.exit_codes import STOPPED

_ENDS = ("started", "exported", "stopped", "failed")
"""The events that say where a start of a run is."""


@dataclass(frozen=True)
class Result:
    """How a run has ended. Losses are nats per token; None is what there is none of."""

    out: Path
    """The run folder."""
    exit_code: int
    """0 where it has come to its end, 75 where it was asked to stop and has saved itself."""
    step: int
    """The last step that it has committed."""
    loss: float | None
    """Of that step, on what is trained."""
    held_out_loss: float | None
    """Of the last evaluation."""
    perplexity: float | None
    """Of the last evaluation."""
    model: Path | None
    """The model directory that it has exported at its end."""
    tokens_per_s: float | None
    """The median over its steps."""

    @property
    def stopped(self) -> bool:
        """Whether it can be gone on with: `Run(out=..., resume=True)`."""
        return self.exit_code == STOPPED

    @classmethod
    def of(
        cls, out: Path, exit_code: int, records: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
    ) -> Result:
        """From the records and events of a run."""
        last = records[-1] if records else {}
        held_out = next((event for event in reversed(events) if event["event"] == "evaluation"), {})
        model = out / "model"
        return cls(
            out, exit_code, int(last.get("step", 0)), last.get("loss"), held_out.get("loss"),
            held_out.get("perplexity"), model if exit_code == 0 and model.is_dir() else None,
            performance(records).get("tokens_per_s"),
        )  # fmt: skip


def code_told(out: Path, events: Sequence[Mapping[str, Any]]) -> int:
    """The exit code of a run that is over, as its last events tell. Raises RunFailed for one that has failed, or was
    killed."""
    last = next((event for event in reversed(events) if event["event"] in _ENDS), {"event": None})
    if last["event"] in ("exported", "stopped"):
        return 0 if last["event"] == "exported" else STOPPED
    if last["event"] == "failed":
        raise RunFailed(str(last.get("error", "it did not say why")))
    raise RunFailed(f"the run in {str(out)!r} has ended without a word, so it was killed; resume=True goes on from the "
                    "newest valid checkpoint")  # fmt: skip
