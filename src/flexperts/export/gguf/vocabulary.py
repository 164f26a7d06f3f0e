"""A tokenizer as llama.cpp reads it from a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import gguf

from flexperts.data.prompts import PromptEncoder
from flexperts.errors import ConfigError

_BYTES = ("ByteLevel", True)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITTERS = {
    (_BYTES,): "gpt-2",
    (("Digits", True), _BYTES): "smollm",
    (("Split", _QWEN2, "Isolated", False), ("ByteLevel", False)): "qwen2",
}
"""How a tokenizer cuts text before it merges bytes -> llama.cpp's name of this."""


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, encoder: PromptEncoder, size: int) -> None:
    """Write tokens, merges, control tokens and the chat template.

    Args:
        writer: The file's writer.
        tokenizer: The tokenizer with the chat template used in training.
        encoder: The encoder of training, which knows what ends an answer.
        size: Rows of the embedding.

    Raises:
        ConfigError: llama.cpp would cut text into other tokens.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter = _splitter(backend)
    words, kinds = _tokens(tokenizer, backend, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    ids["eot"] = encoder.end_token
    for name, token in ids.items():
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def adds_bos(tokenizer: Any) -> bool:
    """Return whether a tokenizer puts BOS before every text; llama.cpp then does so, too."""
    return bool(tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)


def _splitter(backend: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how a tokenizer cuts text, or refuse the tokenizer."""
    model, normalizer = backend["model"], backend["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not model["merges"]:
        raise _refused("it does not merge bytes as GPT-2's does")
    if model.get("ignore_merges") or (normalizer and normalizer["type"] != "NFC"):
        raise _refused("it changes or looks up text before it merges bytes")
    steps = tuple(_steps(backend["pre_tokenizer"]))
    if steps not in _SPLITTERS:
        raise _refused(f"its way to cut text is not one of {', '.join(_SPLITTERS.values())}")
    return _SPLITTERS[steps]


def _steps(pre: Mapping[str, Any] | None) -> Iterator[tuple[Any, ...]]:
    match pre:
        case {"type": "Sequence", "pretokenizers": list(inner)}:
            for each in inner:
                yield from _steps(each)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": by_words}:
            yield "ByteLevel", by_words
        case {"type": "Digits", "individual_digits": single}:
            yield "Digits", single
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}:
            yield "Split", pattern, behavior, invert
        case _:
            yield ("unknown",)


def _tokens(tokenizer: Any, backend: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the text and the kind of every token; rows of the embedding without a token are unused."""
    by_id = {token: text for text, token in tokenizer.get_vocab().items()}
    words = [by_id.get(token, f"[PAD{token}]") for token in range(size)]
    kinds = [gguf.TokenType.NORMAL if token in by_id else gguf.TokenType.UNUSED for token in range(size)]
    for added in backend["added_tokens"]:
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    return words, kinds


def _refused(rule: str) -> ConfigError:
    remedy = "use --form transformers, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
    return ConfigError("--form gguf with the base's tokenizer", rule, remedy)
