"""DPO as a local objective: TRL's trainer, the paper's formula row by row, and micro-batches."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexperts.client.client import Client, Resident
from flexperts.client.request import Request
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.data.batches import training_batches
from flexperts.data.prompts import Example
from flexperts.modeling.lora import peft_config
from flexperts.recipe import parse_recipe
from flexperts.seeding import generator
from flexperts.testing import save_tiny_base
from flexperts.training.local import LocalSettings
from flexperts.training.preferences import DirectPreference

STEPS, BATCH, BETA = 4, 3, 0.25
ENDING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A template that ends an answer with EOS, as most do."""
ROWS = [
    {"prompt": f"Question {i}: {'how ' * (i % 3)}so?", "chosen": f"{'well ' * (i % 4)}yes {i}", "rejected": "n" * i}
    for i in range(1, 15)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_base(tmp_path_factory.mktemp("preferences") / "tiny", max_position_embeddings=512)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = ENDING
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(base: Path, tmp_path: Path) -> RunConfig:
    """One client, one round."""
    for side, rows in (("train", ROWS[:12]), ("test", ROWS[12:])):
        (tmp_path / f"{side}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return parse_recipe(
        f"""
        [model]
        base = "{base}"
        dtype = "float32"
        precision = "fp32"
        [method]
        name = "fedavg"
        [data.clients.solo]
        train = "{tmp_path}/train.jsonl"
        test = "{tmp_path}/test.jsonl"
        [training]
        objective = "dpo"
        dpo_beta = {BETA}
        local_steps = {STEPS}
        batch_size = {BATCH}
        lr = 1e-3
        [federation]
        rounds = 1
        """
    )


@contextmanager
def the_client(config: RunConfig, folder: Path) -> Iterator[tuple[Client, Request]]:
    """Yield the run's client, and the request of its first round."""
    resident = Resident(Workspace(config), config, folder)
    with closing(resident.model):
        client = resident.client("solo")
        payload, _ = client.initial(None)
        yield client, Request(payload, None, 1)


@pytest.mark.parametrize("template", ["alpaca", "chat"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl 1.16's own
def test_a_round_of_one_client_is_trl_s(config: RunConfig, base: Path, tmp_path: Path, template: str) -> None:
    """The same tokens, the same losses and, after AdamW with a cosine and clipping, the same weights."""
    pytest.importorskip("trl")
    model = config.model.model_copy(update={"template": template})
    config = config.model_copy(update={"model": model})
    losses: list[float] = []
    with the_client(config, tmp_path / "run") as (client, request):
        examples, start = list(client.examples), request.payload.tensors()
        spoken = [client.workspace.encoder.tokenizer.decode(e.prompt) for e in examples]
        client.counter = lambda *_: lambda count, loss=None, read=0: losses.append(loss)  # type: ignore[method-assign, misc, assignment, return-value]
        ours = client.train(request).update.tensors()
        targets = client.model.lora.targets
    batches = list(training_batches(examples, BATCH, STEPS, generator(config.seed, "solo", 1, "batches")))
    order = [examples.index(example) for batch in batches for example in batch]
    rows = [ROWS[i] if template == "chat" else ROWS[i] | {"prompt": spoken[i]} for i in order]
    trainer = trl_trainer(config, base, targets, rows, template, tmp_path)
    check_tokens(trainer, [examples[i] for i in order])
    adapted = {n.replace(".default.", "."): p for n, p in trainer.model.named_parameters() if "lora_" in n}
    assert adapted.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in adapted.items():
            parameter.copy_(start[name])
    trainer.train()
    assert [loss for loss in losses if loss is not None] == pytest.approx(trainer.seen, abs=1e-6)
    assert trainer.seen[0] == pytest.approx(math.log(2))
    for name, parameter in adapted.items():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=0, atol=1e-6)
    assert max(float((ours[name] - start[name]).abs().max()) for name in ours) > 1e-3


def trl_trainer(
    config: RunConfig, base: Path, targets: Sequence[str], rows: list[dict[str, str]], template: str, folder: Path
) -> Any:
    """Return TRL's trainer on rows in their order; ``seen`` holds its losses."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):  # type: ignore[misc]
        seen: list[float]

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def _compute_loss(self, *args: Any) -> Any:
            loss = super()._compute_loss(*args)
            self.seen = [*getattr(self, "seen", []), float(loss.detach())]
            return loss

    def turns(row: dict[str, str]) -> dict[str, Any]:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return {column: [{"role": role, "content": row[column]}] for column, role in roles.items()}

    training = config.training
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        beta=training.dpo_beta,
        max_length=training.max_length,
        router_aux_loss_coef=0.0,
        per_device_train_batch_size=training.batch_size,
        max_steps=STEPS,
        learning_rate=training.lr,
        lr_scheduler_type="cosine",
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return InOrder(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list([turns(row) if template == "chat" else row for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=peft_config(config.lora, targets),
    )


def check_tokens(trainer: Any, examples: Sequence[Example]) -> None:
    for told, example in zip(trainer.train_dataset, examples, strict=True):
        chosen, rejected = example.forms
        assert (told["prompt_ids"], told["prompt_ids"]) == ([*chosen.prompt], [*rejected.prompt])
        assert told["chosen_ids"] == [*chosen.input_ids[chosen.prompt_length :]]
        assert told["rejected_ids"] == [*rejected.input_ids[rejected.prompt_length :]]


def likelihood(model: Any, example: Example) -> Tensor:
    """Return one answer's summed log-probability, without padding."""
    ids = torch.tensor([example.input_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, example.prompt_length - 1 : -1]
    return -F.cross_entropy(logits, ids[0, example.prompt_length :], reduction="sum")


@pytest.mark.parametrize("micro", [None, 1, 2])
def test_the_loss_is_equation_7(config: RunConfig, base: Path, tmp_path: Path, micro: int | None) -> None:
    """Against a second, untouched model; in micro-batches the parts have the same sum and gradients."""
    training = config.training.model_copy(update={"micro_batch_size": micro})
    settings = LocalSettings(training=training, precision="fp32", pad_token_id=258, steps=1, total_steps=1)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with the_client(config, tmp_path / "run") as (client, request):
        rows = list(client.examples)[:BATCH]
        with client._training(request, 0) as (turn, _):
            with torch.no_grad():
                for number, parameter in enumerate(turn.split.shared.values()):
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
            policy = turn.model.train()
            assert isinstance(turn.objective, DirectPreference)
            parts = list(turn.objective(policy, rows, settings))
            assert policy.training
            found = torch.autograd.grad(sum(parts), list(turn.split.shared.values()))
            terms = []
            for row in rows:
                ratios = [likelihood(policy, form) - likelihood(plain, form).detach() for form in row.forms]
                terms.append(-torch.log(torch.sigmoid(BETA * (ratios[0] - ratios[1]))))
            expected = torch.stack(terms).mean()
            wanted = torch.autograd.grad(expected, list(turn.split.shared.values()))
    assert len(parts) == math.ceil(BATCH / (micro or BATCH))
    assert abs(float(expected.detach()) - math.log(2)) > 0.01  # the adapters change the answers
    torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)


def test_scores_are_rewards_of_chosen_and_rejected_answers(config: RunConfig, base: Path, tmp_path: Path) -> None:
    """Margin and accuracy by hand; the untouched base has no preference."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with the_client(config, tmp_path / "run") as (client, request):
        update = client.train(request).update
        after = Request(update.payload, None, 1)
        scores = client.evaluate(after, ["zero_shot", "global"], answers=False)
        examples = client.workspace.encoder.encode_all(client.scored_rows)
        with client.in_state(after, "global") as (model, _), torch.no_grad():
            rewards = [
                [BETA * float(likelihood(model, form) - likelihood(policy, form)) for form in example.forms]
                for policy in (plain,)
                for example in examples
            ]
        alone = client.evaluate(after, ["global"], client.scored_rows[:1], answers=False)["global"]
    margins = [chosen - rejected for chosen, rejected in rewards]
    assert scores["zero_shot"].margins == (0.0, 0.0)
    assert scores["zero_shot"].reward_accuracy == 50.0
    assert scores["global"].margins == pytest.approx(margins, abs=1e-4)
    assert scores["global"].reward_margin == pytest.approx(sum(margins) / 2, abs=1e-4)
    assert scores["global"].reward_accuracy == 100 * sum(margin > 0 for margin in margins) / 2
    assert scores["global"].losses == pytest.approx([math.log1p(math.exp(-margin)) for margin in margins], abs=1e-4)
    assert alone.margins == pytest.approx(margins[:1], abs=1e-4)  # the base is scored where it was not asked for
