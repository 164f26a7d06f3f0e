"""A silo's own policy: which recipes and requests it accepts, whatever a server sends."""

from __future__ import annotations

from flexperts.config.run import RunConfig
from flexperts.config.silo import SiloPolicy
from flexperts.errors import PolicyError, shown
from flexperts.methods.kit.method import Method
from flexperts.methods.registry import method_class
from flexperts.protection.pipeline import told


def rules(policy: SiloPolicy) -> dict[str, str]:
    """Return the rules that a policy sets, by key, as `silo check` prints them and a refused server reads them."""
    texts: dict[str, object] = {
        "methods": policy.methods and f"the method must be one of {', '.join(policy.methods)}",
        "bases": policy.bases and f"model.base must be one of {', '.join(policy.bases)}",
        "max_runs": policy.max_runs is not None and f"this silo takes part in at most {policy.max_runs} runs",
        "max_rounds": f"a run may have at most {policy.max_rounds} rounds",
        "max_evaluations": policy.max_evaluations
        and f"a run may have at most {policy.max_evaluations} evaluations",
        "noise": policy.noise == "local" and "privacy.noise must be 'local'",
        "min_noise_multiplier": policy.min_noise_multiplier
        and f"privacy.noise_multiplier must be at least {policy.min_noise_multiplier}",
        "aggregation": policy.aggregation == "secure" and "privacy.aggregation must be 'secure'",
        "agreement": policy.agreement and "with secure aggregation, privacy.agreement must be true",
        "max_epsilon": policy.max_epsilon
        and f"the epsilon of all runs must be at most {policy.max_epsilon} at delta {policy.delta}",
        "scores": not policy.scores and "this silo sends no scores",
        "min_score_rows": f"a score must stand for at least {policy.min_score_rows} rows",
        "min_clients": policy.min_clients and f"federation.min_clients must be at least {policy.min_clients}",
        "max_message_bytes": f"a request may have at most {policy.max_message_bytes:,} bytes",
    }
    return {key: f"{text} (policy.{key})" for key, text in texts.items() if text}


def refusal(policy: SiloPolicy, key: str, found: str) -> PolicyError:
    """Return the error for something that breaks a rule; only the rule is told to the server."""
    return PolicyError(found, rules(policy)[key], "change the recipe, or this silo's policy")


def check_policy(policy: SiloPolicy) -> None:
    """Refuse a policy that names methods which do not exist."""
    for name in policy.methods or ():
        method_class(name)


def check_recipe(policy: SiloPolicy, config: RunConfig, method: Method) -> None:
    """Refuse a recipe that breaks a rule.

    Args:
        policy: The silo's policy.
        config: The recipe, as received.
        method: The recipe's method.
    """
    federation, privacy, evaluation = config.federation, config.privacy, config.evaluation
    rounds = method.total_rounds(federation.rounds)
    evaluations = -(-rounds // evaluation.every) if evaluation.every else 1
    least, most = policy.min_noise_multiplier or 0, policy.max_evaluations or evaluations
    few = policy.scores and evaluation.rows is not None and evaluation.rows < policy.min_score_rows
    broken = {
        ("methods", f"method.name = {shown(method.name)}"): method.name not in (policy.methods or (method.name,)),
        ("bases", f"model.base = {shown(config.model.base)}"): policy.bases
        and config.model.base not in policy.bases,
        ("max_rounds", f"{rounds} rounds"): rounds > policy.max_rounds,
        ("max_evaluations", f"{evaluations} evaluations"): policy.scores and evaluations > most,
        ("noise", f"privacy.noise = {privacy.noise!r}"): policy.noise == "local" != privacy.noise,
        ("min_noise_multiplier", f"{privacy.noise_multiplier}"): privacy.noise_multiplier < least,
        ("aggregation", f"privacy.aggregation = {privacy.aggregation!r}"): policy.aggregation == "secure"
        and privacy.aggregation != "secure",
        ("agreement", f"privacy.agreement = {privacy.agreement}"): policy.agreement
        and privacy.aggregation == "secure"
        and not privacy.agreement,
        ("min_score_rows", f"evaluation.rows = {evaluation.rows}"): few,
        ("min_clients", f"{federation.min_clients}"): federation.min_clients < (policy.min_clients or 1),
    }
    for (key, found), is_broken in broken.items():
        if is_broken:
            raise refusal(policy, key, found)


def check_loss(policy: SiloPolicy, config: RunConfig, rows: int) -> None:
    """Refuse to train if the round's mean loss is sent and would stand for too few rows.

    Args:
        policy: The silo's policy.
        config: The run.
        rows: Number of the silo's train rows.
    """
    size, steps = config.training.batch_size, config.training.steps_per_round(rows)
    # The last batch of a pass may be smaller than the others, and a round of few steps may consist of it.
    behind = rows if steps * size >= rows else (steps - 1) * size + (rows % size or size)
    if told(config, ["loss"]) and behind < policy.min_score_rows:
        raise refusal(policy, "min_score_rows", f"a round of {behind} rows")
