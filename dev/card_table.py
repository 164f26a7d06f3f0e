"""Write the tables of what fits a card into docs/large-models.md: `python dev/card_table.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flexperts.costs.cards import CardPlanner, Fit, card_bytes

PAGE = Path(__file__).parents[1] / "docs" / "large-models.md"
START, END = "<!-- cards: python dev/card_table.py -->\n", "<!-- end of cards -->\n"
MODELS = {
    "olmoe-1b-7b": "OLMoE-1B-7B",
    "qwen1.5-moe-a2.7b": "Qwen1.5-MoE-A2.7B",
    "deepseek-v2-lite": "DeepSeek-V2-Lite",
    "gpt-oss-20b": "gpt-oss-20b",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "mixtral-8x7b": "Mixtral-8x7B",
}
SETTINGS = {"deepseek-v2-lite": ['lora.projections=["q_proj", "kv_a_proj_with_mqa", "kv_b_proj"]']}
"""What a model needs that has other attention projections."""
CARDS = ("24GB", "48GB", "80GB", "141GB")
NVFLARE = (
    "https://github.com/NVIDIA/NVFlare/blob/f3b7c1bffdfed90338d695a67b52a46d8bc4d28c"
    "/integration/nemo/examples/peft/README.md"
)
SIZING = (
    "https://github.com/NVIDIA-NeMo/Nemotron/blob/18fb9673981003fd8ad04a8844abc93251007b10"
    "/usage-cookbook/Nemotron-3-Nano/nemotron3-nano-post-training-sizing.md"
)


def cell(fit: Fit, card: int) -> str:
    """Return the most rows in one pass of training on a card; a dash where the model does not fit."""
    mark = r"\*" if fit.checkpointing else ""
    return f"{fit.rows}{mark}" if fit.on(card) else "–"


def model_lines(name: str, shown: str) -> Iterator[str]:
    """Yield a model's lines: one per storage, with whole and low-rank personal experts in each cell."""
    planner = CardPlanner(name, ["federation.rounds=1", *SETTINGS.get(name, ())])  # memory is the same in each
    by_card = {card: list(planner.fits(card_bytes(card))) for card in CARDS}
    for number, storage in enumerate(("bf16", "int8", "nf4")):
        cells = []
        for card, fits in by_card.items():
            of = [cell(fit, card_bytes(card)) for fit in fits if fit.storage == storage]
            cells.append(" / ".join(of) if set(of) != {"–"} else "–")
        base = next(fit.base for fit in by_card[CARDS[0]] if fit.storage == storage)
        yield f"| {shown if number == 0 else ''} | {storage} | {base / 1e9:.1f} GB | {' | '.join(cells)} |"


def lora_gib(length: int) -> float:
    """Return GiB of LoRA of rank 8 in training on Qwen3-30B-A3B, one row of so many tokens, margins included."""
    planner = CardPlanner(
        "qwen3-30b-a3b",
        ["method.name=fedavg", "lora.rank=8", "federation.rounds=1", f"training.max_length={length}"],
        ["full"],
    )
    fit = next(planner.fits(0))  # nothing fits, so one row is planned, with checkpointing
    return fit.training / 2**30


def text() -> str:
    """Return the tables as Markdown."""
    lines = [
        f"| model | experts | base | {' | '.join(CARDS)} |",
        f"|---|---|---:|{'---|' * len(CARDS)}",
        *(line for name, shown in MODELS.items() for line in model_lines(name, shown)),
        "",
        "Beside figures that others have published for LoRA on models of this size, on an H100 of 80 GB:",
        "",
        "| what | memory |",
        "|---|---:|",
        "| NVIDIA FLARE, federated LoRA of rank 8 on all linear layers of Nemotron-3-Nano-30B-A3B in bf16, one row "
        f"of at most 512 tokens in a step: [reported]({NVFLARE}) | about 64 GiB |",
        "| NVIDIA's sizing of LoRA of rank 8 on the same model, one row of 2,048 tokens: "
        f"[estimated]({SIZING}) | about 68 GiB |",
        *(
            f"| flexperts, `fedavg`, LoRA of rank 8 on Qwen3-30B-A3B in bf16, one row of {length:,} tokens, with "
            f"gradient checkpointing: estimated, margins included | {lora_gib(length):.0f} GiB |"
            for length in (512, 2048)
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replace the tables in the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    PAGE.write_text(before + START + text() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
