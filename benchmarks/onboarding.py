"""How many rows a silo that joins after training needs to reach the level of those that took part.

    nice python benchmarks/onboarding.py --out runs/onboarding                 # all four silos, resumable
    python benchmarks/onboarding.py --out runs/onboarding --silos law_firm     # some
    python benchmarks/onboarding.py --out runs/onboarding --table              # print what is there
    python benchmarks/onboarding.py --out runs/tiny --set model.base=DIR evaluation.rows=2 --rows 4 --silos shop

One silo at a time is left out of a federation of the shipped silos and joins it afterwards with its first 4 to 64
train rows of a random order. These scores are compared with its scores as a participant with all 64 rows, and with
those of method `local` on the plain base with the same rows. All take as many steps as a participant, rounds x
local_steps, and have the same 40 test rows. Settings are those of recipes/study-silos.toml without its validation
rows. Finished cells are not run again. Writes onboarding.json.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from flexperts.artifacts import RunDirectory
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.data.silos.generate import SILOS, write_silos
from flexperts.engines.run import run_federation
from flexperts.environment import environment
from flexperts.files import write_json, write_text
from flexperts.finished.joining import join
from flexperts.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "study-silos.toml"
ROWS = (4, 8, 16, 32, 64)
MOST, TEST = 64, 40
LEVEL = 0.05
"""Largest relative difference from a participant's score that counts as reaching it."""


class Bench:
    """All runs of one seed, on one base in memory.

    Args:
        out: Folder of everything.
        seed: Seed of the runs and of the order of rows; the silos' own texts are those of seed 0.
        settings: Overrides of the recipe.
    """

    def __init__(self, out: Path, seed: int, settings: list[str]) -> None:
        self.out, self.seed, self.settings = out.resolve() / f"seed-{seed}", seed, settings
        self.silos = out.resolve() / "silos"
        if not self.silos.exists():
            write_silos(self.silos, 0, MOST, TEST)
        self.workspace = Workspace(self.config(dict.fromkeys(SILOS, MOST)))

    def config(self, clients: dict[str, int], *more: str) -> RunConfig:
        """Return the recipe for some silos, each with its first rows; ``NAME-ROWS`` is a silo that is alone."""
        files = {
            name: f"{{train={json.dumps(str(self.rows(name.split('-')[0], count)))}, "
            f"test={json.dumps(str(self.test(name.split('-')[0])))}}}"
            for name, count in clients.items()
        }
        data = ", ".join(f"{json.dumps(name)}={both}" for name, both in files.items())
        ours = (f"data={{clients={{{data}}}}}", "evaluation.others_rows=0", "evaluation.routing_rows=0")
        return load_recipe(RECIPE, [*ours, f"seed={self.seed}", *self.settings, *more])

    def test(self, silo: str) -> Path:
        """Return a silo's test file."""
        return self.silos / silo / "test.jsonl"

    def rows(self, silo: str, count: int) -> Path:
        """Return a file with the first train rows of a silo in a random order of this seed."""
        path = self.out / "rows" / f"{silo}-{count}.jsonl"
        lines = (self.silos / silo / "train.jsonl").read_text(encoding="utf-8").splitlines()
        random.Random(f"{self.seed} {silo}").shuffle(lines)
        write_text(path, "\n".join(lines[:count]) + "\n")
        return path

    def run(self, name: str, config: RunConfig) -> Path:
        """Run or resume a recipe, and return its directory."""
        run_federation(config, self.out / name, resume=True, workspace=self.workspace.for_run(config))
        print(f"seed {self.seed}: {name}", flush=True)
        return self.out / name

    def federation(self, left_out: str | None) -> Path:
        """Return the run of all silos, or of all but one."""
        present = {name: MOST for name in SILOS if name != left_out}
        return self.run(f"without-{left_out}" if left_out else "full", self.config(present))

    def newcomer(self, silo: str, count: int) -> None:
        """Let a silo join the federation of the others, and train alone with the same rows."""
        host, name = self.federation(silo), f"{silo}-{count}"
        if name not in RunDirectory(host).joined():
            join(host, self.rows(silo, count), test=self.test(silo), name=name, workspace=self.workspace)
            print(f"seed {self.seed}: {name} has joined", flush=True)
        usual = self.config({name: count})
        steps = usual.federation.rounds * (usual.training.local_steps or 1)
        once = ("method.name=local", "federation.rounds=1", f"training.local_steps={steps}")
        self.run(f"alone-{name}", self.config({name: count}, *once))


def results(out: Path) -> list[dict[str, Any]]:
    """Return a record per finished cell: scores of joining, training alone, taking part, and of the others."""
    found = []
    for host in sorted(out.glob("seed-*/without-*")):
        silo = host.name.removeprefix("without-")
        records = RunDirectory(host).joined()
        for name, joined in sorted(records.items(), key=lambda item: item[1]["rows"]["train_rows"]):
            alone = host.parent / f"alone-{name}"
            if not (alone / "summary.json").exists() or not (host.parent / "full" / "summary.json").exists():
                continue
            full = RunDirectory(host.parent / "full").summary()
            found.append(
                {
                    "seed": full["seed"],
                    "silo": silo,
                    "rows": joined["rows"]["train_rows"],
                    "steps": joined["steps"],
                    "joined": _scores(joined),
                    "alone": _scores(RunDirectory(alone).summary()["clients"][name]),
                    "participant": _scores(full["clients"][silo]),
                    "others": _scores(RunDirectory(host).summary()["mean"]),
                }
            )
    return found


def _scores(record: dict[str, Any]) -> dict[str, Any]:
    return {kind: record[kind] for kind in ("rouge_l", "nll")}


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as a Markdown table: ROUGE-L (NLL) on the silo's own test rows."""
    lines = [
        "| silo | seed | rows | joins | alone | as a participant, 64 rows | mean of the others |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        cells = [_cell(r[who], "personalized") for who in ("joined", "alone", "participant", "others")]
        lines.append("| " + " | ".join([r["silo"], str(r["seed"]), str(r["rows"]), *cells]) + " |")
    return "\n".join(lines)


def untrained_table(records: list[dict[str, Any]]) -> str:
    """Return each silo's scores without training on its own rows, as a Markdown table."""
    lines = ["| silo | seed | zero-shot | the others' shared part alone |", "|---|---:|---:|---:|"]
    firsts = {(r["silo"], r["seed"]): r for r in records}
    for (silo, seed), r in firsts.items():
        cells = [_cell(r["joined"], state) for state in ("zero_shot", "global")]
        lines.append("| " + " | ".join([silo, str(seed), *cells]) + " |")
    return "\n".join(lines)


def level_table(records: list[dict[str, Any]]) -> str:
    """Return the fewest rows tried that reach a participant's level, as a Markdown table; "–" where none does."""
    lines = [
        "| silo | seed | rows tried | joins: ROUGE-L | joins: NLL | alone: ROUGE-L | alone: NLL |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for silo, seed in dict.fromkeys((r["silo"], r["seed"]) for r in records):
        its = sorted((r for r in records if (r["silo"], r["seed"]) == (silo, seed)), key=lambda r: int(r["rows"]))
        cells = [_fewest(its, who, kind) for who in ("joined", "alone") for kind in ("rouge_l", "nll")]
        tried = ", ".join(str(r["rows"]) for r in its)
        lines.append("| " + " | ".join([silo, str(seed), tried, *cells]) + " |")
    return "\n".join(lines)


def _fewest(records: list[dict[str, Any]], who: str, kind: str) -> str:
    """Return the first count of rows whose score is within ``LEVEL`` of the participant's, or better."""
    sign = 1 if kind == "rouge_l" else -1
    for r in records:
        ours, theirs = (r[side][kind]["personalized"] for side in (who, "participant"))
        if sign * (ours - theirs) >= -LEVEL * theirs:
            return str(r["rows"])
    return "–"


def _cell(scores: dict[str, Any], state: str) -> str:
    return f"{scores['rouge_l'][state]:.1f} ({scores['nll'][state]:.2f})"


def main() -> None:
    """Run what is not finished, write onboarding.json and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--silos", nargs="*", default=list(SILOS), choices=list(SILOS))
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--table", action="store_true", help="only print the tables of what is finished")
    arguments = parser.parse_args()
    for seed in () if arguments.table else arguments.seeds:
        bench = Bench(arguments.out, seed, arguments.settings)
        bench.federation(None)
        for silo in arguments.silos:
            for count in arguments.rows:
                bench.newcomer(silo, count)
    records = results(arguments.out)
    write_json(arguments.out / "onboarding.json", {"environment": environment(), "entries": records})
    print(level_table(records), table(records), untrained_table(records), sep="\n\n")


if __name__ == "__main__":
    main()
