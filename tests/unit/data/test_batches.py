"""Batches: left padding, labels on responses only, honest passes over the rows."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexperts.data.batches import pad_batch, training_batches
from flexperts.data.prompts import Example

NO = -100


def test_padding_by_hand() -> None:
    batch = pad_batch([Example((1, 2, 3, 4, 5), 3), Example((6, 7), 1)], pad_token_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [9, 9, 9, 6, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert batch.labels.tolist() == [[NO, NO, NO, 4, 5], [NO, NO, NO, NO, 7]]
    assert batch.response_columns == 2
    assert batch.input_ids.dtype == batch.labels.dtype == torch.long


def test_a_prompt_alone_has_no_labels() -> None:
    batch = pad_batch([Example((1, 2), 2)], pad_token_id=9)
    assert batch.labels.tolist() == [[NO, NO]]
    assert batch.response_columns == 0


EXAMPLES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 6)).map(lambda n: Example(tuple(range(1, sum(n) + 1)), n[0])),
    min_size=1,
    max_size=30,
)


@given(EXAMPLES)
def test_padding_keeps_every_token_and_labels_only_responses(examples: list[Example]) -> None:
    batch = pad_batch(examples, pad_token_id=0)
    for row, example in enumerate(examples):
        ids, real = batch.input_ids[row], batch.attention_mask[row].bool()
        assert tuple(ids[real].tolist()) == example.input_ids
        assert not ids[~real].any()
        assert bool(real[-1])  # rows end in one column
        labelled = batch.labels[row] != NO
        assert tuple(batch.labels[row][labelled].tolist()) == example.input_ids[example.prompt_length :]
        assert not labelled[: -batch.response_columns].any()
    assert (batch.labels != NO)[:, -batch.response_columns].any()


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 60), st.integers(0, 999))
def test_exactly_the_steps_asked_for_and_every_row_once_per_pass(
    rows: int, batch_size: int, steps: int, seed: int
) -> None:
    examples = [Example(tuple(range(i + 2)), 1) for i in range(rows)]
    batches = list(training_batches(examples, batch_size, steps, torch.Generator().manual_seed(seed)))
    assert len(batches) == steps
    per_pass = -(-rows // batch_size)
    for start in range(0, steps, per_pass):
        chunk = batches[start : start + per_pass]
        counts = Counter(len(example.input_ids) for batch in chunk for example in batch)
        assert max(counts.values()) == 1
        if len(chunk) == per_pass:
            assert len(counts) == rows
    assert all(1 <= len(batch) <= batch_size for batch in batches)


@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 999))
def test_batches_are_a_function_of_the_generator(rows: int, batch_size: int, seed: int) -> None:
    examples = [Example(tuple(range(i % 7 + 2)), 1) for i in range(rows)]

    def made() -> list[list[int]]:
        stream = training_batches(examples, batch_size, 12, torch.Generator().manual_seed(seed))
        return [[id(example) for example in batch] for batch in stream]

    torch.manual_seed(seed + 1)  # the global stream plays no part
    first = made()
    torch.manual_seed(seed + 2)
    assert made() == first


def test_passes_and_seeds_differ() -> None:
    examples = [Example(tuple(range(i + 2)), 1) for i in range(30)]

    def lengths(seed: int) -> list[list[int]]:
        stream = training_batches(examples, 3, 20, torch.Generator().manual_seed(seed))
        return [[len(example.input_ids) for example in batch] for batch in stream]

    batches = lengths(0)
    assert batches[:10] != batches[10:]
    assert batches != lengths(1)


def test_neighbours_in_a_batch_are_of_similar_length() -> None:
    """Within a group of eight batches rows are sorted, so padding stays far below that of random batches."""
    examples = [Example((1,) * length, 1) for length in range(2, 66)]
    batches = list(training_batches(examples, 8, 8, torch.Generator().manual_seed(0)))
    spans = [max(len(e.input_ids) for e in b) - min(len(e.input_ids) for e in b) for b in batches]
    assert spans == [7] * 8
