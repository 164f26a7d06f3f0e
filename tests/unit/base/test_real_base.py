"""The real base, built from its real weights (network or cache needed): run with -m slow."""

import subprocess
import sys

import pytest
import torch

from flexperts.smol_moe import calibrate, dense, sources
from flexperts.smol_moe.build import build_base

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source():
    return sources.find_dense()


@pytest.fixture(scope="module")
def dense_model(source):
    return dense.load_dense(source)


@pytest.fixture(scope="module")
def base(tmp_path_factory, source):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXPERTS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return build_base(source=str(source.path))


def losses(model, rows):
    out = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row])
            logits = model(input_ids=ids).logits[0, :-1].float()
            out.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(out)


def test_the_split_costs_little_on_texts_it_was_not_calibrated_on(base, dense_model):
    from transformers import AutoModelForCausalLM

    texts = calibrate.read_texts(calibrate.TEXTS / "held_out")
    rows = [dense_model.tokenizer(text)["input_ids"] for text in texts.values()]
    moe = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    difference = losses(moe, rows).mean() - losses(dense_model.model(), rows).mean()
    assert 0 < difference < 0.2


def test_a_fresh_process_without_flexperts_loads_and_uses_it(base):
    script = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(base)!r})
tokenizer = AutoTokenizer.from_pretrained({str(base)!r})
assert type(model).__name__ == "Qwen2MoeForCausalLM" and str(model.dtype) == "torch.bfloat16"
assert sum(p.numel() for p in model.parameters()) == 134_546_112
assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
chat = [{{"role": "user", "content": "What is the capital of France?"}}]
text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
assert text == "<|im_start|>user\\nWhat is the capital of France?<|im_end|>\\n<|im_start|>assistant\\n"
batch = tokenizer(text, return_tensors="pt")
out = model.generate(**batch, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(out[0, batch["input_ids"].shape[1]:], skip_special_tokens=True))
assert "flexperts" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_every_expert_is_used(base, dense_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    picked: dict[int, list[torch.Tensor]] = {}
    for layer in (4, 9, 14, 19, 24, 29):
        gate = model.model.layers[layer].mlp.gate
        gate.register_forward_hook(lambda _, args, out, at=layer: picked.setdefault(at, []).append(out[2]) or None)
    some = sorted(calibrate.read_texts().values())[::4]
    losses(model, [dense_model.tokenizer(text)["input_ids"] for text in some])
    for layer, chosen in picked.items():
        load = torch.bincount(torch.cat(chosen).flatten(), minlength=8).double()
        assert (load / load.sum()).min() > 0.02, layer
