"""The command line, the agents and what a person sees of a run."""
