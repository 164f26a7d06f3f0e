"""Greedy batched generation: left-padded, sorted by length, with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from flexperts.data.batches import PaddedBatch, pad_batch
from flexperts.data.prompts import Example, PromptEncoder
from flexperts.modeling.forward import Precision, autocast


@torch.no_grad()
def generate(
    model: Any,
    encoder: PromptEncoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    precision: Precision,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_batch: Callable[[PaddedBatch], None] | None = None,
) -> list[str]:
    """Return the greedy answer to each prompt, in the order of the prompts.

    Args:
        model: A causal language model in eval mode.
        encoder: Supplies tokenizer and special tokens.
        prompts: Token ids of each prompt.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts generated together; neighbours in length share a batch.
        precision: As in training.
        on_rows: Gets the number of rows after each batch.
        on_batch: Gets the prompts of each batch before it is generated.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [""] * len(prompts)
    config = _greedy(model, encoder, max_new_tokens)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = prompt_batch([prompts[i] for i in chosen], encoder)
        if on_batch:
            on_batch(batch)
        texts = _batch(model, encoder, batch, config, precision)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
        on_rows(len(chosen))
    return answers


def prompt_batch(prompts: Sequence[Sequence[int]], encoder: PromptEncoder) -> PaddedBatch:
    """Return prompts without responses as one batch."""
    return pad_batch([Example(tuple(p), len(p)) for p in prompts], encoder.tokenizer.pad_token_id)


def _batch(
    model: Any,
    encoder: PromptEncoder,
    batch: PaddedBatch,
    config: GenerationConfig,
    precision: Precision,
) -> list[str]:
    device = next(model.parameters()).device
    with autocast(device, precision):
        output = model.generate(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            generation_config=config,
        )
    new = output[:, batch.input_ids.shape[1] :]
    return [text.strip() for text in encoder.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _greedy(model: Any, encoder: PromptEncoder, max_new_tokens: int) -> GenerationConfig:
    # What is left unset, generate() takes from the base's own generation_config.json.
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=encoder.tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, encoder),
    )


def end_tokens(model: Any, encoder: PromptEncoder) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, and those that the base's own settings name."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {encoder.tokenizer.eos_token_id}
    return sorted(e for e in ends if e is not None)
