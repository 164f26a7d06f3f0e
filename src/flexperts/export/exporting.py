"""Export of a client's model of a finished run as a folder for other tools."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from flexperts.client.answer_limit import answer_limit
from flexperts.config.names import normal
from flexperts.config.run import RunConfig
from flexperts.errors import ArtifactError, ConfigError
from flexperts.evaluation.scores import EvaluationSettings, evaluate
from flexperts.export.baking import BakingLoss, attached, bake
from flexperts.export.card import Facts, write_card
from flexperts.export.content import Content, Exported, logits_of
from flexperts.export.folders import write_model, write_peft, write_personal, write_template
from flexperts.export.gguf.architectures import architecture_of
from flexperts.export.gguf.file import ReadBack
from flexperts.export.gguf.folder import check_gguf, write_gguf
from flexperts.export.template import stop_where_trained, trained_tokenizer
from flexperts.export.verification import REFERENCE_TEXT, LogitDifference, verify
from flexperts.files import holding, unwritable
from flexperts.finished.trained import TrainedRun
from flexperts.methods.kit.method import State
from flexperts.observer import current_observer

FORMS = ("transformers", "merged", "adapter", "personal", "gguf")
DTYPES = ("bfloat16", "float32")
GGUF_DTYPES = ("float16", "q8_0", "bfloat16", "float32")
MAX_LOSS = 0.05
"""Default of the most nats per token that baking may lose."""
_WHOLE = ("transformers", "merged", "gguf")
"""Forms that hold the base, too."""
_IN_RUN = "use the model in its run with `flexperts generate` or `flexperts serve`"


@dataclass(frozen=True)
class Export:
    """The result of an export.

    Args:
        folder: The folder.
        client: The client to which the model belongs; None if all clients have the same.
        state: The model's state.
        bytes: Size of all files.
        dtype: The least precise type in which weights are stored, or computed with.
        difference: Difference between the folder's and the run's logits, or between its weights and the run's; None
            if it was not checked.
        baking: What baking lost; None if nothing was baked.
    """

    folder: Path
    client: str | None
    state: State
    bytes: int
    dtype: str
    difference: LogitDifference | ReadBack | None
    baking: BakingLoss | None = None


def export_run(
    path: Path,
    out: Path,
    *,
    client: str | None = None,
    form: str | None = "transformers",
    state: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    check: bool = True,
    trust_remote_code: bool = False,
    baked: bool = False,
    max_loss: float = MAX_LOSS,
) -> Export:
    """Write a client's model of a finished run; the folder appears complete and checked, or not at all.

    A folder with a client's personal weights is for this user only; a model that all clients share is for everyone.

    Args:
        path: The run directory.
        out: The folder to create.
        client: The client; None if the state is the same for all clients.
        form: One of ``FORMS``; None takes the smallest that holds the model: adapter, personal or transformers.
        state: global, personalized or chosen; None takes the form's default, or chosen where the run has a floor.
        dtype: Storage type of the weights; None takes the base's, or float16 for gguf.
        base: Where the run's base is, if not where its recipe says.
        check: Whether to load the folder in a fresh process and compare its logits with the run's.
        trust_remote_code: Whether code of the base may run; a recipe that asks for it is refused otherwise.
        baked: Whether grafts become neurons of the base's shared experts; see ``baking``. It needs the rows.
        max_loss: Most nats per token that this may lose on the client's scored rows.
    """
    _known("--form", form, (*FORMS, None))
    _known("--dtype", dtype, (*(GGUF_DTYPES if form == "gguf" else DTYPES), None))
    if out.exists():
        raise ArtifactError(f"{out}", "it already exists", "choose another --to, or delete it")
    if form == "adapter" and dtype is not None:
        raise ConfigError(f"--dtype {dtype}", "an adapter is always stored in float32", "leave --dtype out")
    if baked and form not in ("transformers", "gguf"):
        raise ConfigError(f"--bake of --form {form}", "it holds grafts, or nothing of them", "leave --bake out")
    observer = current_observer()
    with _appearing(out) as folder:
        run = TrainedRun(path, base=base, trust_remote_code=trust_remote_code)
        tokens = _reference_tokens(run)
        form = form or _smallest(run, client, state, tokens)
        _check_base(run.config, form)
        architecture = architecture_of(run.workspace.base.model) if form == "gguf" else None
        stored = dtype or ("float16" if architecture else run.config.model.dtype)
        if client is not None and "chosen" in _states(run, form, state, client):
            run.client(client).choice(run.request(client))  # on first use it is made, on the base as it was trained
        # Smaller types of GGUF are made from float32, tensor by tensor; baking computes in it.
        computed = "bfloat16" if stored == "bfloat16" and not baked else "float32"
        if form in _WHOLE and computed != run.config.model.dtype:
            _cast(run.model.lora.frozen().values(), getattr(torch, computed))
        observer.stage("reading the model")
        owner, chosen, content = _read(run, client, "transformers" if baked else form, state, tokens)
        kept = run.client(owner).choice(run.request(owner))["chosen"] if chosen == "chosen" else chosen
        peft = run.model.lora.peft_entries(run.config.model.base)
        run.close()
        encoder = run.encoder_of(owner)
        tokenizer = trained_tokenizer(encoder)
        loss, merging = None, content
        if baked:
            loss, content = _baked(run, owner, content, tokens, stored)
            loss.check(max_loss)
            merging = replace(content, lora={}, grafts={}, experts=[], routers=[])
            architecture = architecture and architecture_of(run.workspace.base.model)
        facts = Facts(
            run, out.name, form, owner, chosen, kept, stored, content, bool(tokenizer.chat_template), loss
        )
        observer.stage(f"writing {out}")
        if form == "adapter":
            write_peft(folder, peft, content)
            write_template(folder, tokenizer)
        elif architecture is not None:
            merging.merge(run.workspace.base.model)
            write_gguf(folder / facts.file, out.name, architecture, tokenizer, encoder, stored)
        elif form == "personal":
            write_personal(folder, peft, content, facts.as_json(), getattr(torch, stored))
            write_template(folder, tokenizer)
        else:
            stop_where_trained(run.workspace.base.model, encoder)
            write_model(folder, run.workspace.base, merging, tokenizer)
        observer.stage(f"loading {out} in a fresh process")
        found = None
        if check and architecture is not None:
            found = check_gguf(folder / facts.file, architecture, tokenizer, tokens, content.logits, stored)
        elif check:
            found = _checked(facts, folder, tokens)
        write_card(folder, facts, found)
        _set_modes(folder, private=chosen in ("personalized", "chosen") or not run.model.method.one_global)
        folder.replace(out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return Export(out, facts.client, chosen, size, _coarsest(facts), found, loss)


def _known(option: str, value: str | None, known: Sequence[str | None]) -> None:
    if value not in known:
        raise ConfigError(
            f"{option} {value}", f"it must be one of {', '.join(filter(None, known))}", "choose one of these"
        )


def _cast(parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Convert weights of the base to another type, so that the run's logits are computed with the same weights."""
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _reference_tokens(run: TrainedRun) -> Tensor:
    ids = run.workspace.base.tokenizer(REFERENCE_TEXT, return_tensors="pt")["input_ids"]
    tokens: Tensor = ids[:, : run.config.training.max_length]
    return tokens


def _smallest(run: TrainedRun, client: str | None, state: str | None, tokens: Tensor) -> str:
    """Return the form of the smallest folder that holds a model."""
    _, _, content = _read(run, client, "transformers", state, tokens)
    return next((form for form in ("adapter", "personal") if _misfit(form, content) is None), "transformers")


def _read(
    run: TrainedRun, client: str | None, form: str, state: str | None, tokens: Tensor
) -> tuple[str, State, Content]:
    """Return the client, the state, and what the client's model has beyond the base."""
    states = _states(run, form, state, client)
    if client is None:
        states = [s for s in states if s == "global"]
        client = _any_client(run, bool(states))
    client = normal(client)
    given, problem = run.client(client), None
    reader = Exported(client, given.workspace, given.model, given.folder)
    for each in states:
        content = reader.content(run.request(client), each, tokens)
        problem = _misfit(form, content)
        if problem is None:
            return client, each, content
    assert problem is not None
    rule, remedy = problem
    remedy = remedy if run.config.model.quantization == "none" else _IN_RUN  # no other form is possible
    raise ConfigError(f"--form {form} of {run.model.method.name}, state {states[-1]}", rule, remedy)


def _baked(run: TrainedRun, owner: str, content: Content, tokens: Tensor, dtype: str) -> tuple[BakingLoss, Content]:
    """Merge and bake a model in place; return the loss, and the content with the logits of what came out."""
    base, parts = run.workspace.base, [*content.grafts.values()]
    if not parts:
        raise ConfigError("--bake", "the model has no grafts", "leave --bake out")
    client = run.client(owner)
    limit = answer_limit(client.workspace, run.config)
    settings = EvaluationSettings(limit, run.config.evaluation.batch_size, "fp32")
    content.merge(base.model)
    with attached(parts):
        before = evaluate(base.model, client.encoder, client.scored_rows, settings)
    bake(base.model, parts, client.examples, base.tokenizer.pad_token_id, run.config.seed)
    _cast(base.model.parameters(), torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    after = evaluate(base.model, client.encoder, client.scored_rows, settings)
    return BakingLoss.between(before, after), replace(content, logits=logits_of(base.model, tokens))


def _states(run: TrainedRun, form: str, name: str | None, client: str | None) -> Sequence[State]:
    """Return the states that may be exported, the preferred one first."""
    method = run.model.method
    if name == "zero_shot" or method.states == ("zero_shot",):
        raise ConfigError("state zero_shot", "it is the unchanged base", "use the base itself")
    if run.config.floor and client is not None:
        return [run.state(name)]
    if name is not None or form == "merged" or (form == "gguf" and client is None):
        return [run.state(name or "global")]
    beyond = [s for s in reversed(method.states) if s != "zero_shot"]
    return beyond if form == "adapter" else beyond[:1]


def _any_client(run: TrainedRun, is_global: bool) -> str:
    """Return a client for a state that is the same for all clients."""
    if is_global and run.model.method.one_global:
        return run.participants[0]
    raise ConfigError(
        "no --client", "every client has a different model", f"choose one of {', '.join(run.clients)}"
    )


def _check_base(config: RunConfig, form: str) -> None:
    """Refuse a form that would need the weights of a quantized or offloaded base."""
    model = config.model
    if model.quantization != "none" and form != "adapter":
        raise ConfigError(
            f"model.quantization = {model.quantization!r} with --form {form}",
            "its experts have no other weights to write or to graft on than the quantized ones",
            f"{_IN_RUN}, or export a state that is LoRA alone with --form adapter",
        )
    if model.device_map is not None and form in _WHOLE:
        raise ConfigError(
            f"model.device_map = {model.device_map!r} with --form {form}",
            "whole models can only be exported from a base that is in memory",
            "use --form adapter or personal",
        )


def _misfit(form: str, content: Content) -> tuple[str, str] | None:
    """Return rule and remedy if a form cannot contain a model, else None."""
    inside = bool(content.experts or content.routers)
    if form in ("adapter", "personal") and content.is_lora_alone and not content.lora:
        return "the model is the unchanged base", "use the base itself, or --form transformers"
    if form == "merged" and content.grafts:
        return "grafts cannot be merged: no standard architecture has them", "use --form transformers"
    if form == "gguf" and content.grafts:
        return "no architecture of llama.cpp has grafts", "use --form transformers, or --state global"
    if form == "adapter" and not content.is_lora_alone:
        return "the model has more than LoRA", "use --form transformers" + ("" if inside else ", or personal")
    if form == "personal" and inside:
        return "the model changes the base's experts or routers", "use --form transformers"
    if form == "personal" and not content.grafts:
        return "the model has no grafts, only LoRA", "use --form adapter"
    return None


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Yield a folder to be renamed to ``out``; otherwise it is deleted. Other processes are locked out."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with holding(out.with_name(f".{out.name}.lock"), out):
            for left in out.parent.glob(f".{glob.escape(out.name)}.*.part"):  # by a killed process
                shutil.rmtree(left, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(".part", f".{out.name}.", out.parent))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise unwritable(out, error) from error


def _set_modes(folder: Path, *, private: bool) -> None:
    """Make a folder readable for this user only, or for everyone."""
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o700 if path.is_dir() else 0o600) | (0 if private else 0o055 if path.is_dir() else 0o044))


def _checked(facts: Facts, folder: Path, tokens: Tensor) -> LogitDifference:
    """Load the folder in a fresh process, as its card says, and compare logits."""
    source = facts.run.workspace.base.source
    base = (
        str(Path(source).resolve()) if Path(source).is_dir() else source
    )  # the process has another current folder
    code = facts.loading(str(folder.resolve()), base)
    without = "" if facts.form == "personal" else "flexperts"
    return verify(code, tokens, facts.content.logits, getattr(torch, _coarsest(facts)), without=without)


def _coarsest(facts: Facts) -> str:
    """Return the least precise type in which a folder's weights are stored, or computed with."""
    base = facts.dtype if facts.is_whole else facts.run.config.model.dtype
    return "bfloat16" if "bfloat16" in (facts.dtype, base) else facts.dtype
