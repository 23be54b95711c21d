"""Samples that the dense model writes itself."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.small_models import NANO
from tests.trim_cli import COMPUTE, save_tokens, trim, trim_json
from trimcli import CalibrateOptions, calibrate
from trimcli.commands.written import TOGETHER, write_samples
from trimcli.errors import OptionError, ResourceError
from trimcli.files.calibration import CalibrationFile
from trimcli.files.checkpoint import Checkpoint
from trimcli.model.skeleton import Skeleton
from trimcli.text.encoding import Encoder
from trimcli.text.tokens import load_tokenizer

TOPICS = [topics[name] for name in sorted(topics)[:8]]


def written(model: Path, *, nsamples: int = 6, seqlen: int = 40, seed: int = 0, bos: str = "auto") -> torch.Tensor:
    encoder = Encoder.of(load_tokenizer(model), bos)  # type: ignore[arg-type]
    return write_samples(Skeleton(Checkpoint.open(model)), encoder, nsamples=nsamples, seqlen=seqlen, seed=seed)


def surprise(model: Path, samples: torch.Tensor) -> float:
    """Mean cross-entropy in nats, by transformers."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return float(loaded(samples.long(), labels=samples.long()).loss)


def test_they_are_what_the_model_expects(nano_qwen2: Path) -> None:
    """No sample of the model's distribution surprises it as tokens in another order do."""
    samples = written(nano_qwen2)
    assert (samples.dtype, samples.shape) == (torch.int32, (6, 40))
    assert not (samples == load_tokenizer(nano_qwen2).eos_token_id).any()
    shuffled = samples[:, torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    assert surprise(nano_qwen2, samples) < surprise(nano_qwen2, shuffled) - 1


def test_the_seed_draws_them_and_nothing_else_is_drawn(nano_qwen2: Path) -> None:
    before = torch.random.get_rng_state()
    one, again, other = (written(nano_qwen2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_in_several_batches(nano_qwen2: Path) -> None:
    seqlen = 64
    nsamples = TOGETHER // seqlen + 1
    samples = written(nano_qwen2, nsamples=nsamples, seqlen=seqlen)
    assert len(samples) == nsamples
    assert len(samples.unique(dim=0)) == nsamples


def test_bos_heads_every_sample_where_it_is_asked_for(nano_qwen2: Path) -> None:
    bos = load_tokenizer(nano_qwen2).bos_token_id
    assert (written(nano_qwen2, bos="each")[:, 0] == bos).all()
    assert not (written(nano_qwen2, bos="none") == bos).any()


def test_a_prune_is_that_of_the_calibrated_samples(nano_qwen2: Path, tmp_path: Path) -> None:
    shared = ("--nsamples", 4, "--seqlen", 32, "--cache-dir", tmp_path / "cache", *COMPUTE)
    trim_json("calibrate", nano_qwen2, "-o", tmp_path / "calib", "--dataset", "self", *shared)
    recorded = CalibrationFile(tmp_path / "calib").manifest
    assert recorded["options"]["dataset"] == "self"
    how = ("prune", nano_qwen2, "--sparsity", 0.5, "--cache-dir", tmp_path / "cache", *COMPUTE)
    trim_json(*how, "-o", tmp_path / "one", "--dataset", "self", "--nsamples", 4, "--seqlen", 32)
    trim_json(*how, "-o", tmp_path / "other", "--tokens", tmp_path / "calib")
    one, other = (load_file(tmp_path / name) for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_share_of_them_beside_a_text(nano_qwen2: Path, tmp_path: Path) -> None:
    """Each kind as if it were asked for alone, evenly from the first sample to the last."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TOPICS))
    shared = ("--seqlen", 16, "--stats", "norms", "--cache-dir", tmp_path / "cache", *COMPUTE)

    def samples(*words: object) -> torch.Tensor:
        path = tmp_path / "-".join(map(str, words[1:])).replace("/", "_")
        trim_json("calibrate", nano_qwen2, "-o", path, "--dataset", *words, *shared)
        return CalibrationFile(path).samples

    both = samples(text, "--nsamples", 6, "--self-share", 0.3)
    own, drawn = samples("self", "--nsamples", 2), samples(text, "--nsamples", 4)
    assert both.tolist() == torch.stack([drawn[0], own[0], drawn[1], drawn[2], own[1], drawn[3]]).tolist()
    assert torch.equal(samples(text, "--nsamples", 3, "--self-share", 1), samples("self", "--nsamples", 3))


def test_a_prune_in_one_go_takes_the_share_along(nano_qwen2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TOPICS))
    shared = ("--dataset", text, "--nsamples", 4, "--seqlen", 16, "--cache-dir", tmp_path / "cache", *COMPUTE)
    trim_json("calibrate", nano_qwen2, "-o", tmp_path / "calib", "--self-share", 0.5, *shared)
    how = ("prune", nano_qwen2, "--sparsity", 0.5, *COMPUTE)
    trim_json(*how, "-o", tmp_path / "one", "--self-share", 0.5, *shared)
    trim_json(*how, "-o", tmp_path / "other", "--tokens", tmp_path / "calib", "--cache-dir", tmp_path / "cache")
    one, other = (load_file(tmp_path / name) for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prune", "--sparsity", 0.5, "--self-share", 0.5), "--self-share with --dataset self"),
        (("calibrate", "--self-share", 1.5), "--self-share 1.5 is outside [0, 1]"),
        (("prune", "--sparsity", 0.5, "--pack"), "--pack with --dataset self"),
        (("prune", "--sparsity", 0.5, "--chat"), "--chat with --dataset self"),
        (("sweep", "--sparsity", 0.5), "then --tokens FILE here"),
    ],
)
def test_what_it_does_not_go_with(words: tuple[object, ...], said: str, nano_qwen2: Path, tmp_path: Path) -> None:
    command, *more = words
    done = trim(command, nano_qwen2, "-o", tmp_path / "out", "--dataset", "self", *more)
    assert done.status == 2
    assert said in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [("--dataset", "self"), ("--self-share", 0.5)])
def test_more_tokens_than_positions_are_refused_before_any_is_written(
    more: tuple[object, ...], nano_qwen2: Path, tmp_path: Path
) -> None:
    done = trim("calibrate", nano_qwen2, "-o", tmp_path / "out", "--seqlen", 513, "--nsamples", 2, *more)
    assert (done.status, "samples of 513 tokens are longer than the 512 positions" in done.err) == (2, True)
    assert "writing samples" not in done.err


def test_a_tokenizer_with_neither_token_is_refused(nano_qwen2: Path) -> None:
    encoder = Encoder.of(load_tokenizer(nano_qwen2))
    encoder.tokenizer.bos_token = encoder.tokenizer.eos_token = None
    with pytest.raises(OptionError, match="has neither; give a text"):
        write_samples(Skeleton(Checkpoint.open(nano_qwen2)), encoder, nsamples=2, seqlen=16, seed=0)


def test_the_plan_holds_the_whole_model(tmp_path: Path) -> None:
    """Of 3 billion weights in float32, though a prune holds one layer of them."""
    plan = ("plan", NANO.with_name("qwen2.5-3b"), "--sparsity", 0.5, "--nsamples", 4, "--seqlen", 64, *COMPUTE)
    shares = (), ("--self-share", 0.5), ("--dataset", "self")
    plain, half, own = (trim_json(*plan, *more)["peak_host_bytes"] for more in shares)
    assert plain < 3e9 < 12e9 < half <= own
    tokens = save_tokens(tmp_path / "tokens", vocabulary=1000, seqlen=64)
    assert trim_json(*plan, "--dataset", "self", "--tokens", tokens)["peak_host_bytes"] == plain


def test_a_limit_that_does_not_hold_the_model(nano_qwen2: Path, tmp_path: Path) -> None:
    options = CalibrateOptions(dataset="self", nsamples=2, seqlen=16, cache_dir=tmp_path / "cache", max_memory="369MiB")
    with pytest.raises(ResourceError, match=r"writing samples, for which all of .* is in memory, takes at least"):
        calibrate(str(nano_qwen2), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
