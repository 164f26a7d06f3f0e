"""Method names and where their classes live. A new method is one file and one line here."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

from pydantic import ValidationError

from flexperts.errors import ConfigError

if TYPE_CHECKING:
    from flexperts.config.run import MethodConfig
    from flexperts.methods.base import Method

_METHODS: dict[str, str] = {
    "centralized": "flexperts.methods.centralized:Centralized",
    "ditto": "flexperts.methods.ditto:Ditto",
    "fdlora": "flexperts.methods.fdlora:FDLoRA",
    "fedadagrad": "flexperts.methods.fedadagrad:FedAdagrad",
    "fedadam": "flexperts.methods.fedadam:FedAdam",
    "fedamole": "flexperts.methods.fedamole:FedAMoLE",
    "fedavg": "flexperts.methods.fedavg:FedAvg",
    "fedavg_experts": "flexperts.methods.fedavg_experts:FedAvgExperts",
    "fedavgm": "flexperts.methods.fedavgm:FedAvgM",
    "feddpa_f": "flexperts.methods.feddpa_f:FedDPAF",
    "feddpa_t": "flexperts.methods.feddpa_t:FedDPAT",
    "fedmoe_da": "flexperts.methods.fedmoe_da:FedMoEDA",
    "fedmoe_style": "flexperts.methods.fedmoe_style:FedMoEStyle",
    "fedper": "flexperts.methods.fedper:FedPer",
    "fedprox": "flexperts.methods.fedprox:FedProx",
    "fedrep": "flexperts.methods.fedrep:FedRep",
    "fedsa_lora": "flexperts.methods.fedsa_lora:FedSALoRA",
    "fedyogi": "flexperts.methods.fedyogi:FedYogi",
    "ffa_lora": "flexperts.methods.ffa_lora:FFALoRA",
    "flex": "flexperts.methods.flex:Flex",
    "flexlora": "flexperts.methods.flexlora:FlexLoRA",
    "flora": "flexperts.methods.flora:FLoRA",
    "hetlora": "flexperts.methods.hetlora:HetLoRA",
    "hfedmoe_style": "flexperts.methods.hfedmoe_style:HFedMoEStyle",
    "local": "flexperts.methods.local:Local",
    "local_lora": "flexperts.methods.local_lora:LocalLoRA",
    "moe_fedavg": "flexperts.methods.moe_fedavg:MoEFedAvg",
    "pfedmoe_style": "flexperts.methods.pfedmoe_style:PFedMoEStyle",
    "scaffold": "flexperts.methods.scaffold:Scaffold",
    "zero_shot": "flexperts.methods.zero_shot:ZeroShot",
}


def register_method(name: str, target: str | type[Method]) -> None:
    """Add a method under a new name.

    Args:
        name: What recipes will call it.
        target: The class, or ``"package.module:Class"`` to import it when it is first used.

    Raises:
        ConfigError: The name is taken by another class.
    """
    path = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    if _METHODS.get(name, path) != path:
        raise ConfigError(f"method {name!r}", f"the name belongs to {_METHODS[name]}", "choose another name")
    _METHODS[name] = path
    if not isinstance(target, str):
        _LOADED[name] = target


_LOADED: dict[str, type[Method]] = {}


def method_names() -> list[str]:
    """Return all registered names, sorted."""
    return sorted(_METHODS)


def method_class(name: str) -> type[Method]:
    """Return the class registered under ``name``, imported on first use.

    Raises:
        ConfigError: No such method; the error says which names are close.
    """
    if name not in _METHODS:
        close = difflib.get_close_matches(name, _METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see `flexperts methods`"
        raise ConfigError(f"method {name!r}", f"methods are {', '.join(method_names())}", hint)
    if name not in _LOADED:
        module, _, attribute = _METHODS[name].partition(":")
        _LOADED[name] = getattr(import_module(module), attribute)
    return _LOADED[name]


def make_method(config: MethodConfig) -> Method:
    """Return the method that a recipe names, with its options.

    Raises:
        ConfigError: No such method, or an option breaks a rule.
    """
    method = method_class(config.name)
    try:
        return method(method.Options.model_validate(config.options))
    except ValidationError as error:
        raise ConfigError("method.options", _offences(error, method), "mend the keys named") from error


def _offences(error: ValidationError, method: type[Method]) -> str:
    known = sorted(method.Options.model_fields)
    parts = []
    for offence in error.errors():
        key = ".".join(map(str, offence["loc"]))
        if offence["type"] == "extra_forbidden":
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
            parts.append(f"{method.name} has no option {key!r} ({hint})")
        else:
            parts.append(f"{key} = {offence['input']!r}: {offence['msg'].removeprefix('Value error, ')}")
    return "; ".join(parts)
