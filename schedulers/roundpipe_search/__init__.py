"""RoundPipe's parts: the problem, the clock that times slots as they are dealt, the search for a cut."""
