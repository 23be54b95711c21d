"""Models that hold their pruned matrices as keep bits and kept values, and text from them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trimcli.commands.evaluate import open_masks
from trimcli.commands.options import GenerateOptions
from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import OptionError
from trimcli.evaluation.perplexity import apply_masks
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.tensors import dtype_name
from trimcli.kernels.bitmap.model import MadeSparse, model_bytes, sparsify
from trimcli.model.device import compute_dtype
from trimcli.model.skeleton import Skeleton, open_model, refuse_other_kind
from trimcli.pipeline.walk import max_positions
from trimcli.text.encoding import Encoder
from trimcli.text.tokens import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Generated:
    """A text, and what it took.

    sparse: of `linears` matrices, how many are multiplied as keep bits and kept values. memory: bytes of the model's
    tensors. seconds: from the prompt's first token to the first new one, and from there to the last.
    """

    model: str
    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    sparse: int
    linears: int
    memory: int
    compute_dtype: str

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first new one; 0 where there are none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0


def load_sparse(
    directory: str | Path,
    *,
    masks: Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
) -> "PreTrainedModel":
    """A packed or pruned directory, or a model under masks, as transformers' model that holds it packed.

    Its pruned linears are `SparseLinear`; the dense model is never in memory. dtype: of the computation, torch's or
    by name, as stored if not given or `auto`. Where the products cannot be compiled for the device, a warning says so
    and the model is dense. Raises InputError, MismatchError and OptionError.
    """
    checkpoint = Checkpoint.open(directory)
    refuse_other_kind(checkpoint, images=False)
    place = torch.device(device)
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else compute_dtype(dtype, checkpoint, place)
    if dtype is None:
        stored = [spec for spec in checkpoint.specs().values() if spec.dtype.is_floating_point]
        dtype = max(stored, key=lambda spec: spec.nbytes).dtype if stored else torch.float32
    skeleton = Skeleton(checkpoint, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
    fill_sparse(skeleton, masks, cache_dir)
    model: PreTrainedModel = skeleton.model
    return model


def fill_sparse(
    skeleton: Skeleton,
    masks: Path | None,
    cache_dir: Path | None,
    progress: Progress = NO_PROGRESS,
    *,
    dense: bool = False,
) -> MadeSparse:
    """Load a skeleton whole, its pruned linears sparse (but not if `dense`), with its generation config."""
    from transformers import GenerationConfig

    mask = open_masks(masks, skeleton) if masks else None
    made = MadeSparse((), 0.0) if dense else sparsify(skeleton, mask, cache_dir, progress)
    skeleton.load_everything()
    if mask is not None:
        apply_masks(skeleton, mask)
    directory = skeleton.checkpoint.directory
    if (directory / "generation_config.json").is_file():
        skeleton.model.generation_config = GenerationConfig.from_pretrained(directory)
    return made


def generate(
    model: str,
    prompt: str,
    options: GenerateOptions,
    *,
    write: Callable[[str], object] = lambda _: None,
    progress: Progress = NO_PROGRESS,
) -> Generated:
    """Go on with a text. write: is given each piece as it comes. Raises OptionError and what opening a model raises."""
    options.check()
    skeleton = open_model(model, options)
    tokenizer = load_tokenizer(skeleton.checkpoint.directory, trust_remote_code=options.trust_remote_code)
    encoder = Encoder.of(tokenizer, "once", chat=options.chat)
    ids = encoder.encode(_rendered(encoder, prompt) if options.chat else prompt)
    positions = max_positions(skeleton.config)
    if not ids:
        raise OptionError("the prompt is empty, and this tokenizer puts nothing before it; give a word to begin with.")
    if positions is not None and len(ids) >= positions:
        raise OptionError(f"the prompt's {len(ids)} tokens fill the {positions} positions of {model}; give fewer.")
    most = min(options.max_new_tokens, positions - len(ids)) if positions is not None else options.max_new_tokens
    made = fill_sparse(skeleton, options.masks, options.cache_dir, progress, dense=options.dense)
    pieces = _Pieces(tokenizer, write)
    drawn = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k or 0}
    chosen = drawn if options.temperature else dict.fromkeys(drawn)
    torch.manual_seed(options.seed)
    inputs = torch.tensor([ids], device=skeleton.device)
    with torch.no_grad():
        found = skeleton.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=most,
            do_sample=options.temperature > 0,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=pieces,
            **chosen,
        )
    return Generated(
        skeleton.checkpoint.id,
        prompt,
        "".join(pieces.pieces),
        len(ids),
        found.shape[1] - len(ids),
        pieces.times[1] - pieces.times[0],
        pieces.times[-1] - pieces.times[1],
        len(made.names),
        len(skeleton.matrices(made.names)),
        model_bytes(skeleton.model),
        dtype_name(skeleton.dtype),
    )


def _rendered(encoder: Encoder, prompt: str) -> str:
    """A message by the chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": prompt}]
    return str(encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


class _Pieces:
    """A streamer of transformers: pieces of text once they can no longer change, and when each token came.

    Prompt and answer are decoded together: alone, the answer could lose the space that it begins with.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._known = ""
        self.pieces: list[str] = []
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """The prompt at first, then every token."""
        self._ids += value.flatten().tolist()
        if not self.times:
            self._known = self._decoded()
        elif not (text := self._decoded()).endswith("\N{REPLACEMENT CHARACTER}"):  # the other bytes are still to come
            self._say(text)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """What is left."""
        self._say(self._decoded())

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text

    def _say(self, text: str) -> None:
        if len(text) > len(self._known):
            self.pieces.append(text[len(self._known) :])
            self._write(self.pieces[-1])
            self._known = text
