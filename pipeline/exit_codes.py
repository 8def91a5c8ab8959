"""The exit codes of the command, which schedulers of clusters act upon."""

ERROR = 1
"""The run, or the command, has failed; what it says may be mended."""
USAGE = 2
"""It was asked for something that does not exist or does not fit."""
STOPPED = 75
"""The run has saved itself before its end, or had not begun: put it into the queue again (EX_TEMPFAIL)."""
GIVE_UP = 93
"""The run would end the same way if it were started again: do not put it into the queue."""


def exit_code(error: BaseException) -> int:
    """That of a command which an error has ended: the error's own `code` where it has one."""
    return USAGE if isinstance(error, ValueError) else getattr(error, "code", ERROR)
