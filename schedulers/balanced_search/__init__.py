"""Balanced's parts: layers cut into pieces that neighbours share, compiled lanes, the search for a dealing."""
