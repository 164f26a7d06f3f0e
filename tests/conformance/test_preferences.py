"""Every registered method on preference rows: it trains, its reference is the untouched base, it is scored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flexperts.config.run import RunConfig
from flexperts.data.batches import PaddedBatch
from flexperts.engines.run import run_federation
from flexperts.methods.registry import make_method, method_names
from flexperts.testing import METHOD_SETTINGS
from flexperts.training.local import LocalSettings
from flexperts.training.preferences import DirectPreference, log_likelihoods

Recipe = Callable[..., RunConfig]
OPTIONS = {
    "fedamole": ["method.options={experts=6}"],  # its pool is for more clients
    "fdlora": ["method.options={fusion_penalty=0}"],  # which is more than two steps gain
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients with opposite preferences; on the same questions, their updates would add up to 0."""
    folder = tmp_path_factory.mktemp("pairs")
    for client, order, first in (("east", 1, 0), ("west", -1, 100)):
        for side, numbers in (("train", range(first, first + 8)), ("test", range(first + 8, first + 10))):
            answers = [(f"yes {n}", f"no, not {n}")[::order] for n in numbers]
            rows = [
                {"prompt": f"Is {n} odd?", "chosen": chosen, "rejected": rejected}
                for n, (chosen, rejected) in zip(numbers, answers, strict=True)
            ]
            (folder / client).mkdir(exist_ok=True)
            (folder / client / f"{side}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", method_names())
def test_a_method_trains_on_preferences(
    recipe: Recipe, pairs: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    checked: list[int] = []
    reference = DirectPreference._reference

    def compared(
        self: DirectPreference, model: nn.Module, batches: Sequence[PaddedBatch], settings: LocalSettings
    ) -> list[Tensor]:
        found = reference(self, model, batches, settings)
        with torch.no_grad():
            for ours, batch in zip(found, batches, strict=True):
                assert torch.equal(ours, log_likelihoods(plain, batch, settings))
        checked.append(len(found))
        return found

    monkeypatch.setattr(DirectPreference, "_reference", compared)
    config = on_pairs(recipe, pairs, name)
    summary = run_federation(config, tmp_path / "run")
    assert summary["bytes"]["personal_sent"] == 0
    states = make_method(config.method).states
    for client in summary["clients"].values():
        assert client["reward_margin"]["zero_shot"] == 0
        assert client["reward_accuracy"]["zero_shot"] == 50
        assert all(math.isfinite(client["reward_margin"][state]) for state in states)
    if name == "zero_shot":
        assert not checked
        return
    assert checked
    assert any(client["reward_margin"][states[-1]] for client in summary["clients"].values())


def on_pairs(recipe: Recipe, pairs: Path, name: str) -> RunConfig:
    """A recipe of the method on the preference rows."""
    made = recipe(
        f"method.name={name}",
        "training.local_steps=2",
        "training.micro_batch_size=2",
        "evaluation.max_new_tokens=1",
        *METHOD_SETTINGS.get(name, ()),
        *OPTIONS.get(name, ()),
    )
    data: dict[str, Any] = made.model_dump(exclude_none=True)
    data["data"] = {"folder": str(pairs)}
    data["training"]["objective"] = "dpo"
    return RunConfig.model_validate(data)
