"""Hidden states through the layers: batches, buffers, what cannot be walked, and memory that runs out on the way."""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import save_family
from tests.small_models import llama_config, random_model, save, skeleton_of
from trimcli.console import Advance
from trimcli.errors import InputError, ResourceError
from trimcli.methods.stats import STATISTICS
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline.collector import Collector
from trimcli.pipeline.walk import Walk, default_seqlen, max_positions, refuse_foreign_tokens

ALL = frozenset(name for name, one in STATISTICS.items() if not one.paired)


class Warnings:
    """A progress that keeps what it is warned of."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    @contextlib.contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        yield lambda count=1: None

    def warn(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(llama_config()), tmp_path_factory.mktemp("walk") / "llama")


def samples(count: int, length: int = 9) -> Tensor:
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(0))


def walked(skeleton: Skeleton, tokens: Tensor, **options: Any) -> Tensor:
    walk = Walk(skeleton, tokens, **options)
    for layer in walk.layers():
        walk.advance(layer)
    return walk.states(slice(0, len(tokens)))


def refuse_batches_over(skeleton: Skeleton, limit: int) -> list[int]:
    """Make the second layer run out of memory on batches of more than `limit`. Returns the batches it ran."""
    ran: list[int] = []

    def before(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if len(args[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        ran.append(len(args[0]))

    skeleton.linears["model.layers.1.mlp.up_proj"].module.register_forward_pre_hook(before)
    return ran


@pytest.mark.parametrize("batch_size", [2, 3, 5, 99])
def test_the_batch_size_changes_nothing_but_rounding(batch_size: int, llama: Path) -> None:
    skeleton, tokens = skeleton_of(llama), samples(5)
    expected = walked(skeleton, tokens, batch_size=1)
    torch.testing.assert_close(walked(skeleton, tokens, batch_size=batch_size), expected, rtol=1e-5, atol=1e-6)


def test_calls_that_depend_on_the_tokens_are_kept_apart(tmp_path: Path) -> None:
    """A model may give its layers something made from the very tokens: each sample then keeps its own."""
    skeleton = skeleton_of(save_family("falcon-alibi", tmp_path / "falcon"))
    own = skeleton.model.transformer.forward
    tokens = samples(4)

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        mask = torch.ones_like(input_ids)
        mask[:, 0] = input_ids[:, 1] % 2
        return own(input_ids=input_ids, **{**kwargs, "attention_mask": mask})

    skeleton.model.transformer.forward = forward
    apart = torch.cat([walked(skeleton, tokens[row : row + 1]) for row in range(4)])
    for batch_size in (2, 4):
        together = walked(skeleton, tokens, batch_size=batch_size)
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


def test_collecting_leaves_the_hidden_states_as_they_are(llama: Path) -> None:
    skeleton = skeleton_of(llama)
    walk = Walk(skeleton, samples(3))
    before = walk.states(slice(0, 3)).clone()
    for layer in walk.layers():
        walk.collect(layer, Collector(walk.groups(layer), ALL, 3, walk.seqlen, skeleton.device))
        assert torch.equal(walk.states(slice(0, 3)), before)


def test_of_a_layer_that_is_left_early_nothing_stays(llama: Path) -> None:
    """Activations go with their batch, not when garbage is looked for the next time."""
    skeleton = skeleton_of(llama)
    walk = Walk(skeleton, samples(4), batch_size=1)
    seen: list[weakref.ref[Tensor]] = []
    layers = walk.layers()
    layer = next(layers)
    down = skeleton.linears["model.layers.0.mlp.down_proj"].module
    gc.collect()
    gc.disable()
    try:
        collector = Collector(walk.groups(layer), ALL, 4, walk.seqlen, skeleton.device)
        with down.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0]))):
            walk.collect(layer, collector)
        assert len(seen) == 4
        assert [one() for one in seen] == [None] * 4
    finally:
        gc.enable()


def test_one_layer_is_resident(llama: Path) -> None:
    skeleton = skeleton_of(llama)
    walk = Walk(skeleton, samples(2))
    for layer in walk.layers():
        loaded = {name for name, p in skeleton.model.named_parameters() if p.device.type != "meta"}
        assert loaded == {f"{layer.name}.{name}" for name, _ in layer.module.named_parameters()}


@pytest.mark.parametrize(("batch", "limit", "count"), [(4, 2, 7), (7, 3, 15), (5, 1, 12), (8, 1, 11), (3, 2, 3)])
def test_the_batch_is_halved_when_memory_runs_out(batch: int, limit: int, count: int, llama: Path) -> None:
    tokens, progress = samples(count), Warnings()
    expected = walked(skeleton_of(llama), tokens, batch_size=1)
    skeleton = skeleton_of(llama)
    ran = refuse_batches_over(skeleton, limit)
    found = walked(skeleton, tokens, batch_size=batch, progress=progress)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert max(ran) <= limit
    assert progress.messages
    assert "going on with a batch size of" in progress.messages[0]


@pytest.mark.parametrize(("half", "batch", "limit"), [(6, 3, 3), (6, 6, 4), (6, 6, 1), (14, 14, 3)])
def test_some_of_the_samples_advance_alone(half: int, batch: int, limit: int, llama: Path) -> None:
    """Two halves, one after the other, whole batches each, also when these are halved: 14 to 3, 3, 3, 3 and 2."""
    tokens = samples(2 * half)
    expected = walked(skeleton_of(llama), tokens, batch_size=1)
    skeleton = skeleton_of(llama)
    refuse_batches_over(skeleton, limit)
    walk = Walk(skeleton, tokens, batch_size=batch, progress=Warnings())
    for layer in walk.layers():
        before = walk.states(slice(half, 2 * half)).clone()
        walk.advance(layer, rows=slice(0, half))
        assert torch.equal(walk.states(slice(half, 2 * half)), before)
        walk.advance(layer, rows=slice(half, 2 * half))
    torch.testing.assert_close(walk.states(slice(0, 2 * half)), expected, rtol=1e-5, atol=1e-6)


def test_a_batch_halved_on_the_way_leaves_another_remainder(llama: Path) -> None:
    """Of 15 samples 7 are through when the batch is halved to 3: batches of 3, 3 and 2 remain."""
    tokens = samples(15)
    expected = walked(skeleton_of(llama), tokens, batch_size=1)
    skeleton = skeleton_of(llama)
    sizes: list[int] = []

    def before(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        sizes.append(len(args[0]))
        if len(sizes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    skeleton.linears["model.layers.1.mlp.up_proj"].module.register_forward_pre_hook(before)
    found = walked(skeleton, tokens, batch_size=7, progress=Warnings())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert sizes == [7, 7, 3, 3, 2]


def test_statistics_survive_a_halved_batch(llama: Path) -> None:
    """The Gram has taken in part of the failed batch: it must not count twice."""
    tokens = samples(5)

    def collected(limit: int) -> Collector:
        skeleton = skeleton_of(llama)
        walk = Walk(skeleton, tokens, batch_size=5, progress=Warnings())
        for layer in walk.layers():
            if layer.index == 0:
                walk.advance(layer)
                continue
            beside = lambda rows, layer=layer: walk.call(layer, rows, 2 * walk.states(rows))  # noqa: E731
            needs = frozenset(STATISTICS)
            collector = Collector(walk.groups(layer), needs, 5, walk.seqlen, skeleton.device, dense=beside)
            # The last linear runs out of memory, after the others' inputs were seen.
            layer.linears[-1].module.register_forward_pre_hook(over(limit))
            walk.collect(layer, collector)
            return collector
        raise AssertionError

    def over(limit: int) -> Any:
        def before(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            if len(args[0]) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return before

    whole, halved = collected(99).by_linear(), collected(2).by_linear()
    for name, expected in whole.items():
        assert len(expected.tensors) == len(STATISTICS)
        for kind, tensor in expected.tensors.items():
            torch.testing.assert_close(halved[name].tensors[kind], tensor, rtol=1e-5, atol=1e-5)


def test_one_sample_that_does_not_fit_ends_the_run(llama: Path) -> None:
    skeleton = skeleton_of(llama)
    refuse_batches_over(skeleton, 0)
    with pytest.raises(ResourceError, match=r"one sample of 9 tokens does not fit .* at model\.layers\.1"):
        walked(skeleton, samples(2), batch_size=2, progress=Warnings())


def test_other_errors_are_not_taken_for_memory(llama: Path) -> None:
    skeleton = skeleton_of(llama)

    def fail(_: torch.nn.Module, __: Any) -> None:
        raise RuntimeError("something else")

    skeleton.layers[0].linears[0].module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="something else"):
        walked(skeleton, samples(2))


def test_foreign_tokens_and_positions_are_refused(llama: Path) -> None:
    skeleton = skeleton_of(llama)
    with pytest.raises(InputError, match=r"token 64 is outside the vocabulary of .* \(0 to 63\)"):
        Walk(skeleton, torch.tensor([[1, 64]]))
    with pytest.raises(InputError, match="token -1 is outside"):
        refuse_foreign_tokens(skeleton, torch.tensor([[1, -1]]))
    with pytest.raises(InputError, match="samples of 33 tokens are longer than the 32 positions"):
        Walk(skeleton, samples(1, 33))


def test_the_default_seqlen(llama: Path, tmp_path: Path) -> None:
    assert default_seqlen(skeleton_of(llama).config) == 32
    bloom = skeleton_of(save_family("bloom", tmp_path / "bloom")).config
    assert max_positions(bloom) is None
    assert default_seqlen(bloom) == 2048


def test_a_sparse_layer_leaves_the_checkpoint_as_it_is(llama: Path) -> None:
    """Tensors that need no conversion are the checkpoint's own mapped memory."""
    skeleton = skeleton_of(llama)
    layer = skeleton.layers[0]
    linear = layer.linears[0]
    before = linear.read(skeleton.checkpoint).clone()
    assert before.dtype == skeleton.dtype
    skeleton.load_layer(layer)
    linear.weight.zero_()
    assert torch.equal(linear.read(skeleton.checkpoint), before)
    skeleton.drop_layer(layer)
    skeleton.load_everything()
    linear.weight.zero_()
    assert torch.equal(linear.read(skeleton.checkpoint), before)
