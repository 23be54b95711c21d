"""The folder beside an output in which a training keeps its checkpoints until it is done."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from trimcli.errors import MismatchError, OutputExists, TrimError
from trimcli.files.atomic import place_of
from trimcli.files.documents import canonical_json, finite_or_none, read_json, write_json
from trimcli.world import is_first

KEY = "run.json"


class Work:
    """`.NAME.finetune` beside the output NAME, held by one run at a time.

    It stays where the run was stopped after its first checkpoint, and goes in any other case. key: what the result
    depends on, a JSON object. Entering raises OutputExists for checkpoints of an earlier run without `resume` or
    `force`, MismatchError under `resume` for those of other settings, and TrimError for those of a run at work.
    """

    def __init__(self, output: Path, key: Mapping[str, Any], *, resume: bool, force: bool) -> None:
        self.output, self.resume, self.force = output, resume, force
        place = place_of(output)
        self.folder = place.with_name(f".{place.name}.finetune")
        self._key = finite_or_none(dict(key))
        self._lock = FileLock(self.folder.with_suffix(".lock"))

    def __enter__(self) -> "Work":
        if not is_first():
            return self
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise TrimError(f"another run is training {self.output} at this moment; wait for it.") from None
        try:
            self._begin()
        except BaseException:
            self._release()
            raise
        return self

    def _begin(self) -> None:
        if self.has_checkpoints and self.resume:
            found = read_json(self.folder / KEY)
            other = [name for name in self._key if canonical_json(found.get(name)) != canonical_json(self._key[name])]
            if other:
                what = f"the interrupted run in {self.folder} had another {', '.join(other)}"
                raise MismatchError(f"{what}; repeat its command with --resume, or give --force to start over.")
            return
        if self.has_checkpoints and not self.force:
            what = f"{self.folder} holds checkpoints of an interrupted run"
            raise OutputExists(f"{what}; give --resume to go on from them, or --force to start over.")
        self._remove()
        self.folder.mkdir()
        write_json(self.folder / KEY, self._key)

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is something to go on from."""
        if not (self.folder / KEY).is_file():
            return False
        return any(self.folder.glob("*/checkpoint-*")) or any(self.folder.glob("learned/*"))

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not is_first():
            return
        if kind is None or issubclass(kind, TrimError) or not self.has_checkpoints:
            self._remove()
        self._release()

    def _remove(self) -> None:
        """Remove the folder, `KEY` first: a run that ends meanwhile leaves nothing that another would go on from."""
        (self.folder / KEY).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _release(self) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)
