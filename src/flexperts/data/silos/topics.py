"""Topics of everyday office notes: nouns, and what happened to them.

A happening is a verb phrase that follows its noun. The last one of a topic is kept for test notes.
"""

from __future__ import annotations

from typing import NamedTuple

# Notes use the themes in this order; it keeps themes with the same house label apart in a short test split.
THEMES = ("schedule", "device", "people", "access", "billing", "delivery", "building")


class Topic(NamedTuple):
    """One thing that a note can be about.

    Args:
        theme: One of THEMES; every house derives a label from it.
        noun: The word for the thing, always written after a brand.
        happenings: Verb phrases that can follow the noun.
    """

    theme: str
    noun: str
    happenings: tuple[str, ...]


def topics(theme: str, **said: str) -> tuple[Topic, ...]:
    """Return the topics of one theme from noun=happenings pairs, with happenings separated by slashes."""
    return tuple(Topic(theme, noun, tuple(map(str.strip, text.split("/")))) for noun, text in said.items())


COMMON = (
    *topics(
        "device",
        printer="jams on every page/prints only blank sheets/makes a grinding noise/smears all the ink",
        laptop="will not switch on/overheats quickly/has a cracked screen/shuts down without warning",
        projector="shows a green picture/flickers all the time/has a burnt bulb/stays completely dark",
        headset="crackles during calls/has no sound left/lost its microphone/only works on one ear",
    ),
    *topics(
        "access",
        key="went missing after lunch/was lost in the corridor/no longer turns/broke off in the lock",
        badge="is refused at the gate/does not open the door/fell out of a pocket/has expired overnight",
        password="was forgotten again/stopped working/has been locked out/is rejected every time",
        account="is missing for a new starter/was never opened/lacks permissions/needs a second user",
    ),
    *topics(
        "building",
        pipe="leaks under the sink/drips onto the carpet/has burst/floods the hallway",
        heater="stays cold/smells of burning/blows only cold air/rattles all night",
        lamp="keeps going out/hangs loose from the ceiling/buzzes loudly/needs a new bulb",
        lift="is stuck between floors/does not close its doors/shakes on the way up/stops at the wrong floor",
    ),
    *topics(
        "delivery",
        parcel="has not arrived/was left in the rain/came a day late/went to the wrong address",
        pallet="came with torn wrapping/is two boxes short/blocks the entrance/was unloaded at the back",
        crate="arrived half empty/was damaged on the road/is still on the truck/holds the wrong things",
        envelope="got lost on the way/arrived already open/was sent back/is waiting for collection",
    ),
    *topics(
        "billing",
        invoice="lists the wrong amount/was charged twice/shows an old address/does not match the agreed sum",
        refund="has not been paid/is lower than promised/went to a closed account/was booked as a charge",
        quote="is out of date/leaves out the tax/looks far too high/adds up to the wrong total",
        deposit="was never returned/does not show on the statement/was paid too early/is missing its receipt",
    ),
    *topics(
        "schedule",
        appointment="must move to the afternoon/clashes with another/was cancelled/needs a later start",
        booking="was made for too few people/is not in the calendar/needs one more night/fell on a holiday",
        meeting="has to start earlier/was planned without a room/should be moved online/overlaps with lunch",
        course="is already full/was put off again/needs a new time/lost two of its sessions",
    ),
    *topics(
        "people",
        driver="was rude at the door/deserves a thank you/shouted at a colleague/ignored every question",
        cleaner="did a wonderful job/skipped the kitchen/never greets anybody/left a kind message",
        guard="was very helpful/fell asleep on duty/sent visitors away/spoke in an unfriendly tone",
        trainer="explained everything well/came unprepared/upset the group/was kind to beginners",
    ),
)
