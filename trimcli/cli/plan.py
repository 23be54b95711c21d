"""`trim plan`."""

from trimcli.cli import common
from trimcli.cli import prune_options as shared
from trimcli.cli.common import boundary


@boundary
def plan(
    model: common.Model,
    save_model: shared.SaveModel = None,
    method: shared.Method = "wanda",
    calibration: shared.Calibration = None,
    ratios: shared.Ratios = None,
    sparsity: shared.Sparsity = None,
    sparsity_type: shared.SparsityType = "unstructured",
    only: shared.Only = None,
    skip: shared.Skip = None,
    numerics: common.Numerics = "exact",
    no_propagate: shared.NoPropagate = False,
    use_variant: shared.UseVariant = False,
    use_trim: shared.UseTrim = False,
    qmetric: shared.Qmetric = "cosim_flat",
    qmetric_dimwise: shared.QmetricDimwise = "cosim",
    iterations: shared.Iterations = 10,
    forbid_neg_lr: shared.ForbidNegLr = False,
    input_recalc: shared.InputRecalc = False,
    mask_score: shared.MaskScore = "obs",
    mask_update: shared.MaskUpdate = None,
    damping: shared.Damping = 0.01,
    block_size: shared.BlockSize = 128,
    gram_dtype: shared.GramDtype = "float32",
    prune_barber: shared.PruneBarber = False,
    prune_granularity: shared.PruneGranularity = "output1",
    threshold: shared.Threshold = 0.01,
    prune_metric: shared.PruneMetric = "WD",
    retain_reconstruction: shared.RetainReconstruction = False,
    dataset: shared.Dataset = None,
    nsamples: shared.Nsamples = None,
    seqlen: shared.Seqlen = None,
    tokens: shared.Tokens = None,
    alloc: shared.Alloc = None,
    lambda_: shared.Lambda = 0.08,
    hyper_m: shared.HyperM = 5.0,
    group: shared.Group = None,
    ww_metric: shared.WwMetric = "alpha_peak",
    epsilon: shared.Epsilon = 0.3,
    mapping_type: shared.MappingType = "block",
    metrics_cache: shared.MetricsCache = None,
    batch_size: shared.BatchSize = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    seed: common.Seed = 0,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
    force: common.Force = False,
    cache_dir: common.CacheDir = None,
    trust_remote_code: common.TrustRemoteCode = False,
    revision: common.Revision = None,
) -> None:
    """Say what a prune would do, before any pass: matrices, targets, exact counts, memory, disk, forward passes.

    Takes the options of prune; a directory with no more than a config.json will do.

    Example: trim plan Qwen/Qwen2.5-72B --sparsity 0.7 --use-trim
    """
    progress = common.start(quiet, as_json)
    options = shared.build(locals())
    from trimcli.commands.plan import foresee

    found = foresee(model, options, progress=progress)
    if as_json:
        common.emit_json(found.document())
        return
    from trimcli.cli.tables import plan_head, plan_table

    common.show(plan_table(found), plan_head(found))
    for name, shape in list(found.dense.items())[:8]:
        common.show(f"left dense: {name} {list(shape)}")
    if len(found.dense) > 8:
        common.show(f"left dense: {len(found.dense) - 8} more")
