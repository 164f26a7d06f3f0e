"""The quick start as a library call: four silos, one resident base, personal experts that stay at home.

python examples/quickstart.py                                          # the shipped base, minutes
python examples/quickstart.py model.base=FOLDER federation.rounds=1    # any MoE, other settings
"""

import sys
from pathlib import Path

from flexperts import Run, load_recipe, run_federation

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"


def main(out: Path, *overrides: str) -> None:
    summary = run_federation(load_recipe(RECIPE, overrides), out)
    for state, points in summary["mean"]["rouge_l"].items():
        print(f"{state:14s} {points:5.1f} ROUGE-L")
    print(f"personal bytes sent: {summary['bytes']['personal_sent']}")

    note = (
        "The Tandem printer has run dry, reports Mr Otto Lind from 12 Cedar Street. Logged on 3 March as RX 4410."
    )
    with Run(out) as run:
        for client in run.clients:
            [answer] = run.model(client).generate([{"instruction": "Extract the details.", "context": note}])
            print(f"{client:10s} {answer}")


if __name__ == "__main__":
    main(Path("runs/quickstart-example"), *sys.argv[1:])
