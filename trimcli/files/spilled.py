"""Tensors in place of memory: in a file without a name, whose room the disk has again when the process ends, however.

The kernel writes the pages out and takes them from memory where others need it. What is read and written in order is
read ahead, and left behind.
"""

import contextlib
import errno
import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from trimcli.console import size
from trimcli.errors import ResourceError


class Spilled:
    """A tensor of this shape in a file in `folder`, which is made where it is missing.

    Raises ResourceError where the disk has no room for all of it: a lack that shows only later would end the process.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        nbytes = max(1, torch.Size(shape).numel() * dtype.itemsize)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, nbytes)
            except OSError as problem:
                if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                what = f"--spill {folder}: its disk has no room for {size(nbytes)} of hidden states"
                raise ResourceError(f"{what}; name a folder on another one.") from None
            self._memory = mmap.mmap(file.fileno(), nbytes)
        self.tensor: Tensor = torch.frombuffer(self._memory, dtype=dtype, count=torch.Size(shape).numel()).view(shape)

    def ahead(self, rows: slice) -> None:
        """Begin to read these of the first dimension."""
        self._advise("MADV_WILLNEED", rows)

    def behind(self, rows: slice) -> None:
        """Hold these no longer in this process; they stay in the file."""
        self._advise("MADV_DONTNEED", rows)

    def _advise(self, name: str, rows: slice) -> None:
        each = self.tensor[0].numel() * self.tensor.element_size()
        start = rows.start * each // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(rows.stop, len(self.tensor)) * each
        if end > start and hasattr(mmap, name):
            with contextlib.suppress(OSError):  # advice that a file system takes or leaves
                self._memory.madvise(getattr(mmap, name), start, end - start)
