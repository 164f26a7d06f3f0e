"""Greedy batched generation: left-padded, sorted by length; finished rows are removed from the key-value cache.

Shapes: B rows, C columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexperts.data.batches import PaddedBatch, pad_batch
from flexperts.data.prompts import Example, PromptEncoder
from flexperts.modeling.caches import ReadPrompts, read_prompts, select_rows, sharing
from flexperts.modeling.forward import Precision, autocast, next_logits

_BROKEN = -1
"""Replaces a token where the logits are not finite and no token can be chosen."""


class Answer(str):
    """A generated answer: its text, and how it ended.

    Args:
        text: The text.
        tokens: Number of generated tokens, with the end token.
        cut: Whether the answer reached the token limit before an end token.
        finite: Whether all logits were finite; if not, the answer ends before the first that were not.
    """

    tokens: int
    cut: bool
    finite: bool

    def __new__(cls, text: str, tokens: int = 0, cut: bool = False, finite: bool = True) -> Answer:
        """Return the text with these attributes."""
        made = super().__new__(cls, text)
        made.tokens, made.cut, made.finite = tokens, cut, finite
        return made


@torch.no_grad()
def generate(
    model: Any,
    encoder: PromptEncoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    precision: Precision,
    on_batch: Callable[[PaddedBatch], None] | None = None,
) -> list[Answer]:
    """Return the greedy answer to each prompt, in the order of the prompts.

    Args:
        model: A causal language model in eval mode.
        encoder: Supplies tokenizer and special tokens.
        prompts: Token ids of each prompt.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts generated together; prompts of similar length share a batch.
        precision: As in training.
        on_batch: Called with the prompts of each batch before it is generated; no row then leaves its batch early.
    """
    answers = [Answer("")] * len(prompts)
    for chosen in longest_first(prompts, batch_size):
        batch = prompt_batch([prompts[i] for i in chosen], encoder)
        if on_batch:
            on_batch(batch)
        with autocast(next(model.parameters()).device, precision):
            texts = greedy_answers(
                model, encoder, read_prompts(model, batch), max_new_tokens, rows_leave=on_batch is None
            )
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
    return answers


def longest_first(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Return the prompts' indices in batches of similar length: little padding, and out of memory shows early."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def prompt_batch(prompts: Sequence[Sequence[int]], encoder: PromptEncoder) -> PaddedBatch:
    """Return prompts without responses as one batch."""
    return pad_batch([Example(tuple(p), len(p)) for p in prompts], encoder.tokenizer.pad_token_id)


def greedy_answers(
    model: Any, encoder: PromptEncoder, read: ReadPrompts, max_new_tokens: int, *, rows_leave: bool
) -> list[Answer]:
    """Return the greedy answers to prompts that were read; their cache cannot be used again.

    Args:
        model, encoder, max_new_tokens: As for ``generate``.
        read: The prompts.
        rows_leave: Whether finished rows leave the batch; False where the model is set up for the batch's rows.
    """
    ends = frozenset({*end_tokens(model, encoder), _BROKEN})
    answers = _decode(model, read, ends, max_new_tokens, rows_leave)
    said = [
        tokens[:-1] if tokens[-1] in ends else tokens for tokens in answers
    ]  # some end tokens are not special tokens
    texts = encoder.tokenizer.batch_decode(said, skip_special_tokens=True)
    return [
        Answer(text.strip(), len(tokens), cut=tokens[-1] not in ends, finite=tokens[-1] != _BROKEN)
        for text, tokens in zip(texts, answers, strict=True)
    ]


def _decode(model: Any, read: ReadPrompts, ends: frozenset[int], limit: int, rows_leave: bool) -> list[list[int]]:
    """Return every answer's tokens, with the end token."""
    answers = [[token] for token in _likeliest(read.logits)]
    rows, mask, cache = list(range(len(answers))), read.mask, read.cache
    can_leave = rows_leave and sharing(cache) != "never"
    while open_ := [row for row in rows if len(answers[row]) < limit and answers[row][-1] not in ends]:
        if can_leave and len(open_) < len(rows):
            kept = torch.tensor([rows.index(row) for row in open_], device=mask.device)
            select_rows(cache, kept, 0)
            rows, mask = open_, mask[kept]
        last = torch.tensor([answers[row][-1:] for row in rows], device=mask.device).clamp(min=0)
        mask = torch.cat([mask, torch.ones_like(last)], dim=1)
        logits, cache = next_logits(model, last, mask, cache, read.padded)
        likeliest = dict(zip(rows, _likeliest(logits), strict=True))
        for row in open_:
            answers[row].append(likeliest[row])
    return answers


def _likeliest(logits: Tensor) -> list[int]:
    """Return the likeliest token of each row of ``[B, V]``; ``_BROKEN`` where the logits are not finite."""
    highest = logits.max(-1)  # max returns NaN if any logit is NaN; minus infinity is a valid logit
    return list(highest.indices.where(highest.values.isfinite(), _BROKEN).tolist())


def end_tokens(model: Any, encoder: PromptEncoder) -> list[int]:
    """Return the tokens that end an answer: those of the template, the tokenizer and the base."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {encoder.end_token, encoder.tokenizer.eos_token_id}
    return sorted(e for e in ends if e is not None)
