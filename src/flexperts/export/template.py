"""The chat template of an export: it writes the prompts of training, even if the base's template does not."""

from __future__ import annotations

import copy
import json
from string import Formatter
from typing import Any

from flexperts.data.prompts import ALPACA, PromptEncoder
from flexperts.evaluation.generation import end_tokens

_SAMPLES = (("Say hi.", ""), ("Who signs?", "The term begins in May.\n\nTwo questions remain."))
_EXPRESSIONS = {
    "with_input": "(', paired with an input' if before.text else '')",
    "instruction": "messages[last]['content']",
    "input": "('### Input:\\n' + before.text + '\\n\\n' if before.text else '')",
}
_ASKED = "### Response:\n"
_TEMPLATE = (
    "{% set last = messages | length - (2 if messages[-1]['role'] == 'assistant' else 1) %}"
    "{% set before = namespace(text='') %}"
    "{% for turn in messages[:last] %}"
    "{% set before.text = before.text + ('' if loop.first else '\\n\\n')"
    " + (turn['content'] if turn['role'] == 'system' else turn['role'] + ': ' + turn['content']) %}"
    "{% endfor %}"
    "{{ PROMPT }}"
    "{% if messages[-1]['role'] == 'assistant' %}{{ ASKED + messages[-1]['content'] + END }}"
    "{% elif add_generation_prompt %}{{ ASKED }}{% endif %}"
)
"""As ``PromptEncoder.conversation``: the last user turn is the instruction, the turns before it are its input."""


def trained_tokenizer(encoder: PromptEncoder) -> Any:
    """Return a tokenizer whose chat template writes the prompts of training: the base's if it does, else a copy.

    Where the base has a chat template, a passage follows the question in the same turn, after an empty line; with
    the alpaca template, it is a system turn before the question. The copy has no template if no template can
    reproduce the tokens.
    """
    if encoder.chat and encoder.chat.template == encoder.tokenizer.chat_template:
        return encoder.tokenizer
    tokenizer = copy.deepcopy(encoder.tokenizer)
    if encoder.chat:
        tokenizer.chat_template = encoder.chat.template
        return tokenizer
    start = "".join(tokenizer.convert_ids_to_tokens(encoder.tokens.beginning))
    for begin in (start, f"{start} "):  # some tokenizers put a space before a text, but not after a control token
        tokenizer.chat_template = _alpaca(begin, tokenizer.eos_token)
        if all(_same(tokenizer, encoder, *sample) for sample in _SAMPLES):
            return tokenizer
    tokenizer.chat_template = None
    return tokenizer


def stop_where_trained(model: Any, encoder: PromptEncoder) -> None:
    """Add the token that ends an answer to a model's generation settings, if it is missing."""
    ends = end_tokens(model, encoder)
    named = model.generation_config.eos_token_id
    if encoder.end_token not in (named if isinstance(named, list) else [named]):
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


def writes_alpaca(template: str) -> bool:
    """Return whether a chat template is one that ``trained_tokenizer`` made for the alpaca template."""
    return _literal(ALPACA.partition("{")[0])[1:-1] in template and _literal(_ASKED) in template


def _alpaca(begin: str, end: str) -> str:
    pieces = [_literal(begin)]
    for literal, field, _, _ in Formatter().parse(ALPACA.removesuffix(_ASKED)):
        pieces += [_literal(literal)] if literal else []
        pieces += [_EXPRESSIONS[field]] if field else []
    values = {"PROMPT": " + ".join(pieces), "ASKED": _literal(_ASKED), "END": _literal(end)}
    text = _TEMPLATE
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def _literal(text: str) -> str:
    """Return a text as a Jinja literal."""
    return json.dumps(text, ensure_ascii=False)


def _same(tokenizer: Any, encoder: PromptEncoder, instruction: str, context: str) -> bool:
    turns = [{"role": "system", "content": context}] if context else []
    turns.append({"role": "user", "content": instruction})
    found = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    return list(found) == encoder.prompt(instruction, context)
