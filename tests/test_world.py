"""How samples and matrices are divided among ranks, and that one process alone needs nobody."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.small_models import NANO, skeleton_of
from trimcli.errors import OptionError
from trimcli.model.device import compute_device
from trimcli.pipeline.walk import own_samples
from trimcli.world import Found, Ranks, World, assigned, current, joined, ranks


def world(rank: int, size: int) -> World:
    found = World()
    found.rank, found.size = rank, size
    return found


@pytest.mark.parametrize(("count", "size"), [(7, 1), (7, 2), (7, 3), (8, 4), (2, 3), (0, 2)])
def test_shares_are_all_samples_in_order(count: int, size: int) -> None:
    shares = [list(range(count))[world(rank, size).share(count)] for rank in range(size)]
    assert [one for share in shares for one in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [list(range(count))[world(0, size).share(count, rank)] for rank in range(size)] == shares


def test_costly_items_are_spread() -> None:
    assert assigned([5, 5, 1, 1, 1, 1, 1, 1], 2).count(0) == 4
    assert assigned([3, 3, 3], 1) == [0, 0, 0]
    costs = [29568 * 8192] * 3 + [8192 * 8192] * 2 + [1024 * 8192] * 2  # a layer of Qwen2.5-72B
    for size in (2, 3, 4):
        loads = [sum(cost for cost, owner in zip(costs, assigned(costs, size), strict=True) if owner == rank)
                 for rank in range(size)]  # fmt: skip
        assert max(loads) <= max(max(costs), sum(costs) / size) * 1.3
    assert assigned(costs, 3) == assigned(costs, 3)


def test_alone_everything_is_ones_own() -> None:
    assert ranks() == 1
    with joined() as alone:
        assert alone is current()
        assert alone.is_first
        assert alone.agreed(lambda: {"a": (1, 2)}) == {"a": (1, 2)}
        tensor = torch.arange(6.0).view(2, 3)
        assert alone.summed(tensor) is tensor
        assert alone.whole(tensor, 1) is tensor
        worked: list[int] = []

        def work(item: int) -> Found:
            worked.append(item)
            return Found({}, item)

        lazily = alone.divided([3, 1, 2], work, float)
        assert (next(lazily), worked) == ((3, Found({}, 3)), [3])  # nothing is held that is not asked for yet
        assert [item for item, _ in lazily] == [1, 2]
        assert alone.most({"host": 3}) == {"host": 3}


def test_ranks_without_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimcli.pipeline.walk.current", lambda: world(0, 3))
    assert len(own_samples(torch.zeros(7, 4))) == 3
    with pytest.raises(OptionError, match="2 samples of calibration do not go round 3 ranks; start at most 2"):
        own_samples(torch.zeros(2, 4))


def test_each_rank_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    assert compute_device("cpu") == torch.device("cpu")
    with pytest.raises(OptionError, match="--device cuda:1: each of 4 ranks takes a device of its own"):
        compute_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert compute_device("cuda") == compute_device("auto") == torch.device("cuda", 2)
    assert set(taken) == {torch.device("cuda", 2)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(OptionError, match="this machine has 2 CUDA devices"):
        compute_device("auto")


def test_unshared_statistics_of_a_sample_say_where_it_lies() -> None:
    """What has a place for every sample is joined along it, whatever the model."""
    from trimcli.methods.stats import STATISTICS

    width = max(linear.d_in for linear in skeleton_of(NANO).linears.values())
    for one in STATISTICS.values():
        options = one.options() if one.options else None
        gathered = one(width, 5, torch.device("cpu"), options=options)
        assert (one.dim is None) == (5 not in gathered.shape), one.name
        assert one.dim is None or gathered.shape[one.dim] == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nccl needs a CUDA GPU")
def test_what_is_told_over_nccl_is_what_was_said(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        world = Ranks()
        world.meet()
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
            tensor = torch.arange(6, device="cuda").view(2, 3).to(dtype)
            assert torch.equal(world.summed(tensor.clone()), tensor)
            assert torch.equal(world.whole(tensor.clone(), 1), tensor)
            told = world.first(partial(Found, {"a": tensor.cpu()}, {"b": 1}))
            assert (torch.equal(told.tensors["a"], tensor.cpu()), told.facts) == (True, {"b": 1})
        assert [found.facts for _, found in world.divided([3, 1], lambda item: Found({}, item), float)] == [3, 1]
        assert world.most({"cuda": 3}) == {"cuda": 3}
    finally:
        torch.distributed.destroy_process_group()
