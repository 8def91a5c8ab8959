"""The engine: one schedule, five readers, and the worker that runs it."""
