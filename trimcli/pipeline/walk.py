"""Hidden states through the decoder layers, one layer resident; all samples' are one buffer, updated in place."""

from collections.abc import Collection, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError, ResourceError
from trimcli.methods.masks import slices
from trimcli.model.forward import Embedder, Forward, Recording, first_output
from trimcli.model.skeleton import DecoderLayer, Skeleton
from trimcli.pipeline.collector import Collector, InputGroup, find_groups

# The share of free device memory that the hidden states may take.
SHARE = 0.4


class Walk:
    """Samples on their way through a skeleton.

    tokens: integer [N, L]. batch_size: None chooses. wanted: the linears whose inputs matter, None for all. Raises
    InputError for tokens outside the vocabulary, ResourceError when not even one sample fits in memory.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        *,
        batch_size: int | None = None,
        wanted: Collection[str] | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> None:
        self.skeleton = skeleton
        self.wanted = wanted
        self.forward = Forward(skeleton)
        self.progress = progress
        self.nsamples, self.seqlen = tokens.shape
        chosen = batch_tokens(skeleton.device) // self.seqlen
        self.batch_size = max(1, min(batch_size or chosen, self.nsamples))
        refuse_foreign_tokens(skeleton, tokens)
        self._tokens = tokens
        self._recordings: dict[int, Recording] = {}
        self._own: dict[int, Recording] = {}
        self._groups: dict[int, list[InputGroup]] = {}
        self.hidden = self._embed()
        if self._own and self.batch_size > 1:
            # Calls that depend on the tokens are good for the very samples they were recorded with.
            self.batch_size = 1
            self._recordings.clear()
            self._own.clear()
            self.hidden = self._embed()

    def _embed(self) -> Tensor:
        hidden: Tensor | None = None
        with self.forward.embedding() as embed, self.progress.task("embedding", self.nsamples) as advance:
            self._record_size(1, embed)
            # With a single batch there is nothing else to see by whether the calls depend on the tokens.
            self._keep_recording(slice(self.nsamples - 1, self.nsamples), embed(self._tokens[-1:])[1])
            for rows in slices(self.nsamples, self.batch_size):
                states, recording = embed(self._tokens[rows])
                self._keep_recording(rows, recording)
                if hidden is None:
                    hidden = self._buffer(states)
                hidden[rows] = states.to(hidden.device)
                advance(rows.stop - rows.start)
        if hidden is None:
            raise InputError("there are no calibration samples; give at least one.")
        return hidden

    def _buffer(self, states: Tensor) -> Tensor:
        shape = (self.nsamples, *states.shape[1:])
        size = states[0].numel() * self.nsamples * states.element_size()
        if states.device.type != "cpu":
            free, _ = torch.get_device_module(states.device).mem_get_info(states.device)
            if size > SHARE * free:
                return torch.empty(shape, dtype=states.dtype, pin_memory=states.device.type == "cuda")
        return torch.empty(shape, dtype=states.dtype, device=states.device)

    def _keep_recording(self, rows: slice, recording: Recording) -> None:
        """Batches of one size are called alike; where the calls depend on the tokens, each batch keeps its own."""
        shared = self._recordings.setdefault(rows.stop - rows.start, recording)
        if shared is not recording and not _alike(shared, recording, self.skeleton.device):
            self._own[rows.start] = recording

    def _record_size(self, size: int, embed: Embedder) -> None:
        if size not in self._recordings:
            self._recordings[size] = embed(self._tokens[:size])[1]

    def layers(self) -> Iterator[DecoderLayer]:
        """Decoder layers in order, each loaded for its turn and dropped after it."""
        for layer in self.skeleton.layers:
            self.skeleton.load_layer(layer)
            try:
                yield layer
            finally:
                self.skeleton.drop_layer(layer)

    def groups(self, layer: DecoderLayer) -> list[InputGroup]:
        """The layer's input groups in order of execution, found with one sample the first time."""
        if layer.index not in self._groups:
            self._groups[layer.index] = find_groups(layer, lambda: self.run_rows(layer, slice(0, 1)), self.wanted)
        return self._groups[layer.index]

    def run_rows(self, layer: DecoderLayer, rows: slice) -> Tensor:
        """The layer's output [b, L, H] for samples `rows`, on the compute device; the buffer stays as it is."""
        return self.call(layer, rows, self.hidden[rows].to(self.skeleton.device, non_blocking=True))

    def call(self, layer: DecoderLayer, rows: slice, hidden: Tensor) -> Tensor:
        """The layer's output for given hidden states [b, L, H] in the place of samples `rows`."""
        recording = self._own.get(rows.start) or self._recordings[rows.stop - rows.start]
        args, kwargs = recording[layer.index]
        with torch.no_grad():
            return first_output(layer.module(hidden, *args, **kwargs))

    def collect(self, layer: DecoderLayer, collector: Collector) -> None:
        """Gather statistics of the layer's inputs; the hidden states stay as they are."""
        with collector.watching():
            self._pass(layer, collector, advance=False)

    def advance(self, layer: DecoderLayer, collector: Collector | None = None) -> None:
        """Replace the hidden states by the layer's outputs, gathering statistics on the way if asked to."""
        with nullcontext() if collector is None else collector.watching():
            self._pass(layer, collector, advance=True)

    def _pass(self, layer: DecoderLayer, collector: Collector | None, *, advance: bool) -> None:
        verb = "forward" if collector is None else "collect"
        title = f"layer {layer.index + 1}/{len(self.skeleton.layers)} {verb}"
        if collector is not None:
            collector.reset()
        sound = torch.ones((), dtype=torch.bool, device=self.skeleton.device)
        with self.progress.task(title, self.nsamples) as step:
            position = 0
            while position < self.nsamples:
                rows = slice(position, min(position + self.batch_size, self.nsamples))
                if collector is not None:
                    collector.batch(rows)
                if not self._fits(layer, rows, sound, advance=advance):
                    # A Gram has already taken in what it saw of the failed batch; a pass that advances has none.
                    if collector is not None and not advance:
                        collector.reset()
                        position = 0
                    self._halve(layer, self.nsamples - position)
                    continue
                position = rows.stop
                step(rows.stop - rows.start)
        # What a collector gathers is checked by its reader, who can name the linear.
        if collector is None and not bool(sound):
            what = f"the outputs of {layer.name} hold NaN or infinite values (the model overflows or is damaged)"
            raise InputError(f"{what}; try --dtype float32, or another checkpoint.")

    def _fits(self, layer: DecoderLayer, rows: slice, sound: Tensor, *, advance: bool) -> bool:
        """Run samples `rows`, and let them advance if asked to; False where memory ran out on the way."""
        try:
            outputs = self.run_rows(layer, rows)
            if advance:
                sound &= torch.isfinite(outputs).all()
                self.hidden[rows] = outputs.to(self.hidden.device)
        except RuntimeError as problem:
            if not _out_of_memory(problem):
                raise
            return False  # to go on out there: in here the traceback keeps the failed batch's activations in memory
        return True

    def _halve(self, layer: DecoderLayer, left: int) -> None:
        """Go on with half the batch size, for the `left` samples of this pass and for the passes to come."""
        if self.batch_size == 1 or self._own:
            what = f"one sample of {self.seqlen} tokens does not fit in the memory of {self.skeleton.device}"
            raise ResourceError(f"{what} at {layer.name}; give a smaller --seqlen or a device with more memory.")
        self.batch_size = max(1, self.batch_size // 2)
        if self.skeleton.device.type != "cpu":
            torch.get_device_module(self.skeleton.device).empty_cache()
        self.progress.warn(f"out of memory at {layer.name}: going on with a batch size of {self.batch_size}.")
        sizes = {self.batch_size, left % self.batch_size, self.nsamples % self.batch_size} - {0}
        with self.forward.embedding() as embed:
            for size in sizes:
                self._record_size(size, embed)


def refuse_foreign_tokens(skeleton: Skeleton, tokens: Tensor) -> None:
    """Raise InputError when a token id is outside the model's vocabulary, or L beyond its positions."""
    vocabulary = skeleton.model.get_input_embeddings().num_embeddings
    low, high = (int(value) for value in torch.aminmax(tokens))
    if low < 0 or high >= vocabulary:
        known = f"the vocabulary of {skeleton.checkpoint.id} (0 to {vocabulary - 1})"
        what = f"token {low if low < 0 else high} is outside {known}"
        raise InputError(f"{what}; the tokens were made by another model's tokenizer.")
    positions = max_positions(skeleton.config)
    if positions is not None and tokens.shape[1] > positions:
        known = f"the {positions} positions of {skeleton.checkpoint.id}"
        raise InputError(f"samples of {tokens.shape[1]} tokens are longer than {known}; give --seqlen {positions}.")


def batch_tokens(device: torch.device) -> int:
    """Tokens in a batch when no batch size is given: enough to fill the device, few enough for small activations."""
    return 2048 if device.type == "cpu" else 16384


def max_positions(config: Any) -> int | None:
    """How many positions a model knows, None where its config does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def default_seqlen(config: Any) -> int:
    """The smaller of 2048 and the model's positions."""
    return min(2048, max_positions(config) or 2048)


def _out_of_memory(problem: RuntimeError) -> bool:
    return isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in str(problem)


def _alike(one: Any, other: Any, device: torch.device) -> bool:
    """Whether two recordings' calls are the same: each pair of tensors compared once, and `device` waited for once."""
    pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    if not _same_form(one, other, pairs):
        return False
    same = [(mine == theirs).all().to(device) for mine, theirs in pairs.values()]
    return not same or bool(torch.stack(same).all())


def _same_form(one: Any, other: Any, pairs: dict[tuple[int, int], tuple[Tensor, Tensor]]) -> bool:
    """Whether two recordings' calls differ in no more than the values of the tensors that go to `pairs`."""
    if isinstance(one, Tensor):
        if one is not other:
            pairs[id(one), id(other)] = (one, other)
        return isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype
    if isinstance(one, dict):
        same = isinstance(other, dict) and one.keys() == other.keys()
        return same and all(_same_form(one[key], other[key], pairs) for key in one)
    if isinstance(one, list | tuple):
        same = isinstance(other, list | tuple) and len(one) == len(other)
        return same and all(_same_form(mine, theirs, pairs) for mine, theirs in zip(one, other, strict=True))
    return type(one) is type(other)
