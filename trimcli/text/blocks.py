"""Text to blocks to train on: consecutive tokens, none of them in two blocks."""

import random
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimcli.errors import InputError
from trimcli.text.encoding import Bos, Encoder
from trimcli.text.sources import calibration_source, name_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def training_blocks(
    dataset: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    bos: Bos = "auto",
    chat: bool = False,
) -> Tensor:
    """Blocks in random order, int32 [n, seqlen], n at most `nsamples` and less where there is no more text.

    One text is cut from its beginning; documents are joined in random order, each once, EOS after each. What is left
    over at the end is dropped. bos, chat: see Encoder; under `each`, BOS and seqlen - 1 tokens are a block. Raises as
    `calibration_source` and `Encoder.of`, and InputError where not even two blocks are there.
    """
    encoder, rng = Encoder.of(tokenizer, bos, chat=chat), random.Random(seed)
    room = seqlen - len(encoder.head)
    with calibration_source(dataset, encoder.render if chat else None) as source:
        if isinstance(source, str):
            ids = encoder.encode(source)
        else:
            close = encoder.closed if encoder.tokenizer.eos_token_id is not None else encoder.encode
            order = rng.sample(range(len(source)), len(source))
            ids = list(islice(chain.from_iterable(close(source[index]) for index in order), nsamples * room))
    count = len(ids) // room
    if count < 2:
        held = f"{name_of(dataset)} holds {len(ids)} tokens, fewer than two blocks of --seqlen {seqlen}"
        raise InputError(f"{held}, one to train on and one to hold out; give a longer text or a smaller --seqlen.")
    blocks = torch.tensor(ids[: count * room], dtype=torch.int32).view(count, room)
    blocks = blocks[rng.sample(range(count), min(count, nsamples))]
    return encoder.headed(blocks)
