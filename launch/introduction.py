"""What a run says of itself before its first step: the model, where it lies, the batch, and where it goes on from."""

from __future__ import annotations

from pathlib import Path

from jobs.config import TrainConfig
from jobs.plan import Plan
from launch.progress import Display


def introduce(config: TrainConfig, plan: Plan, display: Display) -> None:
    """Say what was planned, and what was found on the way to it."""
    for name, reason in plan.notes:
        display.say(f"checkpoint {name} is skipped: {reason}", "yellow")
    model = plan.model
    count = sum(model.parameter_count(layer) for layer in range(model.num_layers))
    adapters = ""
    if model.partly:
        trained = sum(model.trained_count(layer) for layer in range(model.num_layers))
        where = model.lora.about if model.lora is not None else config.trained
        adapters = f" ({trained / 1e6:.2f}M of them trained, in {where})"
    view = plan.view
    spans = " ".join(f"{lo}:{hi}" for lo, hi in plan.layout.train.holders)
    parallel = f"{config.replicas} replica(s)" if config.scheduler != "skippipe" else f"skip {config.skip:g}"
    if plan.rounds is not None:
        cut = plan.rounds.cut
        said = [" ".join(f"{lo}:{hi}" for lo, hi in side) for side in (cut.forward, [cut.fused], cut.backward)]
        spans = f"{said[0]}, with the loss {said[1]}, back {said[2]}"
        parallel = f"{config.round_size} microbatches at once, {config.rule}"
    size = f" (and down to {config.min_workers})" if config.min_workers else ""
    display.say(
        f"{model.config.model_type}, {count / 1e6:.1f}M parameters{adapters}, {model.num_layers} layers in spans "
        f"{spans}; {config.workers} workers{size}, {parallel}, {config.scheduler}"
    )
    samples = config.samples_per_step
    display.say(
        f"global batch: {samples:,} samples of {config.sequence_length:,} tokens, so "
        f"{samples * config.sequence_length:,} tokens a step"
    )
    for line in plan.said:
        display.say(line)
    if view.checkpoint:
        display.say(f"resuming at step {view.first_step} from {Path(view.checkpoint).name}")
