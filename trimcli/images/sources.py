"""Where pictures come from: a folder, with or without a folder for each class; FILE.parquet; FILE.npz.

A parquet file has pictures in a column `image` (or `img`), as data sets on the hub have them, and classes in `label`
(or `labels`). An npz file holds `images`, uint8 [N, H, W] or [N, H, W, C], and `labels` [N].
"""

import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimcli.console import quiet_libraries
from trimcli.errors import InputError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

FORMS = "a folder of pictures, a .parquet or an .npz file"
IMAGES, LABELS = ("image", "img", "images"), ("label", "labels", "fine_label")


@dataclass(frozen=True)
class Pictures:
    """Pictures in order, each decoded when it is asked for. names: of the classes that labels count, if there are any.

    labels: a number for each picture, None where there are none.
    """

    path: Path
    stored: Any
    labels: Sequence[int] | None
    names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> "Image":
        """A picture. Raises InputError for one that cannot be decoded."""
        from PIL.Image import DecompressionBombError, fromarray

        found = self.stored[index]
        try:
            return fromarray(found) if isinstance(found, np.ndarray) else _decoded(found)
        except (OSError, ValueError, SyntaxError, DecompressionBombError) as problem:
            named = (found.get("path") if isinstance(found, dict) else None) or f"picture {index} of {self.path}"
            raise InputError(f"{named} is no whole picture ({first_line(problem)}); remove or replace it.") from None


def _decoded(stored: dict[str, Any]) -> "Image":
    import datasets

    found: Image = datasets.Image().decode_example(stored)
    return found


@contextmanager
def pictures(path: Path) -> Iterator[Pictures]:
    """The pictures in `path`, as long as this lasts. Raises InputError for what holds none."""
    path = path.expanduser()
    if not path.exists():
        raise InputError(f"there is no {path}; give {FORMS}.")
    if path.suffix == ".npz" and path.is_file():
        found = _arrays(path)
    elif path.is_dir() or path.suffix == ".parquet":
        with tempfile.TemporaryDirectory() as folder:
            yield _not_empty(_data_set(path, Path(folder)))
        return
    else:
        raise InputError(f"{path} is neither {FORMS}; give one of these.")
    yield _not_empty(found)


def _not_empty(found: Pictures) -> Pictures:
    if not len(found):
        raise InputError(f"{found.path} holds no pictures; give {FORMS}.")
    return found


def _arrays(path: Path) -> Pictures:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("images", "labels") if name in file.files}
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as problem:
        raise InputError(f"{path} is no whole npz file ({first_line(problem)}); make it anew.") from None
    images, labels = found.get("images"), found.get("labels")
    wanted = "`images`, uint8 [N, H, W] or [N, H, W, C] with C 1 or 3"
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise InputError(f"{path} does not hold {wanted}; save it so, with `labels` [N] to measure.")
    if images.ndim == 4:
        if images.shape[3] not in (1, 3):
            raise InputError(f"{path} holds pictures of {images.shape[3]} channels, not {wanted}; save it so.")
        images = images[..., 0] if images.shape[3] == 1 else images
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise InputError(f"{path} holds {labels.dtype} labels {list(labels.shape)}, not an integer for each picture.")
    return Pictures(path, images, None if labels is None else labels.tolist())


def _data_set(path: Path, cache: Path) -> Pictures:
    """A folder or a parquet file through the library `datasets`, which leaves its files in `cache`."""
    import datasets

    how: dict[str, Any] = {"data_files": {"train": str(path)}}
    kind = "parquet"
    if path.is_dir():  # every file, whatever its name says of splits
        kind, how = "imagefolder", {"data_dir": str(path), "data_files": {"train": "**"}}
    try:
        with quiet_libraries(errors=True):
            found = datasets.load_dataset(kind, split="train", cache_dir=str(cache), **how)
    except Exception as problem:  # the library behind the form may raise anything
        if path.is_dir():
            raise InputError(f"{path} holds no pictures ({first_line(problem)}); give {FORMS}.") from None
        raise InputError(f"{path} is no whole parquet file ({first_line(problem)}); fetch it anew.") from None
    image = next((name for name in IMAGES if name in found.column_names), None)
    if image is None:
        what = f"{path} has no column `image`, only {', '.join(found.column_names) or 'none'}"
        raise InputError(f"{what}; give pictures to read.")
    label = next((name for name in LABELS if name in found.column_names), None)
    names = getattr(found.features[label], "names", None) if label else None
    stored = found.cast_column(image, datasets.Image(decode=False))[image]
    labels = None if label is None else list(found[label])
    if labels is not None and not all(isinstance(one, int) for one in labels):
        raise InputError(f"the column `{label}` of {path} holds {labels[0]!r} where a number is needed.")
    return Pictures(path, stored, labels, names)
