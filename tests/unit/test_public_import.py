"""Public names that need no tensors do not import what computes with them."""

from __future__ import annotations

import subprocess
import sys

LIGHT = (
    "FlexpertsError",
    "Observer",
    "RunConfig",
    "RunDirectory",
    "build_base",
    "load_recipe",
    "method_names",
    "parse_recipe",
    "register_method",
)


def test_light_names_load_no_torch() -> None:
    code = f"import sys; from flexperts import {', '.join(LIGHT)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", "transformers", "peft", "flwr", "datasets", "numpy"} & set(done.stdout.split())
