"""What `export` and `bench` take."""

from dataclasses import dataclass
from typing import Literal

from trimcli.errors import OptionError
from trimcli.options import RunOptions, option, positive

Form = Literal["csr", "semi-structured"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions(RunOptions):
    """The form to write. Semi-structured matrices are packed in the run's dtype."""

    to: Form = option(
        "csr", "csr: for the CPU, where a matrix is measured to be faster so. semi-structured: 2:4 for a CUDA GPU."
    )


@dataclass(frozen=True, kw_only=True)
class BenchOptions(RunOptions):
    """What to measure."""

    tokens: int = option(64, "Tokens of the prompt, and as many decoded after it.", check=positive)
    batch: tuple[int, ...] = option(
        (1, 4, 16), "Sequences at a time, each in turn, separated by commas.", check=positive
    )
    repeat: int = option(5, "Rounds; medians are shown.", check=positive)

    def check(self) -> None:
        """Raise OptionError for values that cannot be used."""
        super().check()
        if not self.batch:
            raise OptionError("--batch names no batch size; give at least one, such as 1,4,16.")
