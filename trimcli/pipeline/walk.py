"""Hidden states through the decoder layers, one layer resident, batch by batch."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError, OptionError, ResourceError, first_line
from trimcli.memory import return_what_was_kept
from trimcli.model.forward import first_output
from trimcli.model.pixels import hidden_form, picture_shape
from trimcli.model.skeleton import DecoderLayer, Form, Skeleton
from trimcli.pipeline.collector import Collector, InputGroup, LeftEarly, find_groups
from trimcli.pipeline.recorded import Recorded
from trimcli.pipeline.stream import Logits, Stream
from trimcli.pipeline.suspended import Suspended
from trimcli.world import current


class Walk:
    """Samples on their way through a skeleton.

    samples: tokens, integer [N, L], or pixels, float [N, C, H, W], by what the model reads. batch_size: None chooses.
    wanted: the linears whose inputs matter, None for all. form: None for the one that the skeleton was proven to have.
    seqlen: L; of pictures about how many places each becomes. Raises InputError for what the model does not take,
    ResourceError when not even one sample fits in memory.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        samples: Tensor,
        *,
        batch_size: int | None = None,
        wanted: Collection[str] | None = None,
        progress: Progress = NO_PROGRESS,
        form: Form | None = None,
    ) -> None:
        self.skeleton = skeleton
        self.wanted = wanted
        self.progress = progress
        self.nsamples, self.seqlen = len(samples), sample_length(skeleton, samples.shape)
        if not skeleton.images:
            refuse_foreign_tokens(skeleton, samples)
        size = batch_of(skeleton, self.nsamples, self.seqlen, batch_size)
        if (form or skeleton.form) == "suspended" and skeleton.spill is not None and form is None:
            what = f"the hidden states of {skeleton.checkpoint.id} belong to passes of its own"
            progress.warn(f"{what} and stay in memory, whatever --spill says.")
        kind = Suspended if (form or skeleton.form) == "suspended" else Recorded
        try:
            self.stream: Stream = kind(skeleton, samples, size, progress)
        except (ValueError, RuntimeError) as problem:
            if not skeleton.images or _out_of_memory(problem):
                raise
            raise not_taken(skeleton, samples.shape[1:], problem) from None
        self._groups: dict[int, list[InputGroup]] = {}

    @property
    def tokens(self) -> int | None:
        """Tokens of a sample that every layer is given; None where they become more or fewer from layer to layer."""
        return None if self.skeleton.images else self.seqlen

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return self.stream.batch_size

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
            self._groups[layer.index] = find_groups(layer, lambda: self.call(layer, self.stream.least), self.wanted)
        return self._groups[layer.index]

    def states(self, rows: slice) -> Tensor:
        """The hidden states [b, L, H] of samples `rows`, on the compute device."""
        return self.stream.states(rows)

    def call(self, layer: DecoderLayer, rows: slice, hidden: Tensor | None = None) -> Tensor:
        """The layer's output [b, L, H] for samples `rows`, which stay as they are, or for other hidden states."""
        return first_output(self.stream.run(layer, rows, hidden))

    def head(self) -> AbstractContextManager[Logits]:
        """The part of the model after the last layer, for samples that have passed it."""
        return self.stream.head()

    def collect(self, layer: DecoderLayer, collector: Collector) -> None:
        """Gather statistics of the layer's inputs; the hidden states stay as they are."""
        with collector.watching(leaves=self.stream.leaves):
            self._pass(layer, collector, advance=False)

    def advance(self, layer: DecoderLayer, collector: Collector | None = None, *, rows: slice | None = None) -> None:
        """Replace the hidden states by the layer's outputs, gathering statistics on the way if asked to.

        rows: only those samples, which are whole batches.
        """
        with nullcontext() if collector is None else collector.watching():
            self._pass(layer, collector, advance=True, rows=rows)

    def outputs(
        self, layer: DecoderLayer, hidden: Callable[[slice], Tensor], take: Callable[[slice, Tensor], object]
    ) -> None:
        """Hand `take` the layer's outputs [b, L, H] for other hidden states, batch by batch; the samples' own stay."""

        def visit(rows: slice) -> Any:
            result = self.stream.run(layer, rows, hidden(rows))
            take(rows, first_output(result))
            return result

        self._pass(layer, None, advance=False, visit=visit)

    def _pass(
        self,
        layer: DecoderLayer,
        collector: Collector | None,
        *,
        advance: bool,
        rows: slice | None = None,
        visit: Callable[[slice], Any] | None = None,
    ) -> None:
        if rows is None:  # blocks of samples follow one another alike, and in their thousands where layers are searched
            return_what_was_kept()
        verb = "forward" if collector is None else "collect"
        title = f"{self.skeleton.place(layer)} {verb}"
        if collector is not None:
            collector.reset()
        sound = torch.ones((), dtype=torch.bool, device=self.skeleton.device)
        around = self.stream.advancing() if advance else nullcontext()
        start, end = (0, self.nsamples) if rows is None else (rows.start, rows.stop)
        with around, self.progress.task(title, end - start) as step:
            position = start
            while position < end:
                batch = slice(position, min(position + self.batch_size, end))
                if not self._fits(layer, batch, sound, collector, advance=advance, visit=visit):
                    # A Gram has already taken in what it saw of the failed batch; a pass that advances has none.
                    if collector is not None and not advance:
                        collector.reset()
                        position = start
                    self._halve(layer, end - position, end - start)
                    continue
                position = batch.stop
                step(batch.stop - batch.start)
        # What a collector gathers is checked by its reader, who can name the linear.
        if collector is None and not bool(sound):
            raise not_finite(layer)

    def _fits(
        self,
        layer: DecoderLayer,
        rows: slice,
        sound: Tensor,
        collector: Collector | None,
        *,
        advance: bool,
        visit: Callable[[slice], Any] | None,
    ) -> bool:
        """Run samples `rows`, and let them advance if asked to; False where memory ran out on the way."""
        try:
            with nullcontext() if collector is None else collector.batch(rows):
                result = self.stream.run(layer, rows) if visit is None else visit(rows)
                if collector is None or advance:
                    for extreme in torch.aminmax(first_output(result)):
                        sound &= torch.isfinite(extreme)
                if advance:
                    self.stream.put(layer, rows, result)
        except LeftEarly:
            return True
        except RuntimeError as problem:
            if not _out_of_memory(problem):
                raise
            return False  # to go on out there: in here the traceback keeps the failed batch's activations in memory
        return True

    def _halve(self, layer: DecoderLayer, left: int, whole: int) -> None:
        """Go on with half the batch size, for what is `left` of this pass's `whole` samples and the passes to come."""
        if not self.stream.divides:
            what, smaller = f"one sample of {self.seqlen} tokens does", "--seqlen"
            if self.skeleton.images:
                what, smaller = f"a batch of {self.batch_size} pictures does", "--batch-size"
            what += f" not fit in the memory of {self.skeleton.device} at {layer.name}"
            raise ResourceError(f"{what}; give a smaller {smaller} or a device with more memory.")
        size = max(1, self.batch_size // 2)
        if self.skeleton.device.type != "cpu":
            torch.get_device_module(self.skeleton.device).empty_cache()
        self.progress.warn(f"out of memory at {layer.name}: going on with a batch size of {size}.")
        self.stream.shrink(size, {size, left % size, whole % size, self.nsamples % size} - {0})


def sample_length(skeleton: Skeleton, shape: Sequence[int]) -> int:
    """Tokens a sample, of samples of this shape; of pictures about how many places each becomes."""
    return hidden_form(skeleton.model, *shape[2:])[0] if skeleton.images else shape[1]


def not_taken(skeleton: Skeleton, shape: Sequence[int], problem: Exception) -> InputError:
    """The error for pictures (C, H, W) that a model cannot take."""
    what = f"{skeleton.checkpoint.id} does not take pictures of {list(shape)} ({first_line(problem)})"
    return InputError(f"{what}; its image processor is another model's: put its own preprocessor_config.json there.")


def not_finite(layer: DecoderLayer) -> InputError:
    """The error for a layer whose outputs are not finite."""
    what = f"the outputs of {layer.name} hold NaN or infinite values (the model overflows or is damaged)"
    return InputError(f"{what}; try --dtype float32, or another checkpoint.")


def refuse_foreign_tokens(skeleton: Skeleton, tokens: Tensor) -> None:
    """Raise InputError when a token id is outside the model's vocabulary, or L beyond its positions."""
    vocabulary = skeleton.model.get_input_embeddings().num_embeddings
    low, high = (int(value) for value in torch.aminmax(tokens))
    if low < 0 or high >= vocabulary:
        known = f"the vocabulary of {skeleton.checkpoint.id} (0 to {vocabulary - 1})"
        what = f"token {low if low < 0 else high} is outside {known}"
        raise InputError(f"{what}; the tokens were made by another model's tokenizer.")
    refuse_length(skeleton, tokens.shape[1])


def refuse_length(skeleton: Skeleton, seqlen: int) -> None:
    """Raise InputError for samples of more tokens than the model has positions."""
    positions = max_positions(skeleton.config)
    if positions is not None and seqlen > positions:
        known = f"the {positions} positions of {skeleton.checkpoint.id}"
        raise InputError(f"samples of {seqlen} tokens are longer than {known}; give --seqlen {positions}.")


def own_samples(samples: Tensor) -> Tensor:
    """This rank's share of the samples [N, ...]. Raises OptionError for fewer samples than ranks."""
    world, count = current(), len(samples)
    if count < world.size:
        what = f"{count} samples of calibration do not go round {world.size} ranks"
        raise OptionError(f"{what}; start at most {count}, or give more samples.")
    return samples[world.share(count)]


def batch_tokens(device: torch.device) -> int:
    """Tokens in a batch when no batch size is given: enough to fill the device, few enough for small activations."""
    return 2048 if device.type == "cpu" else 16384


def batch_of(skeleton: Skeleton, nsamples: int, seqlen: int, batch_size: int | None = None) -> int:
    """Samples in a batch, of `nsamples` of `seqlen` tokens: so many as were asked for, or as the device suits."""
    chosen = (skeleton.batch_tokens or batch_tokens(skeleton.device)) // seqlen
    return max(1, min(batch_size or chosen, nsamples))


def max_positions(config: Any) -> int | None:
    """How many positions a model knows, None where its config does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def default_seqlen(config: Any) -> int:
    """The smaller of 2048 and the model's positions."""
    return min(2048, max_positions(config) or 2048)


def usual_length(skeleton: Skeleton) -> int:
    """Tokens a sample where nothing says otherwise; of pictures the places of one of the config's size."""
    return (
        sample_length(skeleton, (1, *picture_shape(skeleton.config)))
        if skeleton.images
        else default_seqlen(skeleton.config)
    )


def _out_of_memory(problem: Exception) -> bool:
    return isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in str(problem)
