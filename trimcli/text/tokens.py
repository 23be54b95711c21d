"""Text to token windows, sampled as the published pruning code does."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimcli.errors import InputError, OptionError, first_line
from trimcli.files.tensors import open_tensors
from trimcli.text.sources import Documents, calibration_source, evaluation_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

C4_VALIDATION_WINDOWS = 256
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class EvaluationText:
    """The consecutive windows of a text, int64 [n, seqlen], how many tokens all of it has, and its name."""

    windows: Tensor
    tokens: int
    dataset: str


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model directory. Raises InputError when it is unusable or would run code of its own."""
    from transformers import AutoTokenizer

    way_out = "put the model's tokenizer files there, or give the samples with --tokens."
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as problem:
        # Each tokenizer class fails in its own way on missing or damaged files.
        wrong = f"is missing or not usable ({first_line(problem)}); {way_out}"
        if "trust_remote_code" in str(problem):
            wrong = "runs code of its own; trust it with --trust-remote-code."
        raise InputError(f"the tokenizer in {directory} {wrong}") from None
    # Without its files transformers builds a tokenizer that knows no word and turns every text into nothing.
    if tokenizer.vocab_size < 2:
        raise InputError(f"the tokenizer in {directory} is missing: no vocabulary is there; {way_out}")
    return tokenizer


def calibration_tokens(
    dataset: str, tokenizer: "PreTrainedTokenizerBase", *, nsamples: int, seqlen: int, seed: int
) -> Tensor:
    """Calibration samples, int32 [nsamples, seqlen], by Python's `random` in the order of the published code.

    Documents are drawn uniformly until one has more than seqlen tokens; a window starts uniformly in 0..length-seqlen-1
    (Frantar & Alistarh 2023; Sun et al. 2023). Raises as `calibration_source`, and InputError for a text that is too
    short.
    """
    if nsamples < 1 or seqlen < 1:
        raise OptionError(f"--nsamples {nsamples} and --seqlen {seqlen} must be at least 1; raise them.")
    rng = random.Random(seed)
    with calibration_source(dataset) as source:
        if not isinstance(source, str):
            return _draw_from_documents(source, tokenizer, nsamples, seqlen, rng, dataset)
        tokens = _tokenize(tokenizer, source)
    if len(tokens) <= seqlen:
        held = f"{dataset} holds {len(tokens)} tokens, and samples of --seqlen {seqlen} need more"
        raise InputError(f"{held}; give a longer text or a smaller --seqlen.")
    return torch.stack([_draw_window(tokens, seqlen, rng) for _ in range(nsamples)])


def evaluation_windows(
    dataset: str, tokenizer: "PreTrainedTokenizerBase", *, seqlen: int, max_windows: int | None = None
) -> EvaluationText:
    """The first `max_windows` windows of a text, or all. Raises as `evaluation_text`; InputError if too short."""
    if seqlen < 2:
        raise OptionError(f"--seqlen {seqlen} leaves nothing to predict; give at least 2.")
    if max_windows is not None and max_windows < 1:
        raise OptionError(f"--max-windows {max_windows} leaves nothing to measure; give at least 1.")
    tokens = _tokenize(tokenizer, evaluation_text(dataset))
    if dataset == "c4":
        tokens = tokens[: C4_VALIDATION_WINDOWS * seqlen]
    if len(tokens) < seqlen:
        held = f"{dataset} holds {len(tokens)} tokens, fewer than one window of --seqlen {seqlen}"
        raise InputError(f"{held}; give a longer text or a smaller --seqlen.")
    count = len(tokens) // seqlen
    windows = tokens[: count * seqlen].long().view(count, seqlen)
    return EvaluationText(windows[:max_windows], len(tokens), dataset)


def read_tokens(path: Path, vocab_size: int | None = None) -> Tensor:
    """`tokens` of a safetensors file, int32 [nsamples, seqlen]. Raises InputError, also for ids beyond `vocab_size`."""
    with open_tensors(path) as handle:
        names = list(handle.keys())
        if "tokens" not in names:
            found = ", ".join(names[:5]) or "nothing"
            raise InputError(f"{path} holds {found} but no tensor `tokens`; give a file of token samples.")
        tokens: Tensor = handle.get_tensor("tokens")
    if tokens.dtype not in INTEGER_DTYPES or tokens.dim() != 2 or not tokens.numel():
        found = f"`tokens` in {path} is {tokens.dtype} of shape {list(tokens.shape)}"
        raise InputError(f"{found}; an integer tensor of shape [nsamples, seqlen] is needed.")
    limit = 2**31 if vocab_size is None else vocab_size
    for number in (int(tokens.min()), int(tokens.max())):
        if not 0 <= number < limit:
            wrong = f"`tokens` in {path} holds the id {number}, outside 0..{limit - 1}"
            raise InputError(f"{wrong}; give samples made with this model's tokenizer.")
    return tokens.to(torch.int32)


def _tokenize(tokenizer: "PreTrainedTokenizerBase", text: str) -> Tensor:
    """int32 [tokens]: one call, with the tokenizer's own special tokens, without its warning about length."""
    encoded = tokenizer(text, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int32)


def _draw_window(tokens: Tensor, seqlen: int, rng: random.Random) -> Tensor:
    """int32 [seqlen]: consecutive ones of more than seqlen tokens."""
    start = rng.randint(0, len(tokens) - seqlen - 1)
    return tokens[start : start + seqlen]


def _draw_from_documents(
    documents: Documents,
    tokenizer: "PreTrainedTokenizerBase",
    nsamples: int,
    seqlen: int,
    rng: random.Random,
    dataset: str,
) -> Tensor:
    """int32 [nsamples, seqlen]; a document is tokenised at most once however often it is drawn."""
    too_short: dict[int, int] = {}
    long_enough: dict[int, Tensor] = {}
    windows: list[Tensor] = []
    while len(windows) < nsamples:
        if len(too_short) == len(documents):
            longest = f"tokens, the longest has {max(too_short.values(), default=0)}"
            what = f"no document of {dataset} has more than --seqlen {seqlen} {longest}"
            raise InputError(f"{what}; give longer documents, one text as .txt or a smaller --seqlen.")
        index = rng.randint(0, len(documents) - 1)
        if index not in too_short and index not in long_enough:
            tokens = _tokenize(tokenizer, documents[index])
            if len(tokens) > seqlen:
                long_enough[index] = tokens
            else:
                too_short[index] = len(tokens)
        if index in long_enough:
            windows.append(_draw_window(long_enough[index], seqlen, rng))
    return torch.stack(windows)
