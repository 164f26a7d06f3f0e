"""Batches of encoded rows, padded on the left so that all rows end in the same column.

With ends aligned, the logits that the loss needs are the last few columns, and only those are computed: on a small
model the vocabulary projection is a fifth of the work. Shapes: B rows, S columns, R response columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from flexperts.data.prompts import Example

IGNORED = -100
_BUCKET = 8


@dataclass(frozen=True)
class PaddedBatch:
    """Rows of one batch.

    Args:
        input_ids: ``[B, S]``.
        attention_mask: ``[B, S]``, 1 on tokens and 0 on padding.
        labels: ``[B, S]``, the trained tokens, and -100 elsewhere.
        response_columns: R, the number of last columns that hold any label.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    response_columns: int

    @property
    def padded(self) -> bool:
        """Whether a row has padding."""
        return not bool(self.attention_mask.all())


def pad_batch(examples: Sequence[Example], pad_token_id: int) -> PaddedBatch:
    """Join encoded rows into one batch."""
    columns = max(len(e.input_ids) for e in examples)
    shape = (len(examples), columns)
    ids, mask = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for row, example in enumerate(examples):
        start = columns - len(example.input_ids)
        ids[row, start:] = torch.tensor(example.input_ids)
        mask[row, start:] = 1
        for first, end in example.spans:
            labels[row, start + first : start + end] = ids[row, start + first : start + end]
    return PaddedBatch(ids, mask, labels, max(e.trained_columns for e in examples))


def pad_responses(examples: Sequence[Example], pad_token_id: int) -> PaddedBatch:
    """Join the rows' responses into one batch, padded on the right: each response follows its prompt's cache."""
    responses = [torch.tensor(e.input_ids[e.prompt_length :]) for e in examples]
    ids = pad_sequence(responses, batch_first=True, padding_value=pad_token_id)
    labels = pad_sequence(responses, batch_first=True, padding_value=IGNORED)
    return PaddedBatch(ids, (labels != IGNORED).long(), labels, ids.shape[1])


def training_batches(
    examples: Sequence[Example], batch_size: int, steps: int, generator: Generator
) -> Iterator[list[Example]]:
    """Yield ``steps`` batches from shuffled passes over the rows; rows of similar length share a batch.

    Every row is used once per pass. Rows are sorted by length only within random groups of a few batches: little
    padding is needed, and batches still vary from pass to pass.
    """
    done = 0
    while done < steps:
        for batch in _one_pass(examples, batch_size, generator)[: steps - done]:
            yield batch
            done += 1


def _one_pass(examples: Sequence[Example], batch_size: int, generator: Generator) -> list[list[Example]]:
    order = torch.randperm(len(examples), generator=generator).tolist()
    group = batch_size * _BUCKET
    batches: list[list[Example]] = []
    for start in range(0, len(order), group):
        members = sorted(order[start : start + group], key=lambda i: examples[i].length)
        batches += [[examples[i] for i in members[s : s + batch_size]] for s in range(0, len(members), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
