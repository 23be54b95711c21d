import json

from trimcli.files.manifest import is_intact, sealed


def test_a_sealed_document_is_intact_after_a_trip_through_json() -> None:
    document = sealed({"b": (1, 2.5, float("nan")), "a": {"x": 0.1, 3: "ü"}})
    assert is_intact(document)
    assert is_intact(json.loads(json.dumps(document)))
    assert is_intact(json.loads(json.dumps(document, sort_keys=True, ensure_ascii=False)))


def test_any_edit_shows() -> None:
    document = sealed({"zeros": 10, "nested": {"target": 0.5}})
    assert not is_intact({**document, "zeros": 11})
    assert not is_intact({**document, "nested": {"target": 0.50001}})
    assert not is_intact({**document, "more": 1})
    assert not is_intact({"zeros": 10, "nested": {"target": 0.5}})


def test_sealing_twice_seals_the_present_content() -> None:
    assert is_intact(sealed({**sealed({"zeros": 10}), "zeros": 11}))
