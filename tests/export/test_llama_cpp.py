"""GGUF files in llama.cpp itself. Needs the extra: ``make llama-cpp``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from flexperts.config.run import RunConfig
from flexperts.data.prompts import PromptEncoder
from flexperts.engines.run import run_federation
from flexperts.export.content import logits_of
from flexperts.export.exporting import export_run
from flexperts.export.gguf.architectures import architecture_of
from flexperts.export.gguf.folder import check_gguf, write_gguf
from flexperts.export.gguf.vocabulary import _QWEN2
from flexperts.export.verification import LogitDifference
from flexperts.recipe import parse_recipe
from flexperts.testing import tiny_model

from .test_export import SHORT
from .test_gguf import CHATML, SIZE, TOKENS, smol

pytestmark = pytest.mark.llama_cpp
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITTERS = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
MAKE: dict[str, Callable[[], Any]] = {
    "qwen2_moe": lambda: tiny_model("qwen2_moe", vocab_size=SIZE),
    "qwen3_moe": lambda: tiny_model("qwen3_moe", vocab_size=SIZE, norm_topk_prob=True),
    "olmoe": lambda: tiny_model("olmoe", vocab_size=SIZE, num_key_value_heads=4),
    "smol-moe's kind": smol,
}


def checked(model: Any, tokenizer: Any, path: Path, dtype: str) -> LogitDifference:
    architecture = architecture_of(model)
    write_gguf(path, "model", architecture, tokenizer, PromptEncoder(tokenizer), dtype)
    found = check_gguf(path, architecture, tokenizer, TOKENS, logits_of(model, TOKENS), dtype)
    assert isinstance(found, LogitDifference)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
@pytest.mark.parametrize("kind", MAKE)
def test_llama_cpp_computes_what_the_model_does(kind: str, dtype: str, tiny_base: Path, tmp_path: Path) -> None:
    found = checked(MAKE[kind](), AutoTokenizer.from_pretrained(tiny_base), tmp_path / "model.gguf", dtype)
    assert found.relative < {"float32": 1e-4, "float16": 1e-2, "bfloat16": 0.05, "q8_0": 0.05}[dtype]
    assert dtype != "float32" or found.same == 1


@pytest.mark.parametrize("splitter", SPLITTERS)
def test_llama_cpp_cuts_text_as_the_tokenizer(splitter: str, tiny_base: Path, tmp_path: Path) -> None:
    """Control tokens and a chat's prompt, too: ``check_gguf`` refuses other tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.backend_tokenizer.pre_tokenizer = SPLITTERS[splitter]
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    model = tiny_model("qwen2_moe", vocab_size=SIZE + 8)
    checked(model, tokenizer, tmp_path / "model.gguf", "float32")


@pytest.mark.parametrize(
    ("settings", "client"),
    [
        (("flex",), None),
        (("flex", "graft.place=in_place"), "clinic"),
        (("ditto",), "clinic"),
        (("fedmoe_da",), "shop"),
    ],
)
def test_a_runs_models_in_llama_cpp(
    settings: tuple[str, ...], client: str | None, recipe: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run_federation(recipe(*SHORT, *(f"method.name={s}" if "=" not in s else s for s in settings)), tmp_path / "run")
    done = export_run(tmp_path / "run", tmp_path / "out", client=client, form="gguf", dtype="float32")
    assert isinstance(done.difference, LogitDifference)
    assert done.difference.relative < 1e-4
    assert "Loaded in llama.cpp" in (done.folder / "README.md").read_text()


RECIPE = """
[model]
base = "smol-moe"
[data.silos]
train_rows = 8
test_rows = 4
[training]
local_steps = 4
lr = 2e-3
personal_lr = 6e-3
[federation]
rounds = 1
[evaluation]
rows = 2
max_new_tokens = 24
"""


ASK = """
import json
import sys

from llama_cpp import Llama

model = Llama(sys.argv[1], n_ctx=1024, verbose=False)
for line in open(sys.argv[2]):
    row = json.loads(line)
    asked = f"{row['instruction']}\\n\\n{row['context']}" if row["context"] else row["instruction"]
    answer = model.create_chat_completion([{"role": "user", "content": asked}], max_tokens=24, temperature=0)
    print(json.dumps([answer["choices"][0]["message"]["content"].strip(), row["global"].strip()]))
"""


def test_smol_moe_answers_in_llama_cpp_as_in_the_run(tmp_path: Path) -> None:
    """The global model's stored answers, from the chat template in the file; their ends may differ by rounding."""
    run_federation(parse_recipe(RECIPE), tmp_path / "run")
    done = export_run(tmp_path / "run", tmp_path / "out", form="gguf")
    assert isinstance(done.difference, LogitDifference)
    assert done.difference.relative < 0.01
    [file] = done.folder.glob("*.gguf")
    words = [sys.executable, "-c", ASK, file, tmp_path / "run" / "predictions" / "clinic.jsonl"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 2
    for there, here in map(json.loads, said):
        assert there[:20] == here[:20]
