"""The calibration artifact: tokens, input square norms and last-token inputs of a dense model."""

from pathlib import Path
from typing import Any

from torch import Tensor

from trimcli.errors import InputError
from trimcli.files.manifest import CALIBRATION, ModelFingerprint, check_model
from trimcli.files.tensors import open_tensors, read_manifest
from trimcli.methods.stats import LinearStats, stored_statistics


class CalibrationFile:
    """A `trim.calibration/1` file, tensors mapped. Its manifest's `shares`: linear -> the one its tensors are under."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = read_manifest(path, CALIBRATION)
        self._handle = open_tensors(path)
        self._names = set(self._handle.keys())

    @property
    def tokens(self) -> Tensor:
        """The calibration samples, int32 [nsamples, seqlen]."""
        return self._handle.get_tensor("tokens")

    def check(self, model: ModelFingerprint) -> None:
        """Raise MismatchError unless the file was made from this model's weights."""
        check_model(self.manifest, model, self.path)

    def require(self, needs: frozenset[str]) -> None:
        """Raise InputError unless the file holds the statistics of these names, as far as files can."""
        for option, statistic in stored_statistics().items():
            if statistic.name in needs and option not in self.manifest["stats"]:
                what = f"{self.path} holds no {option} (it was made with --stats {','.join(self.manifest['stats'])})"
                raise InputError(f"{what}; calibrate again with --stats including {option}.")

    def statistics(self, name: str) -> LinearStats:
        """The statistics of the linear `name`. Raises InputError when the file has none of it."""
        stored = self.manifest["shares"].get(name)
        if stored is None:
            raise InputError(f"{self.path} holds no statistics of {name}; calibrate this model again.")
        keys = {one.name: f"{stored}.{one.name}" for one in stored_statistics().values()}
        return LinearStats(**{kind: self._handle.get_tensor(key) for kind, key in keys.items() if key in self._names})
