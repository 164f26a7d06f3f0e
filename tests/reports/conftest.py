"""Comparisons made of numbers that are drawn, not measured."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

Comparison = dict[str, Any]
RECIPE = 'seed = 0\n\n[model]\nbase = "smol-moe"\n\n[data.silos]\ntrain_rows = 48\n'
ENVIRONMENT = {
    "packages": {"torch": "2.13.0", "gguf": None},
    "python": "3.11.7",
    "processor": "a processor",
    "cores": 2,
}
LAYERS = ("model.layers.{}.mlp.experts", 6, 8)
PERSONAL = {"flex": True, "local": True}


def statistic(draw: random.Random, clients: list[str], seeds: int, middle: float, width: float) -> dict[str, Any]:
    """Return mean, std, seeds and clients that belong together, as a collection computes them."""
    table = {c: [middle + draw.gauss(0, width) for _ in range(seeds)] for c in clients}
    per_seed = [sum(values[i] for values in table.values()) / len(table) for i in range(seeds)]
    by_client = {c: {"mean": mean(v), "std": std(v)} for c, v in table.items()}
    return {"mean": mean(per_seed), "std": std(per_seed), "seeds": per_seed, "clients": by_client}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def std(values: list[float]) -> float | None:
    if len(values) == 1:
        return None
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def layer(draw: random.Random, experts: int, opening: bool) -> dict[str, Any]:
    shares = [draw.gammavariate(1.5, 1) for _ in range(experts)]
    numbers = {"utilisation": [s / sum(shares) for s in shares], "entropy": draw.uniform(1, 2), "dead": [3]}
    compared = {"agreement": draw.uniform(0.5, 1), "divergence": draw.uniform(0, 0.2)}
    return numbers | compared | ({"opening": draw.uniform(0.2, 0.9)} if opening else {})


def routing(draw: random.Random, clients: list[str], opening: bool) -> dict[str, Any]:
    pattern, layers, experts = LAYERS
    return {c: {pattern.format(i): layer(draw, experts, opening) for i in range(layers)} for c in clients}


def selection(draw: random.Random, clients: list[str]) -> dict[str, Any]:
    pattern, layers, experts = LAYERS
    found: dict[str, Any] = {c: {} for c in clients}
    for c in clients:
        for i in range(layers):
            loss = [draw.uniform(0.2, 2) for _ in range(experts)]
            found[c][pattern.format(i)] = {"choice": [loss.index(min(loss))], "loss": loss}
    return found


def scores(draw: random.Random, clients: list[str], seeds: int, rouge: float, nll: float) -> dict[str, Any]:
    def pair(shift: float) -> dict[str, Any]:
        return {
            "rouge_l": statistic(draw, clients, seeds, rouge - shift, 1.5),
            "nll": statistic(draw, clients, seeds, nll + shift / 20, 0.05),
        }

    accuracy = statistic(draw, clients, seeds, 0.27, 0.01)
    return {"own": pair(0), "others": pair(6), "general": pair(10), "mmlu": {"accuracy": accuracy}}


def curve(draw: random.Random, start: float, end: float, width: float) -> dict[str, Any]:
    rounds = list(range(6))
    middle = [end + (start - end) * math.exp(-0.6 * r) for r in rounds]
    spread = [abs(draw.gauss(width, width / 3)) for _ in rounds]
    low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
    return {"rounds": rounds, "mean": middle, "low": low, "high": high}


def tested(draw: random.Random, middle: float, width: float) -> dict[str, float]:
    return {
        "difference": middle,
        "low": middle - width,
        "high": middle + width,
        "p": min(1.0, 2 * math.exp(-abs(2 * middle / width))),
        "p_adjusted": min(1.0, 3 * math.exp(-abs(2 * middle / width))),
    }


def entry(draw: random.Random, name: str, clients: list[str], seeds: int, reference: str) -> dict[str, Any]:
    method = name.split(",")[0]
    personal = method not in ("fedavg", "fedprox", "scaffold")
    rouge, nll = draw.uniform(24, 38) if personal else draw.uniform(14, 20), draw.uniform(0.8, 1.5)
    made = {"zero_shot": scores(draw, clients, seeds, 11.7, 4.9), "global": scores(draw, clients, seeds, 16, 3.1)}
    if personal:
        made["personalized"] = scores(draw, clients, seeds, rouge, nll)
    bits = 0 if method == "local" else int(10 ** draw.uniform(5.5, 7.2))
    drift = {
        "rounds": [0, 1, 2, 3],
        "entropy": [1.5, 1.4, 1.35, draw.uniform(1.1, 1.3)],
        "agreement": [1, 0.9, 0.85, 0.8],
    }
    drift |= {"divergence": [0, 0.05, None, 0.1], "opening": [None] * 4}
    states = {"global": (4.9, 3.1), **({"personalized": (4.9, nll)} if personal else {})}
    return {
        "name": name,
        "method": method,
        "settings": ["graft.experts=2"] if "k = 2" in name else [],
        "seeds": list(range(seeds)),
        "own_state": "personalized" if personal else "global",
        "scores": made,
        "ability": {
            state: {"rouge_l": tested(draw, draw.uniform(0, 8), 3), "nll": tested(draw, draw.uniform(-1, 0), 0.2)}
            for state in made
            if state != "zero_shot"
        },
        "against": None
        if name == reference
        else {"rouge_l": tested(draw, draw.uniform(-8, 4), 3), "nll": tested(draw, draw.uniform(-0.2, 0.5), 0.2)},
        "bytes": {
            "uplink_per_client_per_round": bits,
            "downlink_per_client_per_round": bits,
            "uplink_total": 12 * bits,
            "downlink_total": 12 * bits,
            "personal_sent": 0,
            "groups": {"uplink": {"attention LoRA": bits}, "downlink": {"attention LoRA": bits}},
        },
        "parameters": {"shared": 230400, "personal": 1769472 if personal else 0},
        "seconds": {"training": draw.uniform(90, 300), "evaluation": 40.0, "total": 380.0},
        "peak_memory": 1_834_000_000,
        "privacy": {"mode": "central", "clip": 1.5, "noise_multiplier": 2.0, "delta": 1e-5, "epsilon": 7.8125}
        if method == "fedavg"
        else None,
        "curves": {
            state: {"nll": curve(draw, *ends, 0.1), "rouge_l": curve(draw, 11.7, rouge, 1)}
            for state, ends in states.items()
        }
        | {"training": {"nll": curve(draw, 4.5, 1.5, 0.1)}},
        "routing": {state: routing(draw, clients, state == "personalized") for state in states},
        "routing_rounds": drift,
        "selection": selection(draw, clients) if method == "flex" else None,
    }


def example(answers: list[str]) -> dict[str, Any]:
    said = {"instruction": "What does the leaflet say on the dose?", "response": "One tablet in the morning."}
    context = "Take one tablet in the morning. Do not take more than two tablets on one day. " * 3
    return said | {"context": context, "answers": {name: f"The answer of {name}." for name in answers}}


def build(names: list[str], clients: list[str], seeds: int, number: int = 0) -> Comparison:
    """Return a comparison with every optional part present; the first name is the reference."""
    draw = random.Random(number)
    return {
        "kind": "comparison",
        "title": "study-silos",
        "recipe": RECIPE,
        "environment": ENVIRONMENT,
        "split": "test",
        "reference": names[0],
        "seeds": list(range(seeds)),
        "confidence": 0.95,
        "resamples": 10000,
        "clients": clients,
        "entries": [entry(draw, name, clients, seeds, names[0]) for name in names],
        "examples": {c: [example(["zero-shot", "flex global", "flex personalized"])] for c in clients},
    }


def reduced(whole: Comparison) -> Comparison:
    """Return the comparison as a single short run gives it: every optional part is missing."""
    made = copy.deepcopy(whole)
    for found in made["entries"]:
        found |= {"against": None, "peak_memory": None, "curves": {}, "routing": None, "routing_rounds": None}
        found |= {"selection": None, "privacy": None, "ability": {}}
        for state in found["scores"].values():
            state |= {"others": None, "general": None, "mmlu": None}
        found["bytes"]["groups"] = {"uplink": {}, "downlink": {}}
    return made | {"examples": {}}


@pytest.fixture
def whole() -> Comparison:
    """Three entries, two clients, three seeds, all parts."""
    return build(["flex", "fedavg", "local"], ["clinic", "shop"], 3)


@pytest.fixture
def single(whole: Comparison) -> Comparison:
    """One run of one seed with nothing optional."""
    return reduced(build(["flex"], ["clinic", "shop"], 1))


@pytest.fixture
def made() -> Callable[..., Comparison]:
    """The builder itself."""
    return build
