"""The command line in this process, and what tests read from the files it leaves."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from trimcli.cli.app import app

COMPUTE = ("--device", "cpu", "--dtype", "float32")


@dataclass(frozen=True)
class Done:
    """What a command left: exit status, stdout and stderr."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


def trim(*args: object, stdin: bytes | None = None) -> Done:
    """Run `trim` with these arguments."""
    found = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return Done(found.exit_code, found.stdout, found.stderr)


def trim_json(*args: object, stdin: bytes | None = None) -> Any:
    """Run `trim` with --json; the run must succeed. Returns the document."""
    done = trim(*args, "--json", stdin=stdin)
    assert done.status == 0, done.err
    return done.document


def save_tokens(path: Path, *, vocabulary: int, nsamples: int = 4, seqlen: int = 16, seed: int = 0) -> Path:
    """A tokens file of random samples, int32 [nsamples, seqlen]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, vocabulary, (nsamples, seqlen), generator=generator, dtype=torch.int32)
    save_file({"tokens": tokens}, path)
    return path


def tree(directory: Path) -> list[str]:
    """Every file and directory below, by relative path, hidden ones too."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def zeros(tensor: Tensor) -> int:
    """How many entries are zero."""
    return tensor.numel() - int(tensor.count_nonzero())
