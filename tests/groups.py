"""Groups of processes, forked from that of the test: none has to load torch again."""

import multiprocessing
import os
import socket
from collections.abc import Callable


def together(count: int, work: Callable[[], None]) -> list[int | None]:
    """Let so many processes do ``work``, with the environment that ``torchrun`` gives them: their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def begin(rank: int) -> None:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        work()

    members = [multiprocessing.get_context("fork").Process(target=begin, args=(rank,)) for rank in range(count)]
    for member in members:
        member.start()
    for member in members:
        member.join(120)
        member.kill()
    return [member.exitcode for member in members]
