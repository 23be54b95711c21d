"""The calibrate stage: text to tokens, tokens through the dense model, statistics to a file."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trimcli.commands.options import CalibrateOptions
from trimcli.console import NO_PROGRESS, Progress
from trimcli.files.cache import Cache
from trimcli.files.manifest import CALIBRATION, manifest, sealed
from trimcli.files.outputs import check_outputs, inputs_of
from trimcli.files.parts import Part, Parts
from trimcli.files.tensors import TensorSpec, dtype_name, write_artifact
from trimcli.memory import PeakMemory
from trimcli.methods.stats import stored_statistics
from trimcli.model.skeleton import Skeleton, open_model
from trimcli.pipeline.collector import Collector
from trimcli.pipeline.plan import chosen_linears, refuse_experts
from trimcli.pipeline.proof import prove
from trimcli.pipeline.walk import Walk, default_seqlen, own_samples
from trimcli.text.encoding import Encoder
from trimcli.text.stdin import file_of
from trimcli.text.tokens import calibration_tokens, load_tokenizer, read_tokens
from trimcli.world import Found, World, joined


@dataclass(frozen=True)
class CalibrationSummary:
    """What calibrate did. peak_memory: in bytes."""

    path: Path
    nsamples: int
    seqlen: int
    linears: int
    stats: tuple[str, ...]
    seconds: float
    peak_memory: dict[str, int]


def encoder_of(skeleton: Skeleton, options: CalibrateOptions) -> Encoder:
    """How the calibration text becomes tokens."""
    tokenizer = load_tokenizer(skeleton.checkpoint.directory, trust_remote_code=options.trust_remote_code)
    return Encoder.of(tokenizer, options.bos, chat=options.chat)


def _draw_tokens(skeleton: Skeleton, options: CalibrateOptions) -> Found:
    """The samples `tokens`, int32 [nsamples, seqlen], and where BOS stands in them, None where they were given."""
    if options.tokens is not None:
        return Found({"tokens": read_tokens(options.tokens)}, None)
    encoder, seqlen = encoder_of(skeleton, options), options.seqlen or default_seqlen(skeleton.config)
    tokens = calibration_tokens(
        options.dataset,
        encoder.tokenizer,
        nsamples=options.nsamples,
        seqlen=seqlen,
        seed=options.seed,
        bos=encoder.bos,
        pack=options.pack,
        chat=options.chat,
    )
    return Found({"tokens": tokens}, encoder.bos)


def calibrate(
    model: str,
    output: Path,
    options: CalibrateOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
) -> CalibrationSummary:
    """Gather a dense model's statistics into a file (Sun et al. 2023, section 3). Unfinished runs go on. UsageError."""
    options = options or CalibrateOptions()
    options.check()
    check_outputs(inputs_of(options, model), files=[output], force=force)
    started = time.monotonic()
    with joined() as world:
        with PeakMemory() as memory:
            skeleton = open_model(model, options)
            drawn = world.first(lambda: _draw_tokens(skeleton, options))
            tokens, bos = drawn.tensors["tokens"], drawn.facts
            linears = _gather(skeleton, tokens, bos, output, options, force, progress, world)
        peak = world.most(memory.document())
    seconds, (nsamples, seqlen) = time.monotonic() - started, tokens.shape
    return CalibrationSummary(output, nsamples, seqlen, linears, options.stats, seconds, peak)


def _gather(
    skeleton: Skeleton,
    tokens: Tensor,
    bos: str | None,
    output: Path,
    options: CalibrateOptions,
    force: bool,
    progress: Progress,
    world: World,
) -> int:
    """Write the calibration file; returns how many linears have statistics."""
    needs = frozenset(one.name for option, one in stored_statistics().items() if option in options.stats)
    linears = chosen_linears(skeleton, options.only, options.skip, progress)
    refuse_experts(linears, needs)
    wanted = [linear.name for linear in linears]
    compute = {"dtype": str(skeleton.dtype), "device": skeleton.device.type}
    what = {"model": skeleton.fingerprint.document(), "tokens": tokens.tolist(), "linears": wanted}
    key = {"stage": "calibrate", **what, **compute, "stats": options.stats}
    with Cache(options.cache_dir).parts(key) as parts:
        if needs:
            prove(skeleton, options.cache_dir, progress)
            skeleton.spill = options.spill
            done = parts.finished()
            mine = own_samples(tokens)
            walk = Walk(skeleton, mine, batch_size=options.batch_size, wanted=set(wanted), progress=progress)
            with progress.task("calibrating layers", len(skeleton.layers)) as step:
                for layer in walk.layers():
                    if layer.index >= done:
                        collector = Collector(walk.groups(layer), needs, len(tokens), walk.seqlen, skeleton.device)
                        last = layer.index + 1 == len(skeleton.layers)
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
        count = world.agreed(lambda: _write(skeleton, tokens, bos, found, output, options, force))
        parts.discard()
    return count


def _write(
    skeleton: Skeleton,
    tokens: Tensor,
    bos: str | None,
    parts: Sequence[Part],
    output: Path,
    options: CalibrateOptions,
    force: bool,
) -> int:
    """Write what the layers' parts hold; returns how many linears have statistics."""
    shares: dict[str, str] = {}
    routed: dict[str, int] = {}
    homes: dict[str, Part] = {}
    specs = {"tokens": TensorSpec(torch.int32, tuple(tokens.shape))}
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
        {"tokens": options.tokens and file_of(options.tokens)},
        stats=list(options.stats),
        shares=shares,
        **({"routed": routed} if routed else {}),
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        bos=bos,
        compute_dtype=dtype_name(skeleton.dtype),
    )

    def tensor(name: str) -> Tensor:
        return tokens.int() if name == "tokens" else homes[name].load(name)

    write_artifact(output, sealed(document), specs, tensor, force=force)
    return len(shares)


def _write_part(parts: Parts, index: int, collector: Collector) -> None:
    stats, groups = collector.by_linear(), collector.groups
    found = {group.name: stats[group.name].tensors for group in groups}
    tensors = {f"{name}.{kind}": tensor for name, kinds in found.items() for kind, tensor in kinds.items()}
    shares = {linear.name: group.name for group in groups for linear in group.linears}
    tokens = {group.name: stats[group.name].tokens for group in groups if group.routed}
    parts.write(index, tensors, {"shares": shares, "routed": tokens})
