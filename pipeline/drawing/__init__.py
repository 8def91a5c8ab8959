"""A timeline or a network as a picture."""
