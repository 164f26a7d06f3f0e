"""GGUF files: their weights, lengths and vocabulary by other readers, and what llama.cpp cannot compute."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tokenizers import Regex, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from flexperts.config.run import RunConfig
from flexperts.data.prompts import PromptEncoder
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError, ConfigError
from flexperts.export.content import logits_of
from flexperts.export.exporting import export_run
from flexperts.export.gguf import folder as folders
from flexperts.export.gguf.architectures import architecture_of
from flexperts.export.gguf.engine import has_llama_cpp
from flexperts.export.gguf.file import ReadBack, _is_rounded, encoded, read_back
from flexperts.export.gguf.folder import write_gguf
from flexperts.export.gguf.modelfile import modelfile
from flexperts.export.gguf.vocabulary import _QWEN2, write_vocabulary
from flexperts.export.verification import LogitDifference
from flexperts.testing import tiny_model

KINDS = gguf.GGMLQuantizationType
SIZE = 1024
TOKENS = torch.randint(0, SIZE - 4, (1, 24), generator=torch.Generator().manual_seed(5))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
)


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def smol(**others: Any) -> Any:
    """A tiny model of smol-moe's kind: weights that sum to 1, shared experts without a gate, a dense layer."""
    its = {
        "vocab_size": SIZE,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "qkv_bias": False,
        "tie_word_embeddings": True,
    }
    model = tiny_model("qwen2_moe", **its | others)
    for name, parameter in model.named_parameters():
        if "shared_expert_gate" in name:
            parameter.zero_()
    return model


def written(model: Any, tokenizer: Any, folder: Path, dtype: str = "float32") -> Path:
    path = folder / "model.gguf"
    write_gguf(path, "model", architecture_of(model), tokenizer, PromptEncoder(tokenizer), dtype)
    return path


def contents(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The fields of a file, and its tensors in float32."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in reader.tensors}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_transformers_reads_the_file_as_the_model(family: str, dtype: str, tokenizer: Any, tmp_path: Path) -> None:
    """Its reader knows where llama.cpp has which weight; widths of experts it takes from the config."""
    normed = {"norm_topk_prob": family == "qwen3_moe"}
    model = tiny_model(family, vocab_size=SIZE, **normed)
    path = written(model, tokenizer, tmp_path, dtype)
    its = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    for name in (
        "num_attention_heads",
        "num_key_value_heads",
        "num_experts_per_tok",
        "hidden_size",
        "rms_norm_eps",
    ):
        assert getattr(its, name) == pytest.approx(getattr(model.config, name))
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=model.config, dtype=torch.float32
    )
    found = LogitDifference.between(logits_of(loaded.eval(), TOKENS), logits_of(model, TOKENS))
    limits = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "q8_0": 3e-2}
    assert found.relative < limits[dtype]
    assert dtype == "float32" or found.relative > limits[dtype] / 100


def granite(fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """A file of llama.cpp's granitemoe as transformers' model of that architecture."""
    its = {name.removeprefix("granitemoe."): value for name, value in fields.items()}
    head, heads = its["attention.key_length"], its["attention.head_count"]
    config = AutoConfig.for_model(
        "granitemoeshared",
        vocab_size=its["vocab_size"],
        hidden_size=its["embedding_length"],
        intermediate_size=its["feed_forward_length"],
        shared_intermediate_size=its["expert_shared_feed_forward_length"],
        num_hidden_layers=its["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=its["attention.head_count_kv"],
        max_position_embeddings=its["context_length"],
        rms_norm_eps=its["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": its["rope.freq_base"]},
        tie_word_embeddings="output.weight" not in tensors,
        attention_multiplier=head**-0.5,
        logits_scaling=its["logit_scale"],
        num_local_experts=its["expert_count"],
        num_experts_per_tok=its["expert_used_count"],
    )
    model = AutoModelForCausalLM.from_config(config)
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    for layer in range(its["block_count"]):
        of = {n.split(".", 2)[2]: t for n, t in tensors.items() if n.startswith(f"blk.{layer}.")}

        def halves(name: str, of: Any = of) -> torch.Tensor:
            weight = of[name]
            return weight.reshape(-1, head // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

        state |= {
            f"model.layers.{layer}.{name}": tensor
            for name, tensor in {
                "input_layernorm.weight": of["attn_norm.weight"],
                "post_attention_layernorm.weight": of["ffn_norm.weight"],
                "self_attn.q_proj.weight": halves("attn_q.weight"),
                "self_attn.k_proj.weight": halves("attn_k.weight"),
                "self_attn.v_proj.weight": of["attn_v.weight"],
                "self_attn.o_proj.weight": of["attn_output.weight"],
                "block_sparse_moe.router.weight": of["ffn_gate_inp.weight"],
                "block_sparse_moe.experts.gate_up_proj": torch.cat(
                    [of["ffn_gate_exps.weight"], of["ffn_up_exps.weight"]], 1
                ),
                "block_sparse_moe.experts.down_proj": of["ffn_down_exps.weight"],
                "shared_mlp.input_linear.weight": torch.cat(
                    [of["ffn_gate_shexp.weight"], of["ffn_up_shexp.weight"]]
                ),
                "shared_mlp.output_linear.weight": of["ffn_down_shexp.weight"],
            }.items()
        }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize(
    "others", [{}, {"mlp_only_layers": []}, {"decoder_sparse_step": 2, "mlp_only_layers": []}], ids=str
)
def test_a_model_of_smol_moes_kind_is_llama_cpps_granitemoe(
    others: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = smol(**others)
    granitemoe = granite(*contents(written(model, tokenizer, tmp_path)))
    found = LogitDifference.between(logits_of(granitemoe, TOKENS), logits_of(model, TOKENS))
    assert found.relative < 1e-5


def with_a_gate_of_zeros() -> Any:
    model = tiny_model("qwen2_moe")
    model.model.layers[1].mlp.shared_expert_gate.weight.zero_()
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tiny_model("gpt_oss"), "written for the types qwen2_moe, qwen3_moe, olmoe"),
        (lambda: tiny_model("qwen2_moe", norm_topk_prob=True), "norm_topk_prob = True"),
        (lambda: tiny_model("qwen2_moe", mlp_only_layers=[0]), "mlp_only_layers = [0]"),
        (with_a_gate_of_zeros, "shared_expert_gate = 0 in some layers"),
        (lambda: smol(norm_topk_prob=False), "norm_topk_prob = False"),
        (lambda: tiny_model("qwen3_moe", norm_topk_prob=False), "norm_topk_prob = False"),
        (lambda: tiny_model("qwen3_moe", norm_topk_prob=True, decoder_sparse_step=2), "mlp_only_layers = [0]"),
        (lambda: tiny_model("qwen2_moe", hidden_act="gelu"), "hidden_act = gelu"),
        (lambda: tiny_model("qwen2_moe", use_sliding_window=True, sliding_window=8), "use_sliding_window = True"),
        (lambda: tiny_model("olmoe", clip_qkv=8.0), "clip_qkv = 8.0"),
        (lambda: tiny_model("olmoe"), "num_key_value_heads = 2"),
        (
            lambda: tiny_model(
                "qwen2_moe", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
            ),
            "rope_type = linear",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        architecture_of(make())
    assert "use --form transformers" in refused.value.remedy


@given(
    values=arrays.arrays(
        np.float32, (2, 64), elements=st.floats(-1000, 1000, width=32, allow_nan=False, allow_subnormal=False)
    ),
    kind=st.sampled_from([KINDS.F32, KINDS.F16, KINDS.BF16, KINDS.Q8_0]),
    place=st.integers(0, 127),
)
@example(values=np.full((2, 64), 1.2e-38, np.float32), kind=KINDS.Q8_0, place=0)
@example(values=np.eye(2, 64, dtype=np.float32) * np.float32(1.2e-38), kind=KINDS.Q8_0, place=3)
@settings(max_examples=150)
def test_a_types_rounding_passes_and_a_step_more_does_not(values: Any, kind: Any, place: int) -> None:
    stored = dequantize(encoded(values, kind), kind)
    assert _is_rounded(values, stored, kind)
    steps = {KINDS.F32: 1e-6, KINDS.F16: 2**-9, KINDS.BF16: 2**-6, KINDS.Q8_0: 1 / 100}
    largest = np.abs(values.reshape(-1, 32)[place // 32]).max()
    other = stored.copy().reshape(-1)
    other[place] += steps[kind] * (largest if kind == KINDS.Q8_0 else abs(other[place])) + 1e-4
    assert not _is_rounded(values, other.reshape(values.shape), kind)


def test_a_value_beyond_float16_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe", vocab_size=SIZE)
    model.model.layers[0].self_attn.o_proj.weight[0, 0] = 7e4
    with np.errstate(over="ignore"):
        path = written(model, tokenizer, tmp_path, "float16")
    with pytest.raises(ArtifactError, match=r"blk\.0\.attn_output\.weight .* more than float16 rounds"):
        read_back(path, architecture_of(model), "float16")


def test_a_file_of_another_model_fails_the_check(tokenizer: Any, tmp_path: Path) -> None:
    path = written(tiny_model("qwen2_moe", vocab_size=SIZE), tokenizer, tmp_path, "q8_0")
    with pytest.raises(ArtifactError, match="differs from the model's by more than q8_0 rounds"):
        read_back(path, architecture_of(tiny_model("qwen2_moe", seed=1, vocab_size=SIZE)), "q8_0")


def vocabulary(tokenizer: Any, path: Path, size: int = SIZE) -> dict[str, Any]:
    writer = gguf.GGUFWriter(path, "qwen2moe")
    write_vocabulary(writer, tokenizer, PromptEncoder(tokenizer), size)
    return {name.removeprefix("tokenizer.ggml."): field.value for name, field in writer.kv_data[0].items()}


def test_the_vocabulary_is_the_tokenizers(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(["tracking"])
    tokenizer.chat_template = CHATML
    found = vocabulary(tokenizer, tmp_path / "x", size=SIZE + 3)
    words, kinds = found["tokens"], found["token_type"]
    assert len(words) == SIZE + 3
    by_id = {token: text for text, token in tokenizer.get_vocab().items()}
    assert all(words[token] == text for token, text in by_id.items())
    assert {words[i] for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL} >= {"<|im_end|>", "</s>"}
    assert kinds[tokenizer.convert_tokens_to_ids("tracking")] == gguf.TokenType.USER_DEFINED
    assert [k for i, k in enumerate(kinds) if i not in by_id] == [gguf.TokenType.UNUSED] * (SIZE + 3 - len(by_id))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert [tuple(merge.split(" ")) for merge in found["merges"]] == [tuple(pair) for pair in merges]
    assert (found["eos_token_id"], found["eot_token_id"]) == (
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    assert (found["add_bos_token"], found["add_eos_token"]) == (False, False)
    assert found["tokenizer.chat_template"] == CHATML


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(_QWEN2), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            "qwen2",
        ),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Digits(individual_digits=True), None),
        (pre_tokenizers.Metaspace(), None),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            None,
        ),
    ],
)
def test_how_text_is_cut_has_a_name_or_is_refused(
    steps: Any, name: str | None, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = steps
    if name:
        assert vocabulary(tokenizer, tmp_path / "x")["pre"] == name
        return
    with pytest.raises(ConfigError, match="its way to cut text is not one of gpt-2, smollm, qwen2"):
        vocabulary(tokenizer, tmp_path / "x")


def go(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Go's template language writes, as far as these templates use it."""
    parts = re.split(r"\{\{ (.+?) \}\}", template)
    place, last = 0, ""

    def block(turn: Mapping[str, str], running: bool) -> tuple[str, str]:
        nonlocal place, last
        out = ""
        while place < len(parts):
            part, is_action = parts[place], place % 2
            place += 1
            if not is_action:
                out += part if running else ""
            elif part in ("end", "else"):
                return out, part
            elif part.startswith("if eq "):
                what, asked = part.removeprefix("if eq ").split(" ")
                holds = (turn.get("role") if what == ".Role" else last) == json.loads(asked)
                text, ended = block(turn, running and holds)
                out += text
                if ended == "else":
                    out += block(turn, running and not holds)[0]
            elif part == "range .Messages":
                start = place
                for message in messages:
                    place = start
                    out += block(message, running)[0]
            elif part.startswith("$last"):
                last = turn["role"] if part.endswith(".Role") and running else last
            elif part == ".Content":
                out += turn["content"] if running else ""
            else:
                out += json.loads(part) if running else ""
        return out, ""

    return block({}, True)[0]


def template_of(text: str) -> str:
    found = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert found
    return found[1]


TURNS = st.lists(st.text(max_size=12), min_size=1, max_size=7).map(
    lambda texts: [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts[: len(texts) - 1 + len(texts) % 2])
    ]
)


@pytest.mark.parametrize(
    "chat", [CHATML, WITH_DEFAULT, "{{ '{{x}}' }}" + CHATML], ids=["plain", "default", "braces"]
)
def test_ollamas_template_writes_the_prompts_of_training(chat: str, tokenizer: Any) -> None:
    tokenizer.chat_template = chat
    text = modelfile("model.gguf", tokenizer, "<|im_end|>")
    assert text is not None
    assert "FROM ./model.gguf\n" in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text

    @given(TURNS, st.none() | st.text(max_size=12))
    @settings(max_examples=60)
    def same(turns: list[dict[str, str]], system: str | None) -> None:
        whole = [*([] if system is None else [{"role": "system", "content": system}]), *turns]
        wanted = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
        assert go(template_of(text), whole) == wanted

    same()


@pytest.mark.parametrize(
    "chat",
    [
        None,
        "{% for m in messages %}{{ m['content'] | trim }}\n{% endfor %}",
        "{% for m in messages %}{{ loop.index }} {{ m['content'] }}\n{% endfor %}",
        "{% for m in messages | reverse %}{{ m['content'] }}\n{% endfor %}",
        '{% for m in messages %}{{ m[\'content\'] }}"""{% endfor %}',
        "{{ raise_exception('no') }}",
    ],
)
def test_where_ollama_would_write_other_prompts_there_is_no_modelfile(chat: str | None, tokenizer: Any) -> None:
    tokenizer.chat_template = chat
    assert modelfile("model.gguf", tokenizer, "</s>") is None


def test_alpaca_is_beyond_ollamas_templates(tokenizer: Any) -> None:
    from flexperts.export.template import trained_tokenizer

    assert modelfile("model.gguf", trained_tokenizer(PromptEncoder(tokenizer, "alpaca")), "</s>") is None


SHORT = (
    "data.silos.train_rows=4",
    "training.lr=0.05",
    "training.personal_lr=0.3",
    "federation.rounds=1",
    "evaluation.max_new_tokens=1",
    "evaluation.rows=1",
)


@pytest.fixture(scope="module")
def run(recipe: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose personal experts are in place."""
    out = tmp_path_factory.mktemp("runs") / "run"
    run_federation(recipe(*SHORT, "method.name=flex", "graft.place=in_place"), out)
    return out


def test_a_runs_model_is_the_file_that_its_card_names(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "has_llama_cpp", lambda: False)
    done = export_run(run, tmp_path / "out", client="clinic", form="gguf", dtype="float32")
    assert isinstance(done.difference, ReadBack)
    assert done.state == "personalized"
    card = (done.folder / "README.md").read_text()
    count = len(gguf.GGUFReader(done.folder / "out-float32.gguf").tensors)
    assert f"All {count} tensors read back from the file, within the rounding of float32" in card
    assert 'Llama("out/out-float32.gguf"' in card
    assert "ollama create NAME -f Modelfile" in card
    assert {path.name for path in done.folder.iterdir()} == {"README.md", "Modelfile", "out-float32.gguf"}
    assert {path.stat().st_mode & 0o077 for path in done.folder.iterdir()} == {0}
    export_run(run, tmp_path / "stock", client="clinic", dtype="float32", check=False)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    loaded = AutoModelForCausalLM.from_pretrained(
        done.folder, gguf_file="out-float32.gguf", config=stock.config, dtype=torch.float32
    )
    assert LogitDifference.between(logits_of(loaded, TOKENS), logits_of(stock, TOKENS)).relative < 1e-5


def test_the_common_model_is_smaller_in_q8_0(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "has_llama_cpp", lambda: False)
    sizes = {}
    for dtype in (None, "q8_0"):
        done = export_run(run, tmp_path / str(dtype), form="gguf", dtype=dtype)
        assert done.state == "global"
        [file] = done.folder.glob("*.gguf")
        sizes[done.dtype] = sum(tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors)
    assert 0.5 < sizes["q8_0"] / sizes["float16"] < 0.8  # rows of 16 stay in float16


def test_a_model_with_grafts_is_refused(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_federation(recipe(*SHORT, "method.name=flex"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"no architecture of llama\.cpp has grafts"):
        export_run(tmp_path / "run", tmp_path / "out", client="clinic", form="gguf")
    assert not (tmp_path / "out").exists()


def test_llama_cpp_is_asked_where_it_is_installed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the package: what it says of the file decides."""
    package = tmp_path / "site" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "llama_cpp.py").write_text(
        "from types import SimpleNamespace\nllama_model_default_params = SimpleNamespace\n"
    )
    (package / "__init__.py").write_text(
        "GGML_TYPE_F32 = 0\n"
        "class Llama:\n"
        "    def __init__(self, path, **settings): pass\n"
        "    def tokenize(self, text, **settings): return [1]\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    assert has_llama_cpp()
    with pytest.raises(ArtifactError, match=r"llama\.cpp cuts text into other tokens than the tokenizer"):
        export_run(run, tmp_path / "out", form="gguf")
    assert not (tmp_path / "out").exists()
