"""The metrics cache: what it keeps, and whose it is."""

import json
from pathlib import Path

import pytest

from trimcli.errors import InputError, MismatchError
from trimcli.files.documents import write_json
from trimcli.files.manifest import ModelFingerprint
from trimcli.files.metrics_cache import MetricsCache

MODEL = ModelFingerprint("model", "a" * 64, "b" * 64)


def test_values_survive_and_grow(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    for metric, name, value in (("alpha", "x", 1.5), ("alpha", "y", 2.25), ("entropy", "x", 0.1)):
        cache = MetricsCache(path, MODEL)
        cache.put(metric, name, value)
        cache.save()
    cache = MetricsCache(path, MODEL)
    assert [cache.get("alpha", "x"), cache.get("alpha", "y"), cache.get("entropy", "x")] == [1.5, 2.25, 0.1]
    assert cache.get("entropy", "y") is None
    assert cache.get("log_norm", "x") is None
    assert json.loads(path.read_text())["schema"] == "trim.metrics/1"


def test_nothing_learnt_nothing_written(tmp_path: Path) -> None:
    MetricsCache(tmp_path / "metrics.json", MODEL).save()
    without = MetricsCache(None, MODEL)
    without.put("alpha", "x", 1.0)
    without.save()
    assert without.get("alpha", "x") == 1.0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other", [ModelFingerprint("m", "c" * 64, "b" * 64), ModelFingerprint("m", "a" * 64, "c" * 64)]
)
def test_another_model_is_refused_and_its_file_kept(other: ModelFingerprint, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    cache = MetricsCache(path, other)
    cache.put("alpha", "x", 1.0)
    cache.save()
    before = path.read_bytes()
    with pytest.raises(MismatchError, match=r"metrics\.json was made for"):
        MetricsCache(path, MODEL)
    assert path.read_bytes() == before


def test_files_that_are_no_cache_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("{")
    with pytest.raises(InputError, match="not a readable JSON file"):
        MetricsCache(path, MODEL)
    write_json(path, {"schema": "trim.layer-sparsity/1"}, force=True)
    with pytest.raises(MismatchError, match="layer-sparsity"):
        MetricsCache(path, MODEL)
    for metrics in (None, {"alpha": 3}, {"alpha": {"x": "much"}}):
        document = {"schema": "trim.metrics/1", "model": MODEL.document(), "metrics": metrics}
        write_json(path, document, force=True)
        with pytest.raises(InputError, match="is not a whole metrics file"):
            MetricsCache(path, MODEL)
    with pytest.raises(InputError, match="does not exist"):
        MetricsCache(tmp_path / "nowhere" / "metrics.json", MODEL)
