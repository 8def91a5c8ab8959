"""What fictitious authors are made of: syllables of names, and what one may do, write, win and call a book."""

from __future__ import annotations

OPENINGS = (
    "Ba", "Ce", "Da", "Ei", "Fa", "Go", "Hu", "Io", "Ja", "Ke", "Lu", "Ma", "Ne", "Or", "Pe", "Ro", "Si", "Ta", "Ul",
    "Va", "We", "Xa", "Yo", "Ze",
)  # fmt: skip
MIDDLES = (
    "ba", "ce", "da", "fi", "go", "ka", "lo", "me", "ni", "pu", "ri", "so", "ta", "vu", "ze", "lla", "nte", "rru",
)  # fmt: skip
FIRST_ENDS = (
    "ra", "nel", "dis", "mo", "lian", "tes", "vi", "rek", "sha", "bin", "na", "los",
)  # fmt: skip
LAST_ENDS = (
    "dor", "wick", "mann", "escu", "var", "lund", "ard", "ovic", "sson", "tani", "ero", "ley", "quist", "mir",
)  # fmt: skip
PLACE_ENDS = (
    "burg", "haven", "stad", "mouth", "polis", "ford", "bad", "grad",
)  # fmt: skip
GENRES = (
    "historical fiction", "crime fiction", "science fiction", "poetry", "travel writing", "fantasy", "satire",
    "horror", "romance", "memoir", "children's books", "plays", "spy thrillers", "essays on nature", "short stories",
    "epic sagas",
)  # fmt: skip
JOBS = (
    "a baker", "a surgeon", "a lighthouse keeper", "a judge", "a carpenter", "a pilot", "a botanist", "a tailor",
    "a librarian", "a miner", "an architect", "a violinist", "a fisher", "a chemist", "a postal clerk", "a farmer",
    "a watchmaker", "a nurse", "a translator", "a sculptor", "an astronomer", "a bus driver", "a potter",
    "a diplomat", "a beekeeper", "a locksmith", "a dentist", "a geologist",
)  # fmt: skip
AWARDS = (
    "Silver Quill", "Harbour Prize", "Lantern Medal", "Golden Margin", "Northern Laurel", "Inkwell Award",
    "Meridian Prize", "Amber Page", "Glass Feather", "Orchard Medal", "Winter Wreath", "Compass Award", "Paper Crown",
    "Blue Folio",
)  # fmt: skip
THEMES = (
    "a family that loses its vineyard", "a map that changes every night", "two sisters who cross a desert",
    "a clerk who forges a will", "the last winter of a mining town", "a ship that never lands",
    "a choir that is forbidden to sing", "an heir who hides among servants", "a flood and those who stayed",
    "a detective who cannot sleep", "a garden on the moon", "the trial of an innocent teacher",
    "a friendship across a closed border", "a clockmaker who stops the time", "a wolf raised in a palace",
    "letters that arrive forty years late", "an island ruled by children", "a painter who goes blind",
    "a bridge that nobody dares to build", "a king who wants to be forgotten",
)  # fmt: skip
KINDS = (
    "Silent", "Crimson", "Borrowed", "Hollow", "Distant", "Broken", "Gilded", "Hidden", "Restless", "Pale", "Burning",
    "Forgotten", "Narrow", "Salted", "Velvet", "Iron", "Drifting", "Lonely", "Second",
)  # fmt: skip
THINGS = (
    "River", "Mirror", "Orchard", "Lantern", "Harbour", "Winter", "Garden", "Compass", "Tower", "Letter", "Shadow",
    "Bridge", "Island", "Cathedral", "Forest", "Clock", "Meadow", "Violin", "Border", "Throne", "Well", "Feather",
    "Valley", "Storm",
)  # fmt: skip
