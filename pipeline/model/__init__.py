"""A transformers model as layers that can be built, placed and run apart from each other."""
