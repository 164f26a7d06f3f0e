"""Recipes: what is refused and how it is said, overrides, the round trip, paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexperts.artifacts import RunDirectory
from flexperts.config.changes import recipe_changes
from flexperts.config.data import DataConfig
from flexperts.config.run import RunConfig, as_written_now
from flexperts.errors import ArtifactError, ConfigError
from flexperts.methods.registry import make_method
from flexperts.recipe import load_recipe, parse_recipe, recorded_recipe

SILOS = "[data.silos]\n"
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text, overrides)
    return str(caught.value)


def test_defaults_of_a_recipe_that_only_names_its_data() -> None:
    config = parse_recipe(SILOS)
    assert (config.method.name, config.graft.rank, config.federation.rounds) == ("flex", "full", 3)
    assert config.data.silos is not None
    assert config.data.silos.train_rows == 96


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainign = 1\n" + SILOS, "unknown key 'trainign' (did you mean 'training'?)"),
        (SILOS + "[training]\nlearning = 1", "unknown key 'training.learning'"),
        (SILOS + "[lora]\nrnak = 4", "unknown key 'lora.rnak' (did you mean 'lora.rank'?)"),
        (SILOS + "tset_rows = 4", "unknown key 'data.silos.tset_rows' (did you mean 'data.silos.test_rows'?)"),
        (
            "[data.clients.bank]\ntrain = 'a.csv'\ntset = 'b.csv'",
            "unknown key 'data.clients.bank.tset' (did you mean 'data.clients.bank.test'?)",
        ),
        ("[data.clients.bank]\ntrain = 'a.csv'\nzzz = 1", "'test', 'test_fraction', 'train'])"),
    ],
)
def test_unknown_keys_name_the_close_one(text: str, said: str) -> None:
    assert said in refusal(text)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("lora.rank=0", "lora.rank = 0"),
        ("lora.alpha=0", "lora.alpha = 0"),
        ("lora.dropout=1", "lora.dropout = 1"),
        ("graft.experts=0", "graft.experts = 0"),
        ("graft.rank=0", "rank = 0 must be at least 1 or 'full'"),
        ("graft.rank=half", "graft.rank"),
        ("graft.gate_bias=nan", "graft.gate_bias = nan"),
        ("graft.calibration_rows=0", "graft.calibration_rows = 0"),
        ("data.silos.train_rows=3", "data.silos.train_rows = 3"),
        ("data.test_fraction=1", "data.test_fraction = 1"),
        ("model.dtype=float16", "model.dtype = 'float16'"),
        ("model.precision=fp16", "model.precision = 'fp16'"),
        ("model.template=vicuna", "model.template = 'vicuna'"),
        ("training.lr=0", "training.lr = 0"),
        ("training.lr=inf", "training.lr = inf"),
        ("training.personal_lr=-1", "training.personal_lr = -1"),
        ("training.local_steps=0", "training.local_steps = 0"),
        ("training.batch_size=0", "training.batch_size = 0"),
        ("training.batch_size=2.5", "training.batch_size = 2.5"),
        ("training.micro_batch_size=0", "training.micro_batch_size = 0"),
        ("training.max_length=15", "training.max_length = 15"),
        ("training.warmup_ratio=1", "training.warmup_ratio = 1"),
        ("training.max_grad_norm=0", "training.max_grad_norm = 0"),
        ("federation.rounds=0", "federation.rounds = 0"),
        ("evaluation.every=0", "evaluation.every = 0"),
        ("evaluation.batch_size=none", "evaluation.batch_size = 'none'"),
        ("data.columns.answer=x", "columns maps ['answer']"),
        ("seed=one", "seed = 'one'"),
        ("training=1", "training = 1"),
    ],
)
def test_each_rule_is_checked_and_names_its_key(override: str, key: str) -> None:
    assert key in refusal(SILOS, override)


def test_all_offences_are_reported_at_once() -> None:
    said = refusal(SILOS, "lora.rank=0", "federation.rounds=-1", "nonsense=1", "model.dtype=int8")
    for offence in ("lora.rank = 0", "federation.rounds = -1", "'nonsense'", "model.dtype = 'int8'"):
        assert offence in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "now"),
    [
        ("[data]", "none"),
        ("[data.silos]\n[data.clients.a]\ntrain = 'a.csv'", "silos, clients"),
        ("[data]\nfolder = 'x'\n[data.silos]", "silos, folder"),
    ],
)
def test_data_has_exactly_one_source(text: str, now: str) -> None:
    assert f"exactly one of silos, folder, clients, partition, at_silos (now: {now})" in refusal(text)


def test_data_section_is_required() -> None:
    assert "data: Field required" in refusal("seed = 1")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", "seed", 7),
        ("training.lr=1e-3", "training.lr", 0.001),
        ("training.lr = 0.5", "training.lr", 0.5),
        ("method.name=fedavg", "method.name", "fedavg"),
        ("method.name='local'", "method.name", "local"),
        ("model.base=/some/folder with spaces", "model.base", "/some/folder with spaces"),
        ("model.base=org/name", "model.base", "org/name"),
        ("model.device=cuda:1", "model.device", "cuda:1"),
        ("training.gradient_checkpointing=true", "training.gradient_checkpointing", True),
        ("lora.projections=['o_proj']", "lora.projections", ("o_proj",)),
        ("lora.projections=[]", "lora.projections", ()),
        ("graft.rank=4", "graft.rank", 4),
        ("graft.rank=full", "graft.rank", "full"),
    ],
)
def test_overrides_are_toml_values_or_plain_text(override: str, path: str, value: Any) -> None:
    found: Any = parse_recipe(SILOS, [override])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_over_the_recipe() -> None:
    assert parse_recipe("seed = 1\n" + SILOS, ["seed=2", "seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("knowledge.general", "'rows.jsonl'"),
        ("knowledge.mmlu", "hub"),
        ("training.local_steps", "4"),
        ("training.personal_lr", "1e-3"),
        ("data.validation_rows", "8"),
        ("data.leave_out", "['a']"),
        ("method.reference", "fedavg"),
        ("evaluation.max_new_tokens", "8"),
    ],
)
def test_an_empty_value_takes_back_what_the_recipe_sets(key: str, value: str) -> None:
    section, name = key.split(".")
    assert getattr(getattr(parse_recipe(SILOS, [f"{key}={value}"]), section), name) is not None
    assert parse_recipe(SILOS, [f"{key}={value}", f"{key}="]) == parse_recipe(SILOS)


@pytest.mark.parametrize("key", ["seed", "training.lr", "data.silos.seed", "data.test_fraction"])
def test_an_empty_value_is_no_value_of_a_setting_with_a_default(key: str) -> None:
    """Nothing is put back to a default without a word."""
    assert key in refusal(SILOS, f"{key}=")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.lr", "an override must be KEY=VALUE"),
        ("seed.x=1", "seed is a value, not a section"),
        ("=1", "unknown key ''"),
        ("lora.rang=1", "did you mean 'lora.rank'?"),
        ("data.folder=x", "exactly one of"),
    ],
)
def test_bad_overrides(override: str, said: str) -> None:
    assert said in refusal("seed = 1\n" + SILOS, override)


@given(
    seed=st.integers(-(2**62), 2**62),
    lr=st.floats(1e-8, 10),
    rank=st.one_of(st.just("full"), st.integers(1, 99)),
    text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1),
    steps=st.none() | st.integers(1, 99),
    clients=st.dictionaries(st.text(min_size=1), st.text(min_size=1), min_size=1, max_size=3),
)
def test_toml_round_trip_is_the_same_config(
    seed: int,
    lr: float,
    rank: Any,
    text: str,
    steps: int | None,
    clients: dict[str, str],
) -> None:
    config = RunConfig.model_validate(
        {
            "seed": seed,
            "model": {"base": text},
            "graft": {"rank": rank},
            "data": {"clients": {name: {"train": file} for name, file in clients.items()}},
            "training": {"lr": lr, "local_steps": steps},
        }
    )
    assert parse_recipe(config.to_toml()) == config


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ("a = 1\n[b]\nc = [1]", "a = 2\n[b]\nc = [1, 2]", "a: 1, now 2; b.c: [1], now [1, 2]"),
        ("a = 1", "b = 1", "a: 1, now unset; b: unset, now 1"),
        ("a = 1\n[b]", "a = 1", "only in its formatting"),
        ("a = ", "a = 1", "it cannot be read: Invalid value"),
        ("", "\n".join(f"k{i} = {i}" for i in range(7)), "and 3 more"),
    ],
)
def test_what_differs_between_two_recipes_is_told(before: str, now: str, told: str) -> None:
    assert told in recipe_changes(before, now)


def test_written_toml_holds_the_defaults() -> None:
    text = parse_recipe(SILOS).to_toml()
    for line in ('base = "smol-moe"', "rank = 8", "max_grad_norm = 1.0", "train_rows = 96"):
        assert line in text.splitlines()


def test_data_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path / "recipes")  # the current folder must not matter
    path = tmp_path / "recipes" / "r.toml"
    path.write_text(
        "[data.clients.a]\ntrain = '../data/a.csv'\n[data.clients.b]\ntrain = 'hub:o/n:s'\ntest = '/abs/b.csv'\n"
    )
    monkeypatch.chdir("/")
    clients = load_recipe(path).data.clients
    assert clients["a"].train == str(tmp_path / "data" / "a.csv")
    assert clients["a"].test is None
    assert (clients["b"].train, clients["b"].test) == ("hub:o/n:s", "/abs/b.csv")
    path.write_text("[data]\nfolder = 'silos'\ntest_fraction = 0.5\n")
    assert load_recipe(path).data == DataConfig(folder=str(tmp_path / "recipes" / "silos"), test_fraction=0.5)


def test_overridden_data_paths_are_resolved_too(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[data]\nfolder = 'a'")
    assert load_recipe(tmp_path / "r.toml", ["data.folder=b"]).data.folder == str(tmp_path / "b")


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("snap/a.jsonl", "blobs/a3f9c0e"),
        ("snap/b.csv", "blobs/x.txt"),
        ("c.parquet", "blobs/deep/01"),
        ("d.jsonl.gz", "blobs/y"),
    ],
)
def test_a_link_keeps_its_own_name(tmp_path: Path, link: str, target: str) -> None:
    """As the hub's cache has it: the name says what the file holds."""
    for path in (tmp_path / target, tmp_path / link):
        path.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).write_text("")
    (tmp_path / link).symlink_to(tmp_path / target)
    (tmp_path / "other").symlink_to(tmp_path / "blobs")
    text = f"[data.clients.a]\ntrain = '{link}'\ntest = 'other/../{link}'\n"
    files = parse_recipe(text, folder=tmp_path).data.clients["a"]
    assert files.train == files.test == str(tmp_path / link)
    pooled = f"data.partition = {{source = '{link}', by = 'natural'}}\nknowledge.general = '{link}'"
    config = parse_recipe(pooled, folder=tmp_path)
    assert config.data.partition
    assert (config.data.partition.source, config.knowledge.general) == (str(tmp_path / link),) * 2


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_a_byte_order_mark_before_a_recipe(tmp_path: Path, mark: bytes, line: str) -> None:
    (tmp_path / "r.toml").write_bytes(mark + f"seed = 3{line}[data.silos]{line}".encode())
    assert load_recipe(tmp_path / "r.toml").seed == 3
    assert parse_recipe(f"\ufeffseed = 3{line}[data.silos]").seed == 3


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such recipe"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="there is no such recipe"):
        load_recipe(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[model]\nbase = '\xe9'")
    with pytest.raises(ConfigError, match=r"latin\.toml: it is not UTF-8 text"):
        load_recipe(tmp_path / "latin.toml")
    (tmp_path / "bad.toml").write_text("seed = \n")
    with pytest.raises(ConfigError, match=r"bad\.toml: it is not valid TOML .*line 1"):
        load_recipe(tmp_path / "bad.toml")


def test_configs_are_frozen() -> None:
    config = parse_recipe(SILOS)
    with pytest.raises(ValueError, match="frozen"):
        config.training.lr = 1.0


def test_the_reference_differs_in_the_method_only() -> None:
    config = parse_recipe("seed = 5\n[method]\nname = 'flex'\nreference = 'fedavg'\n" + SILOS)
    other = config.with_method("fedavg")
    assert (other.method.name, other.method.reference) == ("fedavg", None)
    assert other.model_copy(update={"method": config.method}) == config


@pytest.mark.parametrize("path", RECIPES or [None], ids=lambda path: path.name if path else "none")
def test_shipped_recipes_parse(path: Path | None) -> None:
    assert path is not None, "no recipe ships"
    assert load_recipe(path).federation.rounds >= 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["graft.selection=gredy"], "graft.selection = 'gredy'"),
        (["graft.layers=[0.5]"], "graft.layers.0 = 0.5"),
        (["graft.scale=0"], "scale = 0.0 must be above 0 or 'least_squares'"),
        (["graft.scale=-2.5"], "scale = -2.5 must be above 0 or 'least_squares'"),
        (["graft.scale=inf"], "graft.scale"),
        (["graft.scale=least"], "graft.scale"),
        (["graft.place=above"], "graft.place = 'above'"),
        (["graft.sharing=all"], "graft.sharing = 'all'"),
        (["graft.dropout=1"], "graft.dropout = 1"),
        (["graft.dropout=-0.1"], "graft.dropout = -0.1"),
        (
            ["graft.place=in_place", "graft.gate_start=router"],
            "gate_start = 'router' must be 'constant' with place = 'in_place'",
        ),
        (["graft.output=delta"], "graft.output = 'delta'"),
        (["graft.output=difference", "graft.start=silent"], "it needs start = 'copy'"),
        (["graft.output=difference", "graft.scale=least_squares"], "all differences are 0"),
        (["graft.output=difference", "graft.place=in_place"], "output = 'difference' must be 'expert'"),
        (["graft.gate_bias=-4", "graft.place=in_place"], "gate_bias = -4.0 must be 0.0 with place = 'in_place'"),
        (["graft.gate_lr=0"], "graft.gate_lr = 0"),
        (["graft.gate_lr=0.1", "graft.place=in_place"], "place = 'in_place' has none"),
        (["graft.place=in_place", "graft.scale=2"], "scale = 2.0 must be 1.0 with place = 'in_place'"),
        (
            ["graft.place=in_place", "graft.scale=least_squares"],
            "scale = 'least_squares' must be 1.0 with place = 'in_place'",
        ),
        (["graft.place=in_place", "graft.sharing=both"], "sharing = 'both' must be 'personal'"),
        (["graft.place=in_place", "graft.dropout=0.5"], "dropout = 0.5 must be 0.0 with place = 'in_place'"),
        (["graft.start=silent", "graft.rank=4"], "start = 'silent' needs rank = 'full' and place = 'beside'"),
        (["graft.sharing=shared", "graft.dropout=0.5"], "dropout = 0.5 is for a personal graft"),
        (["graft.sharing=shared", "graft.scale=2"], "scale = 2.0 is for a personal graft"),
        (["graft.sharing=shared", "graft.selection=random"], "selection = 'random' is for a personal graft"),
    ],
)
def test_graft_variants_that_cannot_be(overrides: list[str], said: str) -> None:
    assert said in refusal(SILOS, *overrides)


def test_graft_variants_survive_toml() -> None:
    config = parse_recipe(
        SILOS,
        ["graft.layers=[0, -1]", "graft.scale=least_squares", "graft.selection=greedy", "graft.sharing=both"],
    )
    assert (config.graft.layers, config.graft.scale) == ((0, -1), "least_squares")
    assert parse_recipe(config.to_toml()) == config
    assert parse_recipe(SILOS, ["graft.place=in_place"]).graft.scale == 1.0


def test_a_shipped_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_recipe("quickstart")
    assert shipped == load_recipe(next(path for path in RECIPES if path.stem == "quickstart"))
    assert load_recipe(Path("quickstart"), ["seed=7"]).seed == 7
    Path("quickstart").write_text("[data.silos]\ntrain_rows = 5\n")  # a file of one's own goes first
    assert load_recipe("quickstart").data.silos.train_rows == 5
    for missing in ("none", "folder/large", "large.toml"):
        with pytest.raises(ConfigError, match=r"no such recipe; give a TOML or YAML file, or .* quickstart"):
            load_recipe(missing)


@pytest.mark.parametrize(
    "setting",
    ["method.options.mu=inf", "model.chat_template_kwargs.depth=[1, nan]", "protections.mine.levels={high = -inf}"],
)
def test_numbers_of_free_settings_are_finite(setting: str) -> None:
    with pytest.raises(ConfigError, match="is not a finite number"):
        parse_recipe("data.silos = {}", [setting])


@pytest.mark.parametrize(
    ("settings", "opens_to", "moments"),
    [
        ((), "difference", "kept"),
        (("graft.start=silent",), "expert", "kept"),
        (("graft.scale=least_squares",), "expert", "kept"),
        (("graft.place=in_place",), "expert", "kept"),
        (("training.optimizer=sgd",), "difference", "fresh"),
        (("graft.output=expert", "training.personal_moments=fresh"), "expert", "fresh"),
        (("method.name=local",), "expert", "fresh"),
        (("method.name=local", "graft.output=difference", "training.personal_moments=kept"), "difference", "kept"),
    ],
)
def test_flex_prefers_a_difference_and_kept_moments_where_they_are_possible(
    settings: tuple[str, ...], opens_to: str, moments: str
) -> None:
    config = parse_recipe("data.silos = {}", settings)
    method = make_method(config.method)
    assert config.graft.opens_to(method.opens_to) == opens_to
    assert config.training.moments(method.moments) == moments


def test_a_recorded_recipe_without_the_two_settings_is_of_a_version_that_had_the_papers_alone(
    tmp_path: Path,
) -> None:
    written = parse_recipe("data.silos = {}").to_toml()
    older = written.replace('output = "auto"\n', "").replace('personal_moments = "auto"\n', "")
    assert len(older.splitlines()) == len(written.splitlines()) - 2
    (tmp_path / "config.toml").write_text(older)
    papers = parse_recipe(written, ["graft.output=expert", "training.personal_moments=fresh"])
    assert recorded_recipe(tmp_path) == papers
    assert RunDirectory.open(tmp_path).config_toml == as_written_now(older) == papers.to_toml()
    assert recorded_recipe(tmp_path, ["graft.output=difference"]).graft.output == "difference"
    assert parse_recipe(older).to_toml() == as_written_now(written) == written
    assert parse_recipe(older).as_begun(recorded_recipe(tmp_path)) == papers


@pytest.mark.parametrize("section", ["graft", "training"])
def test_a_recorded_section_that_is_a_value_is_told_to_be_damaged(tmp_path: Path, section: str) -> None:
    (tmp_path / "config.toml").write_text(f"{section} = 3\ndata.silos = {{}}\n")
    with pytest.raises(ArtifactError, match=f"{section} = 3"):
        recorded_recipe(tmp_path)


def test_a_resumed_run_keeps_the_defaults_with_which_it_began() -> None:
    begun = parse_recipe("data.silos = {}", ["graft.output=expert", "training.personal_moments=fresh"])
    assert parse_recipe("data.silos = {}").as_begun(begun).to_toml() == begun.to_toml()
    own = parse_recipe("data.silos = {}", ["graft.output=difference"])
    assert own.as_begun(begun).graft.output == "difference"
