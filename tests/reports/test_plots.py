"""Plots: what is drawn lies where the numbers say, and looks the same everywhere."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from flexperts.reports.bytes_plot import bytes_plot
from flexperts.reports.curve_plots import curve_plots, drift_plots
from flexperts.reports.figures import looks
from flexperts.reports.plots import difference_plot, score_plot
from flexperts.reports.routing_plots import routing_plots

Comparison = dict[str, Any]
MANY = [f"entry {i}" for i in range(15)]


def marks(svg: str, colour: str) -> list[tuple[float, float]]:
    """Return where marks of a colour stand, in the order in which they are drawn."""
    found = re.findall(rf'<use href="[^"]*" x="([^"]*)" y="([^"]*)" style="[^"]*stroke: {colour}', svg)
    return [(float(x), float(y)) for x, y in found]


def own(entry: dict[str, Any], metric: str) -> dict[str, Any]:
    return entry["scores"][entry["own_state"]]["own"][metric]  # type: ignore[no-any-return]


def affine(drawn: list[float], values: list[float]) -> None:
    """Check that places on a linear axis are the values, up to origin and scale."""
    slope, origin = np.polyfit(values, drawn, 1)
    assert drawn == pytest.approx([slope * v + origin for v in values], abs=0.01)
    assert abs(slope) > 0


def test_the_reference_has_the_first_look_and_all_looks_differ(made: Callable[..., Comparison]) -> None:
    comparison = made(MANY, ["clinic"], 1) | {"reference": "entry 7"}
    found = looks(comparison)
    assert len(set(found.values())) == 15
    assert found["entry 7"] == looks(made(["flex"], ["clinic"], 1))["flex"]


@pytest.mark.parametrize("metric", ["rouge_l", "nll"])
def test_scores_and_differences_are_drawn_to_scale(whole: Comparison, metric: str) -> None:
    plots = score_plot(whole, metric), difference_plot(whole, metric)
    for plot, value in zip(plots, (_score, _difference), strict=True):
        assert plot is not None
        drawn = [marks(plot.svg, looks(whole)[e["name"]].colour) for e in whole["entries"]]
        assert [len(m) for m in drawn] == [1, 1, 1]
        affine([m[0][0] for m in drawn], [value(e, metric) for e in whole["entries"]])
    rows = [m[0][1] for m in drawn]
    ranks = np.argsort(np.argsort([-own(e, "rouge_l")["mean"] for e in whole["entries"]]))
    affine(rows, ranks.tolist())


def _score(entry: dict[str, Any], metric: str) -> float:
    return float(own(entry, metric)["mean"])


def _difference(entry: dict[str, Any], metric: str) -> float:
    return float(entry["against"][metric]["difference"]) if entry["against"] else 0.0


def test_a_mark_is_hollow_where_two_are_not_told_apart(whole: Comparison) -> None:
    hollow = "fill: var(--paper)"
    for low, p, fill in ((-1.0, 0.01, hollow), (0.5, 0.01, "fill: {}"), (0.5, 0.06, hollow)):
        test = {"difference": 1.0, "low": low, "high": 2.0, "p_adjusted": p}
        whole["entries"][1]["against"]["rouge_l"] = test
        plot = difference_plot(whole, "rouge_l")
        colour = looks(whole)["fedavg"].colour
        assert plot is not None
        (style,) = re.findall(
            rf'<use href="[^"]*" x="[^"]*" y="[^"]*" style="([^"]*stroke: {colour}[^"]*)"', plot.svg
        )
        assert fill.format(colour) in style


def test_bytes_stand_on_a_log_axis_with_a_place_for_nothing(made: Callable[..., Comparison]) -> None:
    comparison = made(["a", "b", "c", "local"], ["clinic"], 1)
    for entry, sent in zip(comparison["entries"], (1e4, 1e5, 1e6, 0), strict=True):
        entry["bytes"] |= {"uplink_per_client_per_round": sent, "downlink_per_client_per_round": sent}
    plot = bytes_plot(comparison, "rouge_l")
    assert plot is not None
    xs = []
    for entry in comparison["entries"]:
        # The edge of a dot is the page's colour: dots are told by their fill.
        look = looks(comparison)[entry["name"]]
        (x,) = re.findall(rf'<use href="[^"]*" x="([^"]*)" y="[^"]*" style="fill: {look.colour}', plot.svg)
        xs.append(float(x))
    assert xs[2] - xs[1] == pytest.approx(xs[1] - xs[0], abs=0.01)
    assert xs[3] < xs[0] - 10
    for text in ("0", "10 kB", "1 MB", "local"):
        assert f">{text}</text>" in plot.svg


def test_labels_beside_dots_do_not_cover_each_other(made: Callable[..., Comparison]) -> None:
    """Twelve entries of equal bytes and nearly equal scores."""
    comparison = made([f"method {i}" for i in range(12)], ["clinic"], 1)
    for i, entry in enumerate(comparison["entries"]):
        entry["bytes"] |= {"uplink_per_client_per_round": 1e6, "downlink_per_client_per_round": 1e6}
        own(entry, "rouge_l")["mean"] = 30 + 0.1 * i
    own(comparison["entries"][0], "rouge_l")["mean"] = 10
    plot = bytes_plot(comparison, "rouge_l")
    assert plot is not None
    places = re.findall(r'text-anchor: (start|end)[^>]*?x="([-\d.]+)" y="([-\d.]+)"[^>]*>method', plot.svg)
    assert len(places) == 12
    for side in ("start", "end"):
        heights = sorted(float(y) for anchor, _, y in places if anchor == side)
        assert min(np.diff(heights), default=99) >= 10.9


def band(svg: str, colour: str) -> dict[float, list[float]]:
    """Return where the edges of an entry's band lie: x -> heights."""
    (name, offset) = re.findall(
        rf'<use href="#(\w+)" x="0" y="(\d+)" style="fill: {colour}; fill-opacity: 0.22"', svg
    )[0]
    (path,) = re.findall(rf'<path id="{name}" d="([^"]*)"', svg)
    edge: dict[float, list[float]] = {}
    for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path):
        edge.setdefault(float(x), []).append(float(y) + float(offset))
    return edge


def test_few_entries_share_a_curve_and_many_have_their_own(
    whole: Comparison, made: Callable[..., Comparison]
) -> None:
    (plot,) = curve_plots(whole, "nll")
    # One band per entry.
    assert plot.svg.count("fill-opacity: 0.22") == 3
    comparison = made(MANY, ["clinic"], 2)
    assert sorted(p.title for p in curve_plots(comparison, "nll")) == sorted(MANY)
    curve = whole["entries"][0]["curves"]["personalized"]["nll"]
    points = marks(plot.svg, looks(whole)["flex"].colour)
    affine([x for x, _ in points], curve["rounds"])
    affine([y for _, y in points], curve["mean"])
    edge = band(plot.svg, looks(whole)["flex"].colour)
    affine([max(edge[x]) for x, _ in points] + [min(edge[x]) for x, _ in points], curve["low"] + curve["high"])


def test_one_seed_has_no_band_and_one_round_no_curve(whole: Comparison) -> None:
    for entry in whole["entries"]:
        entry["seeds"] = [0]
        entry["curves"][entry["own_state"]]["rouge_l"] = {
            "rounds": [3],
            "mean": [30.0],
            "low": [30.0],
            "high": [30.0],
        }
    (plot,) = curve_plots(whole, "nll")
    assert "fill-opacity: 0.22" not in plot.svg
    assert curve_plots(whole, "rouge_l") == []


def test_drift_leaves_out_what_is_never_measured(whole: Comparison) -> None:
    assert [p.title for p in drift_plots(whole)] == ["Entropy", "Agreement with base", "Divergence from base"]


def pixels(svg: str) -> np.ndarray[Any, Any]:
    """Return the first embedded image ``[rows, columns, 4]``, from 0 to 1, top row first."""
    (data,) = re.findall(r'href="data:image/png;base64,([^"]*)"', svg)[:1]
    image = imread(io.BytesIO(base64.b64decode(data)), format="png")
    match = re.search(r'<image[^>]*transform="([^"]*)"', svg)
    # matplotlib may store rows upside down and turn them by the transform.
    upside_down = bool(match) and "scale(1 -1)" in match.group(1) if match else False
    return image[::-1] if upside_down else image


def own_routing(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return list(entry["routing"][entry["own_state"]].values())


def test_every_entry_has_its_maps_on_one_scale_and_only_grafts_have_gates(whole: Comparison) -> None:
    whole["entries"][2]["routing"] = None
    first, second = routing_plots(whole)
    assert [first.entry, second.entry] == [entry["name"] for entry in whole["entries"][:2]]
    assert [plot.title for plot in first.use] == [plot.title for plot in second.use]
    assert re.findall('colours from 0 to [^"]+', first.use[-1].svg) == re.findall(
        'colours from 0 to [^"]+', second.use[-1].svg
    )
    assert [plots.opening is not None for plots in (first, second)] == [True, False]


def test_a_heat_map_has_layers_as_rows_and_experts_as_columns(whole: Comparison) -> None:
    clinic, shop, scale = routing_plots(whole)[0].use
    assert (clinic.title, shop.title, scale.title) == ("clinic", "shop", "Share of selections")
    layers = whole["entries"][0]["routing"]["personalized"]
    top = max(max(layer["utilisation"]) for e in whole["entries"] for c in own_routing(e) for layer in c.values())
    values = np.array([layers["shop"][f"model.layers.{i}.mlp.experts"]["utilisation"] for i in range(6)])
    image = pixels(shop.svg)
    assert image.shape[:2] == values.shape
    assert image == pytest.approx(mpl.colormaps["cividis"](values / top), abs=1.5 / 255)


def test_gates_are_written_as_numbers_and_several_grafts_are_averaged(whole: Comparison) -> None:
    layers = whole["entries"][0]["routing"]["personalized"]
    layers["shop"]["model.layers.2.mlp.experts"]["opening"] = [0.25, 0.75, 0.11]
    plot = routing_plots(whole)[0].opening
    assert plot is not None
    assert ">0.37</text>" in plot.svg
    for layer in layers["clinic"].values():
        assert f">{layer['opening']:.2f}</text>" in plot.svg


def test_names_are_no_formulas(whole: Comparison) -> None:
    whole["entries"][1]["name"] = "$\\frac{a}$ <b> & 名"
    plot = score_plot(whole, "rouge_l")
    assert plot is not None
    assert "$\\frac{a}$ &lt;b&gt; &amp; 名</text>" in plot.svg
