"""The command line: what it prints, what it refuses in one line, what it leaves on the disk."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoConfig, AutoModelForCausalLM

from flexperts import __version__
from flexperts.artifacts import RunDirectory
from flexperts.cli.main import app, main
from flexperts.finished.trained import TrainedRun
from flexperts.methods.registry import method_class, method_names
from flexperts.modeling.load import load_base
from flexperts.parameters.store import load_personal, save_personal
from flexperts.testing import byte_tokenizer

PROGRAM = Path(sys.executable).with_name("flexperts")
CLIENTS = ["clinic", "help_desk", "law_firm", "shop"]
RECIPE = """
[training]
max_length = 640
lr = 0.05
personal_lr = 0.3
local_epochs = 4
[federation]
rounds = 1
[evaluation]
max_new_tokens = 6
rows = 4
"""
SILOS = "[data.silos]\ntrain_rows = 8\ntest_rows = 4\n"

Call = Callable[..., tuple[int, str, str]]


def call(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["flexperts", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    return int(exit_.value.code or 0), out.getvalue(), err.getvalue()


def start(*arguments: str | Path, cwd: Path) -> tuple[int, str, str]:
    """Run the command as users do."""
    done = subprocess.run(
        [PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout, done.stderr


def command_lines(command: Any) -> list[list[str]]:
    """Return a command and all below it, each as its words."""
    below = getattr(command, "commands", {})
    return [[], *([name, *rest] for name, one in below.items() for rest in command_lines(one))]


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Path:
    """A folder with a recipe in it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "recipe.toml").write_text(tiny_model + RECIPE + SILOS)
    return folder


@pytest.fixture(scope="module")
def finished(work: Path) -> tuple[Path, str]:
    """A finished run and what was printed; its name would be markup to rich."""
    out = work / "runs" / "flex[bold]"
    code, printed, said = call("run", work / "recipe.toml", "--out", out)
    assert (code, said) == (0, "")
    return out, printed


# What works


def test_help_of_every_command_imports_nothing_heavy() -> None:
    commands = command_lines(typer.main.get_command(app))
    assert ["data", "make-silos"] in commands
    code = f"""
import sys
from flexperts.cli.main import main
for command in {commands}:
    sys.argv = ["flexperts", *command, "--help"]
    try:
        main()
    except SystemExit as done:
        assert done.code == 0, command
heavy = {{"torch", "transformers", "flwr", "peft", "datasets", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: flexperts") == len(commands)


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flexperts", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == __version__


def test_methods_lists_them_all_with_what_they_send_and_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # nothing wraps
    code, printed, _ = call("methods")
    assert code == 0
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    methods = [method_class(name) for name in method_names()]
    own = {m.name: "yes" if "personalized" in m.states else "no" for m in methods}
    assert (own["flex"], own["local"], own["fedavg"], own["zero_shot"]) == ("yes", "yes", "no", "no")
    assert cells == [[m.name, m.summary, m.sends, m.keeps, own[m.name], m.source] for m in methods]


def test_run_shows_its_stages_and_scores(finished: tuple[Path, str]) -> None:
    out, printed = finished
    summary = json.loads((out / "summary.json").read_text())
    lines = printed.splitlines()
    rows = f"rows (train/test): {', '.join(f'{client} 8/4' for client in CLIENTS)}"
    for stage in ("reading rows", rows, "flex: clients join", "round 1 of 1"):
        assert stage in lines
    assert lines[-1].endswith(f"everything is in {out}")  # whole, however long
    assert "0 personal bytes sent" in printed
    for client in CLIENTS:
        scores = summary["clients"][client]
        cells = [f"{scores['rouge_l'][s]:.1f} ({scores['nll'][s]:.2f})" for s in scores["nll"]]
        assert [c.strip() for line in lines if f"│ {client} " in line for c in line.split("│")[2:-1]] == cells
        choice = load_personal(out / "personal" / f"{client}.safetensors")[1].choice
        grafted = " ".join("+".join(map(str, indices)) for indices in choice.values())
        assert f"  {client} grafts experts {grafted}" in lines


def test_evaluate_prints_the_runs_own_scores(finished: tuple[Path, str]) -> None:
    out, _ = finished
    before = listing(out)
    code, printed, said = call("evaluate", out)
    assert (code, said) == (0, "")
    for client, scores in json.loads((out / "summary.json").read_text())["clients"].items():
        cells = [f"{scores['rouge_l'][s]:.1f} ({scores['nll'][s]:.2f})" for s in scores["nll"]]
        shown = [line.split("│")[2:-1] for line in printed.splitlines() if f"│ {client} " in line]
        assert [[c.strip() for c in row] for row in shown] == [cells]
    assert listing(out) == before


@pytest.mark.parametrize("state", [None, "personalized", "global", "zero_shot"])
def test_generate_answers_as_the_evaluation_did(finished: tuple[Path, str], state: str | None) -> None:
    out, _ = finished
    rows = map(json.loads, (out / "predictions" / "shop.jsonl").read_text(encoding="utf-8").splitlines())
    row = next(row for row in rows if len({row[s] for s in ("zero_shot", "global", "personalized")}) == 3)
    options = ["--state", state] if state else []
    code, printed, said = call(
        "generate", out, row["instruction"], "--context", row["context"], "--client", "shop", *options
    )
    assert code == 0
    assert said in ("", "[cut at 6 tokens; --max-tokens N allows a longer answer]\n")
    assert printed == row[state or "personalized"] + "\n"


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_generate_marks_an_answer_that_was_cut(finished: tuple[Path, str], tokens: int) -> None:
    """On stderr: what a program reads from stdout is the answer alone."""
    ask = ("generate", finished[0], "Hello", "--client", "shop", "--state", "zero_shot")
    code, printed, said = call(*ask, "--max-tokens", tokens)
    trained = TrainedRun(finished[0])
    answer = trained.generate("shop", "Hello", state="zero_shot", max_new_tokens=tokens)
    trained.close()
    assert (code, printed) == (0, f"{answer}\n")
    assert said == (f"[cut at {tokens} tokens; --max-tokens N allows a longer answer]\n" if answer.cut else "")
    assert answer.cut or tokens == 40
    assert call(*ask, "--max-tokens", 0)[0] == 2


def test_inspect_shows_modules_and_split(tiny_base: Path) -> None:
    code, printed, _ = call("inspect", tiny_base, "--set", "lora.rank=2", "--set", "model.dtype=float32")
    assert code == 0
    assert printed.startswith(f"Qwen2MoeForCausalLM from {tiny_base}, fingerprint ")
    together = "".join(part.strip() for line in printed.splitlines() for part in line.split("│")[1:2])
    for layer in range(2):
        assert f"model.layers.{layer}.mlp.experts" in together
    rows = {
        c[1].strip(): [x.strip() for x in c[2:5]]
        for c in (x.split("│") for x in printed.splitlines())
        if len(c) > 5
    }
    # q [32, 32], k and v [32, 16], rank 2, two layers: 2 * 2 * (64 + 48 + 48)
    assert rows["shared"] == ["12", "640", "2.6 kB"]
    # per layer an expert's [32, 32] and [32, 16], the gate's 32 weights and its bias
    assert rows["personal"] == ["8", "3,138", "12.6 kB"]
    assert "attention projections: 2 q_proj, 2 k_proj, 2 v_proj, 2 o_proj" in " ".join(printed.split())


def test_inspect_without_grafts(tiny_base: Path) -> None:
    code, printed, _ = call("inspect", tiny_base, "--method", "fedavg")
    assert code == 0
    assert "fedavg: parameters of one client" in printed
    assert "experts module" not in printed


def test_made_silos_train_from_their_folder(tmp_path: Path, tiny_model: str) -> None:
    code, printed, _ = call("data", "make-silos", tmp_path / "silos", "--train-rows", "8", "--test-rows", "4")
    assert code == 0
    assert sorted(printed.splitlines()) == sorted(
        str(tmp_path / "silos" / name) for name in listing(tmp_path / "silos")
    )
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tiny_model + RECIPE + "[data]\nfolder = 'silos'\n[method]\nname = 'fedavg'\n")
    code, printed, said = call("run", recipe, "--out", tmp_path / "out")
    assert (code, said) == (0, "")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {n: (c["train_rows"], c["scored_rows"]) for n, c in summary["clients"].items()} == dict.fromkeys(
        CLIENTS, (8, 4)
    )


def test_what_surprises_in_the_rows_is_said_once(tmp_path: Path, tiny_model: str) -> None:
    for ward, ending in (("ward_a", "jsonl"), ("ward_c", "csv")):
        (tmp_path / "silos" / ward).mkdir(parents=True)
        rows = [
            {"instruction": f"{ward} {i}", "input": "about", "output": str(i), "passage": str(i)} for i in range(8)
        ]
        path = tmp_path / "silos" / ward / f"train.{ending}"
        if ending == "jsonl":
            jsonl(path, *rows, {"instruction": "private", "output": ""})
        else:
            path.write_text("\n".join(map(",".join, [rows[0].keys(), *(row.values() for row in rows)])))
    (tmp_path / "silos" / "pool.csv").write_text("")
    recipe = tmp_path / "recipe.toml"
    data = "[data]\nfolder = 'silos'\non_bad_row = 'drop'\n[knowledge]\ngeneral = 'silos/ward_c/train.csv'\n"
    recipe.write_text(tiny_model + RECIPE + f"{data}[method]\nname = 'fedavg'\nreference = 'local'\n")
    code, printed, said = call("run", recipe, "--out", tmp_path / "out")
    assert (code, said) == (0, "")
    silos = tmp_path / "silos"
    notes = [line.removeprefix("  note: ") for line in printed.splitlines() if line.startswith("  note: ")]
    known = "context is read from 'input', response is read from 'output'"
    rows_notes = [note for note in notes if str(silos) in note]
    assert sorted(rows_notes) == sorted([
        f"{silos}: not read, as it is not in a client's folder: pool.csv",
        f"ward_a: {silos / 'ward_a' / 'train.jsonl'}: 1 of 9 rows are left out (data.on_bad_row = 'drop'): "
        "line 9, row 9: output is empty",
        f"ward_a: {silos / 'ward_a' / 'train.jsonl'}: {known}",
        f"ward_c: {silos / 'ward_c' / 'train.csv'}: {known}",
        f"{silos / 'ward_c' / 'train.csv'}: {known}",
    ])  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: client["train_rows"] for name, client in summary["clients"].items()} == {"ward_a": 6, "ward_c": 6}


def test_run_without_out_makes_a_folder_named_after_the_recipe(
    work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["method.name=fedavg", "evaluation.rows=1", "evaluation.max_new_tokens=1", "training.local_steps=1"]
    code, _, _ = call("run", work / "recipe.toml", *[word for option in options for word in ("--set", option)])
    assert code == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("recipe-20")
    config = (made / "config.toml").read_text()
    assert 'name = "fedavg"' in config
    assert "local_steps = 1" in config


# What does not


def refused(answer: tuple[int, str, str], *said: str) -> None:
    code, _, err = answer
    assert code == 2, err
    # On a busy machine a command may take so long to start that it says so.
    lines = [line for line in err.splitlines() if not line.startswith("  starting: ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for part in said:
        assert part in lines[0]


def jsonl(path: Path, *rows: dict[str, str]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


GOOD = [{"instruction": f"q{i}", "response": "a"} for i in range(5)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["lora.rnak=4"], ["recipe.toml: unknown key 'lora.rnak'", "did you mean 'lora.rank'?"]),
        (["lora.rank=0", "seed=x"], ["lora.rank = 0", "seed = 'x'"]),
        (["training"], ["--set training: an override must be KEY=VALUE"]),
        (["method.name=fedavgg"], ["method 'fedavgg'", "did you mean 'fedavg'?"]),
        (["method.reference=flx"], ["method 'flx'", "did you mean 'flex'?"]),
        (["model.base=smol-mo"], ["base 'smol-mo'", "did you mean 'smol-moe'?"]),
        (["model.device=cuda:7"], ["torch cannot use it"]),
        (["lora.projections=['q']"], ["has no attention projection ['q']", "q_proj"]),
        (["model.base={dense}"], ["LlamaForCausalLM has no experts modules"]),
        (["model.base={plain}", "model.template=chat"], ["the tokenizer has no chat template"]),
    ],
    ids=lambda value: value[0].split("=")[0] + "-" + value[0].split("=")[-1][:8] if "=" in value[0] else None,
)
def test_run_refuses_settings(
    work: Path, tmp_path: Path, dense: Path, plain: Path, options: list[str], said: list[str]
) -> None:
    options = [o.format(dense=dense, plain=plain) for o in options]
    answer = call(
        "run", work / "recipe.toml", "--out", tmp_path / "out", *[w for o in options for w in ("--set", o)]
    )
    refused(answer, *said)
    assert listing(tmp_path) == {}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=260, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (None, None, ["train.jsonl: there is no such data file"]),
        (
            [{"question": "q", "response": "a"}],
            None,
            ["bank: ", "train.jsonl: no column 'instruction'", "question"],
        ),
        (GOOD, [], ["test.jsonl: a split needs at least one row"]),
        (GOOD[:1], None, ["bank: 1 passages with test_fraction"]),
        (GOOD, GOOD[1:2], ["bank: 1 passages are in train and in test"]),
        (GOOD, [{"instruction": "q"}], ["test.jsonl: no column 'response'"]),
    ],
    ids=["missing", "column", "empty", "few", "shared", "test-column"],
)
def test_run_refuses_data(
    tmp_path: Path,
    tiny_model: str,
    train: list[dict[str, str]] | None,
    test: list[dict[str, str]] | None,
    said: list[str],
) -> None:
    data = "[data.clients.bank]\ntrain = 'train.jsonl'\n"
    if train is not None:
        jsonl(tmp_path / "train.jsonl", *train)
    if test is not None:
        jsonl(tmp_path / "test.jsonl", *test)
        data += "test = 'test.jsonl'\n"
    (tmp_path / "recipe.toml").write_text(tiny_model + RECIPE + data)
    before = listing(tmp_path)
    refused(call("run", tmp_path / "recipe.toml", "--out", tmp_path / "out"), *said)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["two\nlines", "[bold]", "[/bold]", "it's"])
def test_errors_are_shown_literally_on_one_line(tmp_path: Path, name: str) -> None:
    shown = name.replace("\n", "\\n")
    refused(call("run", tmp_path / f"{name}.toml"), f"{shown}.toml: there is no such recipe")


def test_missing_recipe_as_users_see_it(tmp_path: Path) -> None:
    refused(start("run", "none.toml", cwd=tmp_path), "none.toml: there is no such recipe")
    assert listing(tmp_path) == {}


def test_a_run_is_not_written_over_another(work: Path, finished: tuple[Path, str]) -> None:
    out, _ = finished
    before = listing(out)
    answer = call("run", work / "recipe.toml", "--out", out)
    refused(answer, "it already holds a run", "choose another --out")
    assert answer[1].strip() == ""  # said before minutes of loading
    assert listing(out) == before


def test_a_finished_run_is_not_run_again(work: Path, finished: tuple[Path, str]) -> None:
    out, _ = finished
    before = listing(out)
    code, printed, said = call("run", work / "recipe.toml", "--out", out, "--resume")
    assert (code, said) == (0, "")
    assert "round 1" not in printed
    assert f"everything is in {out}" in printed
    assert listing(out) == before


def test_a_run_is_not_taken_up_with_another_recipe(work: Path, finished: tuple[Path, str]) -> None:
    out, _ = finished
    before = listing(out)
    answer = call("run", work / "recipe.toml", "--out", out, "--resume", "--set", "seed=1")
    refused(
        answer,
        "it holds a run with another recipe (seed: 0, now 1)",
        "resume with the recipe and --set of the first start",
    )
    refused(call("run", work / "recipe.toml", "--resume"), "--resume", "add --out DIRECTORY")
    assert answer[1].strip() == ""
    assert listing(out) == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_base(path: Path) -> None:
    tensors, meta = load_personal(path)
    save_personal(path, tensors, replace(meta, base="f" * 64))


PERSONAL = Path("personal") / "shop.safetensors"
CHECKPOINT = Path("checkpoint.safetensors")
ASK = ["generate", "{run}", "hello", "--client", "shop"]


@pytest.mark.parametrize(
    ("damage", "arguments", "said"),
    [
        (lambda run: other_base(run / PERSONAL), ASK, ["shop.safetensors belongs to base ffffffffffff"]),
        (lambda run: other_base(run / PERSONAL), ["evaluate", "{run}"], ["belongs to base ffffffffffff"]),
        (lambda run: cut(run / PERSONAL), ASK, ["shop.safetensors: it is damaged"]),
        (lambda run: (run / PERSONAL).unlink(), ASK, ["shop.safetensors: there is no such file"]),
        (lambda run: cut(run / CHECKPOINT), ASK, ["checkpoint.safetensors: it is damaged"]),
        (lambda run: (run / CHECKPOINT).unlink(), ASK, ["checkpoint.safetensors: there is no such file"]),
        (lambda run: (run / CHECKPOINT).unlink(), ["evaluate", "{run}"], ["there is no such file"]),
        (lambda run: (run / "summary.json").unlink(), ASK, ["the run has not finished (no summary.json)"]),
        (lambda run: (run / "summary.json").unlink(), ["evaluate", "{run}"], ["the run has not finished"]),
        (lambda run: cut(run / "summary.json"), ["evaluate", "{run}"], ["summary.json: it is damaged"]),
        (lambda run: (run / "config.toml").unlink(), ["evaluate", "{run}"], ["it holds no run (no config.toml)"]),
        (lambda run: (run / "config.toml").write_text("seed = "), ["evaluate", "{run}"], ["it is not valid TOML"]),
        (lambda run: None, [*ASK[:-1], "nobody"], ["client 'nobody': the run's clients are clinic, help_desk"]),
        (lambda run: None, [*ASK, "--state", "best"], ["state 'best': flex has the states zero_shot, global"]),
        (lambda run: None, ["generate", "{run}/none", "hello", "--client", "shop"], ["it holds no run"]),
    ],
    ids=[
        "base", "base-evaluate", "cut", "missing", "cut-server", "no-server", "no-server-evaluate", "unfinished",
        "unfinished-evaluate",
        "cut-summary", "no-config", "bad-config", "client", "state", "no-run",
    ],
)  # fmt: skip
def test_runs_that_cannot_be_used(
    finished: tuple[Path, str],
    tmp_path: Path,
    damage: Callable[[Path], None],
    arguments: list[str],
    said: list[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    damage(run)
    before = listing(tmp_path)
    refused(call(*[argument.format(run=run) for argument in arguments]), *said)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "content", [b"", b"seed = ", b"seed = 'a'", b"\xff"], ids=["none", "cut", "other", "bytes"]
)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "{recipe}", "--out", "{run}"], "/run"),
        (["run", "{recipe}", "--out", "{run}", "--resume"], "config.toml: it is damaged"),
        (["evaluate", "{run}"], "config.toml: it is damaged"),
        (["report", "{run}"], "config.toml: it is damaged"),
        (["join", "{run}", "--name", "new", "--data", "{recipe}"], "config.toml: it is damaged"),
        (["export", "{run}", "--client", "shop", "--to", "{run}/model"], "config.toml: it is damaged"),
    ],
    ids=["run", "resume", "evaluate", "report", "join", "export"],
)
def test_a_damaged_recipe_of_a_run_is_named(
    work: Path, finished: tuple[Path, str], tmp_path: Path, content: bytes, arguments: list[str], said: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / "config.toml").write_bytes(content)
    before = listing(tmp_path)
    refused(call(*[argument.format(run=run, recipe=work / "recipe.toml") for argument in arguments]), said)
    assert listing(tmp_path) == before


def test_a_damaged_personal_state_as_users_see_it(finished: tuple[Path, str], tmp_path: Path) -> None:
    """In a process of its own, where what libraries print at import and load would show."""
    shutil.copytree(finished[0], tmp_path / "run")
    cut(tmp_path / "run" / PERSONAL)
    refused(start("generate", "run", "hello", "--client", "shop", cwd=tmp_path), "shop.safetensors: it is damaged")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{dense}"], ["LlamaForCausalLM has no experts modules"]),
        (["{dense}/none"], ["must be a shipped base, an existing folder, or a hub id"]),
        (["{dense}", "--method", "flexx"], ["did you mean 'flex'?"]),
        (["{dense}", "--set", "lora.rnak=1"], ["did you mean 'lora.rank'?"]),
    ],
    ids=["dense", "missing", "method", "setting"],
)
def test_inspect_refuses(dense: Path, arguments: list[str], said: list[str]) -> None:
    refused(call("inspect", *[argument.format(dense=dense) for argument in arguments]), *said)


@pytest.mark.parametrize("option", ["--train-rows", "--test-rows"])
def test_make_silos_refuses_too_few_rows(tmp_path: Path, option: str) -> None:
    refused(call("data", "make-silos", tmp_path / "silos", option, "3"), "=3: must be at least 4")
    assert listing(tmp_path) == {}


def test_the_run_directory_reads_back(finished: tuple[Path, str], work: Path, tiny_base: Path) -> None:
    from flexperts.recipe import load_recipe, parse_recipe

    run = RunDirectory.open(finished[0])
    config = load_recipe(work / "recipe.toml")
    assert parse_recipe(run.config_toml) == config
    assert run.summary()["base"]["fingerprint"] == load_base(config.model).fingerprint
    assert [record["number"] for record in run.rounds()] == [1]
