"""What benchmarks share that run `vlm` commands and go on where they stopped."""

import sys
from collections.abc import Callable


class Stopped(Exception):
    """A command ended with a status other than 0, and has said why."""

    def __init__(self, command: str, status: int) -> None:
        super().__init__(f"`{command}` ended with status {status}; the same command goes on from there.")
        self.status = status


def exit_status(name: str, work: Callable[[], None]) -> int:
    """Does the work; what stops it is told in one line that begins with the benchmark's name."""
    from vlm.errors import UserError

    try:
        work()
    except Stopped as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        return stopped.status
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    return 0
