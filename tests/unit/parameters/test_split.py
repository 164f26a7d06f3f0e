"""The split: every parameter in exactly one group, and every wrong claim refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from flexperts.errors import SplitError
from flexperts.parameters.split import ParameterSplit, aliases, split_parameters


def trained(*shape: int) -> Parameter:
    return Parameter(torch.zeros(*shape))


def frozen(tensor: Tensor) -> Parameter:
    return Parameter(tensor, requires_grad=False)


def model() -> dict[str, Parameter]:
    return {
        "lora": trained(2, 3),
        "expert": trained(4),
        "base": frozen(torch.zeros(5, 2)),
        "norm": frozen(torch.zeros(3)),
    }


def refusal(parameters: dict[str, Parameter], shared: list[str], personal: list[str]) -> str:
    with pytest.raises(SplitError) as caught:
        split_parameters(parameters, shared, personal)
    return str(caught.value)


@given(st.dictionaries(st.text(min_size=1), st.sampled_from(["shared", "personal", "frozen"])))
def test_groups_are_disjoint_and_cover_everything(claims: dict[str, str]) -> None:
    parameters = {n: Parameter(torch.zeros(2), requires_grad=g != "frozen") for n, g in claims.items()}
    split = split_parameters(
        parameters,
        [n for n, g in claims.items() if g == "shared"],
        [n for n, g in claims.items() if g == "personal"],
    )
    groups = {"shared": split.shared, "personal": split.personal, "frozen": split.frozen}
    assert sum(map(len, groups.values())) == len(parameters)
    for name, group in claims.items():
        assert groups[group][name] is parameters[name]
    assert split.trained == {n: p for n, p in parameters.items() if p.requires_grad}


def test_groups_keep_the_models_order() -> None:
    parameters = {name: trained(1) for name in "zmab"}
    assert list(split_parameters(parameters, list("abz"), ["m"]).shared) == ["z", "a", "b"]


@pytest.mark.parametrize(
    ("shared", "personal", "said"),
    [
        (["lora", "expert"], ["expert"], "expert: claimed as shared and as personal"),
        (["lora", "nothing"], ["expert"], "nothing: claimed but not in the model"),
        (["lora"], ["expert", "nothing"], "nothing: claimed but not in the model"),
        (["lora", "base"], ["expert"], "base: claimed but not trainable"),
        (["lora"], ["expert", "norm"], "norm: claimed but not trainable"),
        (["lora"], [], "expert: trainable but not claimed"),
        ([], [], "expert, lora: trainable but not claimed"),
    ],
)
def test_wrong_claims(shared: list[str], personal: list[str], said: str) -> None:
    assert refusal(model(), shared, personal).startswith(said)


def test_many_names_are_cut_short() -> None:
    parameters = {f"p{i}": trained(1) for i in range(8)}
    assert refusal(parameters, [], []).startswith("p0, p1, p2, p3, p4 and 3 more: trainable but not claimed")


@pytest.mark.parametrize("kept", ["personal", "frozen"])
def test_a_shared_parameter_that_views_a_kept_one_is_refused(kept: str) -> None:
    """Sending it would send the other's values, whatever the names say."""
    memory = torch.zeros(10)
    parameters = {
        "other": trained(2),
        "kept": Parameter(memory, requires_grad=kept == "personal"),
        "view": Parameter(memory[4:6]),
    }
    personal = ["kept"] if kept == "personal" else []
    said = refusal(parameters, ["other", "view"], personal)
    assert said.startswith("view: shared, but its storage belongs to a personal or frozen parameter")


def test_one_tensor_under_two_names_is_refused() -> None:
    both = trained(3)
    assert refusal({"a": both, "b": both}, ["a"], ["b"]).startswith("a: shared, but its storage")


def test_views_within_one_group_are_allowed() -> None:
    memory = torch.zeros(4)
    parameters = {"a": Parameter(memory[:2]), "b": Parameter(memory[2:]), "c": trained(1)}
    assert list(split_parameters(parameters, ["a", "b"], ["c"]).shared) == ["a", "b"]


def test_empty_tensors_share_nothing() -> None:
    split = split_parameters({"a": trained(0), "b": trained(0), "c": frozen(torch.zeros(0))}, ["a"], ["b"])
    assert aliases(split) == []


def test_aliases_are_found_in_a_split_built_by_hand() -> None:
    memory = torch.zeros(10)
    split = ParameterSplit({"a": trained(2), "b": Parameter(memory[3:])}, {"c": Parameter(memory[:3])}, {})
    assert aliases(split) == ["b"]


def test_groups_cannot_be_changed() -> None:
    split = split_parameters(model(), ["lora"], ["expert"])
    for group in (split.shared, split.personal, split.frozen):
        with pytest.raises(TypeError):
            group["expert"] = trained(1)  # type: ignore[index]
    with pytest.raises(AttributeError):
        split.shared = {}  # type: ignore[misc]
    split.trained.clear()  # a copy
    assert list(split.trained) == ["lora", "expert"]


def test_later_changes_of_the_source_do_not_reach_the_split() -> None:
    parameters = model()
    split = split_parameters(parameters, ["lora"], ["expert"])
    parameters["late"] = trained(1)
    assert "late" not in {**split.shared, **split.personal, **split.frozen}


def test_the_table_counts_by_hand() -> None:
    parameters = model() | {"half": frozen(torch.zeros(7, dtype=torch.bfloat16))}
    table = split_parameters(parameters, ["lora"], ["expert"]).describe()
    numbers = [(r["group"], r["tensors"], r["parameters"], r["bytes"], r["trained"]) for r in table]
    assert numbers == [
        ("shared", 1, 6, 24, "yes"),
        ("personal", 1, 4, 16, "yes"),
        ("frozen", 3, 20, 66, "no"),
    ]
    assert [r["leaves"] for r in table][1:] == ["never leaves the client"] * 2
