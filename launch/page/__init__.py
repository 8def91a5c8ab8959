"""The report of a run: one page that needs nothing else, from the files that the run leaves."""
