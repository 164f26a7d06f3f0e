"""An export's chat template writes the very tokens of training, whatever the base's own template is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from flexperts.config.run import RunConfig
from flexperts.data.prompts import PromptEncoder
from flexperts.engines.run import run_federation
from flexperts.export.exporting import export_run
from flexperts.export.template import stop_where_trained, trained_tokenizer
from flexperts.testing import byte_tokenizer, tiny_model

Message = dict[str, str]


def with_bos(*, chat: bool) -> Any:
    """A tokenizer that puts <s> before every text."""
    tokenizer = byte_tokenizer(chat=chat)
    tokenizer.add_bos_token = True
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def of(role: str, content: str) -> Message:
    return {"role": role, "content": content}


CONVERSATIONS: list[list[Message]] = [
    [of("user", "Say hi.")],
    [of("system", "The passage:\n\n'quoted' {{ 7 * 7 }} {% raw %}"), of("user", "Summarise it, “please”.")],
    [of("user", "One?"), of("assistant", "Two."), of("user", "Three?")],
    [of("system", ""), of("user", "Nothing before?")],
    [of("system", "a"), of("system", ""), of("user", "b"), of("assistant", "c\n"), of("user", "  d  ")],
    [of("user", "")],
]


def same(tokenizer: Any, encoder: PromptEncoder, messages: Sequence[Message]) -> None:
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(found) == encoder.conversation(messages)


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=str)
@pytest.mark.parametrize("chat", [True, False], ids=["over another template", "without one"])
@pytest.mark.parametrize("make", [byte_tokenizer, with_bos], ids=["plain", "with BOS"])
def test_alpaca_prompts_are_those_of_training(make: Any, chat: bool, messages: list[Message]) -> None:
    encoder = PromptEncoder(make(chat=chat), "alpaca", 4096)
    tokenizer = trained_tokenizer(encoder)
    same(tokenizer, encoder, messages)
    assert encoder.tokenizer.chat_template != tokenizer.chat_template  # the run's own stays as it was


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\U000f0000\U000f0001"), max_size=20)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), max_size=4))
@settings(max_examples=60)
def test_alpaca_prompts_of_any_conversation(turns: list[tuple[str, str]]) -> None:
    encoder = PromptEncoder(with_bos(chat=False), "alpaca", 4096)
    if not any(token in text for _, text in turns for token in encoder.tokenizer.all_special_tokens):
        same(trained_tokenizer(encoder), encoder, [*(of(*turn) for turn in turns), of("user", "Well?")])


@pytest.mark.parametrize("context", ["", "A passage."])
def test_a_passage_is_a_system_turn(context: str) -> None:
    encoder = PromptEncoder(with_bos(chat=False), "alpaca", 4096)
    before = [of("system", context)] if context else []
    tokenizer = trained_tokenizer(encoder)
    messages = [*before, of("user", "Summarise it.")]
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(found) == encoder.prompt("Summarise it.", context)


def test_a_whole_conversation_ends_as_training_does() -> None:
    encoder = PromptEncoder(with_bos(chat=False), "alpaca", 4096)
    tokenizer = trained_tokenizer(encoder)
    asked = [of("system", "A passage."), of("user", "Summarise it.")]
    whole = tokenizer.apply_chat_template([*asked, of("assistant", "Short.")], return_dict=True)["input_ids"]
    answer = [*tokenizer("Short.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert list(whole) == [*encoder.conversation(asked), *answer]
    bare = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=False)
    assert bare.endswith("A passage.\n\n")


def test_a_chat_template_stays_the_bases() -> None:
    encoder = PromptEncoder(byte_tokenizer(), "auto", 4096)
    assert trained_tokenizer(encoder) is encoder.tokenizer


def test_where_no_template_writes_the_tokens_there_is_none() -> None:
    """Here every prompt has a token in front that no text is read as."""
    tokenizer = with_bos(chat=True)
    encoder = PromptEncoder(tokenizer, "alpaca", 4096)
    real = encoder.prompt
    encoder.prompt = lambda instruction, context="": [7, *real(instruction, context)]  # type: ignore[method-assign]
    assert trained_tokenizer(encoder).chat_template is None


@pytest.mark.parametrize(
    ("template", "form"), [("alpaca", "transformers"), ("auto", "merged"), ("alpaca", "adapter")]
)
def test_an_exported_folder_has_the_template(
    recipe: Callable[..., RunConfig], tiny_base: Path, tmp_path: Path, template: str, form: str
) -> None:
    short = ("federation.rounds=1", "evaluation.rows=1", "evaluation.max_new_tokens=2", "training.local_steps=1")
    config = recipe(*short, "method.name=fedavg", f"model.template={template}")
    run_federation(config, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", form=form, check=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base if form == "adapter" else tmp_path / "out")
    if form == "adapter":
        tokenizer.chat_template = (tmp_path / "out" / "chat_template.jinja").read_text()
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(tiny_base), template, 640)  # type: ignore[arg-type]
    for messages in CONVERSATIONS[:3]:
        same(tokenizer, encoder, messages)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("a system turn before the question" in card) == (template == "alpaca")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt and not think %}<|im_start|>assistant\n{% endif %}"
)


def test_a_chat_template_goes_with_its_settings_and_its_end(tmp_path: Path) -> None:
    """A program that loads the folder renders as in training, and stops where an answer ended there."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML.replace("think", "think is not defined or think")
    encoder = PromptEncoder(tokenizer, settings={"think": False})
    model = tiny_model()
    stop_where_trained(model, encoder)
    assert encoder.end_token == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoder.end_token in model.generation_config.eos_token_id
    trained_tokenizer(encoder).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "Say hi."}]
    found = loaded.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(found) == encoder.prompt("Say hi.")


def test_generation_settings_that_name_the_end_stay_as_they_are() -> None:
    model, encoder = tiny_model(), PromptEncoder(byte_tokenizer())
    model.generation_config.eos_token_id = 257
    stop_where_trained(model, encoder)
    assert model.generation_config.eos_token_id == 257
