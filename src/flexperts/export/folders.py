"""The forms of an export as folders.

transformers   the whole model; with grafts, code that defines them is included, else the architecture is standard
adapter        a PEFT folder
personal       a PEFT folder, and the grafts in separate files
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexperts.communication.adapter_folder import write_adapter
from flexperts.errors import ArtifactError
from flexperts.export import grafts as shipped
from flexperts.export.content import Content, graft_tensors
from flexperts.files import read_json, unwritable, write_json, write_text
from flexperts.modeling.load import LoadedBase
from flexperts.modeling.skeleton import auto_class
from flexperts.parts.graft_file import save_grafts

_CODE = "modeling_grafted"
_MODELING = '''"""{architecture} with personal experts, which grafts.py adds. Made by flexperts."""

from transformers import {config}, {architecture}

from .grafts import hang_grafts


class Grafted{config}({config}):
    """``grafts``: name of an experts module -> its personal experts' factors, and what is subtracted from each."""

    # Not the base's type: software that does not support grafts must refuse this model, not ignore them.
    model_type = "grafted_{model_type}"


class Grafted{architecture}({architecture}):
    """The base with its grafts."""

    config_class = Grafted{config}

    def __init__(self, config):
        super().__init__(config)
        hang_grafts(self, config.grafts)
'''


def write_model(folder: Path, base: LoadedBase, content: Content, tokenizer: Any = None) -> None:
    """Write the whole model with its tokenizer; the base in memory is changed.

    Args:
        folder: An existing, empty folder.
        base: The base without adapters, in the storage type.
        content: What the model has beyond the base.
        tokenizer: The tokenizer with the chat template used in training; the base's by default.
    """
    content.merge(base.model)
    grafted = bool(content.grafts)
    if grafted and not type(base.model).__module__.startswith("transformers."):
        raise ArtifactError(
            f"base class {type(base.model).__name__}",
            "grafts can only be exported for classes that are part of transformers",
            "use --form personal",
        )
    layout = _hang(base.model, content) if grafted else {}
    try:
        # A model with its own code is loaded as stored here; a standard one needs the layout of hub checkpoints.
        base.model.save_pretrained(folder, save_original_format=not grafted)
        (tokenizer or base.tokenizer).save_pretrained(folder)
    except Exception as error:  # of these libraries, one raises bare exceptions where a disk is full
        raise unwritable(folder, error) from error
    if grafted:
        _write_code(folder, base.model, layout)


def write_peft(folder: Path, peft: Mapping[str, Any], content: Content) -> None:
    """Write LoRA as a PEFT folder.

    Args:
        folder: Where it goes.
        peft: Entries of PEFT's configuration of the run's adapter.
        content: What the model has beyond the base.
    """
    write_adapter(folder, peft, content.adapter())


def write_template(folder: Path, tokenizer: Any) -> None:
    """Write only the chat template, as transformers does; the tokenizer is the base's."""
    if isinstance(tokenizer.chat_template, str):
        write_text(folder / "chat_template.jinja", tokenizer.chat_template)


def write_personal(
    folder: Path, peft: Mapping[str, Any], content: Content, about: dict[str, Any], dtype: torch.dtype
) -> None:
    """Write LoRA as a PEFT folder, the grafts as files, and their metadata as JSON; grafts in memory are converted.

    Args:
        folder: The folder.
        peft: Entries of PEFT's configuration of the run's adapter.
        content: What the model has beyond the base.
        about: Other entries of the JSON.
        dtype: Storage type of the grafts.
    """
    write_peft(folder, peft, content)
    for name, part in content.grafts.items():
        save_grafts(folder / f"{name}.safetensors", part.to(dtype))
    indices = {
        name: {layer: list(chosen) for layer, chosen in part.choice.items()}
        for name, part in content.grafts.items()
    }
    write_json(folder / "personal.json", about | {"grafted_experts": indices})


@torch.no_grad()
def _hang(model: nn.Module, content: Content) -> dict[str, dict[str, Any]]:
    """Attach the exported code's grafts, with the run's values, to the model; return their layout."""
    layers = [graft for part in content.grafts.values() for graft in part]
    names = list(dict.fromkeys(graft.experts.name for graft in layers))
    by_name = {name: [graft for graft in layers if graft.experts.name == name] for name in names}
    layout = {
        name: {
            "scales": [c for graft in grafts for c in graft.scales],
            "minus": [index if graft.difference else None for graft in grafts for index in graft.indices],
        }
        for name, grafts in by_name.items()
    }
    shipped.hang_grafts(model, layout)
    for name, grafts in by_name.items():
        target: Any = model.get_submodule(f"{name}.graft")
        each = [graft_tensors(graft) for graft in grafts]
        for tensor_name, parameter in target.named_parameters():
            parameter.copy_(torch.cat([tensors[tensor_name] for tensors in each]))
    return layout


def _write_code(folder: Path, model: Any, layout: dict[str, dict[str, Any]]) -> None:
    """Write the code that loads the folder, and register it in the folder's config."""
    config, kind = read_json(folder / "config.json"), type(model)
    names = {
        "architecture": kind.__name__,
        "config": type(model.config).__name__,
        "model_type": config["model_type"],
    }
    write_text(folder / f"{_CODE}.py", _MODELING.format(**names))
    shutil.copyfile(shipped.__file__, folder / "grafts.py")
    classes = {"AutoConfig": names["config"], auto_class(model.config).__name__: names["architecture"]}
    own = {
        "model_type": f"grafted_{config['model_type']}",
        "architectures": [f"Grafted{names['architecture']}"],
        "auto_map": {auto: f"{_CODE}.Grafted{name}" for auto, name in classes.items()},
        "grafts": layout,
    }
    write_json(folder / "config.json", config | own)
