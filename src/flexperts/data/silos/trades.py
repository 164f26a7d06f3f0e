"""Topics and asides that occur in the notes of one silo only."""

from __future__ import annotations

from flexperts.data.silos.topics import Topic, topics

TRADE_TOPICS: dict[str, tuple[Topic, ...]] = {
    "clinic": (
        *topics("device", wheelchair="has a flat tyre/pulls to the left/squeaks on the ward/lost a brake pad"),
        *topics("access", cabinet="will not unlock for the nurse/was left open overnight/needs a new code"),
        *topics("building", sink="is blocked in the treatment room/drips beside the bed/runs only cold"),
        *topics("delivery", vaccine="came in too warm/is missing from the cool box/went to another ward"),
        *topics("billing", prescription="was billed to the wrong patient/was charged in full/has no co payment"),
        *topics("schedule", checkup="has to be moved/clashes with the surgery/needs a fasting patient"),
        *topics("people", midwife="calmed a worried patient/was short with a patient/forgot the dressing"),
    ),
    "help_desk": (
        *topics("device", router="drops the network/restarts every hour/blinks red/loses all packets"),
        *topics("access", login="fails after the update/asks for a second token/loops back to the form"),
        *topics("building", rack="stands in a damp cellar/gets too hot in summer/has a loose floor plate"),
        *topics("delivery", monitor="was shipped without cables/is late from the depot/came with the wrong stand"),
        *topics(
            "billing",
            licence="was renewed twice/costs more than the contract says/was paid by the wrong team",
        ),
        *topics("schedule", upgrade="must run after midnight/clashes with the backup/needs a later window"),
        *topics("people", engineer="solved the outage quickly/closed the ticket too soon/was curt on the chat"),
    ),
    "law_firm": (
        *topics("device", dictaphone="swallowed the statement/records only noise/stops during dictation"),
        *topics("access", archive="is closed to the trainee lawyer/refuses the associate/needs a partner key"),
        *topics("building", courtroom="has a dripping roof/is far too cold/lacks working lights"),
        *topics("delivery", affidavit="has not reached the court/was served too late/got lost with the bailiff"),
        *topics("billing", retainer="was invoiced twice/is used up/does not cover the appeal"),
        *topics("schedule", hearing="was moved by the judge/clashes with the trial/needs a new date"),
        *topics("people", notary="was polite to the witness/kept the parties waiting/lectured the claimant"),
    ),
    "shop": (
        *topics("device", scanner="misses every second barcode/beeps without reason/freezes at the checkout"),
        *topics("access", shutter="does not unlock in the morning/needs a spare key/jams when we close"),
        *topics("building", freezer="leaks into the aisle/ices up the shelf/lets the floor get wet"),
        *topics("delivery", stock="is short by one box/came in the wrong size/sits at the loading bay"),
        *topics("billing", voucher="was not taken off the bill/was refused at checkout/shows the wrong value"),
        *topics("schedule", fitting="must be moved to the evening/clashes with the sale/needs a longer slot"),
        *topics("people", cashier="was rude to a shopper/gave great advice/argued over the change"),
    ),
}

TRADE_ASIDES: dict[str, tuple[str, ...]] = {
    "clinic": (
        "The doctor on the ward has seen it.",
        "Two patients in the waiting room asked as well.",
        "The nurse wrote it on the ward board.",
        "Surgery hours go on as planned.",
    ),
    "help_desk": (
        "The server room team has been told.",
        "A reboot did not change anything.",
        "Other users on the network are fine.",
        "The chat bot could not close it.",
    ),
    "law_firm": (
        "Opposing counsel has been informed.",
        "The trial bundle is not affected.",
        "A paralegal put it in the case file.",
        "The judge has not asked for it.",
    ),
    "shop": (
        "The checkout team has been told.",
        "Shoppers in the next aisle noticed it too.",
        "The sale goes on as planned.",
        "The stockroom shelf is marked.",
    ),
}
