"""A folder with a GGUF file, and the Modelfile with which Ollama imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from flexperts.data.prompts import PromptEncoder
from flexperts.export.gguf.architectures import Architecture
from flexperts.export.gguf.engine import check_with_llama_cpp, has_llama_cpp
from flexperts.export.gguf.file import ReadBack, opened, read_back, write_weights
from flexperts.export.gguf.modelfile import modelfile
from flexperts.export.gguf.vocabulary import write_vocabulary
from flexperts.export.verification import REFERENCE_TEXT, LogitDifference
from flexperts.files import write_text

MODELFILE = "Modelfile"
_QUESTIONS = ("Who signs?", "Summarise 3 of 1984's cases: naïve coöperation, 2 parcels\n\n\tand 15 % off.")


def write_gguf(
    path: Path, name: str, architecture: Architecture, tokenizer: Any, encoder: PromptEncoder, dtype: str
) -> None:
    """Write a model as a GGUF file, and a Modelfile where Ollama can write the prompts of training.

    Args:
        path: The GGUF file, in an existing folder.
        name: The model's name.
        architecture: The model, with everything merged.
        tokenizer: The tokenizer with the chat template used in training.
        encoder: The encoder of training.
        dtype: float32, float16, bfloat16 or q8_0.
    """
    with opened(path, architecture) as writer:
        writer.add_name(name)
        write_vocabulary(writer, tokenizer, encoder, architecture.lengths["vocab_size"])
        write_weights(writer, architecture, dtype)
    end = tokenizer.decode([encoder.end_token])
    if (text := modelfile(path.name, tokenizer, end)) is not None:
        write_text(path.with_name(MODELFILE), text)


def check_gguf(
    path: Path, architecture: Architecture, tokenizer: Any, tokens: Tensor, reference: Tensor, dtype: str
) -> ReadBack | LogitDifference:
    """Read a file back, and compare its logits with the run's where llama.cpp is installed.

    Args:
        path: The GGUF file.
        architecture: The model.
        tokenizer: The tokenizer with the chat template used in training.
        tokens: Token ids ``[1, S]``.
        reference: The run's logits on these tokens, ``[1, S, V]``.
        dtype: Type of the file's weights.

    Raises:
        ArtifactError: The file holds something else, or llama.cpp computes something else.
    """
    same = read_back(path, architecture, dtype)
    if not has_llama_cpp():
        return same
    texts = [REFERENCE_TEXT, *_QUESTIONS]
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": question}] for question in _QUESTIONS]
        texts += [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
    encoded = [(text, tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return check_with_llama_cpp(path, tokens, reference, encoded, dtype)
