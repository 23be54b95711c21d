"""The fixed part of a perplexity study: a model, what it is calibrated on and the texts it is measured on."""

import argparse
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.support.questions import write_questions
from trimcli import AllocateOptions, CalibrateOptions, EvaluateOptions, allocate, calibrate, evaluate
from trimcli.demo import MODEL, write_texts
from trimcli.files.atomic import file_digest
from trimcli.files.cache import digest
from trimcli.files.checkpoint import Checkpoint
from trimcli.model.device import compute_device, compute_dtype


@dataclass(frozen=True)
class Study:
    """One model's calibration and measurement.

    model: its directory. source: calibration text, or a safetensors file of `tokens`. nsamples: samples
    drawn from a text. texts: files to measure on, `windows` windows of `seqlen` tokens each, the length of
    the samples too. work: directory for what is made once (calibration, ratios). seed: of the draw of samples.
    compute: the computation's dtype, `auto` or by name. questions: of the zero-shot task made of the last text.
    """

    model: Path
    source: Path
    texts: tuple[Path, ...]
    nsamples: int
    windows: int
    seqlen: int
    work: Path
    seed: int = 0
    compute: Any = "auto"
    questions: int = 0

    @property
    def name(self) -> str:
        """The model's name."""
        return "the demo's model" if self.model == MODEL else self.model.name

    @property
    def fixed(self) -> bool:
        """Whether the samples are given, so that no seed changes them."""
        return self.source.suffix == ".safetensors"

    @property
    def dtype(self) -> str:
        """The computation's dtype on this machine."""
        return str(compute_dtype(self.compute, Checkpoint.open(self.model), compute_device("auto"))).removeprefix(
            "torch."
        )

    @cached_property
    def key(self) -> dict[str, Any]:
        """What every figure of the study depends on, as a JSON object."""
        weights = sorted([*self.model.glob("*.json"), *self.model.glob("*.safetensors")])
        return {
            "model": digest({path.name: file_digest(path) for path in weights}),
            "source": file_digest(self.source),
            "texts": {path.name: file_digest(path) for path in self.texts},
            "nsamples": None if self.fixed else self.nsamples,
            **({"seed": self.seed} if self.seed and not self.fixed else {}),
            **({"dtype": self.compute} if self.compute != "auto" else {}),
            **({"questions": self.questions} if self.questions else {}),
            "windows": self.windows,
            "seqlen": self.seqlen,
        }

    @cached_property
    def folder(self) -> Path:
        """The study's own folder inside `work`, shared by the processes that work on it."""
        folder = self.work / f"study-{digest(self.key)}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def cache(self) -> Path:
        """The stage cache of the study's runs."""
        return self.folder / "cache"

    def calibration(self, self_share: float = 0.0) -> Path:
        """The calibration file, made the first time. self_share: of the samples, what the dense model writes."""
        path = self.folder / f"calibration{f'-own-{self_share:g}' if self_share else ''}.safetensors"
        tokens = self.source if self.fixed else None
        options = CalibrateOptions(
            dataset=str(self.source),
            tokens=tokens,
            nsamples=self.nsamples,
            self_share=self_share,
            seqlen=self.seqlen,
            seed=self.seed,
            dtype=self.compute,
            cache_dir=self.cache,
        )
        with FileLock(self.folder / "calibration.lock"):
            if not path.is_file():
                calibrate(str(self.model), path, options)
        return path

    def ratios(self, method: str, sparsity: float, numerics: Any = "exact") -> Path:
        """The layer ratios file of an allocation method at its default parameters, made the first time."""
        suffix = "" if numerics == "exact" else f"-{numerics}"
        path = self.folder / ratios_name(method, sparsity, suffix)
        options = AllocateOptions(
            method=method,
            sparsity=sparsity,
            calibration=self.calibration() if method == "owl" else None,
            metrics_cache=self.folder / "metrics.json" if method == "alpha" else None,
            numerics=numerics,
            dtype=self.compute,
            cache_dir=self.cache,
        )
        with FileLock(self.folder / "ratios.lock"):
            if not path.is_file():
                allocate(str(self.model), path, options)
        return path

    def task(self) -> Path:
        """The zero-shot task's file, made the first time."""
        folder = self.folder / "questions"
        with FileLock(self.folder / "questions.lock"):
            if not folder.is_dir():
                write_questions([self.texts[-1].read_text(encoding="utf-8")], folder, self.questions)
        return folder / "continuation.yaml"

    def measure(self, model: Path, masks: Path | None = None) -> dict[str, Any]:
        """`perplexity` by the text's name, `sparsity` of the linears' weights, `accuracy` where questions are asked."""
        options = EvaluateOptions(
            masks=masks,
            ppl=tuple(map(str, self.texts)),
            tasks=(str(self.task()),) if self.questions else (),
            seqlen=self.seqlen,
            max_windows=self.windows,
            dtype=self.compute,
            cache_dir=self.cache,
        )
        found = evaluate(str(model), options)
        values = {Path(entry["dataset"]).name: entry["value"] for entry in found["perplexity"]}
        measured = {"perplexity": values, "sparsity": found["sparsity"]["total"]}
        if self.questions:
            measured["accuracy"] = found["tasks"]["continuation"]["acc"]
        return measured

    def facts(self) -> dict[str, str]:
        """What the head of a results file says of the study."""
        drawn = "its samples" if self.fixed else f"{self.nsamples} samples"
        return {
            "calibrated on": f"{self.source.name}, {drawn}",
            "measured on": f"{', '.join(path.name for path in self.texts)}, the first {self.windows} "
            f"windows of {self.seqlen} tokens each",
        }


def ratios_name(method: str, sparsity: float, suffix: str = "") -> str:
    """The name of a layer ratios file, such as owl-70.json."""
    return f"{method}-{sparsity * 100:g}{suffix}.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that studies share."""
    parser.add_argument(
        "--measure", nargs="+", type=Path, help="texts to measure on (default: the demo's held-back text)"
    )
    parser.add_argument("--windows", type=int, default=20, help="windows of each text (default 20)")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of a window (default 128)")
    parser.add_argument("--nsamples", type=int, default=64, help="samples of a calibration text (default 64)")
    parser.add_argument("--work", type=Path, help="where to keep calibration and ratios (default: a temporary folder)")
    parser.add_argument("--runs", type=Path, help="finished runs, JSON lines (default: in the work folder)")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: print)")


def make_study(given: argparse.Namespace, model: Path | None, source: Path | None) -> Study:
    """The study that the options ask for; without a model that of the embedded one on the demo's texts."""
    work: Path = given.work or Path(tempfile.gettempdir()) / "trim-benchmarks"
    work.mkdir(parents=True, exist_ok=True)
    texts: list[Path] | None = given.measure
    if source is None or texts is None:
        with FileLock(work / "texts.lock"):
            demo = write_texts(work)
        source, texts = source or demo.calibration, texts or [demo.measurement]
    return Study((model or MODEL).resolve(), source, tuple(texts), given.nsamples, given.windows, given.seqlen, work)
