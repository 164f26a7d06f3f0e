"""A server cannot choose what a silo's policy forbids, and a refusal tells it the rule alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flexperts.communication.messages import metrics_of, records
from flexperts.config.run import RunConfig
from flexperts.deployment.home import RECEIVED, HomeModel
from flexperts.deployment.state import delete_run
from flexperts.errors import ConfigError
from flexperts.recipe import load_silo

from .asked_silo import OTHER, RUN, AskedSilo, silo_file, to_evaluate, to_train

Recipe = Callable[..., RunConfig]
LOCAL = ("privacy.noise=local", "method.name=fedavg")
BROKEN = {
    "method": ('methods = ["fedavg", "flex"]', ["method.name=ditto"], "the method must be one of fedavg, flex"),
    "base": ('bases = ["smol-moe"]', [], "model.base must be one of smol-moe"),
    "rounds": ("max_rounds = 2", ["federation.rounds=3"], "a run may have at most 2 rounds"),
    "endless": ("", ["federation.rounds=1000000000"], "a run may have at most 1000 rounds"),
    "extra round": ("max_rounds = 2", ["method.name=feddpa_f"], "a run may have at most 2 rounds"),
    "evaluations": (
        "max_evaluations = 2",
        ["federation.rounds=5", "evaluation.every=2"],
        "a run may have at most 2 evaluations",
    ),
    "no noise": ('noise = "local"', [], "privacy.noise must be 'local'"),
    "central noise": ('noise = "local"', ["privacy.noise=central"], "privacy.noise must be 'local'"),
    "less noise": (
        'noise = "local"\nmin_noise_multiplier = 2.0',
        [*LOCAL, "privacy.noise_multiplier=1.9"],
        "privacy.noise_multiplier must be at least 2.0",
    ),
    "one row": ("", ["evaluation.rows=1"], "a score must stand for at least 5 rows"),
    "alone": ("min_clients = 3", ["federation.min_clients=2"], "federation.min_clients must be at least 3"),
}
KEYS = {
    "method": "methods",
    "base": "bases",
    "rounds": "max_rounds",
    "endless": "max_rounds",
    "extra round": "max_rounds",
    "evaluations": "max_evaluations",
    "no noise": "noise",
    "central noise": "noise",
    "less noise": "min_noise_multiplier",
    "one row": "min_score_rows",
    "alone": "min_clients",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_recipe_that_breaks_a_rule_is_told_the_rule(
    tmp_path: Path, tiny_base: Path, recipe: Recipe, what: str
) -> None:
    policy, overrides, rule = BROKEN[what]
    asked = AskedSilo(silo_file(tmp_path, tiny_base, policy), recipe)
    for kind in ("query.join", "query.initial", "train", "evaluate"):
        told = asked.refusal(kind, records({"agreement": "null"}), asked.handed(*overrides))
        assert told == f"PolicyError: {rule} (policy.{KEYS[what]})"
    assert asked.files() == {}  # nothing of the run is kept


def test_a_run_within_the_policy_ends_as_without_one(tmp_path: Path, tiny_base: Path, recipe: Recipe) -> None:
    replies = []
    rules = [
        'methods = ["flex"]',
        f'bases = ["{tiny_base}"]',
        "max_runs = 1",
        "max_rounds = 2",
        "max_evaluations = 1",
        "min_clients = 1",
    ]
    for folder, policy in (("with", rules), ("without", [])):
        (tmp_path / folder).mkdir()
        asked = AskedSilo(silo_file(tmp_path / folder, tiny_base, *policy), recipe)
        text = asked.handed()
        start = asked.start(text)
        told = [asked.refusal("query.join", records({}), asked.handed("federation.rounds=9"))] if policy else []
        replies.append([asked.raw("train", to_train(start), text), asked.raw("evaluate", to_evaluate(start), text)])
        assert not told or told == ["PolicyError: a run may have at most 2 rounds (policy.max_rounds)"]
    assert replies[0] == replies[1]


def test_a_run_cannot_be_given_more_rounds_later(tmp_path: Path, tiny_base: Path, recipe: Recipe) -> None:
    asked = AskedSilo(silo_file(tmp_path, tiny_base, "max_rounds = 2"), recipe)
    start = asked.start(asked.handed())
    longer = asked.handed("federation.rounds=1000000")
    assert "policy.max_rounds" in asked.refusal("train", to_train(start, 3), longer)
    asked.answer("train", to_train(start, 1), asked.handed())


def test_runs_are_counted_over_restarts_and_after_forgetting(
    tmp_path: Path, tiny_base: Path, recipe: Recipe
) -> None:
    asked = AskedSilo(silo_file(tmp_path, tiny_base, "max_runs = 1"), recipe)
    text = asked.handed()
    asked.start(text)
    rule = "PolicyError: this silo takes part in at most 1 runs (policy.max_runs)"
    assert asked.refusal("query.join", records({}), text, OTHER) == rule
    delete_run(asked.state, RUN)
    asked.restart()
    assert asked.refusal("query.join", records({}), text, OTHER) == rule
    asked.start(text)


@pytest.mark.parametrize("method", ["flex", "feddpa_t"])
def test_a_silo_without_scores_still_gets_its_model(
    tmp_path: Path, tiny_base: Path, recipe: Recipe, method: str
) -> None:
    file = silo_file(tmp_path, tiny_base, "scores = false")
    asked = AskedSilo(file, recipe)
    text = asked.handed(f"method.name={method}")
    start = asked.start(text)
    asked.answer("train", to_train(start), text)
    for content in (to_evaluate(start), to_evaluate(start, answers=True)):
        assert asked.refusal("evaluate", content, text) == "PolicyError: this silo sends no scores (policy.scores)"
    assert (asked.state / "runs" / RUN / RECEIVED).exists()
    assert isinstance(HomeModel(load_silo(file), RUN).generate("Sum up.", "A note."), str)


def test_few_rows_are_not_scored_whichever_way_they_are_chosen(
    tmp_path: Path, tiny_base: Path, recipe: Recipe
) -> None:
    """The rows of a split are few, though the recipe asks for all of them."""
    file = silo_file(tmp_path, tiny_base, test_rows=4)
    asked = AskedSilo(file, recipe)
    rule = "PolicyError: a score must stand for at least 5 rows (policy.min_score_rows)"
    start = asked.start(asked.handed())
    assert asked.refusal("evaluate", to_evaluate(start), asked.handed()) == rule
    held = asked.handed("evaluation.split=validation", "data.validation_fraction=0.25")
    start = asked.start(held, OTHER)
    assert asked.refusal("evaluate", to_evaluate(start), held, OTHER) == rule


def test_the_difference_of_two_scores_stands_for_enough_rows(
    tmp_path: Path, tiny_base: Path, recipe: Recipe
) -> None:
    """Scores of 5 rows and of 6 rows, under the same weights, would tell the score of one row."""
    asked = AskedSilo(silo_file(tmp_path, tiny_base, test_rows=12), recipe)
    five, six, ten, all_ = (asked.handed(f"evaluation.rows={rows}") for rows in (5, 6, 10, 12))
    runs = {text: f"{number:032x}" for number, text in enumerate((five, six, ten, all_))}
    starts = {text: asked.start(text, run) for text, run in runs.items()}

    def told(text: str) -> str:
        asked.restart()
        reply = asked.raw("evaluate", to_evaluate(starts[text]), text, runs[text])
        return "refused" if b"policy.min_score_rows" in reply else "answered"

    assert told(five) == "answered"
    assert told(six) == "refused"  # one row more
    assert told(ten) == "answered"  # five rows more
    assert told(all_) == "refused"  # two rows more
    assert told(five) == "answered"


def test_a_rounds_loss_stands_for_enough_rows(tmp_path: Path, tiny_base: Path, recipe: Recipe) -> None:
    """With a clock a round of 8 steps can end after one: its loss is not sent."""
    asked = AskedSilo(silo_file(tmp_path, tiny_base), recipe)
    one_row = ("training.batch_size=1", "training.local_steps=1", "method.name=fedavg")
    start = asked.start(asked.handed(*one_row))
    told = asked.refusal("train", to_train(start), asked.handed(*one_row))
    assert told == "PolicyError: a score must stand for at least 5 rows (policy.min_score_rows)"
    clock = ("training.local_seconds=1e-9", "training.local_steps=8")
    for more, run in ((("privacy.noise=local",), OTHER), (clock, f"{3:032x}")):
        hidden = asked.handed("training.batch_size=1", "method.name=fedavg", *more)
        start = asked.start(hidden, run)
        assert not {"loss", "tokens"} & metrics_of(asked.answer("train", to_train(start), hidden, run)).keys()


def test_noise_is_refused_where_a_method_would_send_more_than_it_covers(
    tmp_path: Path, tiny_base: Path, recipe: Recipe
) -> None:
    asked = AskedSilo(silo_file(tmp_path, tiny_base, 'noise = "local"'), recipe)
    for more in (["method.name=scaffold"], ["method.name=flex", "graft.sharing=both"]):
        refused = asked.refusal("query.join", records({}), asked.handed("privacy.noise=local", *more))
        assert refused == "ConfigError"
    asked.start(asked.handed(*LOCAL))


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("max_epsilon = 3.0", "policy.max_epsilon needs policy.noise = 'local'"),
        ("min_noise_multiplier = 3.0", "policy.min_noise_multiplier needs policy.noise = 'local'"),
        ("max_round = 3", "did you mean 'policy.max_rounds'"),
        ("methods = []", "policy.methods"),
    ],
)
def test_a_policy_that_would_not_hold_is_refused(tmp_path: Path, tiny_base: Path, line: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_silo(silo_file(tmp_path, tiny_base, line))
    assert rule in str(caught.value)


def test_a_policy_names_methods_that_exist(tmp_path: Path, tiny_base: Path, recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="did you mean 'flex'"):
        AskedSilo(silo_file(tmp_path, tiny_base, 'methods = ["flx"]'), recipe)
