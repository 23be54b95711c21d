"""`plan` without a run: targets from the options and whatever files they name, nothing computed and nothing written."""

from trimcli.commands.calibrate import CalibrateOptions
from trimcli.commands.prune import PruneOptions
from trimcli.console import NO_PROGRESS, Progress
from trimcli.files.calibration import CalibrationFile
from trimcli.files.ratios import LayerSparsity
from trimcli.methods.recipe import Target, uniform_target
from trimcli.model.skeleton import open_model
from trimcli.pipeline.plan import Plan, chosen_linears, make_plan
from trimcli.pipeline.walk import default_seqlen
from trimcli.text.tokens import read_tokens


def foresee(model: str, options: PruneOptions, *, progress: Progress = NO_PROGRESS) -> Plan:
    """The plan of `prune(model, ...)` under these options, from the config and the files they name.

    An allocation that is yet to be made (`allocate`) is planned with its target, uniform. Raises UsageError.
    """
    options.check()
    skeleton = open_model(model, options, weights=None)
    linears = chosen_linears(skeleton, options.only, options.skip, progress)
    if options.ratios:
        ratios = LayerSparsity.load(options.ratios)
        ratios.check(skeleton.shapes, skeleton.fingerprint)
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
        if skeleton.checkpoint.has_weights:
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
