"""A run of the control plane under a virtual clock: the production code of coordinator, agents, members, votes, moves
and the training loop, over a simulated store, network, processes and disk, drawn from one seed.

    python -m tests.simulation --seed 17            # replay one run, and print what happened
    python -m tests.simulation --seeds 100000       # many; prints the command that replays a failure

One actor runs at a time and hands on wherever the real thing would wait or talk: the store (each call takes its time,
so that calls of different actors change places), sleep, start of a process. What is simulated: time, store, links and
groups, processes, compute (a layer's state is one number that each step turns into another) and the checkpoints' disk.
Faults: SIGKILL at any such moment, SIGSTOP for a while, a machine that is gone with its agent, a slow store.

Checked: a step is committed on all or on none; every committed step is made of the one before it, in order, without a
gap or a repetition but for those that a rollback announces; holders of a layer are equal; the ledger has every step
once; the states at the end are those of a calm run; the run ends well or by a named error before its deadline.
"""
