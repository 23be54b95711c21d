"""Text to token windows, sampled as the published pruning code does."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimcli.errors import InputError, OptionError, first_line
from trimcli.files.tensors import open_tensors
from trimcli.text.encoding import Bos, Encoder
from trimcli.text.sources import Documents, calibration_source, evaluation_text, name_of
from trimcli.text.stdin import file_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

C4_VALIDATION_WINDOWS = 256
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class EvaluationText:
    """The windows of a text, int64 [n, seqlen], how many tokens all of it has, its name, and where BOS stands."""

    windows: Tensor
    tokens: int
    dataset: str
    bos: str


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
    dataset: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    bos: Bos = "auto",
    pack: bool = False,
    chat: bool = False,
) -> Tensor:
    """Calibration samples, int32 [nsamples, seqlen], by Python's `random` in the order of the published code.

    Documents are drawn uniformly until one has more than seqlen tokens; a window starts uniformly in 0..length-seqlen-1
    (Frantar & Alistarh 2023; Sun et al. 2023). pack: documents are taken in random order, each once before any again,
    joined by EOS and cut into samples. bos, chat: see Encoder; under `each`, BOS and seqlen - 1 tokens drawn so are a
    sample. Raises as `calibration_source` and `Encoder.of`, and InputError for a text that is too short.
    """
    if nsamples < 1 or seqlen < 1:
        raise OptionError(f"--nsamples {nsamples} and --seqlen {seqlen} must be at least 1; raise them.")
    encoder, rng = Encoder.of(tokenizer, bos, chat=chat), random.Random(seed)
    head, name = encoder.head, name_of(dataset)
    room = seqlen - len(head)
    with calibration_source(dataset, encoder.render if chat else None) as source:
        if pack:
            ids = _packed(source, encoder, rng, name)
            return torch.tensor([[*head, *islice(ids, room)] for _ in range(nsamples)], dtype=torch.int32)
        if isinstance(source, str):
            tokens = _tokenize(encoder, source)
            if len(tokens) <= room:
                held = f"{name} holds {len(tokens)} tokens, and samples of --seqlen {seqlen} need more"
                raise InputError(f"{held}; give a longer text or a smaller --seqlen.")
            windows = torch.stack([_draw_window(tokens, room, rng) for _ in range(nsamples)])
        else:
            windows = _draw_from_documents(source, encoder, nsamples, room, rng, name)
    return encoder.headed(windows)


def evaluation_windows(
    dataset: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seqlen: int,
    max_windows: int | None = None,
    bos: Bos = "auto",
    chat: bool = False,
) -> EvaluationText:
    """The first `max_windows` windows of a text, or all; no token is left out between them.

    bos, chat: see Encoder; under `each`, a window is BOS and seqlen - 1 tokens of the text. Raises as `evaluation_text`
    and `Encoder.of`; InputError if too short.
    """
    if seqlen < 2:
        raise OptionError(f"--seqlen {seqlen} leaves nothing to predict; give at least 2.")
    if max_windows is not None and max_windows < 1:
        raise OptionError(f"--max-windows {max_windows} leaves nothing to measure; give at least 1.")
    encoder = Encoder.of(tokenizer, bos, chat=chat)
    room = seqlen - len(encoder.head)
    tokens = _tokenize(encoder, evaluation_text(dataset, encoder.render if chat else None))
    if dataset == "c4":
        tokens = tokens[: C4_VALIDATION_WINDOWS * room]
    if len(tokens) < room:
        held = f"{name_of(dataset)} holds {len(tokens)} tokens, fewer than one window of --seqlen {seqlen}"
        raise InputError(f"{held}; give a longer text or a smaller --seqlen.")
    count = len(tokens) // room
    windows = encoder.headed(tokens[: count * room].long().view(count, room))
    return EvaluationText(windows[:max_windows], len(tokens), dataset, encoder.bos)


def read_tokens(path: Path, vocab_size: int | None = None) -> Tensor:
    """`tokens` of a safetensors file, int32 [nsamples, seqlen]. Raises InputError, also for ids beyond `vocab_size`.

    path: `-` is standard input.
    """
    name = name_of(str(path))
    with open_tensors(file_of(path)) as handle:
        names = list(handle.keys())
        if "tokens" not in names:
            found = ", ".join(names[:5]) or "nothing"
            raise InputError(f"{name} holds {found} but no tensor `tokens`; give a file of token samples.")
        tokens: Tensor = handle.get_tensor("tokens")
    if tokens.dtype not in INTEGER_DTYPES or tokens.dim() != 2 or not tokens.numel():
        found = f"`tokens` in {name} is {tokens.dtype} of shape {list(tokens.shape)}"
        raise InputError(f"{found}; an integer tensor of shape [nsamples, seqlen] is needed.")
    limit = 2**31 if vocab_size is None else vocab_size
    for number in (int(tokens.min()), int(tokens.max())):
        if not 0 <= number < limit:
            wrong = f"`tokens` in {name} holds the id {number}, outside 0..{limit - 1}"
            raise InputError(f"{wrong}; give samples made with this model's tokenizer.")
    return tokens.to(torch.int32)


def _tokenize(encoder: Encoder, text: str) -> Tensor:
    """int32 [tokens]."""
    return torch.tensor(encoder.encode(text), dtype=torch.int32)


def _draw_window(tokens: Tensor, length: int, rng: random.Random) -> Tensor:
    """int32 [length]: consecutive ones of more than so many tokens."""
    start = rng.randint(0, len(tokens) - length - 1)
    return tokens[start : start + length]


def _draw_from_documents(
    documents: Documents, encoder: Encoder, nsamples: int, length: int, rng: random.Random, name: str
) -> Tensor:
    """int32 [nsamples, length]; a document is tokenised at most once however often it is drawn."""
    too_short: dict[int, int] = {}
    long_enough: dict[int, Tensor] = {}
    windows: list[Tensor] = []
    while len(windows) < nsamples:
        if len(too_short) == len(documents):
            seqlen, longest = length + len(encoder.head), max(too_short.values(), default=0)
            wanted = f"{length} tokens (--seqlen less BOS)" if encoder.head else f"--seqlen {seqlen} tokens"
            what = f"no document of {name} has more than {wanted}, the longest has {longest}"
            raise InputError(f"{what}; join them with --pack, give longer ones or a smaller --seqlen.")
        index = rng.randint(0, len(documents) - 1)
        if index not in too_short and index not in long_enough:
            tokens = _tokenize(encoder, documents[index])
            if len(tokens) > length:
                long_enough[index] = tokens
            else:
                too_short[index] = len(tokens)
        if index in long_enough:
            windows.append(_draw_window(long_enough[index], length, rng))
    return torch.stack(windows)


def _packed(source: str | Documents, encoder: Encoder, rng: random.Random, name: str) -> Iterator[int]:
    """The ids of documents without end, each closed by EOS: all in random order, then all in another."""
    if isinstance(source, str):
        raise OptionError(f"--pack joins documents, and {name} is one text; leave --pack out.")
    if encoder.tokenizer.eos_token_id is None:
        lacks = f"--pack joins documents by EOS, and the tokenizer in {encoder.tokenizer.name_or_path} has none"
        raise OptionError(f"{lacks}; leave --pack out.")
    while True:
        held = False
        for index in rng.sample(range(len(source)), len(source)):
            ids = encoder.closed(source[index])
            held = held or bool(ids)
            yield from ids
        if not held:
            raise InputError(f"every document of {name} is blank; give text to read.")
