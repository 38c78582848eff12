"""The one exception that people are meant to read."""


class InputError(Exception):
    """Something the person running the program can mend.

    The message is one line: the file or setting, what is wrong with it, what to do. `main` prints
    it without a traceback and exits with a code that is not zero.
    """


class Stopped(Exception):
    """A run was asked to stop (Ctrl-C, SIGTERM) and has saved what it needs to go on."""
