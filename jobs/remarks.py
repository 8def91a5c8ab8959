"""What a person may not have meant, and should be told in a line before the first step."""

from __future__ import annotations

from jobs.config import TrainConfig
from pipeline.state.optimizer import learning_rate
from recovery.inject import Fault


def remarks(config: TrainConfig, first_step: int = 0) -> list[str]:
    """Lines about settings that are allowed and hardly wanted, of a run that goes on from `first_step`."""
    found: list[str] = []
    known = config.optimizer_config()
    if known.warmup_steps >= config.steps > 1:
        found.append(
            f"warmup is {known.warmup_steps} and the run has {config.steps} steps: the learning rate only rises, to "
            f"{learning_rate(known, config.steps - 1):.3g} of {known.lr:g}"
        )
    for text, fault in zip(filter(str.strip, config.inject.split(";")), config.faults(), strict=True):
        if isinstance(fault, Fault) and not first_step <= fault.step < config.last_step:
            found.append(
                f"inject {text.strip()!r} never happens: this start takes steps {first_step} to {config.last_step - 1}"
            )
    return found
