"""The lower bound: the same batches through the same model in one plain loop, and nothing else.

No clients, no messages, no averaging: one adapter trains on. Base, attention and logits are loaded and computed as
in flexperts, so that the difference in time is due to the federation alone.
"""

from __future__ import annotations

from typing import Any

import torch
from clock import Clock
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from work import Work

from flexperts.data.batches import pad_batch
from flexperts.modeling.attention import attention_in_fp32
from flexperts.modeling.forward import autocast, token_losses
from flexperts.modeling.load import load_base
from flexperts.seeding import derive_seed


@attention_in_fp32()
def run(work: Work, clock: Clock) -> dict[str, Tensor]:
    """Train; there are no averaged weights to return."""
    model = with_lora(load_base(work.config.model).model, work)
    pad = work.encoder.tokenizer.pad_token_id
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, _ = work.optimizer(model, 1)
    for number in range(1, work.rounds + 1):
        clock.begin()
        for name in sorted(work.clients):
            for rows in work.batches(name, number):
                batch = pad_batch(rows, pad)
                with autocast(torch.device("cpu"), work.config.model.precision):
                    sums, counts = token_losses(model, batch)
                (sums.sum() / counts.sum()).backward()
                torch.nn.utils.clip_grad_norm_(trained, work.config.training.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                clock.count(1, int(batch.attention_mask.sum()))
        clock.end()
    return {}


def with_lora(model: Any, work: Work) -> PeftModel:
    """Put the run's LoRA into a base, A drawn as flexperts draws it."""
    lora = work.config.lora
    torch.manual_seed(derive_seed(work.config.seed, "lora"))
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.projections),
    )
    adapted: PeftModel = get_peft_model(model, settings)
    return adapted
