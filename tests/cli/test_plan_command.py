"""`flexperts plan`: table, notes and JSON."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner, Result

from flexperts.cli import plan
from flexperts.errors import ConfigError

app = typer.Typer()
app.command()(plan.command)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})


def test_a_model_that_is_not_here_is_planned() -> None:
    """Qwen1.5-MoE-A2.7B: LoRA of rank 8 on three 2048 x 2048 matrices of 24 layers, 9.4 MB."""
    result = run("Qwen/Qwen1.5-MoE-A2.7B", "--bandwidth", "10")
    assert result.exit_code == 0, result.output
    assert "14.32 G parameters, 2.69 G active; 24 MoE layers, 4 of 60 experts per token" in result.output
    flex = [line for line in result.output.splitlines() if "flex, whole expert" in line]
    moves, takes = ([cell.strip() for cell in line.split("│")[2:-1]] for line in flex)
    assert moves[:4] == ["2.36 M", "9.4 MB", "9.4 MB", "15.1"]
    assert takes[0] == "207.67 M"


def test_the_tables_fit_a_terminal_of_80_columns() -> None:
    result = CliRunner().invoke(app, ["qwen1.5-moe-a2.7b"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "…" not in result.output
    assert "not a method of flexperts" in result.output


def test_json_holds_every_round() -> None:
    result = run("olmoe-1b-7b", "--methods", "hetlora,fedavg", "--json", "--set", "lora.rank=4", "--clients", "2")
    made = json.loads(result.output)
    assert [m["name"] for m in made["methods"]] == ["hetlora", "fedavg"]
    assert made["methods"][1]["shared"] == 16 * 3 * 4 * 2 * 2048
    assert list(made["methods"][1]["rounds"][0]["uplink"]) == ["client-1", "client-2"]
    assert "upper bound" in made["methods"][0]["note"]


def test_a_broken_rule_is_an_error_of_ours() -> None:
    result = run("olmoe-1b-7b", "--methods", "nothing")
    assert isinstance(result.exception, ConfigError)


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999"), (1_000, "1.00 k"), (2.5e9, "2.50 G"), (3e12, "3.00 T"), (0, "0")]
)
def test_counts_are_short(value: float, text: str) -> None:
    assert plan._count(value) == text


def test_a_link_has_a_unit() -> None:
    """FedAvg of 9.4 MB each way, three rounds and an evaluation: seven payloads over 10 Mbit/s are 53 seconds."""
    slow, fast = (run("qwen1.5-moe-a2.7b", "--methods", "fedavg", "--json", "--link", rate) for rate in LINKS)
    (one,), (other,) = (json.loads(result.output)["methods"] for result in (slow, fast))
    assert one["run_seconds"] == pytest.approx(7 * 9437184 * 8 / 1e7, rel=0.01)
    assert other["run_seconds"] == pytest.approx(one["run_seconds"] / 100)
    assert one["seconds"] == pytest.approx(2 * 9437184 * 8 / 1e7)


LINKS = ("10Mbit/s", "1 Gbit/s")


@pytest.mark.parametrize("link", ["10", "10 MB/s", "-1Mbit/s", "Mbit/s", "", "1e3Mbit/s"])
def test_a_link_without_a_rate_is_refused(link: str) -> None:
    result = run("olmoe-1b-7b", "--link", link)
    assert isinstance(result.exception, ConfigError)
    assert "10Mbit/s" in str(result.exception)


def test_the_option_before_it_still_works_and_says_so() -> None:
    result = run("qwen1.5-moe-a2.7b", "--methods", "fedavg", "--bandwidth", "10")
    assert result.exit_code == 0
    assert "--bandwidth is replaced by --link" in result.output


def test_what_fits_a_card_is_shown_and_is_json() -> None:
    result = run("smol-moe", "--gpu", "24GB")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "│" in line]
    assert [line.split()[1:6:2] for line in lines] == [
        [s, r, "yes"] for r in ("whole", "32") for s in ("bf16", "int8", "nf4")
    ]
    assert "no card was used" in result.output
    made = json.loads(run("smol-moe", "--gpu", "3GB", "--json", "--set", "training.max_length=4096").output)
    assert made["card"] == 3 * 10**9
    assert {row["fits"] for row in made["rows"]} <= {True, False}
    assert all(row["rows"] < 32 for row in made["rows"])
