"""The language model inside a model: all of a text model, a part of one that sees or hears too."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def language_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the language model, by the names that they have in ``model``.

    Towers for images or sound may hold attention and experts of their own; these stay as they are.

    Args:
        model: A model of transformers, which knows its decoder, or any other module, which is taken whole.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    yield from decoder.named_modules(prefix=prefix)
