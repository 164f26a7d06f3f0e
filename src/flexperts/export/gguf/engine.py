"""Check of a GGUF file with llama.cpp itself, in a fresh process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from flexperts.export.verification import LogitDifference, logits_in_fresh_process, within

_COMPUTE = """
import json
import sys

import llama_cpp.llama_cpp as library
import torch
from llama_cpp import GGML_TYPE_F32, Llama

settings = library.llama_model_default_params()
settings.use_extra_bufts = False  # copies of weights for speed, with which AMX crashes on some virtual machines
library.llama_model_default_params = lambda: settings
model = Llama(
    {path!r}, n_ctx=tokens.shape[1], logits_all=True, n_gpu_layers=0, verbose=False,
    type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32,
)
for text, ids in json.loads({texts!r}):
    if model.tokenize(text.encode(), add_bos=False, special=True) != ids:
        sys.exit("llama.cpp cuts text into other tokens than the tokenizer")
model.eval(tokens[0].tolist())
logits = torch.from_numpy(model.scores[: tokens.shape[1]]).unsqueeze(0).contiguous()
"""
_LIMITS = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1, "q8_0": 0.1}
"""Largest ``LogitDifference.relative`` that rounding explains; llama.cpp rounds a layer's inputs, too."""


def has_llama_cpp() -> bool:
    """Return whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


def check_with_llama_cpp(
    path: Path, tokens: Tensor, reference: Tensor, texts: Sequence[tuple[str, list[int]]], dtype: str
) -> LogitDifference:
    """Load a file in llama.cpp; compare its logits with the run's, and its tokens with the tokenizer's.

    Args:
        path: The GGUF file.
        tokens: Token ids ``[1, S]``.
        reference: The run's logits on these tokens, ``[1, S, V]``.
        texts: Texts, each with its token ids by the tokenizer.
        dtype: Type of the file's weights.

    Raises:
        ArtifactError: llama.cpp cannot load the file, or computes something else.
    """
    code = _COMPUTE.format(path=str(path.resolve()), texts=json.dumps(texts))
    logits = logits_in_fresh_process(code, tokens)
    return within(_LIMITS[dtype], LogitDifference.between(logits, reference, "loaded in llama.cpp"))
