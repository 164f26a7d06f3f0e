"""Models without weights, from a name or a config: built on the meta device, where tensors have only shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig

from flexperts.errors import ModelError, did_you_mean
from flexperts.modeling.load import LoadedBase
from flexperts.modeling.skeleton import skeleton

_REMEDY = "name a config that ships, a folder or file with a config.json, or a hub id"
_STAND_INS = {"deepseek": "deepseek-moe-16b"}
"""Model types that need remote code -> the shipped config with their shapes."""


@dataclass(frozen=True)
class Description:
    """A model's description without weights.

    Args:
        name: The name that the user gave.
        config: transformers' configuration.
        note: A note on the model, or an empty text.
    """

    name: str
    config: Any
    note: str = ""


def shipped_configs() -> list[str]:
    """Return the names of the configs that ship, sorted."""
    return sorted(p.name.removesuffix(".json") for p in _folder().iterdir() if p.name.endswith(".json"))


def describe(name: str) -> Description:
    """Return a model's configuration.

    Args:
        name: A shipped config (any case, with or without the hub's organisation), the path of a config.json or of
            its folder, or a hub id, which needs the network.
    """
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        return _from_file(name, path / "config.json" if path.is_dir() else path)
    if (short := name.rsplit("/", 1)[-1].lower()) in shipped_configs():
        return _from_text(name, _folder().joinpath(f"{short}.json").read_text(encoding="utf-8"))
    if "/" not in name:  # not a hub id: a request to the hub would take half a minute
        raise _unknown(name, short)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unknown(name, short) from error
    return Description(name, config, _unquantized(config))


def _unknown(name: str, short: str) -> ModelError:
    shipped = shipped_configs()
    hint = did_you_mean(short, shipped, f"configs that ship: {', '.join(shipped)}", cutoff=0.5)
    return ModelError(f"model {name!r}", "there is no config with this name", f"{_REMEDY}; {hint}")


def meta_base(description: Description, dtype: str) -> LoadedBase:
    """Return a frozen base with all shapes and no values.

    Args:
        description: The model.
        dtype: Storage type of the weights, as in a recipe.
    """
    try:
        model = skeleton(description.config, dtype)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"no model can be built from it ({str(error).strip().splitlines()[0]})"
        raise ModelError(
            f"model {description.name!r}", reason, "use a causal language model of transformers"
        ) from error
    model.requires_grad_(False).eval()
    return LoadedBase(model, SimpleNamespace(pad_token_id=0), "planned", description.name)


def experts_per_token(config: Any) -> int:
    """Return K, the number of experts that the router chooses for a token."""
    text = config.get_text_config()
    for place in (text, getattr(text, "ffn_config", None)):
        for name in ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts"):
            if isinstance(value := getattr(place, name, None), int):
                return value
    raise ModelError(
        f"config of type {text.model_type!r}",
        "it has no num_experts_per_tok",
        "use a Mixture-of-Experts model",
    )


def _folder() -> Any:
    return files("flexperts.costs").joinpath("configs")


def _from_file(name: str, path: Path) -> Description:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"model {name!r}", f"{path} cannot be read ({error})", _REMEDY) from error
    return _from_text(name, text)


def _from_text(name: str, text: str) -> Description:
    try:
        values: dict[str, Any] = json.loads(text)
        kind = str(values.pop("model_type"))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"model {name!r}", f"its config.json is not valid ({error!r})", _REMEDY) from error
    note = str(values.get("_note", ""))
    config = _configured(name, kind, {k: v for k, v in values.items() if not k.startswith("_")})
    return Description(name, config, note or _unquantized(config))


def _configured(name: str, kind: str, values: Mapping[str, Any]) -> Any:
    try:
        return AutoConfig.for_model(kind, **values)
    except (ValueError, TypeError, KeyError) as error:
        stand_in = _STAND_INS.get(kind)
        remedy = f"plan {stand_in!r}, which has its shapes" if stand_in else "use a model type of transformers"
        reason = str(error).strip().splitlines()[0]
        rule = "transformers has no class for this type" if stand_in else f"transformers cannot read it ({reason})"
        raise ModelError(f"model {name!r} of type {kind!r}", rule, remedy) from error


def _unquantized(config: Any) -> str:
    """Remove a checkpoint's quantization from its config, so that model.dtype is planned; return a note on it."""
    if getattr(config, "quantization_config", None) is None:
        return ""
    del config.quantization_config
    return "the checkpoint is quantized; planned in model.dtype"
