"""The methods, one a file: what each minimises, on which kinds of microbatches, with its formula and its source."""
