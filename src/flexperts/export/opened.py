"""An exported folder in use: a whole model, or what it adds to a base."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel

from flexperts.config.data import Template
from flexperts.config.model import ModelConfig
from flexperts.config.names import normal
from flexperts.data.prompts import PromptEncoder
from flexperts.errors import ArtifactError, ConfigError
from flexperts.evaluation.generation import Answer
from flexperts.export.template import writes_alpaca
from flexperts.files import mapping, read_json, text_of
from flexperts.finished.trained import answered
from flexperts.modeling.forward import Precision
from flexperts.modeling.load import LoadedBase, load_base
from flexperts.moe.experts import find_experts
from flexperts.parts.graft_file import load_grafts

_LONGEST, _BATCH = 256, 8
_PRECISIONS: dict[str, Precision] = {"bfloat16": "bf16", "float32": "fp32"}
"""Storage type of the base -> the precision in which it computes."""


class ExportedFolder:
    """A folder that an export wrote: a whole model, or what it adds to a base.

    Args:
        folder: The folder.
        base: Folder or hub id of the base, if it is not what the folder names.
        dtype: Storage type of the base's weights; by default what the folder says, else bfloat16.
        trust_remote_code: Whether code in a whole model's folder may run.
    """

    def __init__(self, folder: Path, base: str | None, dtype: str | None, *, trust_remote_code: bool) -> None:
        self.place, self._base, self._trusted = folder, base, trust_remote_code
        self._whole = (folder / "config.json").is_file()
        about = folder / "personal.json"
        self.about: dict[str, Any] = mapping(about, read_json(about)) if about.is_file() else {}
        """Whose model it is, in which state, and on which base; empty where the form does not say."""
        self.state = str(self.about.get("state", "exported"))
        self.name = normal(str(self.about.get("client", folder.resolve().name)))
        """The client whose model it is, or the folder's name."""
        if not self._whole and not (folder / "adapter_model.safetensors").is_file():
            raise ArtifactError(
                f"{folder}",
                "it holds neither a run nor an exported model",
                "give a run directory, or a folder or hub repository made by `flexperts export` or push_to_hub",
            )
        self._dtype = dtype or self._stored_dtype()
        if self._dtype not in _PRECISIONS:
            rule = f"it must be {' or '.join(_PRECISIONS)}"
            raise ConfigError(f"dtype = {self._dtype!r}", rule, "choose one of them")

    def _stored_dtype(self) -> str:
        if self._whole:
            config = mapping(self.place / "config.json", read_json(self.place / "config.json"))
            return str(config.get("dtype", config.get("torch_dtype", "bfloat16")))
        return str(self.about.get("base", {}).get("dtype", "bfloat16"))

    @cached_property
    def _loaded(self) -> LoadedBase:
        if self._whole:
            return load_base(self._settings(str(self.place)))
        entries = self.place / "adapter_config.json"
        named = mapping(entries, read_json(entries)).get("base_model_name_or_path")
        loaded = load_base(self._settings(self._base or str(named)))
        its = self.about.get("base", {}).get("fingerprint", loaded.fingerprint)
        if its != loaded.fingerprint:
            raise ArtifactError(
                f"{self.place} belongs to base {its[:12]}, and {loaded.source} is base {loaded.fingerprint[:12]}",
                "the model's own base is needed, in the same dtype",
                "give its folder or hub id as base=...",
            )
        experts = find_experts(loaded.model) if self.about else []
        PeftModel.from_pretrained(loaded.model, str(self.place)).eval()  # the adapters stay in the base
        device = next(loaded.model.parameters()).device
        for path in sorted(self.place.glob("*graft.safetensors")):
            load_grafts(path, experts).to(device).attach()
        template = self.place / "chat_template.jinja"
        loaded.tokenizer.chat_template = text_of(template) if template.is_file() else None
        return loaded

    def _settings(self, base: str) -> ModelConfig:
        known = {"base": base, "dtype": self._dtype, "precision": self.precision}
        return ModelConfig.model_validate(known | {"trust_remote_code": self._trusted})

    @cached_property
    def encoder(self) -> PromptEncoder:
        """The encoder of prompts, with the chat template of training."""
        tokenizer, text = self._loaded.tokenizer, self._loaded.model.config.get_text_config()
        template, positions = tokenizer.chat_template, getattr(text, "max_position_embeddings", None)
        kind: Template = "chat" if template and not writes_alpaca(str(template)) else "alpaca"
        known = {"vocabulary": text.vocab_size, "positions": positions}
        return PromptEncoder(tokenizer, kind, positions or _LONGEST, **known)

    def answers(self, prompts: Sequence[Sequence[int]], limit: int | None, batch: int | None) -> list[Answer]:
        """Return the greedy answers to prompts, in their order.

        Args:
            prompts: Token ids of each prompt, up to where its answer starts.
            limit: Longest answer in tokens; None is 256.
            batch: Prompts that are answered together; None is 8.
        """
        return answered(
            self._loaded.model,
            self.encoder,
            prompts,
            _LONGEST if limit is None else limit,
            _BATCH if batch is None else batch,
            precision=self.precision,
            on_batch=None,
            owner=self.name,
            state=self.state,
        )

    @contextmanager
    def in_use(self) -> Iterator[Any]:
        """Yield the torch model."""
        yield self._loaded.model

    @property
    def precision(self) -> Precision:
        """The precision in which the model computes."""
        return _PRECISIONS[self._dtype]

    def write(self, folder: Path, form: str | None) -> None:
        """Copy the folder; another form is refused."""
        if form is not None:
            rule = "an exported model keeps its form"
            raise ConfigError(f"form = {form!r}", rule, "leave it out, or export from the run")
        shutil.copytree(self.place, folder)

    def close(self) -> None:
        """Free the base."""
        for name in ("encoder", "_loaded"):
            self.__dict__.pop(name, None)
