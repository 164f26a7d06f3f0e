"""Write docs/scale.md from the scale benchmark's JSON: its measured numbers, and estimates for a million silos.

python benchmarks/performance/scale_page.py            # after scale.py, which does it itself
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from figures import RESULTS, ROOT

from flexperts.costs.plan import plan
from flexperts.files import read_json, write_json

PAGE = ROOT / "docs" / "scale.md"
MODELS = ("smol-moe", "qwen1.5-moe-a2.7b")
MILLION, DRAWN, REGIONS = 1_000_000, 1_000, 100
LINK = 10e9 / 8
"""Bytes a second of the server's link."""

Plan = Mapping[str, Any]


def page(found: Mapping[str, Any]) -> str:
    """Return the page."""
    details = found["details"]
    sizes, averaging, rows = list(details["sizes"].values()), details["averaging"], details["rows_of_a_silo"]
    usual = [one for one in sizes if one["participants"] == sizes[0]["participants"]]
    few, many = usual[0], usual[-1]
    added = many["silos"] - few["silos"]
    entry = (many["checkpoint_bytes"] - few["checkpoint_bytes"]) / added
    joining = _median(many, "joining") / many["silos"]
    speed = averaging["clients"] * averaging["payload_bytes"] / median(averaging["seconds"]["server"])
    return (
        Path(__file__)
        .with_name("scale.template.md")
        .read_text(encoding="utf-8")
        .format(
            silos=f"{many['silos']:,}",
            commit=found["commit"],
            date=found["date"],
            cores=found["environment"]["cores"],
            processor=found["environment"]["processor"],
            participants=few["participants"],
            rows="\n".join(map(_size_row, sizes)),
            rows_each=sum(rows.values()),
            checking=1e3 * (many["reading"] + many["encoding"]) / many["silos"],
            joining=1e6 * joining,
            joining_minutes=joining * MILLION / 60,
            per_silo=(many["peak_bytes"] - few["peak_bytes"]) / added / 1024,
            entry=entry,
            checkpoint_million=entry * MILLION / 1e6,
            million=MILLION,
            drawn=DRAWN,
            paper=_table(details["plans"], _paper(speed)),
            speed=speed / 1e9,
            ratio=averaging["ratio"],
            regions=REGIONS,
            of_region=MILLION // REGIONS,
            drawn_region=DRAWN // REGIONS,
            hierarchy=_table(details["plans"], _hierarchy(speed)),
        )
    )


def _paper(speed: float) -> dict[str, Callable[[Plan], str]]:
    return {
        "payload, each way": lambda p: _bytes(p["uplink"]),
        f"up in a round: x {DRAWN:,}": lambda p: _bytes(DRAWN * p["uplink"]),
        "down in a round": lambda p: _bytes(DRAWN * p["downlink"]),
        "each way over 10 Gbit/s at the server": lambda p: f"{DRAWN * p['uplink'] / LINK:.1f} s",
        "each way over 100 Mbit/s at a silo": lambda p: f"{p['uplink'] / 12.5e6:.1f} s",
        "adding the updates up": lambda p: f"{DRAWN * p['uplink'] / speed:.1f} s",
        "server's memory: shared, sum, one update": lambda p: _bytes(3 * p["uplink"]),
        "personal state at a silo, whole experts, both files": lambda p: _bytes(2 * p["whole_state"]),
        "the same with graft.rank = 8": lambda p: _bytes(2 * p["low_rank_state"]),
        f"all of {MILLION:,} silos, graft.rank = 8": lambda p: _bytes(2 * MILLION * p["low_rank_state"]),
    }


def _hierarchy(speed: float) -> dict[str, Callable[[Plan], str]]:
    return {
        "up at the root in a round": lambda p: _bytes(REGIONS * p["uplink"]),
        "over 10 Gbit/s at the root": lambda p: f"{REGIONS * p['uplink'] / LINK:.2f} s",
        "adding the means up": lambda p: f"{REGIONS * p['uplink'] / speed:.2f} s",
        "up at a region": lambda p: _bytes(DRAWN // REGIONS * p["uplink"]),
    }


def _table(plans: Mapping[str, Plan], cells: Mapping[str, Callable[[Plan], str]]) -> str:
    return "\n".join(
        f"| {name} | {' | '.join(cell(plan) for plan in plans.values())} |" for name, cell in cells.items()
    )


def _size_row(one: Mapping[str, Any]) -> str:
    cells = (
        f"{one['silos']:,}",
        str(one["participants"]),
        f"{one['median_round']:.2f} s",
        f"{1e6 * _median(one, 'joining') / one['silos']:,.0f} us",
        _bytes(one["peak_bytes"]),
        str(max(run["open_files"] for run in one["runs"])),
        str(one["personal_files"]),
        _bytes(one["checkpoint_bytes"]),
    )
    return "| " + " | ".join(cells) + " |"


def _median(one: Mapping[str, Any], measure: str) -> float:
    return float(median(run[measure] for run in one["runs"]))


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


def plans() -> dict[str, dict[str, float]]:
    """Return bytes of FLEx on the page's models, as `flexperts plan` has them."""
    found = {}
    for model in MODELS:
        whole, low_rank = (plan(model, ["flex"], settings).methods[0] for settings in ((), ("graft.rank=8",)))
        states = {"whole_state": whole.personal_state, "low_rank_state": low_rank.personal_state}
        found[model] = {"uplink": whole.uplink, "downlink": whole.downlink, **states}
    return found


def write() -> None:
    """Plan the models anew, and write their sizes into the file among the results, and the page from that file."""
    found = read_json(results := RESULTS / "scale.json")
    found["details"]["plans"] = plans()
    write_json(results, found)
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    write()
