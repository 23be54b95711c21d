"""The stage cache and the parts of unfinished runs."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.trim_cli import tree, trim, trim_json
from trimcli.errors import InputError, TrimError
from trimcli.files.cache import Cache, digest


def write_part(cache: Cache, key: object, index: int) -> Path:
    with cache.parts(key) as parts:
        parts.write(index, {"a.keep": torch.tensor([[1, 2]], dtype=torch.uint8)}, {"rows": {}, "nan": math.nan})
        return parts.directory


def test_names_depend_on_the_key_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    one = cache.file("calibration", {"a": 1, "b": [2, None]}, ".safetensors")
    assert one == cache.file("calibration", {"b": [2, None], "a": 1}, ".safetensors")
    assert one != cache.file("calibration", {"a": 1, "b": [3, None]}, ".safetensors")
    assert one.parent == tmp_path / "calibration"
    assert digest({"x": math.inf}) == digest({"x": None})


def test_the_default_is_the_users_cache_folder() -> None:
    assert Cache().directory.name == "trim"


def test_parts_are_read_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    write_part(cache, "key", 0)
    with cache.parts("key") as parts:
        part = parts.read(0)
        assert part.names == ["a.keep"]
        assert part.facts == {"rows": {}, "nan": None}
        assert torch.equal(part.load("a.keep"), torch.tensor([[1, 2]], dtype=torch.uint8))
        assert part.spec("a.keep").shape == (1, 2)


def test_only_layers_from_the_first_on_count_as_finished(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for index in (0, 1, 3):
        write_part(cache, "key", index)
    with cache.parts("key") as parts:
        assert parts.finished() == 2
        parts.discard()
        assert parts.finished() == 0
    assert tree(tmp_path / "parts") == []


def test_a_second_run_of_the_same_command_is_told_so(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.parts("key"):
        with pytest.raises(TrimError, match="another run of the same command holds"), cache.parts("key"):
            pass
        with cache.parts("other"):
            pass
    with cache.parts("key"):
        pass
    assert tree(tmp_path / "parts") == []


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    directory = write_part(cache, "key", 0)
    (directory / "layer-00000.safetensors").write_bytes(b"nonsense")
    with cache.parts("key") as parts, pytest.raises(InputError, match=r"layer-00000\.safetensors is not a whole"):
        parts.read(0)


def test_the_command_lists_and_clears(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    cache.file("ratios", "a", ".json").write_text("{}")
    directory = write_part(cache, "key", 0)
    listed = trim_json("cache", "--cache-dir", tmp_path / "cache")
    assert {entry["kind"] for entry in listed["entries"]} == {"ratios", "parts"}
    sizes = {Path(entry["path"]).name: entry["bytes"] for entry in listed["entries"]}
    assert sizes == {
        Path(cache.file("ratios", "a", ".json")).name: 2,
        directory.name: (directory / "layer-00000.safetensors").stat().st_size,
    }
    assert listed["freed"] == 0
    shown = trim("cache", "--cache-dir", tmp_path / "cache")
    assert (shown.status, "2 entries" in shown.out) == (0, True)
    assert trim_json("cache", "--clear", "--cache-dir", tmp_path / "cache")["freed"] == sum(sizes.values())
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    assert trim_json("cache", "--cache-dir", tmp_path / "cache")["entries"] == []


def test_clearing_spares_a_run_at_work(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    write_part(cache, "waiting", 0)
    with cache.parts("working") as parts:
        parts.write(0, {}, {})
        Cache(tmp_path).clear()
        assert parts.finished() == 1
    assert [entry.path.name for entry in cache.entries()] == [digest("working")]


def test_an_empty_cache_is_no_error(tmp_path: Path) -> None:
    assert trim_json("cache", "--cache-dir", tmp_path / "none")["entries"] == []


def test_two_runs_that_need_the_same_make_it_once(tmp_path: Path) -> None:
    made: list[str] = []
    began = threading.Event()

    def slowly(path: Path) -> None:
        began.set()
        waiting.wait(0.2)  # the other run has long asked by now
        made.append("first")
        path.write_text("whole")

    def at_once(path: Path) -> None:
        made.append("second")
        path.write_text("again")

    waiting = threading.Event()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(Cache(tmp_path).made, "ratios", {"a": 1}, ".json", slowly)
        began.wait()
        second = pool.submit(Cache(tmp_path).made, "ratios", {"a": 1}, ".json", at_once)
        assert first.result() == second.result()
    assert (made, first.result().read_text()) == (["first"], "whole")
    assert [entry.path for entry in Cache(tmp_path).entries()] == [first.result()]
