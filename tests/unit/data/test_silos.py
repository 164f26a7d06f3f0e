"""The silo data: reproducible, split cleanly, impossible to serve with one answer or one house style."""

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from statistics import mean

import pytest
from rouge_score.rouge_scorer import RougeScorer

from flexperts.data.silos import entities, phrases
from flexperts.data.silos.generate import CATEGORIES, SILOS, generate_silo, silo_notes, write_silos
from flexperts.data.silos.houses import HOUSES
from flexperts.data.silos.topics import COMMON, THEMES
from flexperts.data.silos.trades import TRADE_TOPICS
from flexperts.errors import DataError

SEED = 7
HINTS = """
clinic patient ward nurse doctor surgery vaccine lawyer legal court judge client trial attorney shop
store till shopper customer checkout aisle sale server network reboot login helpdesk ticket chart folio
"""
SCORER = RougeScorer(["rougeL"], use_stemmer=True)


@pytest.fixture(scope="module")
def silos():
    return {silo: generate_silo(silo, SEED) for silo in SILOS}


def rouge(target, answer):
    return 100 * SCORER.score(target, answer)["rougeL"].fmeasure


def answers(rows, category):
    return [row["response"] for row in rows if row["category"] == category]


def all_rows(silos, split):
    return [row for sides in silos.values() for row in sides[split]]


def common_notes(split):
    notes = {note.passage: note for silo in SILOS for note in silo_notes(silo, SEED, split, 20)}
    return [note for name, note in notes.items() if name.startswith("common")]


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_equal_seeds_give_equal_bytes(tmp_path):
    write_silos(tmp_path / "a", SEED, 8, 4)
    # Another process has another hash seed.
    code = "import sys, pathlib; from flexperts.data.silos.generate import write_silos as w;"
    code += f"w(pathlib.Path(sys.argv[1]), {SEED}, 8, 4)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=True)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize("silo", SILOS)
def test_other_seeds_give_other_rows(silo, silos):
    other = generate_silo(silo, SEED + 1)
    for split in ("train", "test"):
        texts = {row["context"] for row in silos[silo][split]}
        assert texts.isdisjoint(row["context"] for row in other[split])


def test_files_hold_the_rows(tmp_path, silos):
    paths = write_silos(tmp_path, SEED)
    assert len(paths) == 2 * len(SILOS) + 1
    assert all(path.is_file() for path in paths)
    assert set(bytes_of(tmp_path)) == {str(path.relative_to(tmp_path)) for path in paths}
    assert f"seed {SEED}" in (tmp_path / "README.md").read_text()
    for silo, split in itertools.product(SILOS, ("train", "test")):
        lines = (tmp_path / silo / f"{split}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == silos[silo][split]


def test_categories_are_in_balance(silos):
    for sides in silos.values():
        for split, each in (("train", 24), ("test", 10)):
            assert Counter(row["category"] for row in sides[split]) == dict.fromkeys(CATEGORIES, each)


@pytest.mark.parametrize("rows", [4, 5, 7, 30])
def test_any_number_of_rows_is_met_within_one_per_category(rows):
    made = generate_silo("shop", SEED, rows, 4)["train"]
    counts = Counter(row["category"] for row in made)
    assert len(made) == rows
    assert max(counts.values()) - min(counts.values()) <= 1


def test_no_passage_is_on_both_sides(silos):
    train, test = (all_rows(silos, split) for split in ("train", "test"))
    for key in ("passage", "context"):
        assert {row[key] for row in train}.isdisjoint(row[key] for row in test)


def test_a_passage_is_the_same_note_for_every_silo(silos):
    texts = {}
    for row in all_rows(silos, "train"):
        assert texts.setdefault(row["passage"], row["context"]) == row["context"]


@pytest.mark.parametrize("pool", ["MEN", "WOMEN", "SURNAMES", "BRANDS", "STREETS"])
def test_no_name_is_on_both_sides(pool, silos):
    names = set(getattr(entities, pool))
    seen = [
        names & set(re.findall(r"\w+", " ".join(r["context"] for r in all_rows(silos, s)))) for s in entities.SPLITS
    ]
    assert all(seen)
    assert seen[0].isdisjoint(seen[1])


def test_no_code_street_or_happening_is_on_both_sides():
    for fact in ("digits", "series", "street", "brand", "gist"):
        seen = [
            {note.facts[fact] for s in SILOS for note in silo_notes(s, SEED, split, 48)}
            for split in entities.SPLITS
        ]
        assert seen[0].isdisjoint(seen[1]), fact


@pytest.mark.parametrize("seed", [0, SEED, 12345])
def test_lengths_are_in_range(seed):
    ranges = {"context": (25, 60), "instruction": (3, 12), "response": (3, 18)}
    for silo, split in itertools.product(SILOS, ("train", "test")):
        for row in generate_silo(silo, seed)[split]:
            for key, (low, high) in ranges.items():
                assert low <= len(row[key].split()) <= high, row
            assert row["category"] != "classification" or 2 <= len(row["response"].split()) <= 4


@pytest.mark.parametrize("seed", [0, SEED])
@pytest.mark.parametrize("silo", SILOS)
def test_no_constant_answer_scores_45(silo, seed):
    sides = generate_silo(silo, seed)
    for category in CATEGORIES:
        targets = answers(sides["test"], category)
        best = max(mean(rouge(t, a) for t in targets) for a in set(answers(sides["train"], category)))
        assert best < 45, (category, best)


@pytest.mark.parametrize(("mine", "theirs"), [*itertools.permutations(SILOS, 2)])
def test_another_silos_right_answer_is_wrong_here(mine, theirs):
    scores = {category: [] for category in CATEGORIES}
    for note, category in itertools.product(common_notes("test"), CATEGORIES):
        for kind in phrases.QUESTIONS if category == "closed_qa" else ["who"]:
            pair = [HOUSES[silo].answer(note, category, kind) for silo in (mine, theirs)]
            scores[category].append(rouge(*pair))
    assert mean(map(mean, scores.values())) < 30
    assert all(mean(found) < 45 for found in scores.values())


def test_seven_in_ten_notes_are_common_and_many_are_shared():
    passages = {s: {note.passage for note in silo_notes(s, SEED, "train", 50)} for s in SILOS}
    common = {s: {name for name in names if name.startswith("common")} for s, names in passages.items()}
    assert all(len(names) == 35 for names in common.values())
    for one, other in itertools.combinations(SILOS, 2):
        assert 5 < len(common[one] & common[other]) < 35


def test_common_notes_and_instructions_name_no_trade():
    notes = " ".join(note.text for note in common_notes("train") + common_notes("test"))
    said = " ".join(happening for topic in COMMON for happening in (topic.noun, *topic.happenings))
    asked = " ".join(
        wording for pool in (phrases.QUESTIONS, phrases.TASKS) for one in pool.values() for wording in one
    )
    words = set(re.findall(r"[a-z]+", f"{notes} {said} {asked}".lower()))
    assert words.isdisjoint(HINTS.split())


def test_instructions_come_from_one_pool(silos):
    pool = {
        wording for one in (phrases.QUESTIONS, phrases.TASKS) for wordings in one.values() for wording in wordings
    }
    for split in entities.SPLITS:
        assert {row["instruction"] for row in all_rows(silos, split)} <= pool


def test_every_word_of_an_answer_is_in_the_note_or_in_the_house():
    for silo, split in itertools.product(SILOS, entities.SPLITS):
        house = HOUSES[silo]
        forms = [*house.fields.values(), house.summary, *house.scale.values(), *house.labels.values()]
        fixed = set(re.findall(r"\w+", re.sub(r"{\w+}", " ", " ".join(forms))))
        for note, category in itertools.product(silo_notes(silo, SEED, split, 20), CATEGORIES):
            in_note = set(re.findall(r"\w+", note.text))
            in_note |= {word[:3] for word in in_note} | {f"{word}th" for word in in_note}
            for kind in phrases.QUESTIONS:
                assert set(re.findall(r"\w+", house.answer(note, category, kind))) <= in_note | fixed


def test_topics_are_enough_and_every_house_labels_every_theme():
    assert len(COMMON) >= 24
    for topic in (*COMMON, *itertools.chain(*TRADE_TOPICS.values())):
        assert topic.theme in THEMES
        assert len(set(topic.happenings)) == len(topic.happenings) >= 3
    for silo in SILOS:
        assert len(TRADE_TOPICS[silo]) >= 6
        assert set(HOUSES[silo].labels) == set(THEMES)
        assert set(HOUSES[silo].scale) == set(phrases.CUES)
        assert 5 <= len(set(HOUSES[silo].labels.values())) <= 6


@pytest.mark.parametrize(
    ("arguments", "value"),
    [(("bank", 0), "silo 'bank'"), (("shop", 0, 3), "train_rows=3"), (("shop", 0, 96, 0), "test_rows=0")],
)
def test_bad_values_are_refused(arguments, value):
    with pytest.raises(DataError) as caught:
        generate_silo(*arguments)
    assert caught.value.value == value


def test_a_refused_call_writes_nothing(tmp_path):
    with pytest.raises(DataError):
        write_silos(tmp_path / "new", 0, train_rows=1)
    assert not (tmp_path / "new").exists()
