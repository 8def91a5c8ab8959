"""Unlearning: requests to forget rows of a run's data, as jobs of the same engine."""
