"""`plan` without a run: targets from the options and whatever files they name, nothing computed and nothing written."""

from trimcli.allocation import LayerSparsity
from trimcli.artifacts import MARK
from trimcli.calibration import CalibrationFile
from trimcli.checkpoint import BIN_INDEX, BIN_SINGLE, SAFE_INDEX, SAFE_SINGLE, Checkpoint
from trimcli.console import NO_PROGRESS, Progress
from trimcli.data import read_tokens
from trimcli.device import compute_device, compute_dtype
from trimcli.model import Skeleton
from trimcli.plan import Plan, chosen_linears, make_plan
from trimcli.recipe import Target, uniform_target
from trimcli.stages.calibrate import CalibrateOptions
from trimcli.stages.prune import PruneOptions
from trimcli.walk import default_seqlen


def foresee(model: str, options: PruneOptions, *, progress: Progress = NO_PROGRESS) -> Plan:
    """The plan of `prune(model, ...)` under these options, from the config and the files they name.

    An allocation that is yet to be made (`allocate`) is planned with its target, uniform. Raises UsageError.
    """
    options.check()
    directory = Checkpoint.open(model, revision=options.revision, weights=False).directory
    weights = any((directory / name).is_file() for name in (SAFE_INDEX, SAFE_SINGLE, BIN_INDEX, BIN_SINGLE, MARK))
    checkpoint = Checkpoint(directory, model, weights=weights)
    device = compute_device(options.device)
    dtype = compute_dtype(options.dtype, checkpoint, device)
    skeleton = Skeleton(checkpoint, dtype=dtype, device=device, trust_remote_code=options.trust_remote_code)
    linears = chosen_linears(skeleton, options.only, options.skip, progress)
    if options.ratios:
        ratios = LayerSparsity.load(options.ratios)
        ratios.check(skeleton)
        pattern = ratios.pattern or {}
        options.recipe.check(pattern=bool(pattern))
        targets = {one.name: Target(ratios.sparsity[one.name], pattern.get(one.name)) for one in linears}
    elif options.allocate and options.allocate.sparsity is not None:
        targets = dict.fromkeys((one.name for one in linears), Target(options.allocate.sparsity))
    else:
        targets = dict.fromkeys((one.name for one in linears), uniform_target(options.sparsity, options.sparsity_type))
    drawn = options.calibrate or CalibrateOptions()
    nsamples, seqlen = drawn.nsamples, drawn.seqlen or default_seqlen(skeleton.config)
    if drawn.tokens:
        nsamples, seqlen = read_tokens(drawn.tokens).shape
    if options.calibration:
        calibration = CalibrationFile(options.calibration)
        if weights:
            calibration.check(skeleton.fingerprint)
        nsamples, seqlen = calibration.tokens.shape
    return make_plan(
        skeleton,
        linears,
        targets,
        options.recipe,
        nsamples=nsamples,
        seqlen=seqlen,
        saves_model=options.save_model is not None,
    )
