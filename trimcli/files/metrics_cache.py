"""Metrics kept between runs: a JSON file of metric -> linear -> value, bound to one model."""

from pathlib import Path

from trimcli.files.atomic import refuse_existing
from trimcli.files.documents import read_json, write_json
from trimcli.files.forms import NUMBER, Each, Must, check_form
from trimcli.files.manifest import ModelFingerprint, check_model, manifest

SCHEMA = "trim.metrics/1"


class MetricsCache:
    """`values`, metric -> linear -> value, of one model, kept in `path` if given. Raises MismatchError, InputError."""

    def __init__(self, path: Path | None, model: ModelFingerprint) -> None:
        self._path, self._model, self._grown = path, model, False
        self.values: dict[str, dict[str, float]] = {}
        if path is not None:
            refuse_existing(path, force=True)
        if path is not None and path.exists():
            document = read_json(path, SCHEMA)
            check_model(document, model, path)
            check_form(document, {"metrics": Must(Each(Must(Each(Must(NUMBER)))))}, path, "metrics")
            self.values = document["metrics"]

    def get(self, metric: str, name: str) -> float | None:
        """The metric of the linear `name`, None where it is not known."""
        return self.values.get(metric, {}).get(name)

    def put(self, metric: str, name: str, value: float) -> None:
        """Remember a metric of the linear `name`."""
        self.values.setdefault(metric, {})[name] = value
        self._grown = True

    def save(self) -> None:
        """Write the file if there is one and something was learnt."""
        if self._path is not None and self._grown:
            write_json(self._path, manifest(SCHEMA, "alloc-layers", {}, self._model, metrics=self.values), force=True)
            self._grown = False
