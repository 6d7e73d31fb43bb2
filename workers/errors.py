"""What a worker says when the user's input cannot be used."""


class InputError(ValueError):
    """A value the user gave is wrong; the message names it and says what to do. ``pipeline/cli.py`` prints it."""
