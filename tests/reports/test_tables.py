"""Every number of a page's and a document's tables is the comparison's, to the printed digits."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from statistics import fmean, median, stdev
from typing import Any

import pytest

from flexperts.reports.html import html_report
from flexperts.reports.markdown import markdown_report
from flexperts.reports.summary import summary
from flexperts.reports.tables import tables

Grid = list[list[str]]
Comparison = dict[str, Any]


class Tables(HTMLParser):
    """Reads the tables of a page: key -> rows of texts, the last header row first."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Grid] = {}
        self.spans: dict[str, int] = {}
        self._rows: Grid | None = None
        self._cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "table":
            self._key = str(given["data-key"])
            self._rows = self.found[self._key] = []
        elif self._rows is not None and tag == "tr":
            self._rows.append([])
        elif self._rows is not None and tag in ("th", "td"):
            self._rows[-1].append("")
            self._cell = True
            self.spans[self._key] = self.spans.get(self._key, 0) + int(given.get("colspan") or 0)

    def handle_data(self, data: str) -> None:
        if self._cell and self._rows is not None:
            self._rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("th", "td")
        if tag == "table":
            self._rows = None


def of_html(comparison: Comparison) -> dict[str, Grid]:
    reader = Tables()
    reader.feed(html_report(comparison))
    for key, columns in reader.spans.items():
        if columns:
            assert columns == len(reader.found[key][1]), key
            del reader.found[key][0]
    return reader.found


def of_markdown(comparison: Comparison) -> dict[str, Grid]:
    titles = {table.title: key for key, table in tables(comparison).items()}
    found: dict[str, Grid] = {}
    for part in re.split(r"^## ", markdown_report(comparison), flags=re.MULTILINE)[1:]:
        title, *lines = part.splitlines()
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
        if rows:
            del rows[1]
            found[titles[title]] = [[re.sub(r"\\(.)", r"\1", cell.strip(" *")) for cell in row] for row in rows]
    return found


@pytest.fixture(params=[of_html, of_markdown])
def read(request: pytest.FixtureRequest) -> Callable[[Comparison], dict[str, Grid]]:
    """Both ways to read the tables back."""
    return request.param  # type: ignore[no-any-return]


def numbers(text: str) -> list[float]:
    """Return all numbers of a cell; sizes in bytes, a dash as nothing."""
    scale = {"kB": 1e3, "MB": 1e6, "GB": 1e9}.get(text.split()[-1], 1.0)
    return [scale * float(n.replace("−", "-").replace(",", "")) for n in re.findall(r"[+−]?\d[\d,]*\.?\d*", text)]


def close(text: str, expected: list[float | None], half: float) -> None:
    assert numbers(text) == pytest.approx([e for e in expected if e is not None], abs=1.0001 * half), text


def by_name(grid: Grid) -> dict[str, list[str]]:
    return {row[0].removesuffix(" (reference)"): row for row in grid[1:]}


def stat(found: dict[str, Any]) -> list[float | None]:
    return [found["mean"], found["std"]]


def test_the_comparison(whole: Comparison, read: Callable[[Comparison], dict[str, Grid]]) -> None:
    rows = by_name(read(whole)["main"])
    assert set(rows) == {"flex", "fedavg", "local", "base, untrained"}
    for entry in whole["entries"]:
        row, scores = rows[entry["name"]], entry["scores"]
        own = scores[entry["own_state"]]
        assert row[1] == entry["own_state"]
        for column, metric, half in ((2, "rouge_l", 0.05), (5, "nll", 0.0005)):
            close(row[column], stat(own["own"][metric]), half)
            test = (entry["against"] or {}).get(metric)
            close(row[column + 1], [test["difference"], test["low"], test["high"]] if test else [], half)
            close(row[column + 2], [test["p_adjusted"]] if test else [], 0.0005)
        close(row[8], stat(scores["global"]["own"]["rouge_l"]), 0.05)
        close(row[9], stat(scores["global"]["own"]["nll"]), 0.0005)
        close(row[10], stat(own["others"]["rouge_l"]), 0.05)
        close(row[11], stat(own["others"]["nll"]), 0.0005)
        close(row[12], stat(scores["global"]["others"]["rouge_l"]), 0.05)
        close(row[13], stat(scores["global"]["others"]["nll"]), 0.0005)
        sent = entry["bytes"]["uplink_per_client_per_round"]
        close(row[14], [sent], 50 if sent < 999_950 else 5e4)
        close(row[16], [entry["seconds"]["training"]], 0.5)
    base = whole["entries"][0]["scores"]["zero_shot"]
    close(rows["base, untrained"][2], stat(base["own"]["rouge_l"]), 0.05)
    close(rows["base, untrained"][11], stat(base["others"]["nll"]), 0.0005)


def test_entries_stand_best_first_and_the_best_is_bold(whole: Comparison) -> None:
    def rouge(entry: dict[str, Any]) -> float:
        return float(entry["scores"][entry["own_state"]]["own"]["rouge_l"]["mean"])

    table = tables(whole)["main"]
    best = sorted(whole["entries"], key=rouge, reverse=True)
    assert [row[0].text.removesuffix(" (reference)") for row in table.rows[:-1]] == [e["name"] for e in best]
    assert [row[2].best for row in table.rows] == [True, False, False, False]
    assert f"**{table.rows[0][2].text}**" in markdown_report(whole)
    assert f'<td class="best">{table.rows[0][2].text}</td>' in html_report(whole)


@pytest.mark.parametrize(("metric", "half"), [("rouge_l", 0.05), ("nll", 0.0005)])
def test_client_by_client(
    whole: Comparison, read: Callable[[Comparison], dict[str, Grid]], metric: str, half: float
) -> None:
    grid = read(whole)[f"clients-{metric}"]
    assert [h.split(" (")[0] for h in grid[0]] == ["entry", "own state", "clinic", "shop", "mean"]
    for entry in whole["entries"]:
        found = entry["scores"][entry["own_state"]]["own"][metric]
        row = by_name(grid)[entry["name"]]
        assert row[1] == entry["own_state"]
        for column, client in enumerate(whole["clients"], 2):
            close(row[column], stat(found["clients"][client]), half)
        close(row[4], stat(found), half)


@pytest.mark.parametrize("by_row", [True, False])
def test_what_personalization_cost(
    whole: Comparison, read: Callable[[Comparison], dict[str, Grid]], by_row: bool
) -> None:
    for entry in whole["entries"] if not by_row else ():
        entry["ability"] = {}
    rows = {tuple(row[:2]): row for row in read(whole)["ability"][1:]}
    assert set(rows) == {(e["name"], s) for e in whole["entries"] for s in e["scores"] if s != "zero_shot"}
    for entry in whole["entries"]:
        for state, found in entry["scores"].items():
            if state == "zero_shot":
                continue
            wanted = (
                (2, "general", "rouge_l", 1, 0.05),
                (4, "general", "nll", 1, 0.0005),
                (6, "mmlu", "accuracy", 100, 0.05),
            )
            for column, place, metric, scale, half in wanted:
                row, ours, base = rows[entry["name"], state], found[place][metric], entry["scores"]["zero_shot"]
                close(row[column], [scale * ours["mean"], scale * ours["std"]], half)
                change = [scale * (a - b) for a, b in zip(ours["seeds"], base[place][metric]["seeds"], strict=True)]
                test = entry["ability"].get(state, {}).get(metric)
                with_rows = [test[key] for key in ("difference", "low", "high")] if test else []
                close(row[column + 1], with_rows or [fmean(change), stdev(change)], half)


def test_privacy_stands_where_noise_was_added(
    whole: Comparison, read: Callable[[Comparison], dict[str, Grid]]
) -> None:
    found = by_name(read(whole)["privacy"])
    assert set(found) == {e["name"] for e in whole["entries"] if e["privacy"]}
    assert found
    for row in found.values():
        assert row[1:] == ["central", "1.5", "2", "1e-05", "7.812"]


def test_cost_and_groups(whole: Comparison, read: Callable[[Comparison], dict[str, Grid]]) -> None:
    found = read(whole)
    for entry in whole["entries"]:
        row, sent = by_name(found["cost"])[entry["name"]], entry["bytes"]
        for column, key in ((1, "uplink_per_client_per_round"), (4, "downlink_total")):
            close(row[column], [sent[key]], 50 if sent[key] < 999_950 else 5e4)
        exact = [sent["personal_sent"], entry["parameters"]["shared"], entry["parameters"]["personal"]]
        assert [numbers(cell)[0] for cell in row[5:8]] == exact
        close(row[8], [entry["peak_memory"]], 5e6)
        close(" ".join(row[9:12]), list(entry["seconds"].values()), 0.5)
        groups = by_name(found["groups"])[entry["name"]]
        group = sent["groups"]["uplink"]["attention LoRA"]
        close(groups[1], [group], 50 if group < 999_950 else 5e4)


def test_bytes_are_told_to_be_of_rounds_with_weights_where_they_are(whole: Comparison) -> None:
    """Comparisons of earlier versions counted the other rounds too."""

    def groups() -> dict[str, str]:
        found = tables(whole)
        return {key: next(c.group for c in found[key].header if c.name == "sent") for key in ("main", "cost")}

    assert groups() == dict.fromkeys(("main", "cost"), "per client and round")
    for entry in whole["entries"]:
        entry["bytes"]["replies_with_weights"] = 12
    assert groups() == dict.fromkeys(("main", "cost"), "per client and round with weights")
    assert tables(whole)["groups"].note.startswith("Payload per client and round with weights, ")


def test_routing(whole: Comparison, read: Callable[[Comparison], dict[str, Grid]]) -> None:
    whole["entries"][0]["routing"]["personalized"]["shop"]["model.layers.0.mlp.experts"]["dead"] = [1, 4, 6, 7]
    grid = read(whole)["routing"]
    keys = ["entropy", "agreement", "divergence", "dead", "opening"]
    assert len(grid[0]) == 2 + len(keys)
    for entry in whole["entries"]:
        row = by_name(grid)[entry["name"]]
        layers = [v for c in entry["routing"][entry["own_state"]].values() for v in c.values()]
        for key, text in zip(keys, row[2:], strict=True):
            values = [len(v) if isinstance(v := layer[key], list) else v for layer in layers if key in layer]
            half = {"dead": 0.05, "divergence": 0.005}.get(key, 0.0005)
            close(text, [fmean(values)] if values else [], half)


def test_a_divergence_far_below_one_is_not_printed_as_nothing(whole: Comparison) -> None:
    for layers in whole["entries"][0]["routing"]["personalized"].values():
        for layer in layers.values():
            layer["divergence"] = 4.24e-7
    assert by_name(of_markdown(whole)["routing"])["flex"][4] == "4.2e−07"


def test_runs_of_several_environments_are_told(
    whole: Comparison, read: Callable[[Comparison], dict[str, Grid]]
) -> None:
    whole["environment"] |= {"cores": [2, 4], "revision": ["0123456789", None]}
    rows = dict(read(whole)["environment"][1:])
    assert (rows["cores"], rows["revision"], rows["packages.torch"]) == ("2 / 4", "0123456789 / –", "2.13.0")
    assert "the runs differ" in tables(whole)["environment"].note


def test_selection(whole: Comparison, read: Callable[[Comparison], dict[str, Grid]]) -> None:
    selection = whole["entries"][0]["selection"]
    selection["clinic"]["model.layers.1.mlp.experts"]["choice"] = [2, 5]
    rows = read(whole)["selection"][1:]
    assert len(rows) == 12
    for client, layer, chosen, *losses in rows:
        found = selection[client][f"model.layers.{layer}.mlp.experts"]
        assert chosen == ", ".join(map(str, found["choice"]))
        loss = found["loss"]
        mine = fmean(loss[i] for i in found["choice"])
        close(" ".join(losses), [mine, min(loss), median(loss), max(loss)], 0.0005)


def test_layers_stand_in_the_order_of_their_numbers(whole: Comparison) -> None:
    layer = {"choice": [0], "loss": [0.5, 0.7]}
    whole["entries"][0]["selection"] = {"shop": {f"layers.{i}.experts": layer for i in (10, 2, 0)}}
    assert [row[1].text for row in tables(whole)["selection"].rows] == ["0", "2", "10"]


def test_one_seed_prints_no_spread_and_nothing_is_left_out_silently(
    single: Comparison, read: Callable[[Comparison], dict[str, Grid]]
) -> None:
    found = read(single)
    assert list(found) == ["main", "clients-rouge_l", "clients-nll", "cost", "entries", "environment"]
    assert not any("±" in cell for grid in found.values() for row in grid for cell in row)
    assert "± sample" not in html_report(single)
    flex = by_name(found["main"])["flex"]
    close(flex[2], [single["entries"][0]["scores"]["personalized"]["own"]["rouge_l"]["mean"]], 0.05)


def test_missing_numbers_are_dashes(whole: Comparison) -> None:
    whole["entries"][1]["scores"]["global"]["own"]["nll"] = None
    whole["entries"][1]["bytes"]["uplink_per_client_per_round"] = None
    whole["entries"][1]["scores"]["global"]["general"]["nll"]["mean"] = float("nan")
    whole["entries"][2]["scores"]["zero_shot"]["general"]["rouge_l"]["seeds"] = []
    whole["entries"][1]["ability"] = whole["entries"][2]["ability"] = {}
    row = by_name(of_html(whole)["main"])["fedavg"]
    assert (row[5], row[14]) == ("–", "–")
    ability = {tuple(row[:2]): row for row in of_html(whole)["ability"]}
    assert ability["fedavg", "global"][4:6] == ["–", "–"]
    assert "±" not in ability["local", "personalized"][3]
    assert numbers(ability["local", "personalized"][3])


def test_an_entry_without_all_seeds_is_named(whole: Comparison) -> None:
    whole["entries"][2]["seeds"] = [0]
    assert "Seeds are missing of: local (1 of 3)." in tables(whole)["main"].note


def test_an_interval_of_one_seed_is_not_said_to_be_widened(whole: Comparison) -> None:
    assert "seed in common" not in tables(whole)["main"].note
    whole["entries"][1]["seeds"] = [1]
    name = whole["entries"][1]["name"]
    assert f"for the training seeds (not for {name}: one seed in common)" in tables(whole)["main"].note


def test_the_note_says_what_the_interval_is(whole: Comparison) -> None:
    note = tables(whole)["main"].note
    for words in ("95 %", "10,000 resamples", "bootstrap", "Benjamini", "2 comparisons", "3 seeds, 2 clients"):
        assert words in note
    whole["entries"][1]["against"]["rouge_l"] = None
    assert "for 1 comparison of ROUGE-L, 2 comparisons of NLL; the" in tables(whole)["main"].note
    whole["seeds"] = [0]
    assert "does not cover other seeds" in tables(whole)["main"].note


def test_budgets_are_below_every_table_of_entries_for_those_in_it(whole: Comparison) -> None:
    entries, every = whole["entries"], tables(whole)
    assert not any("Budgets" in table.note for table in every.values())
    entries[0] |= {"method": "fedadam", "budget_note": "as <FedAvg>"}
    entries[1] |= {"method": "fedyogi", "budget_note": "as <FedAvg>"}
    entries[2] |= {"method": "ditto", "budget_note": "twice the steps"}
    said = "Budgets and variants. fedadam, fedyogi: as <FedAvg>; ditto: twice the steps."
    made = tables(whole)
    assert made.keys() == every.keys()
    of_entries = {key for key, table in made.items() if table.header[0].name == "entry"}
    assert {"main", "clients-rouge_l", "clients-nll", "ability", "cost", "entries"} <= of_entries
    for key, table in made.items():
        names = {row[0].text.removesuffix(" (reference)") for row in table.rows}
        if key in of_entries and {entry["name"] for entry in entries} <= names:
            assert table.note.endswith(said)
    assert "Budgets" not in made["environment"].note
    privacy = {row[0].text for row in made["privacy"].rows}
    assert entries[2]["name"] not in privacy
    assert "ditto" not in made["privacy"].note
    assert markdown_report(whole).count("ditto: twice the steps.") >= 6
    assert html_report(whole).count("fedadam, fedyogi: as &lt;FedAvg&gt;; ditto: twice the steps.") >= 6


def test_an_adjusted_p_on_the_border_is_told_with_its_error(whole: Comparison) -> None:
    """p 0.0255 doubled by adjustment, of 10,000 draws: 2 x 2 sqrt(0.01275 0.98725 / 10,000) x 2 is 0.0090."""
    whole["entries"][1]["against"]["nll"] |= {"p": 0.0255, "p_adjusted": 0.051}
    whole["entries"][2]["against"]["nll"] |= {"p": 0.04, "p_adjusted": 0.08}
    name, note = whole["entries"][1]["name"], tables(whole)["main"].note
    assert f"two standard errors of the draws: {name}, NLL: 0.0510 ± 0.0090. More" in note
    whole["resamples"] = 1_000_000  # 0.0009: the verdict holds
    assert "other draws could give" not in tables(whole)["main"].note
    whole["entries"][1]["against"] = None
    whole["entries"][2]["against"]["nll"] = None
    tables(whole)


def test_zero_shot_as_an_entry_of_its_own_takes_the_bases_row(whole: Comparison) -> None:
    whole["entries"][1]["own_state"] = "zero_shot"
    assert "base, untrained" not in by_name(of_html(whole)["main"])


def test_budgets_are_below_tables_in_which_entries_are_columns_or_second(made: Callable[..., Comparison]) -> None:
    found = made(["flex", "fedavg"], [f"silo-{i}" for i in range(8)], 2)
    found["entries"][1] |= {"budget_note": "other steps"}
    found["newcomers"] = ["new"]
    for entry in found["entries"]:
        entry["newcomers"] = {"global": entry["scores"]["global"]["own"]}
    every = tables(found)
    assert every["clients-nll"].header[0].name == "silo"
    for key in ("clients-nll", "newcomers"):
        assert every[key].note.endswith("Budgets and variants. fedavg: other steps.")


def test_where_answers_have_one_token_nll_decides_the_order(whole: Comparison) -> None:
    whole["recipe"] += "\n[evaluation]\nmax_new_tokens = 1\n"
    nll = {e["name"]: e["scores"][e["own_state"]]["own"]["nll"]["mean"] for e in whole["entries"]}
    best = max(whole["entries"], key=lambda e: nll[e["name"]])  # last by NLL
    best["scores"][best["own_state"]]["own"]["rouge_l"]["mean"] = 99.0
    table = tables(whole)["main"]
    ranked = [row[0].text.removesuffix(" (reference)") for row in table.rows]
    assert [name for name in ranked if name in nll] == sorted(nll, key=lambda name: nll[name])
    assert "sorted by NLL, best first" in table.note
    assert "has the best NLL" in summary(whole)[0]


def test_the_best_of_preferences_is_none_of_other_seeds(whole: Comparison) -> None:
    for place, entry in enumerate(whole["entries"]):
        own = entry["scores"][entry["own_state"]]["own"]
        own |= {kind: own["nll"] | {"mean": 60.0 + place} for kind in ("reward_margin", "reward_accuracy")}
    whole["entries"][-1]["other_seeds"] = True
    table = tables(whole)["rewards"]
    best = [
        [row[0].text, column.name]
        for row in table.rows
        for cell, column in zip(row, table.header, strict=True)
        if cell.best
    ]
    assert best == [[whole["entries"][-2]["name"], name] for name in ("reward accuracy, %", "reward margin")]


def test_a_border_is_told_of_preferences_too(whole: Comparison) -> None:
    for entry in whole["entries"]:
        own = entry["scores"][entry["own_state"]]["own"]
        own |= dict.fromkeys(("reward_margin", "reward_accuracy"), own["nll"])
    entry = whole["entries"][1]
    entry["against"]["reward_margin"] = entry["against"]["nll"] | {"p": 0.0255, "p_adjusted": 0.051}
    made = tables(whole)
    assert f"{entry['name']}, reward margin: 0.0510 ± 0.0090. More" in made["rewards"].note
    assert "reward margin: 0.0510" not in made["main"].note
