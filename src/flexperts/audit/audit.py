"""The audit: a round is simulated in every setting, and the update that an observer sees is attacked.

A run directory keeps no updates. So the audited round is the one after a finished run's last. A recipe is first run
for one round, on another part of the rows where they are divided; else on the same.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from scipy.stats import binomtest

from flexperts.artifacts import RunDirectory
from flexperts.audit.canaries import chance, exposures, secrets
from flexperts.audit.membership import RESAMPLES, bounds, membership
from flexperts.audit.rounds import CONTROL, Observed, Setting, Simulation, dealt, settings_of
from flexperts.audit.words import word_attack
from flexperts.client.workspace import Workspace
from flexperts.config.evaluation import EvaluationConfig, KnowledgeConfig
from flexperts.config.federation import CompressionConfig, PrivacyConfig
from flexperts.config.names import normal
from flexperts.config.run import MethodConfig, RunConfig
from flexperts.data.clients import Clients, partition_manifest
from flexperts.data.rows import Row
from flexperts.engines.run import check_settings, run_federation
from flexperts.environment import environment
from flexperts.errors import ArtifactError, ConfigError, did_you_mean
from flexperts.files import opened, placeless, read_json, sealed, sole_writer, write_json
from flexperts.finished.trained import TrainedRun
from flexperts.methods.kit.server_state import Server
from flexperts.methods.registry import make_method
from flexperts.observer import Observer, current_observer, observing
from flexperts.protection.pipeline import check_enough, checked_method
from flexperts.recipe import recorded_recipe
from flexperts.seeding import derive_seed, generator
from flexperts.server.checkpoint import load_server

CANARIES, REPEATS, CANDIDATES = 8, 4, 127
"""Secrets in the audited silo's rows, how often each is there, and secrets that are not."""
_FEWEST = 8
"""Fewest rows on each side for membership inference."""
RESULT = "audit.json"


@dataclass(frozen=True)
class Plan:
    """What to audit.

    Args:
        client: The audited client; None takes the first.
        only: Names of settings; empty takes all.
        secure: Numbers of silos with secure aggregation.
    """

    client: str | None = None
    only: Sequence[str] = ()
    secure: tuple[int, ...] = (4, 20)


@dataclass(frozen=True)
class Subject:
    """A run's state, from which the audited rounds start.

    Args:
        workspace: Its base and encoders.
        config: The audited round's recipe.
        server: The server's state.
        parts: The clients' rows in parts; see ``dealt``.
        personal: Folder of the clients' personal states.
    """

    workspace: Workspace
    config: RunConfig
    server: Server
    parts: Sequence[Clients]
    personal: Path


def audit_recipe(config: RunConfig, out: Path, plan: Plan, observer: Observer) -> dict[str, Any]:
    """Run a recipe for one round, attack the next one in all settings, and return the result.

    Args:
        config: The recipe.
        out: Folder of the result and of the round before; settings that are there already are not repeated.
        plan: What to audit.
        observer: Receives progress.

    Raises:
        FlexpertsError: The recipe's method, rows or defences cannot be audited; this is checked before training.
    """
    with sole_writer(out), observing(observer):
        _check(config)
        observer.stage("reading rows")
        workspace = Workspace(config)
        config = config.with_choices(template_date=workspace.template_date)
        parts, chosen = _planned(config, workspace.clients, plan)
        first, run = _first_round(config), RunDirectory(out / "run")
        run_federation(first, run.path, observer, resume=True, workspace=workspace.with_clients(first, parts[-1]))
        subject = Subject(workspace, config, load_server(run.checkpoint), parts, run.path / "personal")
        return _audit(subject, chosen, out)


def audit_run(
    path: Path,
    settings: Sequence[str],
    out: Path,
    plan: Plan,
    observer: Observer,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Attack the round after a finished run's last one in all settings, and return the result.

    Args:
        path: The run directory.
        settings: Changes of the audited round, ``KEY=VALUE`` of training.* and privacy.*.
        out, plan, observer: As for ``audit_recipe``.
        base: Folder of the base, if it is not where the recipe says.
        trust_remote_code: Whether code of the base may run.

    Raises:
        FlexpertsError: There is no finished run, or it cannot be audited; this is checked before training.
    """
    for key in (its.partition("=")[0].strip() for its in settings):
        if not key.startswith(("training.", "privacy.")):
            rule = "rows, base and method are the run's; the audited round may have other training.* and privacy.*"
            raise ConfigError(f"--set {key}", rule, "leave it out, or audit a recipe with this setting")
    RunDirectory.open(path).summary()
    wanted = recorded_recipe(path, settings)
    with sole_writer(out), observing(observer):
        _check(wanted)
        trained = TrainedRun(path, base=base, trust_remote_code=trust_remote_code)
        trained.close()
        config = trained.config.model_copy(update={"training": wanted.training, "privacy": wanted.privacy})
        observer.stage("reading rows")
        parts, chosen = _planned(config, trained.workspace.clients, plan)
        return _audit(Subject(trained.workspace, config, trained.server, parts, path / "personal"), chosen, out)


def _check(config: RunConfig) -> None:
    """Refuse what has no update to attack, or one in which the attacks mean something else."""
    check_settings(config)
    method = make_method(config.method)
    if not method.additive:
        raise ConfigError(
            f"an audit of method {method.name!r}",
            "it needs replies that are the sent weights after training (Method.additive)",
            "audit a recipe with a method such as 'fedavg' or 'flex'",
        )
    if config.training.objective != "next_token":
        raise ConfigError(
            f"training.objective = {config.training.objective!r}",
            "the audit's canaries have one answer, and its attacks read losses of answers",
            "audit with --set training.objective=next_token",
        )


def _planned(config: RunConfig, clients: Clients, plan: Plan) -> tuple[list[Clients], list[Setting]]:
    """Return the clients' rows in parts, and the chosen settings; refuse a plan that does not fit the clients."""
    if len(clients) < 2:
        rule = "the attacks compare the audited silo with other ones"
        raise ConfigError(f"a recipe with {len(clients)} client", rule, "audit a recipe with two clients or more")
    name = next(iter(clients)) if plan.client is None else normal(plan.client)
    if name not in clients:
        raise ConfigError(f"--client {name!r}", "there is no such client", f"choose from {', '.join(clients)}")
    rows = settings_of(config, len(clients), plan.secure)
    known = {row.name: row for row in rows}
    if unknown := [its for its in plan.only if its not in known]:
        remedy = did_you_mean(unknown[0], known, f"choose from {', '.join(known)}")
        raise ConfigError(f"--only {unknown[0]!r}", "there is no such setting", remedy)
    chosen = [row for row in rows if not plan.only or row.name in plan.only]
    for row in chosen:
        checked_method(its := row.config(config))
        check_enough(its, row.silos)
    return dealt(clients, name, max(row.silos for row in rows)), chosen


def _first_round(config: RunConfig) -> RunConfig:
    """Return the recipe of the round before the audited one: no defences, and next to no evaluation."""
    federation = config.federation.model_copy(update={"rounds": 1, "participation": 1.0, "aggregation": "mean"})
    method = MethodConfig(name=config.method.name, options=config.method.options)
    off = {"privacy": PrivacyConfig(), "compression": CompressionConfig(), "protections": {}, "floor": None}
    evaluation = EvaluationConfig(rows=1, clients=1, max_new_tokens=1)
    plain = {"federation": federation, "method": method, "evaluation": evaluation, "knowledge": KnowledgeConfig()}
    return config.model_copy(update=off | plain)


def _audit(subject: Subject, chosen: Sequence[Setting], out: Path) -> dict[str, Any]:
    """Attack every chosen setting that the result does not have yet; it is written after each."""
    result = _begun(subject, out)
    for number, setting in enumerate(chosen, 1):
        if setting.name in result["settings"]:
            continue
        current_observer().stage(f"{setting.name} ({number} of {len(chosen)}): {setting.about}")
        result["settings"][setting.name] = _attacked(subject, setting)
        write_json(out / RESULT, sealed(result))
    return result


def _begun(subject: Subject, out: Path) -> dict[str, Any]:
    """Return the result so far, or a new one; refuse one of another audit."""
    config, server, parts = subject.config, subject.server, subject.parts
    audited = next(iter(parts[0]))
    made = {
        "method": config.method.name,
        "base": {"name": placeless(config.model.base), "fingerprint": server.base},
        "client": audited,
        "clients": len(parts[0]),
        "parts": len(parts),
        "train_rows": len(parts[0][audited].train),
        "test_rows": len(parts[0][audited].test),
        "round": server.round + 1,
        "canaries": {"secrets": CANARIES, "repeats": REPEATS, "candidates": CANDIDATES + 1},
        "rows": partition_manifest(parts[0])["sha256"],
        "recipe": tomli_w.dumps(placeless(tomllib.loads(config.to_toml()))),
        "environment": environment(),
    }
    path = out / RESULT
    if not path.exists():
        return {**made, "settings": {}}
    found = opened(path, read_json(path), needed=True)
    if differing := [key for key, value in made.items() if found.get(key) != value]:
        rule = f"it is of another audit (other {', '.join(differing)})"
        raise ArtifactError(f"{path}", rule, "choose another --out, or repeat the command of that audit")
    return found


def _attacked(subject: Subject, setting: Setting) -> dict[str, Any]:
    """Train one setting's round, and return its row of the table."""
    config, seed = setting.config(subject.config), subject.config.seed
    silos = _silos(subject.parts)
    simulation = Simulation(subject.workspace, subject.server, silos, subject.personal)
    own = silos[simulation.audited]
    drawn = secrets(CANARIES + CANDIDATES, generator(seed, "audit", "canaries"))
    planted, candidates = drawn[:CANARIES], drawn[CANARIES:]
    rows = {"one": own.train[:1], "batch": own.train[: config.training.batch_size]}.get(setting.rows)
    trained = rows if rows is not None else (*own.train, *(row for row in planted for _ in range(REPEATS)))
    with simulation.observed(setting, config, replace(own, train=trained)) as seen:
        encoder, lora = seen.client.encoder, seen.client.model.lora
        others = [encoder.encode(row).input_ids for its in [*subject.parts[0].values()][1:] for row in its.train]
        true = [example.input_ids for example in seen.client.examples]
        words = word_attack(seen.change, lora, config.model.precision, true, others)
        found: dict[str, Any] = {"canaries": None, "membership": None}
        if rows is None:
            score = partial(_scores, seen)
            found["canaries"] = _exposure(score(planted), score(candidates), seed)
            if min(len(own.train), len(own.test)) >= _FEWEST:
                found["membership"] = membership(score(own.train), score(own.test), derive_seed(seed, "audit"))
        norm = float(np.linalg.norm(seen.after.vector.astype(np.float64) - seen.before.vector))
        return {**_facts(setting, config, seen, len(trained)), "norm": norm, "words": _shares(words), **found}


def _silos(parts: Sequence[Clients]) -> Clients:
    """Return all parts' silos in turn; those of the first part have the clients' names."""
    return {
        name if number == 0 else f"{name}-{number + 1}": rows
        for number, part in enumerate(parts)
        for name, rows in part.items()
    }


def _facts(setting: Setting, config: RunConfig, seen: Observed, rows: int) -> dict[str, Any]:
    privacy = config.privacy
    return {
        "about": setting.about,
        "control": setting.name == CONTROL,
        "observer": "another silo" if privacy.noise == "central" else "the server",
        "optimizer": config.training.optimizer,
        "steps": seen.steps,
        "rows": rows,
        "rank": config.lora.rank,
        "noise": privacy.noise,
        "noise_multiplier": privacy.noise_multiplier if privacy.noise != "none" else None,
        "clip": privacy.clip if privacy.noise != "none" or privacy.aggregation == "secure" else None,
        "packing": config.compression.kind,
        "secure": privacy.aggregation == "secure",
        "silos": setting.silos,
    }


def _scores(seen: Observed, rows: Sequence[Row]) -> list[float]:
    """Return how much lower each row's loss is than under the untouched base, in nats per token.

    A loss that is not finite, which a model that noise has broken may have, tells nothing: its score is 0.
    """
    scored = seen.client.evaluate(seen.request, ("zero_shot", "global"), rows, answers=False)
    gains = np.subtract(scored["zero_shot"].nlls, scored["global"].nlls)
    return [float(gain) if np.isfinite(gain) else 0.0 for gain in gains]


def _exposure(planted: Sequence[float], candidates: Sequence[float], seed: int) -> dict[str, float]:
    """Return the canaries' mean exposure with its interval over canaries, and what it can be."""
    found = exposures(planted, candidates)
    stream = np.random.default_rng(derive_seed(seed, "audit", "exposure"))
    draws = [float(stream.choice(found, len(found)).mean()) for _ in range(RESAMPLES)]
    its = bounds(float(np.mean(found)), draws)
    return {**its, "most": log2(len(candidates) + 1), "chance": chance(len(candidates))}


def _shares(words: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the word attack's counts with the share of named words that are right, and its Wilson interval."""
    if words is None:
        return None
    shares = {name: _shares(value) if name == "own" else value for name, value in words.items()}
    if not words["named"]:
        return {**shares, "value": None, "low": None, "high": None}
    its = binomtest(words["right"], words["named"]).proportion_ci(method="wilson")
    return {**shares, "value": words["right"] / words["named"], "low": float(its.low), "high": float(its.high)}
