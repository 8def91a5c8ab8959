"""Work as data: ops, routes and lanes, and all who read them. Needs no torch."""
