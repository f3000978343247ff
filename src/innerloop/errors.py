"""What can go wrong, by name; the command turns each into one line."""


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line that names the cure."""


class Diverged(ArithmeticError):
    """The loss or the meta-gradient of a step is infinite or not a number."""


class Failed(RuntimeError):
    """A process that measured or trained did not end well; the message is its last line."""
