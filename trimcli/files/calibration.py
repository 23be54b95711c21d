"""The calibration artifact: tokens or pixels, input square norms and last-token inputs of a dense model."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimcli.errors import InputError
from trimcli.files.forms import COUNT, MODEL, TEXT, Each, Must, check_form
from trimcli.files.manifest import CALIBRATION, SEAL, ModelFingerprint, check_model, is_intact
from trimcli.files.tensors import TensorSpec, open_tensors, read_manifest, spec_of
from trimcli.methods.stats import LinearStats, stored_statistics

META = torch.device("meta")
# What samples are called in the file, their dtype and how many dimensions they have.
SAMPLES = {"tokens": (torch.int32, 2), "pixels": (torch.float32, 4)}
FORM = {
    "stats": Must([Must(TEXT)]),
    "shares": Must(Each(Must(TEXT))),
    "routed": Each(Must(COUNT)),
    "model": MODEL,
    "bos": TEXT,
    "commands": [Must(TEXT)],
    "command_line": TEXT,
}


class CalibrationFile:
    """A `trim.calibration/1` file, tensors mapped. Its manifest's `shares`: linear -> the one its tensors are under.

    Raises InputError (missing, damaged, manifest edited) and MismatchError (of another kind).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = read_manifest(path, CALIBRATION)
        if SEAL in self.manifest and not is_intact(self.manifest):  # those of earlier versions have no seal
            raise InputError(f"the manifest in {path} was changed after trim wrote it; calibrate again.")
        check_form(self.manifest, FORM, path, "calibration")
        self._handle = open_tensors(path)
        self._names = set(self._handle.keys())
        kept = next((name for name in SAMPLES if name in self._names), None)
        if kept is None or not _are_samples(spec_of(self._handle, kept, path), *SAMPLES[kept]):
            raise InputError(f"{path} holds no samples of tokens or pixels; calibrate again.")
        self._kept = kept

    @property
    def samples(self) -> Tensor:
        """The calibration samples: tokens, int32 [nsamples, seqlen], or pixels, float32 [nsamples, C, H, W]."""
        return self._handle.get_tensor(self._kept)

    @property
    def tokens(self) -> Tensor:
        """The samples where they are tokens, int32 [nsamples, seqlen]."""
        return self._handle.get_tensor("tokens")

    @property
    def shape(self) -> tuple[int, ...]:
        """The samples' shape, without reading them."""
        return spec_of(self._handle, self._kept, self.path).shape

    @property
    def nsamples(self) -> int:
        """How many samples there are."""
        return self.shape[0]

    def check(self, model: ModelFingerprint) -> None:
        """Raise MismatchError unless the file was made from this model's weights."""
        check_model(self.manifest, model, self.path)

    def require(self, needs: frozenset[str]) -> None:
        """Raise InputError unless the file holds the statistics of these names, as far as files can."""
        for option, statistic in stored_statistics().items():
            if statistic.name in needs and option not in self.manifest["stats"]:
                what = f"{self.path} holds no {option} (it was made with --stats {','.join(self.manifest['stats'])})"
                raise InputError(f"{what}; calibrate again with --stats including {option}.")

    def statistics(self, name: str, d_in: int) -> LinearStats:
        """The statistics of the linear `name` with `d_in` inputs. Raises InputError when the file has none of it."""
        stored = self.manifest["shares"].get(name)
        if stored is None:
            raise InputError(f"{self.path} holds no statistics of {name}; calibrate this model again.")
        found, tokens = {}, (self.manifest.get("routed") or {}).get(stored)
        for option, one in stored_statistics().items():
            key = f"{stored}.{one.name}"
            too_few = tokens is not None and one.routed is not None and tokens < one.routed.least(self.nsamples)
            if option in self.manifest["stats"] and not too_few:
                spec = spec_of(self._handle, key, self.path) if key in self._names else None
                if spec != TensorSpec.of(one.finish(one(d_in, self.nsamples, META, options=None))):
                    raise InputError(f"{self.path} holds no whole {option} of {name}; calibrate this model again.")
                found[one.name] = self._handle.get_tensor(key)
        return LinearStats(tokens, **found)


def _are_samples(spec: TensorSpec, dtype: torch.dtype, dimensions: int) -> bool:
    return spec.dtype == dtype and len(spec.shape) == dimensions and math.prod(spec.shape) > 0
