"""From a run's configuration to the plain settings of a client's local work."""

from __future__ import annotations

from flexperts.config.run import RunConfig
from flexperts.training.local import LocalSettings


def local_settings(
    config: RunConfig, *, steps: int, first_step: int, total_steps: int, pad_token_id: int
) -> LocalSettings:
    """Return the settings of one stretch of local training.

    Args:
        config: The run.
        steps: Optimizer steps of the stretch.
        first_step: Steps before it.
        total_steps: Steps over which the cosine goes; the warm-up is a share of them.
        pad_token_id: Token that fills short rows.
    """
    training = config.training
    return LocalSettings(
        steps=steps,
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size or training.batch_size,
        lr=training.lr,
        personal_lr=training.personal_lr or training.lr,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        first_step=first_step,
        total_steps=total_steps,
        warmup_steps=round(training.warmup_ratio * total_steps),
        precision=config.model.precision,
        pad_token_id=pad_token_id,
        optimizer=training.optimizer,
    )
