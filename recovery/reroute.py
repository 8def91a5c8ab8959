"""Around what is lost: microbatches take other routes, over replicas or past a stage that nobody holds.

Training goes on at once, over the workers that are left, while a replacement is started; once that is ready it joins
at the end of a step, as under redundant computation, and its state comes from a replica, or from a remedy. What the
routes are, a planner says, which recovery is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from pipeline.schedule.layout import Layout

Planner = Callable[[Collection[int]], Layout]
"""The places that have workers -> the layout over them. Raises CannotRestore."""
