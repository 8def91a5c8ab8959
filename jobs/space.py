"""What a run will write to its folder, known before it writes anything."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from jobs.config import ConfigError, TrainConfig
from pipeline.model.layered import LayeredModel

_FP32, _HEADER = 4, 8192  # bytes of a number, and at most of what a file says of a layer's tensors


@dataclass(frozen=True)
class Space:
    """Bytes: of one checkpoint, of the exported model, and of the tokens at most (None: as many as the text has).
    `checkpoints` come to lie beside each other, the one that is being written and takes the place of another included.
    Where it is not `known` how many the text can have, they may be far fewer, and do not count.
    """

    checkpoint: int
    checkpoints: int
    model: int
    tokens: int | None
    known: bool = False
    exports: int = 0
    """How many models are written beside the one at the end."""

    @property
    def state(self) -> int:
        """What is not tokens."""
        return self.checkpoints * self.checkpoint + (1 + self.exports) * self.model

    @property
    def total(self) -> int:
        """What there must be room for."""
        return self.state + (self.tokens or 0 if self.known else 0)

    def __str__(self) -> str:
        parts = [f"the model {in_words(self.model)}" + (f", {self.exports} more of it" if self.exports else "")]
        if self.checkpoints:
            several = "s" if self.checkpoints > 1 else ""
            parts = [f"{self.checkpoints} checkpoint{several} of {in_words(self.checkpoint)}", *parts]
        if self.tokens is None:
            parts.append("the tokens of the text")
        elif self.tokens:
            most = in_words(self.tokens)
            parts.append(f"tokens up to {most}" if self.known else f"the tokens of the text, {most} at most")
        return f"{in_words(self.total)}: {', '.join(parts)}"


def space_needed(
    config: TrainConfig, model: LayeredModel, first_step: int = 0, there: int = 0, most_tokens: int | None = None
) -> Space:
    """What a run writes from `first_step` on, beside the `there` checkpoints that it has written before.

    `most_tokens` are those that the text can have, where that is known.
    """
    layers = range(model.num_layers)
    numbers = sum(map(model.parameter_count, layers))
    trained = sum(map(model.trained_count, layers))
    optimizer, shapes = config.optimizer_config(), {layer: model.shapes(layer) for layer in layers}
    copies = sum(  # the moments, and the weights that are one step behind
        math.prod(shape := shapes[n][key])
        * (config.optimizer_async + optimizer.num_moments(len(shape), n in model.blocks))
        for n in layers
        for key in model.trainable(n)
    )
    every, left = config.checkpoint_every, config.last_step - first_step
    last = config.last_step - 1
    coming = int(left > 0) + (last // every - first_step // every if every and left > 0 else 0)
    at_most = min(config.keep + 1, there + coming)
    new = max(at_most - there, min(coming, 1))
    width = 2 if int(model.config.vocab_size) <= 2**16 else 4
    taken = config.max_tokens if most_tokens is None else min(config.max_tokens, most_tokens)
    tokens = width * taken if config.max_tokens else None
    return Space(
        _FP32 * (numbers + copies) + _HEADER * model.num_layers,
        new,
        _FP32 * (numbers + (trained if model.lora else 0)),
        tokens if first_step == 0 else 0,
        known=most_tokens is not None,
        exports=last // each - first_step // each if (each := config.export_every) and left > 0 else 0,
    )


def check_space(out: Path, space: Space) -> str:
    """What is needed of what is free, in one line. Raises ConfigError where it does not fit."""
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())).free
    if space.total > free:
        fewer = "checkpoints (keep, checkpoint_every)" if space.total <= 2 * space.state else "tokens (max_tokens)"
        raise ConfigError(
            f"out is {str(out)!r}, where {in_words(free)} are free, and the run needs {space}; allowed: a folder with "
            f"more room, or fewer {fewer}"
        )
    return f"space: {space}; {in_words(free)} are free"


def in_words(size: int) -> str:
    """Bytes for people, in powers of 1000, as disks are sold."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 999.5 else f"{value:,.0f} {units[0]}"
