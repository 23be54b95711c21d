"""What `trim demo` runs on: a small trained model inside the package and text of the standard library.

The model is of Qwen2 form, six layers and 5.5 M parameters, trained on 21 million tokens of English. It is measured on
the help topics of Python whose name's MD5 digest starts with 0, 1 or 2, and calibrated on the others.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

MODEL = Path(__file__).parent / "model"
"""The embedded model: an ordinary Hugging Face directory."""


@dataclass(frozen=True)
class DemoTexts:
    """The two text files of a demo, with no topic in common."""

    calibration: Path
    measurement: Path


def calibration_text() -> str:
    """The help topics to calibrate on, in the order of their names."""
    return "\n\n".join(topics[name] for name in sorted(topics) if not _is_held_back(name))


def measurement_text() -> str:
    """The help topics to measure on, in the order of their names."""
    return "\n\n".join(topics[name] for name in sorted(topics) if _is_held_back(name))


def write_texts(directory: Path) -> DemoTexts:
    """Write both texts to `directory`, which must exist, and say where they are."""
    texts = DemoTexts(directory / "topics.calibration.txt", directory / "topics.measurement.txt")
    texts.calibration.write_text(calibration_text(), encoding="utf-8", newline="")
    texts.measurement.write_text(measurement_text(), encoding="utf-8", newline="")
    return texts


def _is_held_back(name: str) -> bool:
    return hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()[0] in "012"
