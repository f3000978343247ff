"""What can go wrong, by name; the command turns each into one line."""


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line that names the cure."""


class Diverged(ArithmeticError):
    """The loss or the meta-gradient of a step is infinite or not a number."""


class Failed(RuntimeError):
    """A process that measured or trained did not end well; the message is its last line."""


class BadData(ValueError):
    """Data that cannot be learned from; the message names the set, the task and the cure."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to stop.

    Attributes:
        number: of the signal; the command ends with 128 more, as shells count.
        message: one line, such as how to go on.
    """

    def __init__(self, number: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.number, self.message = number, message
