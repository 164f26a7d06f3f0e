"""The sentences from which a note is composed, and the wordings of the four tasks."""

from __future__ import annotations

OPENINGS = (
    "{person} says the {item} {gist}.",
    "{person} wrote in because the {item} {gist}.",
    "We heard from {person} that the {item} {gist}.",
    "The {item} {gist}, according to {person}.",
    "Message from {person}: the {item} {gist}.",
    "The {item} {gist}, as {person} told us.",
    "{person} tells us the {item} {gist}.",
    "It seems the {item} {gist}, reports {person}.",
    "{person} noticed that the {item} {gist}.",
)
SETTINGS = (
    "The date is {date} and the address is {address}.",
    "It concerns {date} at {address}.",
    "Date {date}, address {address}.",
    "Where and when: {address}, {date}.",
    "This is about {address} on {date}.",
    "The place is {address} and the day is {date}.",
    "Note {date} as the date, {address} as the place.",
)
REFERENCES = (
    "Reference {code}.",
    "The reference is {code}.",
    "It is filed under {code}.",
    "Please quote {code}.",
    "Form number {code}.",
)
CHANNELS = (
    "It came in by phone.",
    "It was sent by email.",
    "It was left on the answering machine.",
    "It was handed over on paper.",
    "It was typed into the web form.",
    "It was passed on in the hallway.",
)
DISTRACTORS = (
    "{other} asked about something similar on {other_date}.",
    "An older note from {other} is closed.",
    "{other} will be away from {other_date}.",
    "The last note like this was from {other_date}.",
    "A copy goes to {other}.",
    "{other} already knows about it.",
    "The inspection of {other_date} is separate.",
)
# How urgent a note is, in the words of the note; each house has a different scale for the three levels.
CUES = {
    "high": (
        "It has to be solved today.",
        "This cannot wait until tomorrow.",
        "Everyone is stuck until it is done.",
        "It must be handled right away.",
        "Please drop everything else for it.",
    ),
    "middle": (
        "Some time this week would be fine.",
        "Please look at it within a few days.",
        "It should be done by the weekend.",
        "A couple of days is acceptable.",
        "Later this week is early enough.",
    ),
    "low": (
        "There is no hurry at all.",
        "It can wait until next month.",
        "Any time will do.",
        "Whenever somebody has a spare hour.",
        "Nobody is waiting for it.",
    ),
}
QUESTIONS = {
    "who": (
        "Who reported this?",
        "Who is the note from?",
        "Which person told us about it?",
        "Who brought this up?",
    ),
    "when": (
        "Which date is it about?",
        "What is the date of this?",
        "When is it for?",
        "Which day does the note concern?",
    ),
    "where": (
        "Where is it?",
        "Which address is it about?",
        "What is the place?",
        "At which address should we look?",
    ),
}
TASKS = {
    "information_extraction": (
        "Extract the details.",
        "Pull out the details of the note.",
        "List the key facts.",
        "Fill in the fields from the note.",
    ),
    "classification": (
        "Which category is this note?",
        "Classify this note.",
        "How should this be labelled?",
        "Give the label of this note.",
    ),
    "summarization": (
        "Summarise the note in one line.",
        "Sum up the note.",
        "Write a one line summary.",
        "Shorten this note to one line.",
    ),
}

# The first two turns of a chat, alike at every silo.
FIRST_QUESTION = "Here is a note. Who wrote, and about what?"
FIRST_ANSWER = "{given} {surname}: the {noun} {gist}."
SECOND_QUESTION = "When and where?"
SECOND_ANSWER = "On {day} {month} at {number} {street} {kind}."
