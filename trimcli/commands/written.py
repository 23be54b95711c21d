"""Calibration samples that the dense model writes itself, where no text like its training data is at hand."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError, OptionError
from trimcli.methods.masks import slices
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline.estimate import whole_model
from trimcli.pipeline.fit import Work, fit
from trimcli.text.encoding import Encoder

# Tokens that are written at a time, over all samples of a batch.
TOGETHER = 1 << 14


def written_at_once(nsamples: int, seqlen: int) -> int:
    """How many of the samples are written together."""
    return min(nsamples, max(1, TOGETHER // seqlen))


def spread(kinds: Sequence[Tensor]) -> Tensor:
    """Samples [n, L] of several kinds as one, each kind evenly from first to last: the last ones are held out."""
    places = torch.cat([(torch.arange(len(kind)) + 0.5) / len(kind) for kind in kinds])
    return torch.cat(list(kinds))[places.argsort(stable=True)]


def write_samples(
    skeleton: Skeleton,
    encoder: Encoder,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    trust_remote_code: bool = False,
    progress: Progress = NO_PROGRESS,
) -> Tensor:
    """Samples drawn token by token from the model's own predictions, int32 [nsamples, seqlen] (Ji et al. 2024).

    From BOS, or EOS where there is no BOS, at temperature 1 over the whole vocabulary, EOS alone left out. The model is
    in memory whole; afterwards nothing is left of it. Raises ResourceError where the limits do not hold it,
    OptionError where the tokenizer has neither token, InputError for a model that cannot generate.
    """
    tokenizer = encoder.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        lacks = f"--dataset self begins with BOS or EOS, and the tokenizer in {tokenizer.name_or_path} has neither"
        raise OptionError(f"{lacks}; give a text.")
    together = written_at_once(nsamples, seqlen)
    words = f"writing samples, for which all of {skeleton.checkpoint.id} is in memory,"
    fit(skeleton, Work(words, lambda *_: whole_model(skeleton, together * seqlen), 1, 1, 1))
    # Another one than the walk's, whose layers are filled and emptied in turn.
    how: dict[str, Any] = {"dtype": skeleton.dtype, "device": skeleton.device}
    writer = Skeleton(skeleton.checkpoint, trust_remote_code=trust_remote_code, **how)
    if not writer.model.can_generate():
        raise InputError(f"{skeleton.checkpoint.id} cannot generate, as --dataset self asks; give a text.")
    writer.load_everything()
    head = len(encoder.head)
    found = torch.empty(nsamples, seqlen, dtype=torch.int32)
    devices = [skeleton.device] if skeleton.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), progress.task("writing samples", nsamples) as step:
        torch.manual_seed(seed)
        for rows in slices(nsamples, together):
            found[rows] = _written(writer, start, rows.stop - rows.start, seqlen - head, tokenizer)[:, 1 - head :].cpu()
            step(rows.stop - rows.start)
    return found


def _written(writer: Skeleton, start: int, count: int, length: int, tokenizer: Any) -> Tensor:
    """So many beginnings and `length` tokens that follow each, int64 [count, 1 + length]."""
    from transformers import GenerationConfig

    ends = tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length, min_new_tokens=length,
        bos_token_id=start, eos_token_id=ends, pad_token_id=ends if ends is not None else start,
    )  # fmt: skip
    inputs = torch.full((count, 1), start, device=writer.device)
    found: Tensor = writer.model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    return found
