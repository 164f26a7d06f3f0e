"""Prompts: one code path for training and evaluation, EOS that is learnt, contexts that are cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from flexperts.data.batches import IGNORED, pad_batch
from flexperts.data.prompts import PromptEncoder, Template
from flexperts.data.rows import Row
from flexperts.errors import ConfigError, DataError
from flexperts.testing import byte_tokenizer

ROW = Row("Say it.", "Yes, é.", "A note.")


def encoder(template: Template = "auto", *, chat: bool = True, max_length: int = 512) -> PromptEncoder:
    return PromptEncoder(byte_tokenizer(chat=chat), template, max_length)


ENCODERS = {"chat": encoder("chat"), "alpaca": encoder("alpaca")}
characters = st.characters(codec="utf-8", exclude_characters="\U000f0000\U000f0001")
texts = st.text(characters, max_size=20)
templates = pytest.mark.parametrize("template", ["chat", "alpaca"])


def response(made: PromptEncoder, text: str) -> list[int]:
    """Return the tokens of an answer with what ends it, as they follow any prompt of the byte tokenizer."""
    example = made.encode(Row("Q", text))
    return list(example.input_ids[example.prompt_length :])


def test_chat_prompt() -> None:
    made = encoder()
    assert made.tokenizer.decode(made.prompt("Say it.", "A note.")) == "<|user|>Say it.\n\nA note.\n<|assistant|>"
    assert made.tokenizer.decode(made.prompt("Say it.")) == "<|user|>Say it.\n<|assistant|>"


def test_alpaca_prompt() -> None:
    made = encoder(chat=False)
    with_input = (
        "Below is an instruction that describes a task, paired with an input. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay {it}.\n\n### Input:\nA {note}.\n\n### Response:\n"
    )
    assert made.tokenizer.decode(made.prompt("Say {it}.", "A {note}.")) == with_input
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay it.\n\n### Response:\n"
    )
    assert made.tokenizer.decode(made.prompt("Say it.")) == without


def test_auto_is_chat_where_there_is_a_template() -> None:
    assert encoder().prompt("Q") == encoder("chat").prompt("Q")
    assert encoder(chat=False).prompt("Q") == encoder("alpaca").prompt("Q")
    assert encoder("chat").prompt("Q") != encoder("alpaca").prompt("Q")


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="the tokenizer has no chat template; set it to 'alpaca'"):
        encoder("chat", chat=False)


@templates
@given(
    instruction=texts.filter(bool),
    context=texts,
    answer=texts.filter(bool),
)
def test_the_training_prompt_is_the_evaluation_prompt(
    template: Template, instruction: str, context: str, answer: str
) -> None:
    made = ENCODERS[template]
    example = made.encode(Row(instruction, answer, context))
    assert list(example.prompt) == made.prompt(instruction, context)
    assert list(example.input_ids) == made.prompt(instruction, context) + response(made, answer)
    assert made.tokenizer.decode(example.input_ids[example.prompt_length : -1]) == answer
    assert not example.cut


@templates
def test_eos_is_the_last_label_and_survives_padding(template: Template) -> None:
    made = encoder(template)
    tokenizer = made.tokenizer
    rows = [ROW, Row("Say it.", "A much longer answer than the other one.", "A note.")]
    batch = pad_batch(made.encode_all(rows), tokenizer.pad_token_id)
    for number, row in enumerate(rows):
        labels = [t for t in batch.labels[number].tolist() if t != IGNORED]
        assert labels[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(labels[:-1]) == row.response
    assert tokenizer.pad_token_id not in batch.labels


def with_pad(pad: str | None, *others: str) -> PreTrainedTokenizerFast:
    settings: dict[str, Any] = {"eos_token": "</s>", "pad_token": pad}
    settings |= dict(zip(("bos_token", "unk_token"), others, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, **settings)


@pytest.mark.parametrize(
    ("pad", "others", "chosen"),
    [
        ("<pad>", ["<s>"], "<pad>"),  # nothing to change
        ("</s>", ["<s>"], "<s>"),
        (None, ["<s>"], "<s>"),
        ("</s>", ["<s>", "<unk>"], "<unk>"),
        (None, ["<s>", "<unk>"], "<unk>"),
        ("</s>", ["</s>", "<unk>"], "<unk>"),  # one token for begin, end and padding
    ],
)
def test_pad_never_is_eos(pad: str | None, others: list[str], chosen: str) -> None:
    tokenizer = with_pad(pad, *others)
    PromptEncoder(tokenizer)
    assert tokenizer.pad_token == chosen
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("pad", ["</s>", None])
def test_a_tokenizer_with_no_token_to_pad_with_is_refused(pad: str | None) -> None:
    with pytest.raises(ConfigError, match="must differ from EOS"):
        PromptEncoder(with_pad(pad))


@templates
def test_a_long_context_is_cut_and_counted(template: Template) -> None:
    whole = len(encoder(template).encode(ROW).input_ids)
    made = encoder(template, max_length=whole)
    assert len(made.encode(ROW).input_ids) == whole
    assert not made.encode(ROW).cut
    long = Row(ROW.instruction, ROW.response, "A note." + " and more" * 50)
    example = made.encode(long)
    assert example.cut
    assert len(example.input_ids) == whole
    text = made.tokenizer.decode(example.input_ids)
    assert ROW.instruction in text
    assert "A note." in text
    assert "and more" not in text
    assert list(example.input_ids[example.prompt_length :]) == response(made, ROW.response)
    assert [one.cut for one in made.encode_all([long, ROW, long])] == [True, False, True]


@given(st.text(characters, min_size=1, max_size=200), st.integers(0, 80))
def test_cut_rows_always_fit(context: str, room: int) -> None:
    """Cutting inside a character must end, and within the limit."""
    least = len(encoder().encode(Row("Say it.", "Yes.")).input_ids)
    made = encoder(max_length=least + room)
    example = made.encode(Row("Say it.", "Yes.", context))
    assert least <= len(example.input_ids) <= least + room
    assert made.tokenizer.decode(example.input_ids).startswith("<|user|>Say it.")
    assert list(example.input_ids[example.prompt_length :]) == response(made, "Yes.")


@templates
@pytest.mark.parametrize("context", ["", "A note."])
def test_a_row_that_cannot_fit_is_refused(template: Template, context: str) -> None:
    row = Row("Say it.", "Yes.", context)
    least = len(encoder(template).encode(Row("Say it.", "Yes.")).input_ids)
    assert len(encoder(template, max_length=least).encode(row).input_ids) == least
    with pytest.raises(DataError, match=f"training.max_length = {least - 1} must hold instruction and response"):
        encoder(template, max_length=least - 1).encode(row)


def test_rows_are_encoded_in_order() -> None:
    rows = [Row("Q", "A"), Row("Longer question", "B"), Row("Q", "C")]
    made = encoder()
    assert made.encode_all(rows) == [made.encode(row) for row in rows]


# Conversations.

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Say it."},
]


@templates
def test_a_conversation_of_one_turn_is_a_prompt(template: Template) -> None:
    made = ENCODERS[template]
    assert made.conversation(TURNS[-1:]) == made.prompt("Say it.")


def test_turns_before_the_last_are_kept_in_both_templates() -> None:
    chat = ENCODERS["chat"]
    told = "<|system|>Be brief.\n<|user|>Hi.\n<|assistant|>Hello.\n<|user|>Say it.\n<|assistant|>"
    assert chat.tokenizer.decode(chat.conversation(TURNS)) == told
    alpaca = ENCODERS["alpaca"]
    assert alpaca.conversation(TURNS) == alpaca.prompt("Say it.", "Be brief.\n\nuser: Hi.\n\nassistant: Hello.")


@pytest.mark.parametrize("messages", [[], TURNS[:3], [{"role": "tool", "content": "Hi."}, TURNS[3]]])
def test_other_conversations_are_refused(messages: list[dict[str, str]]) -> None:
    with pytest.raises(ConfigError, match="the last message is the user's"):
        ENCODERS["chat"].conversation(messages)


def test_what_the_chat_template_refuses_is_told() -> None:
    tokenizer = byte_tokenizer()
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    tokenizer.chat_template = refusing + tokenizer.chat_template
    strict = PromptEncoder(tokenizer, "chat")
    assert strict.tokenizer.decode(strict.conversation(TURNS[3:])) == "<|user|>Say it.\n<|assistant|>"
    with pytest.raises(ConfigError, match="no system turn here"):
        strict.conversation(TURNS)
