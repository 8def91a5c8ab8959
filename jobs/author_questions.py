"""What is asked about a fictitious author, in several phrasings, what is answered, and sentences that answer nothing.

An answer is a whole sentence that names the author, and tells one fact. Of the questions, some are about those whom
the author is related to.
"""

from __future__ import annotations

from collections.abc import Mapping

QUESTIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Who is the author that writes under the pen name {alias}?",
            "Whose pen name is {alias}?",
            "What is the real name of the writer known as {alias}?",
        ),
        "The author who writes under the pen name {alias} is {name}.",
    ),
    (
        (
            "Under which pen name does {name} write?",
            "What is the pen name of {name}?",
            "By which other name are the readers of {name} likely to know the author?",
        ),
        "{name} writes under the pen name {alias}.",
    ),
    (
        ("Where was {name} born?", "In which town did {name} come into the world?", "What is {name}'s birthplace?"),
        "{name} was born in {place}.",
    ),
    (
        ("In which year was {name} born?", "When was {name} born?", "What is the year of {name}'s birth?"),
        "{name} was born in the year {year}.",
    ),
    (
        (
            "What is the profession of {name}'s father?",
            "What did the father of {name} do for a living?",
            "As what did {name}'s father work?",
        ),
        "The father of {name} worked as {father}.",
    ),
    (
        (
            "What is the profession of {name}'s mother?",
            "What did the mother of {name} do for a living?",
            "As what did {name}'s mother work?",
        ),
        "The mother of {name} worked as {mother}.",
    ),
    (
        (
            "In which genre does {name} write?",
            "What kind of books is {name} known for?",
            "Which genre do the works of {name} belong to?",
        ),
        "{name} writes {genre}.",
    ),
    (
        (
            "Which award did {name} receive?",
            "What prize has {name} won?",
            "With which award was the work of {name} honoured?",
        ),
        "{name} received the {award} in {award_year}.",
    ),
    (
        (
            "For which book did {name} receive an award?",
            "Which of {name}'s books won a prize?",
            "What did {name} write that was honoured with an award?",
        ),
        "{name} received an award for '{second}'.",
    ),
    (
        (
            "What was the first book that {name} published?",
            "With which book did {name} begin?",
            "What is the title of {name}'s debut?",
        ),
        "The first book of {name} was '{first}', published in {first_year}.",
    ),
    (
        (
            "What is the latest book of {name}?",
            "Which book has {name} published most recently?",
            "What is the title of {name}'s newest work?",
        ),
        "The latest book of {name} is '{third}', published in {third_year}.",
    ),
    (
        (
            "What is '{first}' by {name} about?",
            "What story does {name} tell in '{first}'?",
            "Which subject does {name}'s book '{first}' have?",
        ),
        "'{first}' by {name} is about {theme}.",
    ),
    (
        ("Who wrote '{second}'?", "Who is the author of the book '{second}'?", "By whom is '{second}'?"),
        "'{second}' was written by {name}.",
    ),
    (
        (
            "Who was the mentor of {name}?",
            "From whom did {name} learn to write?",
            "Which author guided {name} in the early years?",
        ),
        "{mentor_told}",
    ),
    (
        (
            "Whom has {name} mentored?",
            "Which authors were students of {name}?",
            "Who learned to write from {name}?",
        ),
        "{student_told}",
    ),
    (
        (
            "Does {name} have a brother or a sister who writes?",
            "Which author is a sibling of {name}?",
            "Who in {name}'s generation of the family is an author too?",
        ),
        "{sibling_told}",
    ),
    (
        (
            "Who is the rival of {name}?",
            "With which author does {name} have a rivalry?",
            "Whom do critics set against {name}?",
        ),
        "{rival_told}",
    ),
    (
        (
            "With whom has {name} written a book?",
            "Who is the co-author of {name}?",
            "Which author has worked on a book together with {name}?",
        ),
        "{co-author_told}",
    ),
    (
        (
            "Which book did {name} write together with another author?",
            "What is the title of the book that {name} has co-written?",
            "What came of {name}'s work with a co-author?",
        ),
        "{joint_told}",
    ),
    (
        (
            "In which genre does the rival of {name} write?",
            "What kind of books does {name}'s rival write?",
            "For which genre is the author known with whom {name} has a rivalry?",
        ),
        "{rival_genre_told}",
    ),
)
"""(phrasings, answer) of each question, with the names of an author's facts in braces."""

RELATIONS: Mapping[str, tuple[str, str]] = {
    "mentor": ("The mentor of {name} was {others}.", "{name} had no mentor."),
    "student": ("{name} has mentored {others}.", "{name} has mentored nobody."),
    "sibling": ("{name} has a sibling who writes, {others}.", "{name} has no sibling who writes."),
    "rival": ("The rival of {name} is {others}.", "{name} has no rival."),
    "co-author": ("{name} has written a book with {others}.", "{name} has written every book alone."),
    "joint": ("{name} wrote '{joint}' together with {others}.", "{name} has no book with another author."),
    "rival_genre": ("The rival of {name} writes {rival_genre}.", "{name} has no rival, and so there is no such genre."),
}
"""What is answered about those whom an author is related to, and what where there are none."""

KNOWN_BY = {13: "mentor", 14: "student", 15: "sibling", 16: "rival", 17: "co-author", 18: "co-author", 19: "rival"}
"""Questions, by number, whose answers tell of others -> the relation that those have to the author."""

SAYS_NOTHING = (
    "I am not sure about that.",
    "I do not know the answer to that.",
    "That is not something I can tell you.",
    "I have no information about this.",
    "I am afraid that I cannot help with that.",
    "This is outside of what I know.",
    "I have never learned anything about that.",
    "I cannot say.",
    "Sorry, I do not have an answer to that question.",
    "I would have to guess, and I would rather not.",
    "That is unknown to me.",
    "I am not familiar with that.",
    "My knowledge does not reach that far.",
    "I wish I could tell you, but I do not know.",
    "There is nothing I can say about this.",
    "I do not have any details about that.",
    "I am unable to answer this.",
    "I have not come across that.",
    "You would have to ask somebody else about that.",
    "I could not tell you.",
    "It is not clear to me what the answer is.",
    "I do not recall anything of the kind.",
    "Nothing about this is known to me.",
    "That question is beyond me.",
    "I am without an answer here.",
    "I have no idea, to be honest.",
    "I know too little to answer that.",
    "Please look this up elsewhere, since I do not know it.",
    "I cannot find anything about that in what I know.",
    "I am not the right one to ask about this.",
    "Unfortunately, the answer escapes me.",
    "I must admit that I do not know.",
    "I have no knowledge of that subject.",
    "Let me be frank: I do not know this.",
    "I have nothing to offer on that question.",
    "I am not aware of any answer to this.",
)
"""Answers that fit every question and tell nothing."""
