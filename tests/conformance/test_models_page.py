"""The matrix holds every family, and docs/models.md is what it makes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flexperts.errors import ConfigError
from flexperts.testing import FAMILIES, tiny_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MATRIX = tomllib.loads((HERE / "matrix.toml").read_text(encoding="utf-8"))
NOT_GRAFTED = {"doge"}
"""What holds experts that are no MLPs."""
COMPOSITE = {"dots3_note", "gemma4", "llama4", "qwen3_5_moe", "qwen4_exp"}
"""Multimodal types of which transformers also makes a causal language model: their text types are in the matrix."""


def modeling_source(kind: str) -> str:
    """Return the source of a model type's modules, without importing it."""
    spec = importlib.util.find_spec(CONFIG_MAPPING[kind].__module__.replace(".configuration_", ".modeling_"))
    return Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""


def test_every_moe_type_of_transformers_is_in_the_matrix() -> None:
    experts = re.compile(r"^class \w*(Experts|CDMoE)\b", re.MULTILINE)
    moe = {kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if experts.search(modeling_source(kind))}
    assert moe - NOT_GRAFTED - COMPOSITE == FAMILIES.keys()
    assert len(FAMILIES) == 56


def test_the_matrix_names_what_there_is() -> None:
    every = {test for tests in MATRIX["properties"].values() for test in tests}
    named = every | set(MATRIX["core"]) | {test for e in MATRIX["exceptions"] for test in e["tests"]}
    for test in named:
        file, function = test.split("::")
        assert f"def test_{function}(" in (HERE / f"test_{file}.py").read_text(encoding="utf-8"), test
    assert named <= every
    excepted = {family for e in MATRIX["exceptions"] for family in e["families"]}
    assert excepted | set(MATRIX["first"]) <= FAMILIES.keys()


def test_every_family_has_a_row() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert rows == [*sorted(FAMILIES), *sorted(FAMILIES)]
    reasons = {e["reason"] for e in MATRIX["exceptions"]}
    assert all(reason[1:] in page for reason in reasons)
    assert "`doge` is refused" in page


def test_an_unknown_family_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'qwen3_moe'"):
        tiny_model("qwen3_mo")


@pytest.mark.families
def test_the_page_is_current() -> None:
    script = ROOT / "benchmarks" / "supported_models.py"
    command = [sys.executable, script, "--check", "--listed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
