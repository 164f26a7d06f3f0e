"""The model card of an export: contents, origin, scores, limits, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from flexperts.export.baking import BakingLoss
from flexperts.export.content import Content
from flexperts.export.gguf.file import ReadBack
from flexperts.export.gguf.folder import MODELFILE
from flexperts.export.verification import LogitDifference
from flexperts.files import placeless, write_text
from flexperts.finished.trained import TrainedRun
from flexperts.methods.kit.method import State
from flexperts.modeling.skeleton import auto_class
from flexperts.server.summary import scores_text
from flexperts.smol_moe.build import BASES

_MODEL = """\
from transformers import {auto}

model = {auto}.from_pretrained({folder}, dtype="auto"{trust})
"""
_ADAPTER = """\
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({base}, dtype="{dtype}")
model = PeftModel.from_pretrained(base, {folder})
"""
_GRAFTS = """\
from pathlib import Path

from flexperts import find_experts, load_grafts

for path in sorted(Path({folder}).glob("*graft.safetensors")):
    load_grafts(path, find_experts(base)).attach()
"""
_GGUF = """\
from llama_cpp import Llama  # pip install llama-cpp-python

model = Llama({file}, n_ctx={context})
asked = [{{"role": "user", "content": "..."}}]
print(model.create_chat_completion(asked, temperature=0)["choices"][0]["message"]["content"])
"""
_CARD = """---
{metadata}
---

# {title}

{what}

- Base: `{base}`, fingerprint `{fingerprint}`.
- Method: `{method}`: {summary}. {rounds} rounds, seed {seed}.
- Data: {data}. This card contains none of their content.
- Made by flexperts {version}. {checked}

## Scores
{scores}

## Load
```python
{loading}```

{note}

## Use and limits
For the tasks of {whom}, with prompts like those of training. {prompts} It was
scored on few rows of one kind. It may make the base's mistakes, and on other tasks it may be worse than the base.

## Privacy
{privacy}

## Licence
{terms}
"""
_LIBRARIES = {"adapter": "peft", "personal": "peft", "gguf": "gguf"}


@dataclass(frozen=True)
class Facts:
    """Facts about an export.

    Args:
        run: The run.
        name: The folder's name.
        form: One of the forms.
        owner: The client whose model was read.
        state: The model's state.
        kept: The candidate that the client keeps if the state is chosen, else the state.
        dtype: Storage type of the weights.
        content: What the model has beyond the base.
        has_template: Whether the folder has the chat template used in training.
        baking: What baking the grafts lost; None if they were not baked.
    """

    run: TrainedRun
    name: str
    form: str
    owner: str
    state: State
    kept: str
    dtype: str
    content: Content
    has_template: bool
    baking: BakingLoss | None = None

    @property
    def has_grafts(self) -> bool:
        """Whether the folder holds grafts as such."""
        return bool(self.content.grafts) and self.baking is None

    @property
    def is_whole(self) -> bool:
        """Whether the folder holds the base, too."""
        return self.form not in ("adapter", "personal")

    @property
    def file(self) -> str:
        """The name of the GGUF file, in that form."""
        return f"{self.name}-{self.dtype}.gguf"

    @property
    def client(self) -> str | None:
        """The client to which the model belongs; None if all clients have the same."""
        return None if self.state == "global" and self.run.model.method.one_global else self.owner

    def as_json(self) -> dict[str, Any]:
        """Return the facts that the personal form stores."""
        base = self.run.workspace.base
        return {
            "client": self.owner,
            "state": self.state,
            **({"kept": self.kept} if self.state == "chosen" else {}),
            "method": self.run.config.method.name,
            "round": self.run.server.round,
            "base": {
                "name": _base_name(self.run),
                "fingerprint": base.fingerprint,
                "dtype": self.run.config.model.dtype,
            },
            "dtype": self.dtype,
        }

    def loading(self, folder: str, base: str) -> str:
        """Return Python code that loads the exported model as ``model``."""
        names = {"folder": json.dumps(folder), "auto": auto_class(self.run.workspace.base.model.config).__name__}
        if self.form == "gguf":
            file, context = json.dumps(f"{folder}/{self.file}"), self.run.config.training.max_length
            return _GGUF.format(file=file, context=context)
        if self.is_whole:
            trust = ", trust_remote_code=True" if self.has_grafts else ""
            return _MODEL.format(**names, trust=trust)
        code = _ADAPTER.format(**names, base=json.dumps(base), dtype=self.run.config.model.dtype)
        return code + (f"\n{_GRAFTS.format(**names)}" if self.content.grafts else "")


def write_card(folder: Path, facts: Facts, difference: LogitDifference | ReadBack | None) -> None:
    """Write the card as README.md."""
    from flexperts import __version__

    run, method = facts.run, facts.run.model.method
    whom = f"the silo `{facts.client}`" if facts.client else "the federation's silos"
    metadata = ModelCardData(
        base_model=_base_name(run),
        license=_license(Path(run.workspace.base.source)) or "other",
        library_name=_LIBRARIES.get(facts.form, "transformers"),
        pipeline_tag="text-generation",
        tags=["flexperts", "federated-learning", "mixture-of-experts"],
    )
    text = _CARD.format(
        metadata=metadata.to_yaml(),
        base=_base_name(run),
        title=f"{_base_name(run)} for {facts.client or 'all silos'}",
        what=_what(facts),
        fingerprint=run.workspace.base.fingerprint,
        method=method.name,
        summary=method.summary,
        rounds=run.summary["rounds"],
        seed=run.config.seed,
        data=_data(facts),
        version=__version__,
        checked=f"{difference}"[:1].upper() + f"{difference}"[1:] + "." if difference else "It was not checked.",
        scores="\n".join(_scores(facts)),
        loading=facts.loading(facts.name, _base_name(run)),
        note=_note(facts, folder),
        whom=whom,
        prompts=_prompts(facts),
        privacy=_privacy(facts),
        terms=_terms(run),
    )
    write_text(folder / "README.md", text)


def _what(facts: Facts) -> str:
    content = facts.content
    lora = f"LoRA on {len(content.lora)} attention layers"
    grafts = sum(len(graft.indices) for part in content.grafts.values() for graft in part)
    opens = any(part.difference for part in content.grafts.values())
    difference = " that opens to the difference from the expert it started from" if opens else ""
    adapted = sum(len(layer.indices) for part in content.experts for layer in part)
    also = [
        f"{grafts} grafted experts, each with a sigmoid gate{difference}" if grafts else "",
        f"{adapted} pretrained experts trained in place" if adapted else "",
        f"{len(content.routers)} routers trained" if content.routers else "",
    ]
    parts = ", ".join([lora, *filter(None, also)])
    forms = {
        "transformers": f"The whole model, stored as {facts.dtype}; LoRA is merged into the base's weights",
        "merged": f"The whole model, stored as {facts.dtype}; LoRA is merged into the base's weights",
        "gguf": f"The whole model as a GGUF file of {facts.dtype}; LoRA is merged into the base's weights",
        "adapter": "A PEFT adapter folder, without the base",
        "personal": f"What this model adds to the base: a PEFT adapter folder, and grafts as {facts.dtype}",
    }
    trained = parts if content.lora else "nothing, it is the unchanged base"
    return f"{forms[facts.form]}. What was trained: {trained}. State: {_state(facts)}."


def _state(facts: Facts) -> str:
    return facts.state if facts.state == facts.kept else f"{facts.state} by its validation rows: {facts.kept}"


def _data(facts: Facts) -> str:
    clients = facts.run.server.clients
    silos = f"{len(clients)} silos with {sum(clients.values())} train rows in all"
    if (joined := facts.run.joined.get(facts.client or "")) is not None:
        return f"{silos}; then {joined['rows']['train_rows']} of {facts.client}'s, which joined after training"
    own = clients.get(facts.client or "")
    return f"{silos}, of which {own} are {facts.client}'s" if own is not None else silos


def _scores(facts: Facts) -> Iterator[str]:
    """Yield the lines of a score table: of the model's client, or of all clients."""
    took_part = facts.run.summary["clients"]
    scored = took_part | facts.run.joined
    names = [facts.client] if facts.client else sorted(took_part)
    pairs = facts.run.config.training.objective == "dpo"
    rewards = ", and the percentage of pairs whose chosen answer has the higher reward," if pairs else ""
    yield f"ROUGE-L (NLL in nats per token){rewards} on each silo's own {facts.run.config.evaluation.split} rows:\n"
    states = facts.run.model.method.states
    yield f"| silo | rows | {' | '.join(states)} |"
    yield "|---" * (len(states) + 2) + "|"
    for name in (n for n in names if n in scored):
        cells = [scores_text(scored[name], s) for s in states]
        yield f"| {name} | {scored[name]['scored_rows']} | {' | '.join(cells)} |"
    yield f"\nThis export is the state *{_state(facts)}*."
    if facts.baking:
        yield f"\nIts grafts are {facts.baking}: neurons of the base's shared experts do nearly the same."


def _note(facts: Facts, folder: Path) -> str:
    if facts.form == "gguf":
        run = f"`llama-server -m {facts.file} --jinja` serves it with the chat template that is in the file."
        if (folder / MODELFILE).exists():
            return f"{run} For Ollama: `ollama create NAME -f {MODELFILE}`."
        return f"{run} It has no {MODELFILE} for Ollama, whose templates cannot write the prompts of training."
    if facts.is_whole:
        if not facts.has_grafts:
            return "The architecture is the base's: software that serves the base also serves this folder."
        return (
            "Loading runs the code in `modeling_grafted.py` and `grafts.py` in this folder, about 200 lines: "
            "read it before you trust it. Software that supports only standard architectures refuses this folder."
        )
    base = _base_name(facts.run)
    where = f" (`flexperts base build {base}` prints its folder)" if base in BASES else ""
    extra = " The grafts need flexperts; PEFT alone gives the model without them." if facts.content.grafts else ""
    return f"The base must be `{base}`: give its folder{where} or hub id.{extra}"


def _prompts(facts: Facts) -> str:
    """Return how to write prompts as in training."""
    if facts.run.encoder_of(facts.owner).chat:
        how = "a passage follows the question in the same turn, after an empty line"
    elif not facts.has_template:
        return "They follow the alpaca template, which no chat template of this tokenizer can write; use flexperts."
    else:
        how = "a passage is in a system turn before the question"
    if facts.is_whole:
        return f"The tokenizer's chat template writes them: {how}."
    return f"`chat_template.jinja` writes them: set it as the tokenizer's `chat_template`; {how}."


def _privacy(facts: Facts) -> str:
    if facts.kept == "zero_shot":
        return "It is the unchanged base: no row of a silo is in it."
    if facts.kept != "global":
        return (
            f"Parts of this model were trained only on the rows of `{facts.owner}` and may repeat their content. "
            "Share the model only with people who may see the rows."
        )
    return (
        "It was trained on the rows of all silos and may repeat some of their content; only differential privacy, "
        "if the run used it, limits that."
    )


def _terms(run: TrainedRun) -> str:
    known = _license(Path(run.workspace.base.source))
    base = (
        f"The base's licence is {known}, as its card says" if known else "See the base's own card for its licence"
    )
    return (
        f"{base}; this folder is a derivative of the base. The owners of the training rows may set further terms."
    )


def _license(base: Path) -> str | None:
    """Return the licence that a local base's card names."""
    card = base / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"\A---\n(?:.*\n)*?license: *(\S+)", text)
    return found[1] if found else None


def _base_name(run: TrainedRun) -> str:
    """Return the base's name in the recipe; of a local folder, only the last part."""
    return str(placeless(run.config.model.base))
