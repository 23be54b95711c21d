"""What linears that share an input share, and what a statistic is made of."""

import platform

import pytest
import torch
from torch import Tensor

from trimcli.errors import OptionError
from trimcli.methods.stats import (
    CROSS,
    FITTING,
    GRAM,
    HELDOUT,
    HELDOUT_CROSS,
    HELDOUT_DENSE,
    INPUTS,
    SQNORM,
    STATISTICS,
    GramOptions,
    LinearStats,
    Statistic,
    fitting_samples,
    statistic,
    stored_statistics,
)

CPU = torch.device("cpu")


def samples(count: int = 5, seqlen: int = 4, d_in: int = 6) -> Tensor:
    return torch.randn(count, seqlen, d_in, generator=torch.Generator().manual_seed(0))


def dense_inputs(x: Tensor) -> Tensor:
    """What the dense model's inputs would be: near by."""
    return x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


def gathered(one: Statistic, x: Tensor, batches: list[slice], options: object = None) -> Tensor:
    tensor: Tensor = one(x.shape[2], len(x), CPU, options=options)
    for batch in batches:
        one.add(tensor, x[batch], batch, len(x), *([dense_inputs(x)[batch]] if one.paired else []))
    return one.finish(tensor)


def expected_of(x: Tensor, columns: slice = slice(None)) -> dict[str, Tensor]:
    whole, x = x, x[:, :, columns]
    flat, count = x.reshape(-1, x.shape[2]), len(x) - max(1, len(x) // 8)
    first, last = x[:count].reshape(-1, x.shape[2]), x[count:].reshape(-1, x.shape[2])
    dense, last_dense = (
        dense_inputs(whole)[part, :, columns].flatten(0, 1) for part in (slice(count), slice(count, None))
    )
    return {
        "cross": 2 / count * dense.T @ first,
        "heldout_cross": 2 / (len(x) - count) * last_dense.T @ last,
        "heldout_dense": 2 / (len(x) - count) * last_dense.T @ last_dense,
        "sqnorm": x.double().square().sum(dim=(0, 1)).div(len(x)).float(),
        "inputs": torch.stack([sample[-1] for sample in x], dim=1),
        "gram": 2 / len(x) * flat.T @ flat,
        "fitting": 2 / count * first.T @ first,
        "heldout": 2 / (len(x) - count) * last.T @ last,
    }


def test_the_statistics_that_there_are() -> None:
    known = (SQNORM, INPUTS, GRAM, FITTING, HELDOUT, CROSS, HELDOUT_CROSS, HELDOUT_DENSE)
    assert dict(STATISTICS) == {one.name: one for one in known}
    assert [one for one in known if one.paired] == [CROSS, HELDOUT_CROSS, HELDOUT_DENSE]
    assert stored_statistics() == {"norms": SQNORM, "inputs": INPUTS}
    assert {name for name, one in STATISTICS.items() if one.copies} == {"gram", "fitting", "cross"}
    with pytest.raises(
        OptionError,
        match=r"--stats 'sqnrm' is none of sqnorm, inputs, gram, fitting, heldout, cross, .*; did you mean 'sqnorm'",
    ):
        STATISTICS["sqnrm"]
    with pytest.raises(ValueError, match="a statistic named 'gram' is registered already"):
        statistic(
            "gram",
            lambda *_: torch.zeros(1),
            help="nothing",
            source="nowhere",
            add=lambda *_: None,
            nbytes=lambda *_: 0,
        )


@pytest.mark.parametrize("name", STATISTICS)
def test_each_is_its_formula_whatever_the_batches(name: str) -> None:
    x = samples()
    for batches in ([slice(0, 5)], [slice(0, 2), slice(2, 5)], [slice(i, i + 1) for i in range(5)]):
        found = gathered(STATISTICS[name], x, batches)
        torch.testing.assert_close(found, expected_of(x)[name])
        assert found.dtype == torch.float32


@pytest.mark.parametrize("name", ["sqnorm", "inputs"])
def test_what_is_kept_by_sample_may_come_again_and_in_any_order(name: str) -> None:
    x, one = samples(), STATISTICS[name]
    plain = gathered(one, x, [slice(0, 5)])
    assert torch.equal(gathered(one, x, [slice(3, 5), slice(0, 3), slice(0, 3), slice(2, 4)]), plain)


@pytest.mark.parametrize(("nsamples", "fitted"), [(1, 1), (2, 1), (7, 6), (8, 7), (15, 14), (16, 14), (128, 112)])
def test_an_eighth_of_the_samples_is_held_out(nsamples: int, fitted: int) -> None:
    assert fitting_samples(nsamples) == fitted
    x = samples(nsamples)
    for size in (1, 3, nsamples):
        batches = [slice(start, min(start + size, nsamples)) for start in range(0, nsamples, size)]
        fitting, heldout = (gathered(one, x, batches) for one in (FITTING, HELDOUT))
        whole = (fitting * fitted + heldout * (nsamples - fitted)) / nsamples
        torch.testing.assert_close(whole, 2 / nsamples * x.flatten(0, 1).T @ x.flatten(0, 1))
        last = x[fitted:].flatten(0, 1)
        torch.testing.assert_close(heldout * (nsamples - fitted), 2 * last.T @ last)


@pytest.mark.parametrize("d_in", [513, 1024])
def test_a_wide_gram_is_whole(d_in: int) -> None:
    """It is gathered from the diagonal on, in stripes that need not divide it."""
    one, inputs = STATISTICS["gram"], torch.randn(3, 5, d_in)
    gathered = one(d_in, 3, torch.device("cpu"))
    for sample in range(3):
        one.add(gathered, inputs[sample : sample + 1], slice(sample, sample + 1), 3)
    gram, flat = one.finish(gathered), inputs.flatten(0, 1).double()
    torch.testing.assert_close(gram.double(), 2 / 3 * flat.T @ flat, rtol=1e-5, atol=1e-5)


def test_the_gram_is_accumulated_in_the_dtype_asked_for() -> None:
    x = samples()
    wide = gathered(GRAM, x, [slice(0, 5)], GramOptions("float64"))
    assert wide.dtype == torch.float64
    flat = x.double().reshape(-1, 6)
    torch.testing.assert_close(wide, 2 / 5 * flat.T @ flat)
    assert {one.options for one in (GRAM, FITTING, HELDOUT)} == {GramOptions}
    with pytest.raises(OptionError, match="--gram-dtype 'float16' is none of float32, float64"):
        GramOptions("float16")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STATISTICS)
def test_memory_while_it_is_gathered(name: str) -> None:
    one = STATISTICS[name]
    assert one(7, 3, CPU).nbytes == one.nbytes(7, 3)


@pytest.mark.parametrize("name", STATISTICS)
def test_the_part_of_some_columns(name: str) -> None:
    x = samples()
    columns = slice(1, 4)
    whole = LinearStats(**{name: expected_of(x)[name]})
    part = whole.of(columns)
    torch.testing.assert_close(part[STATISTICS[name]], expected_of(x, columns)[name])
    assert part.place == columns
    assert whole.place == slice(None)


def test_what_was_collected() -> None:
    gram, sqnorm = torch.eye(3), torch.ones(3)
    stats = LinearStats(gram=gram, sqnorm=sqnorm, inputs=None)
    assert (GRAM in stats, SQNORM in stats, INPUTS in stats) == (True, True, False)
    assert set(stats.tensors) == {"gram", "sqnorm"}
    assert stats.gram is stats[GRAM] is gram
    assert stats.sqnorm is stats[SQNORM] is sqnorm
    with pytest.raises(ValueError, match="the statistic 'inputs' was not collected"):
        stats[INPUTS]
    with pytest.raises(ValueError, match="the statistic 'inputs' was not collected"):
        _ = stats.inputs


def test_others_in_the_place_of_some() -> None:
    stats = LinearStats(gram=torch.eye(3), sqnorm=torch.ones(3))
    inputs = torch.zeros(3, 2)
    changed = stats.with_(inputs=inputs, sqnorm=None)
    assert set(changed.tensors) == {"gram", "inputs"}
    assert changed.inputs is inputs
    assert set(stats.tensors) == {"gram", "sqnorm"}


def test_what_is_derived_is_made_once_for_all_who_share_it() -> None:
    stats = LinearStats(gram=torch.eye(3))
    made: list[LinearStats] = []

    def make(whole: LinearStats) -> int:
        made.append(whole)
        return len(made)

    assert stats.once("a", make) == 1
    assert stats.once("a", make) == 1
    assert stats.with_(sqnorm=torch.ones(3)).once("a", make) == 1
    assert stats.of(slice(0, 2)).once("a", make) == 1
    assert stats.once(("b", 0.5), make) == 2
    assert made == [stats, stats]
    with pytest.raises(ValueError, match="'c' is derived from all columns; ask for it before taking some"):
        stats.of(slice(0, 2)).once("c", make)
    assert LinearStats(gram=torch.eye(3)).once("a", make) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 256, 256), (1, 37, 19), (3, 1, 7), (2, 300, 1000), (5, 16, 130), (2, 4, 0)])
def test_square_norms_are_torchs(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    wide = 3 * torch.randn((*shape[:2], 2 * shape[2]), generator=torch.Generator().manual_seed(0)).to(dtype)
    for inputs in (wide[..., : shape[2]], wide[..., : shape[2]].contiguous(), wide[..., ::2]):
        found = torch.zeros(shape[0], shape[2])
        SQNORM.add(found, inputs, slice(0, shape[0]), shape[0])
        expected = torch.linalg.vector_norm(inputs, dim=1, dtype=torch.float32).square()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        if platform.machine() == "x86_64":  # masks that were chosen before stay what they were
            assert torch.equal(found, expected)
