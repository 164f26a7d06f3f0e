"""Chat templates: what is trained is their own rendering, what they lose is refused, their clock stands still."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from flexperts.data.prompts import PromptEncoder, encoder_of
from flexperts.data.rows import Row
from flexperts.errors import ConfigError, DataError
from flexperts.recipe import parse_recipe
from flexperts.testing import byte_tokenizer

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ROW = Row("Say hi.", "Hi there.")


def tokenizer(template: Any, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    made = byte_tokenizer()
    made.add_tokens(["<|im_start|>", "<|im_end|>", "<|end|>", "<|eot|>"], special_tokens=True)
    made.add_tokens(["<think>", "</think>"])
    made.eos_token, made.chat_template = eos, template
    return made


def turn(template: Any, **settings: Any) -> tuple[str, str]:
    """Return the text of a row's prompt, and of its response with what ends it."""
    made = PromptEncoder(tokenizer(template), settings=settings)
    example = made.encode(ROW)
    assert list(example.prompt) == made.prompt(ROW.instruction) == made.conversation([user(ROW.instruction)])
    assert example.input_ids[-1] == made.end_token
    decode = made.tokenizer.decode
    return decode(example.prompt), decode(example.input_ids[example.prompt_length :])


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        pytest.param(
            LOOP + ASK,
            "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n",
            "Hi there.<|im_end|>",
            id="ChatML",
        ),
        pytest.param(
            "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n{% endfor %}",
            "### user\nSay hi.\n### assistant\n",
            "Hi there.</s>",
            id="no generation prompt, no end",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{% if m.role == 'assistant' %}</s>"
            "{% endif %} {% endfor %}",
            "USER: Say hi. ASSISTANT:",
            " Hi there.</s>",
            id="no generation prompt, a space before answers",
        ),
        pytest.param(
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
            "<s>[INST] Say hi. [/INST]",
            " Hi there. </s>",
            id="the prompt ends with the question",
        ),
        pytest.param(
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
            "<|user|>\nSay hi.<|end|>\n<|assistant|>\n",
            "Hi there.<|end|>",
            id="end of turn and end of text",
        ),
        pytest.param(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|><|eot|>{% endfor %}" + ASK,
            "<|im_start|>user\nSay hi.<|end|><|eot|><|im_start|>assistant\n",
            "Hi there.<|end|><|eot|>",
            id="two tokens end a turn",
        ),
        pytest.param(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
            "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + ASK,
            "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nHi there.<|im_end|>",
            id="empty thinking in the last answer",
        ),
        pytest.param(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content }}<|end|>.<|eot|>{% endgeneration %}{% else %}{{ m.content }}<|eot|>{% endif %}\n"
            "{% endfor %}" + ASK,
            "<|im_start|>user\nSay hi.<|eot|><|im_start|>assistant\n",
            "Hi there.<|end|>.<|eot|>",
            id="marked as generated",
        ),
        pytest.param(
            "\n{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant> {% endif %}",
            "\nuser> Say hi.\nassistant> ",
            "Hi there.</s>",
            id="a prompt that ends with a space",
        ),
    ],
)
def test_the_trained_turn_is_the_template_s_turn(template: str, prompt: str, response: str) -> None:
    assert turn(template) == (prompt, response)


def test_a_missing_generation_prompt_is_said_once_and_goes_with_the_template() -> None:
    lacking = "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n{% endfor %}"
    made = PromptEncoder(tokenizer(lacking))
    assert len(made.notices) == 1
    assert made.chat is not None
    rendered = made.tokenizer.apply_chat_template(
        [user("Q")], chat_template=made.chat.template, add_generation_prompt=True, tokenize=False
    )
    assert rendered == "### user\nQ\n### assistant\n"
    assert PromptEncoder(tokenizer(made.chat.template)).notices == []


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% if add_generation_prompt %}<a>{% endif %}", "does not write the question"),
        ("{{ messages[0].role }}{{ messages[-1].role }}" + ASK, "does not write the question"),
        ("{{ messages[0].content }}" + ASK, "does not write the answer"),
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}" + ASK, "does not write the question"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[5].content }}", "UndefinedError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages | nofilter }}", "TemplateAssertionError"),
        ("{{ raise_exception('only with tools') }}", "only with tools"),
        (
            {"rag": LOOP, "tool_use": LOOP},
            "chat templates rag, tool_use: one of several templates must be called default",
        ),
        (
            LOOP + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
            "differs from the text that it writes before",
        ),
        (
            LOOP + "{% if not add_generation_prompt %}.{% endif %}{% if add_generation_prompt %}<b>{% endif %}",
            "differs from the text that it",
        ),
    ],
)
def test_templates_that_cannot_be_trained_with_are_refused(template: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        PromptEncoder(tokenizer(template))
    assert "model.template = 'alpaca'" in caught.value.remedy
    PromptEncoder(tokenizer(template), "alpaca")  # the remedy helps


def test_a_default_among_several_templates_is_taken() -> None:
    assert turn({"default": LOOP + ASK, "rag": "{{ 1 / 0 }}"})[1] == "Hi there.<|im_end|>"


def test_variables_choose_a_template_s_variant() -> None:
    thinking = "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
    template = LOOP + "{% if add_generation_prompt %}<|im_start|>assistant\n" + thinking + "{% endif %}"
    with pytest.raises(ConfigError, match="chat_template_kwargs"):
        turn(template)
    assert turn(template, enable_thinking=False)[1] == "Hi there.<|im_end|>"
    settings = {"a": 'x\n"é😀{{', "b": [1, True], "c": {"d": 1.5}}
    shown = "{{ a }}|{{ b }}|{{ c.d }}|" + LOOP + ASK
    assert turn(shown, **settings)[0].startswith('x\n"é😀{{|[1, True]|1.5|<|im_start|>user')


@pytest.mark.parametrize(
    ("template", "row", "said"),
    [
        (LOOP.replace("m['content']", "m['content'].split('#')[0]") + ASK, Row("Q # more", "A"), "the user's turn"),
        (
            LOOP.replace("m['content']", "m['content'].split('</think>')[-1]") + ASK,
            Row("Q", "x</think>A"),
            "the answer",
        ),
        (LOOP.replace("m['content']", "m['content'][:60]") + ASK, Row("Q", "A" * 100), "the answer"),
        (
            "{% if messages[0].content == 'Q2' %}{{ raise_exception('no') }}{% endif %}" + LOOP + ASK,
            Row("Q2", "A"),
            "no",
        ),
    ],
)
def test_a_row_that_a_template_changes_is_refused_by_name(template: str, row: Row, said: str) -> None:
    made = PromptEncoder(tokenizer(template))
    made.encode(ROW)
    named = Row(row.instruction, row.response, where="a.csv, row 7")
    with pytest.raises(DataError, match=rf"^a.csv, row 7: .*{said}") as caught:
        made.encode(named)
    assert row.response not in str(caught.value) or len(row.response) == 1


def test_texts_are_in_no_error_of_a_template() -> None:
    template = (
        "{% if 'code' in messages[0].content %}{{ raise_exception('bad: ' + messages[0].content) }}{% endif %}"
    )
    made = PromptEncoder(tokenizer(template + LOOP + ASK))
    with pytest.raises(ConfigError, match="TemplateError") as caught:
        made.conversation([user("the code is hidden-42")])
    assert "hidden-42" not in str(caught.value)


def test_a_template_that_loses_the_system_turn_says_so() -> None:
    made = PromptEncoder(
        tokenizer("{% for m in messages if m.role != 'system' %}{{ m.content }}<|eot|>{% endfor %}")
    )
    made.conversation([user("hi")])
    with pytest.raises(DataError, match="it must write the system's turn unchanged"):
        made.conversation([{"role": "system", "content": "Be brief."}, user("hi")])


def test_templates_that_change_case_or_make_json_keep_the_question() -> None:
    upper = PromptEncoder(tokenizer(LOOP.replace("m['content']", "m['content'] | upper") + ASK))
    assert "SAY HI." in upper.tokenizer.decode(upper.prompt("Say hi."))
    as_json = PromptEncoder(tokenizer(LOOP.replace("m['content']", "m['content'] | tojson") + ASK))
    assert r'"Say \"hi\"\nnow"' in as_json.tokenizer.decode(as_json.prompt('Say "hi"\nnow'))


# The clock.

CLOCK = "{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%A, %-d.%-m.%y %H:%M') }}|" + LOOP + ASK


def test_a_template_is_told_one_day() -> None:
    made = PromptEncoder(tokenizer(CLOCK), date="2024-02-09")
    assert made.chat is not None
    assert made.chat.date == "2024-02-09"
    told = made.tokenizer.decode(made.prompt("Q"))
    assert told.startswith("09 Feb 2024|Friday, 9.2.24 00:00|<|im_start|>user\nQ")
    assert made.prompt("Q") == PromptEncoder(tokenizer(CLOCK), date="2024-02-09").prompt("Q")
    assert made.prompt("Q") != PromptEncoder(tokenizer(CLOCK), date="2024-02-10").prompt("Q")


@pytest.mark.parametrize(
    "form", ["%Y-%m-%d", "%j %U %a %B", "%x", "%F", "100%% on %d", "%%d %%%d", "%-j", "no date"]
)
def test_the_day_is_written_as_strftime_does(form: str) -> None:
    template = f"{{{{ strftime_now('{form}') }}}}|" + LOOP + ASK
    made = PromptEncoder(tokenizer(template), date="2024-02-09")
    assert made.tokenizer.decode(made.prompt("Q")).split("|")[0] == datetime(2024, 2, 9).strftime(form)


def test_a_clock_inside_of_a_macro_stands_still_too() -> None:
    macro = "{% macro head() %}{{ 'On ' + strftime_now('%Y') }}{% endmacro %}{{ head() }}|" + LOOP + ASK
    made = PromptEncoder(tokenizer(macro), date="1999-01-01")
    assert made.tokenizer.decode(made.prompt("Q")).startswith("On 1999|")


def test_without_a_date_it_is_today_and_other_templates_have_none() -> None:
    made, other = PromptEncoder(tokenizer(CLOCK)), PromptEncoder(tokenizer(LOOP + ASK))
    assert made.chat is not None
    assert other.chat is not None
    assert made.tokenizer.decode(made.prompt("Q")).startswith(f"{datetime.now():%d %b}")
    assert made.chat.date == f"{datetime.now():%Y-%m-%d}"
    assert other.chat.date is None


# What ends an answer.


def test_a_tokenizer_without_eos_is_welcome_where_the_template_ends_turns() -> None:
    made = PromptEncoder(tokenizer(LOOP + ASK, eos=None))
    assert made.tokenizer.convert_ids_to_tokens(made.end_token) == "<|im_end|>"
    with pytest.raises(ConfigError, match="no token that ends a turn"):
        PromptEncoder(tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}", eos=None))


@pytest.mark.parametrize(("longest", "fits"), [(1024, True), (1025, False)])
def test_rows_cannot_be_longer_than_the_base_reads(tiny_base: Any, longest: int, fits: bool) -> None:
    from flexperts.modeling.load import load_tokenizer

    config = parse_recipe(f'[model]\nbase = "{tiny_base}"\n[data.silos]\n[training]\nmax_length = {longest}')
    loaded = load_tokenizer(config.model)
    if fits:
        encoder_of(config, *loaded)
        return
    with pytest.raises(ConfigError, match=r"training.max_length = 1025: the base reads at most 1024 tokens"):
        encoder_of(config, *loaded)
