"""The Modelfile with which Ollama imports a GGUF file: the chat template as a Go template.

Ollama does not run the Jinja template in a file. A Go template can say which text stands before a turn, by the
roles of this turn and of the one before it. Whether a chat template is of this kind is found by rendering
conversations. Where it is not, there is no Modelfile: Ollama would write other prompts than those of training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexperts.export.gguf.vocabulary import adds_bos

Render = Callable[[Sequence[Mapping[str, str]]], str]

_ROLES = {"system": ("",), "user": ("", "system", "assistant"), "assistant": ("user",)}
"""Role of a turn -> the roles that may come before it."""
_TRIED = ("u", "su", "uau", "suau", "uauau", "suauau")
_NAMES = {"s": "system", "u": "user", "a": "assistant"}
_TEXTS = ("alpha", "  beta\n", "", "gamma {{ 7 }} 'delta'", "epsilon")
"""Contents that show whether a template changes what it writes."""
_HEAD = """\
# Made by flexperts: ollama create NAME -f Modelfile
FROM ./{file}
TEMPLATE \"\"\"{template}\"\"\"
PARAMETER stop {stop}
# Greedy answers, as those that were scored.
PARAMETER temperature 0
"""


def modelfile(file: str, tokenizer: Any, end: str) -> str | None:
    """Return a Modelfile, or None if no Go template writes the prompts of training.

    Args:
        file: Name of the GGUF file next to it.
        tokenizer: The tokenizer with the chat template used in training.
        end: The token that ends an answer.
    """
    if not tokenizer.chat_template:
        return None

    def render(turns: Sequence[Mapping[str, str]]) -> str:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text

    try:
        before = _before(render)
    except Exception:  # a template may refuse a conversation in any way
        return None
    if before is None or any('"""' in text for text in before.values()):
        return None
    # llama.cpp puts BOS before a prompt by itself.
    start = tokenizer.bos_token if adds_bos(tokenizer) else ""
    before = {pair: text.removeprefix(start) if not pair[0] else text for pair, text in before.items()}
    return _HEAD.format(file=file, template=_go(before), stop=json.dumps(end, ensure_ascii=False))


def _before(render: Render) -> dict[tuple[str, str], str] | None:
    """Return the text before a turn by the roles of the turn before it and of this one, or None.

    The start of a conversation is the role "", the start of the answer the role "answer".
    """
    found: dict[tuple[str, str], str] = {}
    for shape in _TRIED:
        roles = [_NAMES[letter] for letter in shape]
        turns = [{"role": role, "content": f"<{number}>"} for number, role in enumerate(roles)]
        rest = render(turns)
        for pair, turn in zip(zip(["", *roles], [*roles, "answer"], strict=True), [*turns, None], strict=True):
            text, mark, rest = rest.partition(turn["content"]) if turn else (rest, "-", "")
            if not mark or found.setdefault(pair, text) != text:
                return None
    for shape in _TRIED:
        roles = [_NAMES[letter] for letter in shape]
        turns = [{"role": role, "content": _TEXTS[number % len(_TEXTS)]} for number, role in enumerate(roles)]
        pairs = zip(["", *roles], [*roles, "answer"], strict=True)
        contents = [*(turn["content"] for turn in turns), ""]
        if render(turns) != "".join(found[pair] + text for pair, text in zip(pairs, contents, strict=True)):
            return None
    return found


def _go(before: Mapping[tuple[str, str], str]) -> str:
    """Return the Go template that writes these texts."""
    roles = "{{ else }}".join(
        f'{{{{ if eq .Role "{role}" }}}}{_choice(role, befores, before)}' for role, befores in _ROLES.items()
    )
    ends = "{{ end }}" * len(_ROLES)
    turns = f"{{{{ range .Messages }}}}{roles}{ends}{{{{ .Content }}}}{{{{ $last = .Role }}}}{{{{ end }}}}"
    return f'{{{{ $last := "" }}}}{turns}{_literal(before["user", "answer"])}'


def _choice(role: str, befores: Sequence[str], before: Mapping[tuple[str, str], str]) -> str:
    """Return the part of the Go template that writes the text before a turn of one role."""
    *conditional, last = befores
    tests = "".join(
        f'{{{{ if eq $last "{other}" }}}}{_literal(before[other, role])}{{{{ else }}}}' for other in conditional
    )
    return tests + _literal(before[last, role]) + "{{ end }}" * len(conditional)


def _literal(text: str) -> str:
    """Return a text as Go's template language writes it."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if "{{" in text else text
