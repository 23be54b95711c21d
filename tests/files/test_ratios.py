"""The layer ratios file: round trip, what is refused, and which model it binds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trimcli.errors import InputError, MismatchError
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.documents import write_json
from trimcli.files.manifest import ModelFingerprint
from trimcli.files.ratios import LayerSparsity
from trimcli.model.skeleton import Skeleton


@pytest.fixture(scope="module")
def skeleton(nano_qwen2: Path) -> Skeleton:
    return Skeleton(Checkpoint.open(nano_qwen2))


@pytest.fixture
def ratios(skeleton: Skeleton) -> LayerSparsity:
    names = list(skeleton.linears)
    return LayerSparsity(
        method="owl",
        parameters={"lambda": 0.08, "hyper_m": 5.0},
        target=0.7,
        numerics="exact",
        sparsity={name: 0.6 + 0.2 * index / len(names) for index, name in enumerate(names)},
        metric={name: index / 3 for index, name in enumerate(names)},
        pattern=None,
        model=skeleton.fingerprint,
    )


def written(ratios: LayerSparsity, directory: Path, **changes: Any) -> Path:
    path = directory / "ratios.json"
    write_json(path, {**ratios.document({"lambda_": 0.08}, {}), **changes}, force=True)
    return path


def test_round_trip(ratios: LayerSparsity, skeleton: Skeleton, tmp_path: Path) -> None:
    path = written(ratios, tmp_path)
    assert LayerSparsity.load(path) == ratios
    assert LayerSparsity.load(path).path == path
    LayerSparsity.load(path).check(skeleton.shapes, skeleton.fingerprint)
    mixed = replace(ratios, pattern=dict.fromkeys(ratios.sparsity, (5, 8)))
    assert LayerSparsity.load(written(mixed, tmp_path)) == mixed
    LayerSparsity.load(path).check(skeleton.shapes, skeleton.fingerprint)


def test_the_file_says_what_it_is(ratios: LayerSparsity, tmp_path: Path) -> None:
    document = json.loads(written(ratios, tmp_path).read_text())
    assert document["schema"] == "trim.layer-sparsity/1"
    assert {"method", "parameters", "target", "numerics", "sparsity", "metric"} <= document.keys()
    assert "pattern" not in document


def test_metrics_may_be_missing(ratios: LayerSparsity, tmp_path: Path) -> None:
    name = next(iter(ratios.sparsity))
    assert LayerSparsity.load(written(ratios, tmp_path, metric=None)).metric[name] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": {"a": 1.2}},
        {"sparsity": {"a": -0.1}},
        {"sparsity": {"a": None}},
        {"sparsity": [0.5]},
        {"sparsity": {"a": 0.5}, "pattern": {"a": [0, 4]}},
        {"sparsity": {"a": 0.5}, "pattern": {"a": [5, 4]}},
        {"sparsity": {"a": 0.5}, "pattern": {"b": [2, 4]}},
        {"sparsity": {"a": 0.5}, "pattern": {"a": [2]}},
        {"target": "much"},
        {"parameters": 3},
        {"model": {"id": "x"}},
    ],
)
def test_damage_is_refused(ratios: LayerSparsity, changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ratios\.json"):
        LayerSparsity.load(written(ratios, tmp_path, **changes))


def test_reference_numerics_may_ask_for_more_than_everything(ratios: LayerSparsity, tmp_path: Path) -> None:
    name = next(iter(ratios.sparsity))
    beyond = replace(ratios, numerics="reference", sparsity={**ratios.sparsity, name: 1.065})
    path = written(beyond, tmp_path)
    assert json.loads(path.read_text())["sparsity"][name] == 1.065
    assert LayerSparsity.load(path).sparsity == {**ratios.sparsity, name: 1.0}


def test_another_schema_is_refused(ratios: LayerSparsity, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"trim\.masks/1"):
        LayerSparsity.load(written(ratios, tmp_path, schema="trim.masks/1"))


def test_other_names_are_named(ratios: LayerSparsity, skeleton: Skeleton, tmp_path: Path) -> None:
    sparsity = dict(ratios.sparsity)
    gone = list(sparsity)[3]
    sparsity["model.layers.9.mlp.up_proj"] = sparsity.pop(gone)
    with pytest.raises(MismatchError) as caught:
        LayerSparsity.load(written(ratios, tmp_path, sparsity=sparsity)).check(skeleton.shapes, skeleton.fingerprint)
    assert gone in str(caught.value)
    assert "model.layers.9.mlp.up_proj" in str(caught.value)


def test_many_missing_names_are_counted(ratios: LayerSparsity, skeleton: Skeleton) -> None:
    with pytest.raises(MismatchError, match="and 25 more and has none besides"):
        replace(ratios, sparsity={}).check(skeleton.shapes, skeleton.fingerprint)


def test_groups_that_do_not_divide_the_inputs_are_refused(ratios: LayerSparsity, skeleton: Skeleton) -> None:
    with pytest.raises(MismatchError, match="groups of 5 for"):
        replace(ratios, pattern=dict.fromkeys(ratios.sparsity, (3, 5))).check(skeleton.shapes, skeleton.fingerprint)


def test_other_weights_are_refused_unless_the_structure_alone_binds(ratios: LayerSparsity, skeleton: Skeleton) -> None:
    own = skeleton.fingerprint
    with pytest.raises(MismatchError, match="other weights"):
        replace(ratios, model=replace(own, content="0" * 64)).check(skeleton.shapes, skeleton.fingerprint)
    replace(ratios, model=ModelFingerprint("elsewhere", own.structure)).check(skeleton.shapes, skeleton.fingerprint)
    with pytest.raises(MismatchError, match="elsewhere"):
        replace(ratios, model=ModelFingerprint("elsewhere", "0" * 64)).check(skeleton.shapes, skeleton.fingerprint)
