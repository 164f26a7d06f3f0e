"""The split of a tiny random Llama: exactness, clustering, the shipped asset."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from flexperts.errors import ModelError
from flexperts.smol_moe import calibrate, dense, upcycle
from flexperts.smol_moe.build import BASES
from flexperts.smol_moe.neuron_partition import (
    META_KEY,
    NeuronPartition,
    load_neuron_partition,
    save_neuron_partition,
)
from flexperts.smol_moe.sources import DenseSource

HIDDEN, FFN, EXPERTS, SHARED = 32, 64, 4, 32
SHAPE = calibrate.SplitShape(layers=(1,), shared=SHARED, experts=EXPERTS, top_k=2, restarts=2)


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=97,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        max_position_embeddings=128,
    )


class ByteTokenizer:
    def __call__(self, text):
        return {"input_ids": [byte % 97 for byte in text.encode()]}


@pytest.fixture(scope="module")
def tiny() -> dense.DenseModel:
    torch.manual_seed(3)
    model = LlamaForCausalLM(tiny_config())
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    state = {name: value.detach() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    source = DenseSource("path", BASES["smol-moe"].asset, "0" * 64)
    return dense.DenseModel(model.config, state, ByteTokenizer(), source)


@pytest.fixture(scope="module")
def partition(tiny) -> NeuronPartition:
    texts = {"a": "the quick brown fox " * 5, "b": "0123456789 + - = " * 6, "c": "ABC; DEF()! " * 8}
    return calibrate.compute_partition(tiny, texts, seed=0, shape=SHAPE)


def logits(model, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(0, 97, (2, 17))
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("uniform", [True, False])
def test_with_every_expert_active_the_split_is_the_dense_model(tiny, partition, uniform):
    routers = torch.zeros_like(partition.routers) if uniform else partition.routers
    scale = 1.0 if uniform else 1e-6
    full = dataclasses.replace(partition, top_k=EXPERTS, routers=routers, router_scale=scale)
    split = upcycle.upcycle(tiny.config, tiny.state, full)
    torch.testing.assert_close(logits(split), logits(tiny.model()), rtol=1e-4, atol=1e-4)


def test_with_fewer_experts_the_output_is_the_chosen_neurons_of_the_dense_layer(tiny, partition):
    even = dataclasses.replace(partition, router_scale=1e-6)
    block = upcycle.upcycle(tiny.config, tiny.state, even).model.layers[1].mlp
    mlp = tiny.model().model.layers[1].mlp
    x = torch.randn(1, 5, HIDDEN)
    with torch.inference_mode():
        hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        chosen = block.gate(x)[2]
        mask = torch.zeros(5, FFN)
        mask[:, partition.shared[0].long()] = 1
        for token, experts in enumerate(chosen):
            mask[token, partition.routed[0][experts].long().flatten()] = 1
        torch.testing.assert_close(block(x), mlp.down_proj(hidden * mask), rtol=1e-4, atol=1e-4)
    assert mask.sum(dim=1).tolist() == [SHARED + 2 * (FFN - SHARED) // EXPERTS] * 5


def test_layers_outside_the_split_stay_dense(tiny, partition):
    model = upcycle.upcycle(tiny.config, tiny.state, partition)
    assert model.config.mlp_only_layers == [0]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, tiny.state["model.layers.0.mlp.up_proj.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 2)
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (0, 2)


def test_building_leaves_the_random_state_alone(tiny, partition):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    upcycle.upcycle(tiny.config, tiny.state, partition)
    tiny.model()
    assert torch.equal(torch.rand(3), expected)


def test_a_partition_of_another_size_is_refused(tiny, partition):
    config = tiny_config()
    config.intermediate_size = 128
    with pytest.raises(ModelError, match=r"128, 32"):
        upcycle.moe_config(config, partition)
    with pytest.raises(ModelError, match="layer 7"):
        upcycle.moe_config(tiny.config, dataclasses.replace(partition, layers=(7,)))


def test_a_state_with_missing_parameters_is_refused(tiny, partition):
    state = {name: value for name, value in tiny.state.items() if name != "model.norm.weight"}
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        upcycle.upcycle(tiny.config, state, partition)


@settings(max_examples=40)
@given(clusters=st.integers(1, 6), size=st.integers(1, 12), seed=st.integers(0, 2**32 - 1), flat=st.booleans())
def test_clusters_have_equal_size_and_hold_every_point_once(clusters, size, seed, flat):
    draw = np.random.default_rng(seed)
    shape = (clusters * size, 3)
    points = (np.zeros(shape) if flat else draw.normal(size=shape)).astype(np.float32)
    labels = calibrate.balanced_kmeans(points, clusters, seed)
    assert np.bincount(labels, minlength=clusters).tolist() == [size] * clusters


def test_clusters_that_are_apart_are_found():
    draw = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 10)
    points = (np.eye(4)[truth] * 10 + draw.normal(size=(40, 4))).astype(np.float32)
    labels = calibrate.balanced_kmeans(points, 4, seed=1, restarts=8)
    assert all(len(set(labels[truth == group])) == 1 for group in range(4))


def test_the_partition_is_deterministic_in_the_seed(tiny, partition):
    texts = {"a": "the quick brown fox " * 5, "b": "0123456789 + - = " * 6, "c": "ABC; DEF()! " * 8}
    again = calibrate.compute_partition(tiny, texts, seed=0, shape=SHAPE)
    other = calibrate.compute_partition(tiny, texts, seed=1, shape=SHAPE)
    assert torch.equal(again.routed, partition.routed)
    assert torch.equal(again.routers, partition.routers)
    assert not torch.equal(other.routed, partition.routed)


def test_a_partition_survives_its_file(tmp_path, partition):
    save_neuron_partition(partition, tmp_path / "p.safetensors")
    loaded = load_neuron_partition(tmp_path / "p.safetensors")
    assert (loaded.layers, loaded.top_k, loaded.router_scale) == (partition.layers, 2, 0.01)
    assert torch.equal(loaded.routed, partition.routed)
    assert loaded.metadata["tokens"] == partition.metadata["tokens"]


def test_a_doubled_neuron_and_a_foreign_file_are_refused(tmp_path, partition):
    routed = partition.routed.clone()
    routed[0, 0, 0] = routed[0, 1, 0]
    with pytest.raises(ModelError, match="exactly once"):
        dataclasses.replace(partition, routed=routed).check()
    (tmp_path / "x").write_bytes(b"no safetensors file")
    with pytest.raises(ModelError, match="cannot be read"):
        load_neuron_partition(tmp_path / "x")


def test_the_shipped_asset_is_whole_and_says_how_it_was_made():
    asset = BASES["smol-moe"].asset
    partition = load_neuron_partition(asset)
    assert partition.layers == (4, 9, 14, 19, 24, 29)
    assert (partition.shared_size, partition.experts, partition.expert_size) == (768, 8, 96)
    assert partition.routers.shape == (6, 8, 576)
    kinds = (partition.shared.dtype, partition.routed.dtype, partition.routers.dtype)
    assert kinds == (torch.int16, torch.int16, torch.float16)
    assert partition.routers.isfinite().all()
    assert asset.stat().st_size < 80_000
    assert partition.metadata["command"] == "flexperts base partition smol-moe --seed 0"
    assert partition.metadata["texts_sha256"] == calibrate.texts_sha256(calibrate.read_texts())
    assert json.dumps(dict(partition.metadata))
    assert META_KEY == "flexperts.partition"


def test_chat_template_is_plain_chatml():
    from jinja2 import Environment

    template = Environment().from_string(dense.CHAT_TEMPLATE)
    text = template.render(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
