"""RoundPipe's parts: the problem, the clock that times units as they are dealt, the search for a cut."""
