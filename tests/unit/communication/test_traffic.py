"""Counting bytes of the real encoding, and finding personal ones in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch.nn import Parameter

from flexperts.communication.messages import records
from flexperts.communication.traffic import (
    encoded_bytes,
    encoded_objects,
    group_bytes,
    payload_bytes,
    personal_bytes,
    tensor_group,
)
from flexperts.parameters.vector import Manifest, Payload

MEGABYTE = 250_000  # fp32 values


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def payload(values: torch.Tensor | np.ndarray) -> Payload:
    return Payload.of({"w": torch.as_tensor(values)})


def test_the_count_is_the_payload_and_at_most_one_percent_more() -> None:
    size = encoded_bytes(records({"client": "bank"}, {"loss": 1.0}, payload(normal(MEGABYTE))))
    assert 1_000_000 < size <= 1_010_000


def test_chunked_vectors_are_counted_whole() -> None:
    """Flower cuts arrays into chunks of 5 MiB, objects of their own."""
    content = records({"client": "bank"}, {}, payload(normal(10 * MEGABYTE)))
    assert len(list(encoded_objects(content))) > 4
    assert 10_000_000 < encoded_bytes(content) <= 10_100_000


CHUNK = (5 << 20) // 4  # fp32 values; an array's own heading goes before them
SIZES = [1, 3, 1000, CHUNK - 33, CHUNK - 32, CHUNK - 31, CHUNK, 2 * CHUNK, 11 * CHUNK]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [0, 1])
def test_the_count_is_that_of_the_objects_themselves(size: int, factor: int) -> None:
    """Zeros make equal chunks, which Flower moves once."""
    values = np.arange(size, dtype=np.float32) * np.float32(factor)
    content = records({"client": "bank"}, {"loss": 1.0}, payload(values))
    assert encoded_bytes(content) == sum(len(part) for part in encoded_objects(content))


def test_the_count_knows_several_arrays() -> None:
    vector = normal(1000).numpy()
    unlike = ArrayRecord({"a": Array(vector), "b": Array(vector.astype(np.float16)), "c": Array(vector[:0])})
    alike = ArrayRecord({"a": Array(vector), "b": Array(vector)})
    for content in (RecordDict({"x": unlike}), RecordDict({"x": alike}), RecordDict({"x": alike, "y": unlike})):
        assert encoded_bytes(content) == sum(len(part) for part in encoded_objects(content))


def test_the_payload_is_in_the_encoding() -> None:
    vector = normal(1000).numpy()
    assert vector.tobytes() in b"".join(encoded_objects(records({}, None, payload(vector))))


def test_a_message_without_arrays_is_small() -> None:
    assert 0 < encoded_bytes(records({"client": "bank"}, {"loss": 1.0})) < 1000


PERSONAL = {
    "graft.up": Parameter(normal(40, 30, seed=1)),
    "graft.gate": Parameter(normal(1, 32, seed=2)),
    "graft.zero": Parameter(torch.zeros(50)),
    "graft.bias": Parameter(torch.tensor([0.25])),
    "graft.late": Parameter(torch.cat([torch.zeros(400), normal(9, seed=3)])),
    "graft.half": Parameter(normal(33, seed=4).bfloat16()),
}


def test_honest_messages_hold_no_personal_bytes() -> None:
    assert personal_bytes(records({"client": "bank"}, {"loss": 1.0}, payload(normal(5000))), PERSONAL) == 0
    assert personal_bytes(records({}), PERSONAL) == 0
    assert personal_bytes(records({}), {}) == 0


def test_a_shared_weight_equal_to_a_lone_bias_is_no_leak() -> None:
    """Four bytes recur by chance: in a million weights of the same size, once in a hundred messages."""
    vector = normal(5000).numpy()
    vector[1234] = 0.25
    assert personal_bytes(records({}, None, payload(vector)), PERSONAL) == 0


def test_untrained_zeros_are_no_leak() -> None:
    assert personal_bytes(records({}, None, payload(torch.zeros(5000))), PERSONAL) == 0


def raw(name: str) -> np.ndarray:
    return np.frombuffer(PERSONAL[name].detach().reshape(-1).view(torch.uint8).numpy().tobytes(), np.uint8)


@pytest.mark.parametrize("name", ["graft.up", "graft.gate", "graft.late", "graft.half"])
@pytest.mark.parametrize("record", ["shared", "metrics2"])
def test_a_smuggled_array_is_found(name: str, record: str) -> None:
    content = records({"client": "bank"}, {}, payload(normal(100)))
    content[record] = ArrayRecord({"shared": Array(raw(name))})
    assert personal_bytes(content, PERSONAL) == PERSONAL[name].numel() * PERSONAL[name].element_size()


def test_all_smuggled_tensors_are_added_up() -> None:
    names = ["graft.up", "graft.gate"]
    content = RecordDict({n: ArrayRecord({"x": Array(PERSONAL[n].detach().numpy())}) for n in names})
    assert personal_bytes(content, PERSONAL) == 4 * (1200 + 32)


def test_a_tensor_inside_the_shared_vector_is_found() -> None:
    vector = np.concatenate(
        [normal(77).numpy(), PERSONAL["graft.gate"].detach().numpy().ravel(), normal(9).numpy()]
    )
    assert personal_bytes(records({}, None, payload(vector)), PERSONAL) == 128


def test_a_tensor_hidden_in_text_bytes_is_found() -> None:
    content = RecordDict({"info": ConfigRecord({"note": raw("graft.up").tobytes()})})
    assert personal_bytes(content, PERSONAL) == 4800


@pytest.mark.parametrize("zeros", [0, 1, 1023, 1024, 2047, 2048, 2049, 6143, 6144, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_kilobyte_after_zeros_is_what_is_found(zeros: int, dtype: torch.dtype) -> None:
    """By brute force over the whole tensor's bytes; of a kilobyte less one byte nothing is found."""
    tensor = torch.cat([torch.zeros(zeros), normal(700, seed=6)]).to(dtype)
    kilobyte = tensor.view(torch.uint8).numpy().tobytes().lstrip(b"\0")[:1024]
    assert len(kilobyte) == 1024
    for sent, found in ((kilobyte, tensor.nbytes), (kilobyte[:-1], 0), (kilobyte[1:], 0)):
        content = RecordDict({"info": ConfigRecord({"note": b"x" * 3 + sent})})
        assert personal_bytes(content, {"t": Parameter(tensor)}) == found


@pytest.mark.parametrize("before", [CHUNK - 500, CHUNK - 32, CHUNK])
def test_a_tensor_over_the_end_of_a_chunk_is_found(before: int) -> None:
    vector = np.concatenate([normal(before).numpy(), PERSONAL["graft.up"].detach().numpy().ravel()])
    assert personal_bytes(records({}, None, payload(vector)), PERSONAL) == 4800


def test_a_tensor_over_two_arrays_is_found() -> None:
    """Arrays that are not NumPy's have no heading between them."""
    whole = raw("graft.up").tobytes()
    halves = {n: Array("uint8", (len(half),), "raw", half) for n, half in (("a", whole[:300]), ("b", whole[300:]))}
    assert personal_bytes(RecordDict({"x": ArrayRecord(halves)}), PERSONAL) == 4800


def test_a_transposed_personal_tensor_is_searched_in_its_own_order() -> None:
    turned = {"t": Parameter(normal(30, 40, seed=5).T)}
    assert not turned["t"].is_contiguous()
    content = RecordDict({"a": ArrayRecord({"x": Array(np.ascontiguousarray(turned["t"].detach().numpy()))})})
    assert personal_bytes(content, turned) == 4800


LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
EXPERTS = "layers.model/layers/0/mlp/experts"
GROUPS = {
    LORA.format("A"): "attention LoRA A",
    LORA.format("B"): "attention LoRA B",
    f"experts.{EXPERTS}.3.up": "experts",
    f"experts.{EXPERTS}.3.down_lora_A": "experts",
    f"common_graft.{EXPERTS}.personal.0.up": "experts",
    f"common_graft.{EXPERTS}.graft_gate_weight": "gates",
    f"common_graft.{EXPERTS}.graft_gate_bias": "gates",
    f"gated.{EXPERTS}.shared.down": "experts",
    f"gated.{EXPERTS}.gate.W1": "gates",
    f"router.{EXPERTS}": "routers",
    "mixture.sites.model/layers/0/self_attn/q_proj.experts.1.A": "experts",
    "mixture.sites.model/layers/0/self_attn/q_proj.projection": "routers",
    "mixture.sites.model/layers/0/self_attn/q_proj.router": "routers",
    f"derived.router_rows.{EXPERTS}": "derived router rows",
    f"derived.control.{LORA.format('A')}": "derived control",
    f"derived.stack.1.{LORA.format('B')}": "derived stack",
    "derived.rank": "derived rank",
    "adapter.layers.0.down": "adapter",
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_tensor_belongs_to_a_group_by_its_name(name: str) -> None:
    assert tensor_group(name) == GROUPS[name]


def test_groups_add_up_to_the_payload() -> None:
    """Sizes 1, 2, 4, ... tell every sum apart."""
    manifest = Manifest.of({name: torch.zeros(1, 2**i) for i, name in enumerate(GROUPS)})
    assert group_bytes(manifest) == {
        group: 4 * sum(2**i for i, g in enumerate(GROUPS.values()) if g == group)
        for group in sorted(set(GROUPS.values()))
    }
    assert sum(group_bytes(manifest).values()) == payload_bytes(manifest) == 4 * (2 ** len(GROUPS) - 1)
    assert group_bytes(Manifest((), ())) == {}
