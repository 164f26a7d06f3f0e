"""Settings of one silo's rows in place of the common ones: columns, bad rows, test rows, template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexperts.client.workspace import Workspace
from flexperts.config.data import ClientFiles, DataConfig
from flexperts.data.clients import load_clients
from flexperts.deployment.settings import at_silos, for_silo
from flexperts.errors import ConfigError, DataError
from flexperts.recipe import load_recipe, load_silo, parse_recipe

LENGTH = "[training]\nmax_length = 640\n"


def write(folder: Path, name: str, instruction: str, response: str, count: int = 10) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({instruction: f"q {i}", response: f"a {i}"}) + "\n" for i in range(count)))
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder of two silos that share no header."""
    write(tmp_path, "silos/clinic/train.jsonl", "frage", "antwort")
    write(tmp_path, "silos/shop/train.jsonl", "ask", "reply")
    return tmp_path


FILES = """
[data.clients.clinic]
train = "silos/clinic/train.jsonl"
columns = {instruction = "frage", response = "antwort"}
test_fraction = 0.5
[data.clients.shop]
train = "silos/shop/train.jsonl"
[data.columns]
instruction = "ask"
response = "reply"
"""


def test_a_silo_has_columns_and_a_test_share_of_its_own(two: Path) -> None:
    (two / "r.toml").write_text(FILES)
    clients = load_clients(load_recipe(two / "r.toml").data, 0)
    sizes = {name: (len(rows.train), len(rows.test)) for name, rows in clients.items()}
    assert sizes == {"clinic": (5, 5), "shop": (8, 2)}
    assert {row.instruction for row in (*clients["clinic"].train, *clients["clinic"].test)} == {
        f"q {i}" for i in range(10)
    }


def test_the_settings_are_in_the_run_s_record(two: Path) -> None:
    (two / "r.toml").write_text(FILES)
    config = load_recipe(two / "r.toml")
    again = parse_recipe(config.to_toml())
    assert again.data == config.data
    assert again.data.clients["clinic"].columns == {"instruction": "frage", "response": "antwort"}


def test_a_recipe_without_such_settings_is_recorded_as_before() -> None:
    config = parse_recipe("[data.clients.a]\ntrain = 'a.csv'")
    assert '[data.clients.a]\ntrain = "a.csv"\n' in config.to_toml()


def test_the_folder_has_the_files_and_the_recipe_the_settings(two: Path) -> None:
    text = '[data]\nfolder = "silos"\n[data.columns]\ninstruction = "ask"\nresponse = "reply"\n'
    text += '[data.clients.clinic.columns]\ninstruction = "frage"\nresponse = "antwort"\n'
    (two / "r.toml").write_text(text)
    clients = load_clients(load_recipe(two / "r.toml").data, 0)
    assert [len(rows.train) for rows in clients.values()] == [8, 8]
    (two / "r.toml").write_text(text.replace("clients.clinic", "clients.clinik"))
    with pytest.raises(DataError, match="did you mean 'clinic'"):
        load_clients(load_recipe(two / "r.toml").data, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[data]\nfolder = "silos"\n[data.clients.a]\ntrain = "a.csv"', "data.folder has the files"),
        ("[data.clients.a]\non_bad_row = 'drop'", "clients.a.train: it is required"),
        ("[data.clients.a]\ntrain = 'a.csv'\ncolumns = {answer = 'x'}", "columns maps ['answer']"),
        ("[data.clients.a]\ntrain = 'a.csv'\ntemplate = 'vicuna'", "data.clients.a.template"),
        ("[data.clients.a]\ntrain = 'a.csv'\ntest_fraction = 1", "data.clients.a.test_fraction"),
        ("[data.clients.a]\ntrain = 'a.csv'\ncolums = {}", "did you mean 'data.clients.a.columns'"),
    ],
)
def test_what_a_silo_s_section_cannot_say(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_recipe(text)
    assert said in str(raised.value)


def test_bad_rows_are_dropped_where_the_silo_says_so(two: Path) -> None:
    for silo, first, second in (("clinic", "frage", "antwort"), ("shop", "ask", "reply")):
        with (two / f"silos/{silo}/train.jsonl").open("a") as file:
            file.write(json.dumps({first: "q", second: " "}) + "\n")
    (two / "r.toml").write_text(FILES.replace("[data.clients.shop]", 'on_bad_row = "drop"\n[data.clients.shop]'))
    with pytest.raises(DataError, match=r"^shop: "):
        load_clients(load_recipe(two / "r.toml").data, 0)


def test_the_remedy_names_the_silo_s_own_section(two: Path) -> None:
    (two / "r.toml").write_text(FILES.replace('columns = {instruction = "frage", response = "antwort"}', ""))
    with pytest.raises(DataError, match=r"for this client alone: \[data.clients.clinic.columns\]"):
        load_clients(load_recipe(two / "r.toml").data, 0)


def test_a_name_in_another_unicode_form_has_its_settings(two: Path) -> None:
    import unicodedata

    data = DataConfig(clients={unicodedata.normalize("NFD", "klinik-é"): ClientFiles(train="x", test_fraction=0.3)})
    assert data.of_client("klinik-é").test_fraction == 0.3
    assert data.of_client("other").test_fraction == 0.2


def test_a_template_of_its_own(two: Path, tiny_model: str) -> None:
    text = FILES.replace("[data.clients.shop]", 'template = "alpaca"\n[data.clients.shop]')
    (two / "r.toml").write_text(tiny_model + LENGTH + text)
    work = Workspace(load_recipe(two / "r.toml"))
    tokenizer = work.encoder.tokenizer
    prompts = {name: tokenizer.decode(work.examples(name)[0].prompt) for name in work.clients}
    assert "### Instruction:\nq " in prompts["clinic"]
    assert prompts["shop"].startswith("<|user|>q ")
    assert work.encoder_for("clinic").end_token == tokenizer.eos_token_id
    assert len(work.encoders) == 2
    assert work.rows_only().encoder_for("clinic").chat is None


def test_a_silo_s_file_has_the_same_settings(two: Path) -> None:
    (two / "silo.toml").write_text(
        'name = "clinic"\nstate = "state"\nbase = "smol-moe"\n[data]\ntrain = "silos/clinic/train.jsonl"\n'
        'columns = {instruction = "frage", response = "antwort"}\ntest_fraction = 0.4\ntemplate = "alpaca"\n'
    )
    recipe = parse_recipe(
        "[data]\nfolder = 'x'\ntest_fraction = 0.1\non_bad_row = 'drop'\n[data.columns]\ninstruction = 'other'\n"
    )
    config = for_silo(at_silos(recipe), load_silo(two / "silo.toml"))
    assert config.data.own_of("clinic")["template"] == "alpaca"
    assert config.data.of_client("clinic").on_bad_row == "refuse"  # never the recipe's
    rows = load_clients(config.data, 0)["clinic"]
    assert (len(rows.train), len(rows.test)) == (6, 4)


def test_all_errors_of_all_silos_are_collected(two: Path) -> None:
    (two / "r.toml").write_text(FILES.replace("silos/shop/train.jsonl", "none.jsonl").replace("frage", "fraga"))
    errors: list[DataError] = []
    config = load_recipe(two / "r.toml").data
    assert load_clients(config, 0, refused=errors.append) == {}
    assert [str(error).partition(":")[0] for error in errors] == ["clinic", "shop"]
    with pytest.raises(DataError, match=r"^clinic: "):
        load_clients(config, 0)
