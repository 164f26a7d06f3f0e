"""The longest row of a run in tokens, by its data and its base's tokenizer alone."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import AutoTokenizer

from flexperts.base.build import resolve_base
from flexperts.config.run import RunConfig
from flexperts.costs.activations import Lengths
from flexperts.data.prompts import PromptEncoder
from flexperts.data.rows import ClientRows
from flexperts.errors import ModelError


def row_lengths(config: RunConfig, clients: Mapping[str, ClientRows]) -> Lengths:
    """Return the longest row and the longest response of a run's clients.

    Raises:
        FlexpertsError: Rows cannot be read or encoded.
    """
    base = config.model.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_base(base), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = f"its tokenizer cannot be loaded ({str(error).splitlines()[0]})"
        raise ModelError(f"model.base = {base!r}", reason, "check the name and the network") from error
    encoder = PromptEncoder(tokenizer, config.model.template, config.training.max_length)
    encoded = [encoder.encode_all((*c.train, *c.test, *c.validation)) for c in clients.values()]
    examples = [example for client in encoded for example in client]
    return Lengths(
        max(len(e.input_ids) for e in examples), max(len(e.input_ids) - e.prompt_length for e in examples)
    )
