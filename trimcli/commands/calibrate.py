"""The calibrate stage: text to tokens or pictures to pixels, these through the dense model, statistics to a file."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trimcli.commands.options import CalibrateOptions
from trimcli.commands.written import spread, write_samples
from trimcli.console import NO_PROGRESS, Progress
from trimcli.files.cache import Cache, spill_folder
from trimcli.files.manifest import CALIBRATION, manifest, sealed
from trimcli.files.outputs import check_outputs, inputs_of
from trimcli.files.parts import Part, Parts
from trimcli.files.tensors import TensorSpec, dtype_name, tensor_hash, write_artifact
from trimcli.images.pixels import draw, load_processor
from trimcli.images.sources import pictures
from trimcli.memory import PeakMemory
from trimcli.methods.stats import stored_statistics
from trimcli.model.pixels import channels
from trimcli.model.skeleton import Skeleton, open_model
from trimcli.pipeline.collector import Collector
from trimcli.pipeline.estimate import Memory, own_share, peak_of, walking
from trimcli.pipeline.fit import Fit, Work, fit
from trimcli.pipeline.plan import refuse_experts
from trimcli.pipeline.proof import prove
from trimcli.pipeline.selection import chosen_linears
from trimcli.pipeline.walk import Walk, default_seqlen, own_samples, refuse_length, sample_length
from trimcli.text.encoding import Encoder
from trimcli.text.stdin import file_of
from trimcli.text.tokens import calibration_tokens, load_tokenizer, read_tokens
from trimcli.world import Found, World, joined


@dataclass(frozen=True)
class CalibrationSummary:
    """What calibrate did. seqlen: tokens a sample, None of pictures; picture: (C, H, W). peak_memory: in bytes.

    planned: how it kept to memory.
    """

    path: Path
    nsamples: int
    seqlen: int | None
    picture: tuple[int, ...] | None
    linears: int
    stats: tuple[str, ...]
    seconds: float
    peak_memory: dict[str, int]
    planned: dict[str, Any]


def encoder_of(skeleton: Skeleton, options: CalibrateOptions) -> Encoder:
    """How the calibration text becomes tokens."""
    tokenizer = load_tokenizer(skeleton.checkpoint.directory, trust_remote_code=options.trust_remote_code)
    return Encoder.of(tokenizer, options.bos, chat=options.chat)


def _draw(skeleton: Skeleton, options: CalibrateOptions, progress: Progress) -> Found:
    """The samples `tokens`, int32 [nsamples, seqlen], and where BOS stands in them, None where they were given.

    Of an image classifier `pixels`, float32 [nsamples, C, H, W].
    """
    if options.images is not None:
        how = {"trust_remote_code": options.trust_remote_code}
        processor = load_processor(skeleton.checkpoint.directory, channels(skeleton.config), **how)
        with pictures(options.images) as found:
            pixels = draw(found, processor, options.nsamples, options.seed, augment=options.augment)
        return Found({"pixels": pixels}, None)
    if options.tokens is not None:
        return Found({"tokens": read_tokens(options.tokens)}, None)
    encoder, seqlen = encoder_of(skeleton, options), options.seqlen or default_seqlen(skeleton.config)
    refuse_length(skeleton, seqlen)
    shared: dict[str, Any] = {"seqlen": seqlen, "seed": options.seed}
    kinds: list[Tensor] = []
    if text := options.nsamples - options.written:
        reading: dict[str, Any] = {"bos": encoder.bos, "pack": options.pack, "chat": options.chat}
        kinds.append(calibration_tokens(options.dataset, encoder.tokenizer, nsamples=text, **shared, **reading))
    if options.written:
        kinds.append(
            write_samples(
                skeleton,
                encoder,
                nsamples=options.written,
                trust_remote_code=options.trust_remote_code,
                progress=progress,
                **shared,
            )
        )
    return Found({"tokens": spread(kinds)}, encoder.bos)


def calibrate(
    model: str,
    output: Path,
    options: CalibrateOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
    announce: Callable[[Fit], None] | None = None,
) -> CalibrationSummary:
    """Gather a dense model's statistics into a file (Sun et al. 2023, section 3). Unfinished runs go on. UsageError.

    announce: is given how it will keep to memory. Raises ResourceError where it could not within the limits.
    """
    options = options or CalibrateOptions()
    options.check()
    check_outputs(inputs_of(options, model), files=[output], force=force)
    started = time.monotonic()
    with joined() as world:
        with PeakMemory() as memory:
            skeleton = open_model(model, options, images=options.images is not None)
            drawn = world.first(lambda: _draw(skeleton, options, progress))
            kept = _kept_in_memory(skeleton, samples_of(drawn), options)
            if announce:
                announce(kept)
            linears = _gather(skeleton, drawn, output, options, kept, force, progress, world)
        peak = world.most(memory.document())
    seconds, (nsamples, *shape) = time.monotonic() - started, samples_of(drawn).shape
    seqlen, picture = (None, tuple(shape)) if skeleton.images else (shape[0], None)
    planned = kept.document()
    return CalibrationSummary(output, nsamples, seqlen, picture, linears, options.stats, seconds, peak, planned)


def samples_of(drawn: Found) -> Tensor:
    """What was drawn, the one tensor that there is."""
    (samples,) = drawn.tensors.values()
    return samples


def _needs(options: CalibrateOptions) -> frozenset[str]:
    """The statistics that are asked for."""
    return frozenset(one.name for option, one in stored_statistics().items() if option in options.stats)


def _kept_in_memory(skeleton: Skeleton, samples: Tensor, options: CalibrateOptions) -> Fit:
    """How the walk will keep to memory."""
    nsamples, seqlen, needs = len(samples), sample_length(skeleton, samples.shape), _needs(options)

    def memory(batch_size: int, _: int | None) -> Memory:
        if not needs:
            return peak_of(skeleton, [{}])
        return walking(skeleton, needs, nsamples=nsamples, seqlen=seqlen, batch_size=batch_size)

    where = options.spill, spill_folder(options.cache_dir)
    words, mine = f"calibrating {skeleton.checkpoint.id}", own_share(nsamples)
    return fit(skeleton, Work(words, memory, mine, seqlen, options.batch_size, *where))


def _gather(
    skeleton: Skeleton,
    drawn: Found,
    output: Path,
    options: CalibrateOptions,
    kept: Fit,
    force: bool,
    progress: Progress,
    world: World,
) -> int:
    """Write the calibration file; returns how many linears have statistics."""
    needs = _needs(options)
    linears = chosen_linears(skeleton, options.only, options.skip, progress)
    refuse_experts(linears, needs)
    wanted = [linear.name for linear in linears]
    samples = samples_of(drawn)
    compute = {"dtype": str(skeleton.dtype), "device": skeleton.device.type}
    content = {"pixels": tensor_hash(samples)} if skeleton.images else {"tokens": samples.tolist()}
    what = {"model": skeleton.fingerprint.document(), **content, "linears": wanted}
    key = {"stage": "calibrate", **what, **compute, "stats": options.stats}
    with Cache(options.cache_dir).parts(key) as parts:
        if needs:
            prove(skeleton, options.cache_dir, progress)
            kept.hold(skeleton)
            done = parts.finished()
            mine = own_samples(samples)
            walk = Walk(skeleton, mine, batch_size=options.batch_size, wanted=set(wanted), progress=progress)
            with progress.task("calibrating layers", len(skeleton.layers)) as step:
                for layer in walk.layers():
                    if layer.index >= done:
                        collector = Collector(walk.groups(layer), needs, len(samples), walk.tokens, skeleton.device)
                        last = skeleton.is_last(layer)
                        # What experts gather is a sum, which a batch that ran out of memory would leave its part in.
                        apart = any(group.routed for group in collector.groups)
                        (walk.collect if last or apart else walk.advance)(layer, collector)
                        if apart and not last:
                            walk.advance(layer)
                        _write_part(parts, layer.index, collector)
                    elif done < len(skeleton.layers):
                        walk.advance(layer)
                    step()
        found = [parts.read(layer.index) for layer in skeleton.layers] if needs and world.is_first else []
        count = world.agreed(lambda: _write(skeleton, drawn, found, output, options, force))
        parts.discard()
    return count


def _write(
    skeleton: Skeleton, drawn: Found, parts: Sequence[Part], output: Path, options: CalibrateOptions, force: bool
) -> int:
    """Write what the layers' parts hold; returns how many linears have statistics."""
    shares: dict[str, str] = {}
    routed: dict[str, int] = {}
    homes: dict[str, Part] = {}
    kept = {"pixels": samples_of(drawn)} if skeleton.images else {"tokens": samples_of(drawn).int()}
    specs = {name: TensorSpec.of(tensor) for name, tensor in kept.items()}
    nsamples, *shape = samples_of(drawn).shape
    for part in parts:
        shares.update(part.facts["shares"])
        routed.update(part.facts.get("routed", {}))
        homes.update(dict.fromkeys(part.names, part))
        specs.update({name: part.spec(name) for name in part.names})
    document = manifest(
        CALIBRATION,
        "calibrate",
        options.document(),
        skeleton.fingerprint,
        {"tokens": options.tokens and file_of(options.tokens), "images": _one_file(options.images)},
        stats=list(options.stats),
        shares=shares,
        **({"routed": routed} if routed else {}),
        nsamples=nsamples,
        **({"picture": shape} if skeleton.images else {"seqlen": shape[0]}),
        bos=drawn.facts,
        compute_dtype=dtype_name(skeleton.dtype),
    )

    def tensor(name: str) -> Tensor:
        return kept[name] if name in kept else homes[name].load(name)

    write_artifact(output, sealed(document), specs, tensor, force=force)
    return len(shares)


def _one_file(path: Path | None) -> Path | None:
    """The path where it is a file's."""
    return path if path is not None and path.is_file() else None


def _write_part(parts: Parts, index: int, collector: Collector) -> None:
    stats, groups = collector.by_linear(), collector.groups
    found = {group.name: stats[group.name].tensors for group in groups}
    tensors = {f"{name}.{kind}": tensor for name, kinds in found.items() for kind, tensor in kinds.items()}
    shares = {linear.name: group.name for group in groups for linear in group.linears}
    tokens = {group.name: stats[group.name].tokens for group in groups if group.routed}
    parts.write(index, tensors, {"shares": shares, "routed": tokens})
