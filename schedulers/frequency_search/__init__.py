"""The search of `schedulers.frequency`: the critical path of a simulated step, a convex programme, whole steps."""
