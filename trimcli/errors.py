"""Every error a user can meet, as one tree.

    TrimError                exit 1  the run failed on its way
    |- HubError              exit 1  a model or data hub could not be reached
    |- ResourceError         exit 1  disk full, out of memory
    |- CheckFailed           exit 1  `verify` found something that does not hold
    `- UsageError            exit 2  nothing could be started
       |- OptionError        exit 2  the command line: a value or a combination
       |- InputError         exit 2  a file: missing, damaged, unreadable, NaN or infinite weights
       |- MismatchError      exit 2  a file belongs to another model, calibration or schema
       `- OutputExists       exit 2  an output is there already and --force was not given

The message is one sentence that names the value, the file and the way out. Only the command line turns
these into exit statuses (`trimcli.cli.app`); library callers catch the classes.
"""


class TrimError(Exception):
    """The run failed on its way. Base of everything `trimcli` raises on purpose."""

    exit_status = 1


class HubError(TrimError):
    """A hub (models or data sets) could not be reached."""


class ResourceError(TrimError):
    """The machine ran out of something: disk, memory."""


class CheckFailed(TrimError):
    """A verification ran and did not hold."""


class UsageError(TrimError):
    """The command line, an input file or a combination is not usable."""

    exit_status = 2


class OptionError(UsageError):
    """An option's value, or a combination of options, is not usable."""


class InputError(UsageError):
    """An input file is missing, damaged or holds unusable values."""


class MismatchError(UsageError):
    """An input file belongs to another model, another calibration or an unknown schema."""


class OutputExists(UsageError):
    """An output exists and may not be replaced."""


def first_line(problem: Exception) -> str:
    """What another library's error says, in one line."""
    return next(iter(str(problem).strip().splitlines()), "").rstrip(".") or type(problem).__name__
