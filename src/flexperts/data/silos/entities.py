"""The names that a note can contain; train notes use the even half of every pool, test notes the odd half."""

from __future__ import annotations

from collections.abc import Sequence

SPLITS = ("train", "test")


def word_pool(text: str) -> tuple[str, ...]:
    """Return the words of a block of text, as a pool."""
    return tuple(text.split())


# "Mr" is there twice and every other title once, so that no title is right more than two times in five.
TITLES = ("Mr", "Mr", "Ms", "Mrs", "Miss")
WOMEN = word_pool(
    """
    Anna Bella Carla Dora Elena Freya Gina Hanna Irina Julia Karin Lydia Marta Nadia Olga Paula
    Rita Sonia Tara Ursula Vera Wanda Yasmin Zoe
    """
)
MEN = word_pool(
    """
    Adam Boris Colin David Emil Felix Gerald Hugo Ivan Jonas Kevin Leon Martin Nico Oscar Pedro
    Rafael Simon Tomas Ulrich Victor Walter Xavier Yusuf
    """
)
SURNAMES = word_pool(
    """
    Keller Reyes Bauer Novak Jensen Moretti Dubois Lindqvist Kowalski Haddad Okafor Tanaka Silva
    Petrov Murphy Castillo Nielsen Fischer Romero Ivanova Baker Nguyen Schmidt Laurent Ortega Patel
    Vargas Weber Yilmaz Zeman Abbott Brandt Corbett Dalton Egan Farrell Gibbs Horvath Ibrahim Jansen
    Kimura Larsen Mendez Norris Osborne Pereira Quinn Rossi
    """
)
BRANDS = word_pool(
    """
    Norvik Talbero Quenta Maxilor Brisco Velmara Ostrum Pelican Zentrix Cadera Lumora Fenwick
    Halcor Ridano Tesmark Uvalin Sorvex Arbelo Dunmore Jaspero Kelvora Minstra Ondaro Parvex
    Selkirk Tormund Vantoro Wexley Yandor Zubrin Alcanto Bexford Corvina Delphis Embrano Falmora
    Gantrix Hespera Ivoran Jolaris Kestrim Lorvane Mandrel Nexaro Orvello Plinth Quorva Rostane
    """
)
STREETS = word_pool(
    """
    Harbour Chestnut Windmill Orchard Willow Granite Meadow Copper Linden Falcon Abbey Bishop Cedar
    Dover Elm Foundry Garnet Heron Ivy Juniper Kings Lantern Maple Nettle Olive Poplar Quarry Raven
    Saddler Tanner Vine Weaver
    """
)
STREET_KINDS = ("Lane", "Road", "Street", "Square", "Hill", "Row", "Avenue", "Way")
# May is left out: "may" is also a verb, and it is the one month with no shorter form.
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
# Only days whose ordinal ends in "th", so that writing an ordinal is one rule.
DAYS = (*range(4, 21), *range(24, 31))
LETTERS = "BCDFGHJKLMNPRSTVWZ"


def half(pool: Sequence[str], split: str) -> list[str]:
    """Return the part of a pool that one split may use."""
    return list(pool[SPLITS.index(split) :: 2])


def code_numbers(split: str) -> range:
    """Return the numbers that a reference code may have in one split."""
    return range(1100, 5500) if split == "train" else range(5500, 9900)
