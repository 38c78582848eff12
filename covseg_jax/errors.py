"""The exceptions that people are meant to read."""

import os
import pathlib


class InputError(Exception):
    """Something the person running the program can mend.

    The message is one line: the file or setting, what is wrong with it, what to do. `main` prints
    it without a traceback and exits with a code that is not zero.
    """


class FileFault(InputError):
    """One file that cannot be used, what is wrong with it, and what to do about it. The message
    gives its name without its folder."""

    def __init__(self, file: str | os.PathLike, fault: str, remedy: str):
        super().__init__(file, fault, remedy)
        self.file = pathlib.Path(file)
        self.fault = fault
        self.remedy = remedy

    def __str__(self) -> str:
        return f'{self.file.name}: {self.fault}; {self.remedy}'


GO_ON = 'run the same command again to go on'


class Stopped(Exception):
    """A run was asked to stop (Ctrl-C, SIGTERM) and has saved what it needs to go on.

    The message is one line that says how. A training that stops is no failure; what stops with its
    result half there is one, and the program's exit code says so.
    """

    def __init__(self, message: str, exit_code: int = 0):
        super().__init__(message)
        self.exit_code = exit_code


def one_line(error: BaseException) -> str:
    """What an exception says to a person; of a full or read-only disk, or a folder where a file
    should be, the file and the fault."""
    if isinstance(error, OSError):
        return f'{error.filename or "disk"}: {error.strerror or error}'
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if isinstance(error, InputError) else f'{type(error).__name__}: {lines[0]}'
