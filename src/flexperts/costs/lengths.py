"""The longest row of a run in tokens, by its data and its base's tokenizer alone."""

from __future__ import annotations

from collections.abc import Mapping

from flexperts.config.run import RunConfig
from flexperts.costs.activations import Lengths
from flexperts.data.prompts import encoder_of
from flexperts.data.rows import ClientRows
from flexperts.modeling.load import load_tokenizer


def row_lengths(config: RunConfig, clients: Mapping[str, ClientRows]) -> Lengths:
    """Return the longest row and the longest response of a run's clients.

    Raises:
        FlexpertsError: Rows cannot be read or encoded.
    """
    encoder = encoder_of(config, *load_tokenizer(config.model))
    encoded = [encoder.encode_all((*c.train, *c.test, *c.validation)) for c in clients.values()]
    examples = [example for client in encoded for example in client]
    return Lengths(max(len(e.input_ids) for e in examples), max(e.response_length for e in examples))
