"""The store where the processes of a run meet: a table of keys behind a handshake, and torch's interface to it.

    handshake.py   both ends prove that they know the run's token; what a stranger sends is never parsed
    frames.py      what they say after that: sealed, counted, of bounded length
    table.py       the keys and what may be done with them
    server.py      one loop that looks after all connections
    hosting.py     that loop in a process of its own, which ends with the one that has started it
    client.py      a `torch.distributed.Store`

Only `client.py` needs torch.
"""
