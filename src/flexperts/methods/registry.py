"""Method names and the import paths of their classes. A new method is one file and one line here.

An installed package can add methods by entry points of the group ``flexperts.methods``: the entry point's name is
the method's name in recipes, its value ``"package.module:Class"``. Recipes and messages cannot make the process
import code: only methods registered here, by an installed package or by ``register_method`` are imported.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from flexperts.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from flexperts.config.run import MethodConfig
    from flexperts.methods.kit.method import Method

_METHODS: dict[str, str] = {
    "centralized": "flexperts.methods.bounds:Centralized",
    "comigs": "flexperts.methods.comigs:CoMiGS",
    "ditto": "flexperts.methods.ditto:Ditto",
    "fdlora": "flexperts.methods.fdlora:FDLoRA",
    "fedadagrad": "flexperts.methods.server_optimizers:FedAdagrad",
    "fedadam": "flexperts.methods.server_optimizers:FedAdam",
    "fedalt": "flexperts.methods.fedalt:FedALT",
    "fedamole": "flexperts.methods.fedamole:FedAMoLE",
    "fedavg": "flexperts.methods.fedavg:FedAvg",
    "fedavg_experts": "flexperts.methods.fedavg_experts:FedAvgExperts",
    "fedavgm": "flexperts.methods.server_optimizers:FedAvgM",
    "feddpa_f": "flexperts.methods.feddpa:FedDPAF",
    "feddpa_t": "flexperts.methods.feddpa:FedDPAT",
    "fedex_lora": "flexperts.methods.fedex_lora:FedExLoRA",
    "fedlease": "flexperts.methods.fedlease:FedLEASE",
    "fedmoe_da": "flexperts.methods.fedmoe_da:FedMoEDA",
    "fedmoe_style": "flexperts.methods.fedmoe_style:FedMoEStyle",
    "fedper": "flexperts.methods.fedper:FedPer",
    "fedprox": "flexperts.methods.fedprox:FedProx",
    "fedrep": "flexperts.methods.fedper:FedRep",
    "fedsa_lora": "flexperts.methods.fedsa_lora:FedSALoRA",
    "fedsvd": "flexperts.methods.fedsvd:FedSVD",
    "fedyogi": "flexperts.methods.server_optimizers:FedYogi",
    "ffa_lora": "flexperts.methods.ffa_lora:FFALoRA",
    "flex": "flexperts.methods.flex:Flex",
    "flexlora": "flexperts.methods.flexlora:FlexLoRA",
    "flora": "flexperts.methods.flora:FLoRA",
    "hetlora": "flexperts.methods.hetlora:HetLoRA",
    "hfedmoe_style": "flexperts.methods.hfedmoe_style:HFedMoEStyle",
    "local": "flexperts.methods.local:Local",
    "local_lora": "flexperts.methods.local:LocalLoRA",
    "moe_fedavg": "flexperts.methods.moe_fedavg:MoEFedAvg",
    "pfedmoe_style": "flexperts.methods.pfedmoe_style:PFedMoEStyle",
    "rolora": "flexperts.methods.rolora:RoLoRA",
    "scaffold": "flexperts.methods.scaffold:Scaffold",
    "zero_shot": "flexperts.methods.bounds:ZeroShot",
}
_LOADED: dict[str, type[Method]] = {}
_GROUP = "flexperts.methods"
"""Group of the entry points of installed packages."""


def register_method(name: str, target: str | type[Method]) -> None:
    """Add a method under a new name.

    Args:
        name: Its name in recipes.
        target: The class, or ``"package.module:Class"`` to import it on first use.

    Raises:
        ConfigError: The name is taken by another class, or the class is not a ``Method``.
    """
    _find_installed()
    _register(name, target)


def _register(name: str, target: str | type[Method]) -> None:
    path = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    if _METHODS.get(name, path) != path:
        rule = f"the name belongs to {_METHODS[name]}"
        raise ConfigError(f"method {name!r} at {path!r}", rule, "choose another name, or uninstall its package")
    if not isinstance(target, str):
        _LOADED[name] = _checked(name, path, target)
    _METHODS[name] = path


@cache
def _find_installed() -> None:
    """Register the methods of installed packages, once."""
    for point in entry_points(group=_GROUP):
        _register(point.name, point.value)


def method_names() -> list[str]:
    """Return all registered names, sorted.

    Raises:
        ConfigError: An installed package gives a method a name that is taken.
    """
    _find_installed()
    return sorted(_METHODS)


def method_paths() -> dict[str, str]:
    """Return the import paths of all registered methods, by name."""
    _find_installed()
    return dict(_METHODS)


def method_class(name: str) -> type[Method]:
    """Return the class registered under ``name``, imported on first use."""
    _find_installed()
    if name not in _METHODS:
        hint = did_you_mean(name, _METHODS, "see `flexperts methods`")
        raise ConfigError(f"method {name!r}", f"methods are {', '.join(method_names())}", hint)
    if name not in _LOADED:
        _LOADED[name] = _imported(name, _METHODS[name])
    return _LOADED[name]


def _imported(name: str, path: str) -> type[Method]:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"method {name!r} at {path!r}",
            f"it cannot be imported ({error})",
            "install or fix its package; worker processes need it in a module that they can import",
        ) from error
    return _checked(name, path, found)


def _checked(name: str, path: str, found: Any) -> type[Method]:
    from flexperts.methods.kit.method import Method

    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(
            f"method {name!r} at {path!r}",
            "it must be a subclass of flexperts.Method",
            "let its entry point name such a class, or uninstall its package",
        )
    return found


def make_method(config: MethodConfig) -> Method:
    """Return the method that a recipe names, with its options."""
    method = method_class(config.name)
    try:
        return method(method.Options.model_validate(config.options))
    except ValidationError as error:
        raise ConfigError("method.options", _offences(error, method), "change them in the recipe") from error


def total_rounds(config: MethodConfig, rounds: int) -> int:
    """Return how many rounds a run has in all; of a method that this process does not know, the recipe's alone.

    Args:
        config: The recipe's method.
        rounds: The recipe's rounds.
    """
    try:
        return make_method(config).total_rounds(rounds)
    except ConfigError:
        return rounds


def _offences(error: ValidationError, method: type[Method]) -> str:
    known = sorted(method.Options.model_fields)
    parts = []
    for offence in error.errors():
        key = ".".join(map(str, offence["loc"]))
        if offence["type"] == "extra_forbidden":
            hint = did_you_mean(key, known, f"known: {', '.join(known) or 'none'}", cutoff=0.5)
            parts.append(f"{method.name} has no option {key!r} ({hint})")
        else:
            parts.append(f"{key} = {offence['input']!r}: {offence['msg'].removeprefix('Value error, ')}")
    return "; ".join(parts)
