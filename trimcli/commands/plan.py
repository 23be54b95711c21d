"""`plan` without a run: targets from the options and whatever files they name, nothing computed and nothing written."""

from trimcli.commands.options import AllocateOptions, CalibrateOptions, PruneOptions
from trimcli.commands.resolve import matrices_of, refuse_samples_of_other_kind, targets_of
from trimcli.commands.written import written_at_once
from trimcli.console import NO_PROGRESS, Progress
from trimcli.files.cache import spill_folder
from trimcli.files.calibration import CalibrationFile
from trimcli.files.ratios import LayerSparsity
from trimcli.methods.choice import Target
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton, open_model
from trimcli.pipeline.plan import Plan, make_plan
from trimcli.pipeline.walk import sample_length, usual_length
from trimcli.text.tokens import read_tokens


def foresee(model: str, options: PruneOptions, *, progress: Progress = NO_PROGRESS) -> Plan:
    """The plan of `prune(model, ...)`. An allocation yet to be made is planned as uniform.

    Raises UsageError, and ResourceError for what its limits cannot hold.
    """
    options.check()
    skeleton = open_model(model, options, weights=None, images=None)
    refuse_samples_of_other_kind(skeleton, options)
    return foreseen(skeleton, matrices_of(skeleton, options, progress), options)


def _before_allocation(allocate: AllocateOptions) -> Target:
    """What every matrix loses before layers share it: the target, or the pattern of a group nearest to it."""
    sparsity, group = allocate.sparsity or 0.0, getattr(allocate.own(), "group", None)
    if group is None:
        return Target(sparsity)
    kept = group - round(sparsity * group)
    return Target(1 - kept / group, (kept, group)) if kept else Target(sparsity)


def foreseen(skeleton: Skeleton, linears: list[Matrix], options: PruneOptions) -> Plan:
    """The plan of a prune of these linears, before anything is calibrated or allocated. Raises what `foresee` does."""
    if options.allocate and options.allocate.sparsity is not None:
        targets = dict.fromkeys((one.name for one in linears), _before_allocation(options.allocate))
    else:
        ratios = LayerSparsity.load(options.ratios) if options.ratios else None
        targets = targets_of(skeleton, linears, options, ratios)
    drawn = options.calibrate or CalibrateOptions()
    nsamples, seqlen = drawn.nsamples, drawn.seqlen or usual_length(skeleton)
    if drawn.tokens:
        nsamples, seqlen = read_tokens(drawn.tokens).shape
    if options.calibration:
        calibration = CalibrationFile(options.calibration)
        if skeleton.checkpoint.has_weights:
            calibration.check(skeleton.fingerprint)
        nsamples, seqlen = calibration.nsamples, sample_length(skeleton, calibration.shape)
    return make_plan(
        skeleton,
        linears,
        targets,
        options.recipe,
        nsamples=nsamples,
        seqlen=seqlen,
        saves_model=options.save_model is not None,
        calibrates=options.calibrates,
        writes=written_at_once(drawn.written, seqlen) * seqlen,
        trials=options.allocate.trials if options.allocate else None,
        allocation=options.allocate.method if options.allocate else None,
        batch_size=options.batch_size,
        spill=options.spill,
        otherwise=spill_folder(options.cache_dir),
    )
