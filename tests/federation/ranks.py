"""What test_several_cards.py starts with torchrun, in two processes that talk by gloo; tasks are divided by ``--``.

python ranks.py runs FOLDER OVERRIDES...     the example, once per text of overrides
python ranks.py layers FAMILY...             a divided base computes and is read as a whole one
python ranks.py refusals BASE                what a client on several cards is refused
"""

import itertools
import json
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from flexperts.errors import FlexpertsError
from flexperts.modeling.cards import check_cards, shard_layers
from flexperts.moe.experts import find_experts
from flexperts.parameters.fingerprint import fingerprint
from flexperts.parameters.finite import first_not_finite
from flexperts.recipe import parse_recipe
from flexperts.testing import tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "several_cards.py"
TOKENS = torch.arange(1, 33)[None]
CPU = torch.device("cpu")


def runs(folder: str, *several: str) -> None:
    example = runpy.run_path(str(EXAMPLE))
    device = example["own_device"]()
    for number, overrides in enumerate(several):
        example["main"](Path(folder) / str(number), device, *overrides.split())


@torch.no_grad()
def layers(*families: str) -> None:
    for family in families:
        model = tiny_model(family)
        before = [model(TOKENS).logits, *_weights(model)]
        name = fingerprint(model)
        shard_layers(model, CPU)
        stored = [p for experts in find_experts(model) for p in experts.stored]
        assert all(isinstance(p, DTensor) for p in stored), family
        assert sum(p.to_local().numel() for p in stored) < sum(p.numel() for p in stored), family
        assert fingerprint(model) == name, family
        assert first_not_finite(model) is None, family
        assert all(map(torch.equal, before, [model(TOKENS).logits, *_weights(model)])), family
    if dist.get_rank() == 0:
        print(json.dumps(families))


def _weights(model: torch.nn.Module) -> list[torch.Tensor]:
    every = (e.expert(index) for e in find_experts(model) for index in range(e.num_experts))
    return [tensor.clone() for weights in every for _, tensor in weights.items()]


def refusals(base: str) -> None:
    usual = parse_recipe("data.silos = {}")
    noisy = parse_recipe("data.silos = {}", ["privacy.noise=local"])
    whole = AutoModelForCausalLM.from_pretrained(base)
    shard_layers(whole, CPU)
    check_cards(whole, usual)
    tensor = AutoModelForCausalLM.from_pretrained(base, distributed_config=DistributedConfig(tp_size=2))
    said = [_refusal(whole, noisy), _refusal(tensor, usual)]
    if dist.get_rank() == 0:
        print(json.dumps(said))


def _refusal(model, config) -> str:
    try:
        check_cards(model, config)
    except FlexpertsError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given, task in itertools.groupby(sys.argv[1:], lambda word: word != "--"):
        name, *arguments = task
        if given:
            if name != "runs" and not dist.is_initialized():  # the example starts its own group
                dist.init_process_group()
            globals()[name](*arguments)
    dist.destroy_process_group()
