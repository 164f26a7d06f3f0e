"""Healing a split of a tiny dense Llama: what a few steps do, what is stored, and that a killed run continues."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexperts.checked_file import read_sealed
from flexperts.config.model import ModelConfig
from flexperts.errors import ConfigError, ModelError
from flexperts.modeling.load import load_base
from flexperts.smol_moe import dense
from flexperts.smol_moe.build import convert
from flexperts.smol_moe.neuron_partition import load_neuron_partition
from flexperts.smol_moe.sources import from_path
from flexperts.smol_moe.upcycle import upcycle

HEAL = Path(__file__).parents[1] / "dev" / "heal"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHIPPED = {
    "a": "the quick brown fox jumps over the lazy dog, and then it sleeps " * 4,
    "b": "0123 + 45 = 168; " * 16,
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama of three layers and a byte tokenizer that has SmolLM2's control tokens."""
    folder = tmp_path_factory.mktemp("parent")
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIAL))
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; the shipped texts are short, and the report reads them too: what a random model
    learns on one text does not carry over to another."""
    monkeypatch.syspath_prepend(HEAL)
    import heal_base
    import texts

    for module in (heal_base, texts):
        monkeypatch.setattr(module, "read_texts", lambda folder=None: SHIPPED)
    return heal_base


@pytest.fixture
def run(script: Any, parent: Path) -> Callable[..., None]:
    """Runs the script with small settings and more options, as one text."""
    small = "--shared 32 --experts 4 --steps 6 --batch 4 --length 32 --rank 4 --lr 1e-2 --small-lr 1e-3"
    own = "--own-rows 6 --own-batch 4 --save-every 2"

    def run(out: Path, more: str = "") -> None:
        script.heal(script.parsed(f"--out {out} --source {parent} {small} {own} {more}".split()))

    return run


def test_a_few_steps_bring_the_split_closer_to_its_parent(run: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    run(out, "--steps 20 --batch 5 --length 128 --lr 0.01 --small-lr 0.0001 --rank 16 --own-rows 0")
    found = json.loads((out / "report.json").read_text())
    assert found["after"]["kl"] < 0.9 * found["before"]["kl"]
    assert found["after"]["parent_loss"] == found["before"]["parent_loss"]
    assert len(found["after"]["layers"]) == 3
    for layer in found["after"]["layers"].values():
        assert sum(layer["share"]) == pytest.approx(1)
        assert len(layer["norm"]) == 4
    assert "| 2 |" in capsys.readouterr().out
    assert found["bytes"] >= sum((out / f"{n}.safetensors").stat().st_size for n in ("delta", "partition"))


def test_the_folder_is_the_split_with_what_was_trained(script: Any, run: Any, parent: Path, tmp_path: Path) -> None:
    run(tmp_path)
    whole = dense.load_dense(from_path(str(parent)))
    partition = load_neuron_partition(tmp_path / "partition.safetensors")
    split, healed = (upcycle(whole.config, whole.state, partition) for _ in range(2))
    script.apply_delta(healed, tmp_path / "delta.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    held = convert(healed, torch.bfloat16).state_dict()
    assert loaded.state_dict().keys() == held.keys() == split.state_dict().keys()
    assert all(torch.equal(value, held[name]) for name, value in loaded.state_dict().items())
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=ids).logits, healed(input_ids=ids).logits)
    changed = {
        name
        for name, value in convert(split, torch.bfloat16).state_dict().items()
        if not torch.equal(value, held[name])
    }
    for part in ("gate.weight", "gate_up_proj", "experts.down_proj", "shared_expert_gate.weight", "norm.weight"):
        assert any(part in name for name in changed), part
    assert not any(part in name for name in changed for part in ("embed", "self_attn", "shared_expert.", "lm_head"))
    assert load_base(ModelConfig(base=str(tmp_path / "model"))).model.config.num_experts == 4
    assert "for 6 steps" in (tmp_path / "model" / "README.md").read_text()


class Killed(Exception):  # noqa: N818
    """Ends a run."""


def test_a_killed_run_continues_with_the_same_bits(
    script: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def until(text: str) -> Callable[[str], None]:
        def report(line: str) -> None:
            if line.startswith(text):
                raise Killed

        return report

    run(tmp_path / "whole")
    for place in ("own text: 4/6", "step 3/6"):
        monkeypatch.setattr(script, "to_stderr", until(place))
        with pytest.raises(Killed):
            run(tmp_path / "killed")
    lines: list[str] = []
    monkeypatch.setattr(script, "to_stderr", lines.append)
    run(tmp_path / "killed")
    assert not any("own text" in line or "step 2/6" in line for line in lines)
    for name in ("delta.safetensors", "training.safetensors", "partition.safetensors", "model/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("place", ["loss", "gradient", "term"])
def test_training_that_diverges_is_an_error_and_leaves_the_last_good_checkpoint(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Steps 1 to 3 are well, of which 2 are on disk; a run that goes on from there ends as if nothing had been."""
    distillation = sys.modules["distillation"]
    losses, steps = distillation.losses, []

    def diverging(*arguments: Any) -> Any:
        loss, kl = losses(*arguments)
        steps.append(loss)
        if len(steps) < 4:
            return loss, kl
        if place == "loss":
            return loss * torch.nan, kl
        if place == "gradient":
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss, kl

    step = torch.optim.AdamW.step

    @torch.no_grad()
    def spoiling(optimizer: torch.optim.AdamW) -> None:
        step(optimizer)
        if len(steps) == 4:
            optimizer.param_groups[0]["params"][0].fill_(torch.inf)

    run(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(distillation, "losses", diverging)
        if place == "term":
            patched.setattr(torch.optim.AdamW, "step", spoiling)
        with pytest.raises(ModelError, match=r"step 4: .* it must be finite; training has diverged"):
            run(tmp_path / "out")
    assert len(steps) == 4
    assert read_sealed(tmp_path / "out" / "training.safetensors", distillation.FORMAT)[1] == 2
    assert not (tmp_path / "out" / "delta.safetensors").exists()
    run(tmp_path / "out")
    for name in ("delta.safetensors", "training.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_what_would_be_too_large_is_refused_before_training(
    script: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = sys.modules["delta"]
    run(tmp_path / "fits")
    size = json.loads((tmp_path / "fits" / "report.json").read_text())["bytes"]
    monkeypatch.setattr(delta, "LIMIT", size - 1)
    with pytest.raises(ConfigError, match="--rank 4: partition and delta would take") as refused:
        run(tmp_path / "large")
    assert not (tmp_path / "large" / "own-text").exists()
    most = refused.value.remedy.removeprefix("use at most ")
    run(tmp_path / "smaller", f"--rank {most}")
    with pytest.raises(ConfigError):
        run(tmp_path / "rank", f"--rank {int(most) + 1}")


def test_terms_survive_int8_to_a_127th_of_their_largest(script: Any) -> None:
    delta = sys.modules["delta"]
    draw = torch.Generator().manual_seed(0)
    terms = {"x.A": torch.randn(3, 2, 5, generator=draw), "x.B": torch.randn(3, 7, 2, generator=draw) * 1e-3}
    terms |= {"y.D": torch.tensor([1.0, -2.5]), "z.B": torch.zeros(3, 7, 2)}
    again = delta.unpacked(delta.packed(terms))
    assert torch.equal(again["y.D"], terms["y.D"])
    assert torch.equal(again["z.B"], terms["z.B"])
    for name, along in (("x.A", -1), ("x.B", -2)):
        most = terms[name].abs().amax(along, keepdim=True) / 127 / 2 * 1.0001
        assert ((again[name] - terms[name]).abs() <= most).all()


def test_other_settings_and_other_texts_are_refused(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "more.jsonl"
    file.write_text(json.dumps({"instruction": "Say it.", "response": "It." * 40}) + "\n")
    out = tmp_path / "out"
    run(out, f"--texts {file}")
    with pytest.raises(ConfigError, match="it was begun with other values of lr, rank"):
        run(out, f"--texts {file} --rank 3 --lr 1")
    file.write_text(json.dumps({"instruction": "Say it.", "response": "No." * 40}) + "\n")
    with pytest.raises(ConfigError, match="other values of texts"):
        run(out, f"--texts {file}")
    with pytest.raises(ConfigError, match="it cannot be read"):
        run(out, f"--texts {tmp_path}/none.txt")


@pytest.mark.parametrize("more", ["--shared 33", "--layers 0 3"])
def test_a_split_that_does_not_fit_is_refused(run: Any, tmp_path: Path, more: str) -> None:
    with pytest.raises(ModelError, match="split of"):
        run(tmp_path, more)


def test_the_balance_term_counts_layers_apart(script: Any) -> None:
    """Two layers, each with a dead half, but even together: the model's own auxiliary loss would see nothing."""
    distillation = sys.modules["distillation"]
    one = torch.tensor([[9.0, 9.0, -9.0, -9.0]] * 4)

    class Fake:
        config = argparse.Namespace(num_experts=4, num_experts_per_tok=2)

        def __init__(self, *router_logits: torch.Tensor) -> None:
            self.router_logits = router_logits

        def __call__(self, **_: Any) -> Any:
            return argparse.Namespace(
                logits=torch.zeros(1, 4, 5), router_logits=self.router_logits, hidden_states=()
            )

    chosen = {"steps": 1, "batch": 1, "lr": 1, "small_lr": 1, "warmup": 0, "hidden": 0, "seed": 0, "save_every": 1}
    schedule = distillation.Schedule(balance=1.0, **chosen)
    loss, kl = distillation.losses(Fake(), Fake(one, one.flip(1)), torch.zeros(1, 4, dtype=torch.long), schedule)
    assert kl == 0
    assert loss == pytest.approx(2.0, abs=1e-3)


def test_every_epoch_reads_every_row_once(script: Any) -> None:
    distillation = sys.modules["distillation"]
    chosen = {"lr": 1, "small_lr": 1, "warmup": 0.2, "balance": 0, "hidden": 0, "seed": 0, "save_every": 1}
    schedule = distillation.Schedule(steps=10, batch=3, **chosen)
    read = torch.cat([schedule.rows(step, 5) for step in range(10)]).view(6, 5)
    assert all(epoch.sort().values.tolist() == list(range(5)) for epoch in read)
    assert len({tuple(epoch.tolist()) for epoch in read}) > 1
    rates = [schedule.rate(step) for step in range(10)]
    assert rates[0] == 0.5
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.05


def test_a_step_in_bf16_trains_terms_in_fp32(script: Any, parent: Path, run: Any, tmp_path: Path) -> None:
    """As on a GPU: the weights are in bf16, and so are the sums that the model computes with."""
    run(tmp_path, "--steps 1")
    whole = dense.load_dense(from_path(str(parent)))
    partition = load_neuron_partition(tmp_path / "partition.safetensors")
    teacher, model = whole.model(), upcycle(whole.config, whole.state, partition)
    for each in (teacher, model):
        convert(each, torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    terms = script.attach(model, 4, 0)
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    chosen = {"steps": 1, "batch": 1, "lr": 1, "small_lr": 1, "warmup": 0, "seed": 0, "save_every": 1}
    schedule = script.Schedule(hidden=1.0, balance=0.01, **chosen)
    loss, kl = sys.modules["distillation"].losses(teacher, model, torch.arange(40)[None], schedule)
    loss.backward()
    assert loss > kl > 0
    assert all(term.dtype == term.grad.dtype == torch.float32 for term in terms.values())
    assert all(term.grad.isfinite().all() for term in terms.values())
    assert all(term.grad.any() for name, term in terms.items() if name.endswith(".B"))
