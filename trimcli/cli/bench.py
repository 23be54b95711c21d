"""`trim bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimcli.cli import common
from trimcli.cli.common import boundary
from trimcli.cli.lists import values

if TYPE_CHECKING:
    from trimcli.kernels.bench import BenchResult


@boundary
def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Pruned or dense models, or exports of `trim export`.")
    ],
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt, and as many decoded after it.")] = 64,
    batch: Annotated[str, typer.Option(help="Sequences at a time, separated by commas.")] = "1,8",
    repeat: Annotated[int, typer.Option(help="Rounds; medians are shown.")] = 5,
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
    """Tokens per second and bytes, dense against sparse, on this machine, and whether sparsity pays here.

    A model is measured dense and with its pruned matrices in the form that the device has sparse kernels for; an
    export dense and as it was exported.

    Example: trim bench Qwen2.5-3B-90 Qwen2.5-3B-90-csr
    """
    del force  # every command takes it; nothing is written here
    progress = common.start(quiet, as_json)
    from trimcli.kernels.bench import BenchOptions
    from trimcli.kernels.bench import bench as run

    options = BenchOptions(
        device=device,
        dtype=dtype,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
        cache_dir=cache_dir,
        tokens=tokens,
        batch=values("--batch", batch, int),
        repeat=repeat,
    )
    result = run(models, options, progress=progress)
    if as_json:
        common.emit_json(result.document)
    elif not quiet:
        _print(result)


def _print(result: "BenchResult") -> None:

    from trimcli.cli.tables import rows_table

    columns = [("model", "left"), ("form", "left"), ("zeros", "right"), ("disk", "right"), ("memory", "right")]
    columns += [(f"{rate.phase} b{rate.batch}", "right") for rate in result.measured[0].rates]
    rows = [
        [
            Path(one.model).name,
            one.form if one.form == "dense" else f"{one.form} {one.sparse}/{one.linears}",
            f"{one.zeros:.2%}",
            "" if one.disk is None else common.size(one.disk),
            common.size(one.memory),
            *(f"{rate.median:,.1f}" for rate in one.rates),
        ]
        for one in result.measured
    ]
    common.show(rows_table(columns, rows, "tokens per second, medians; b: batch"))
    for sentence in result.verdicts:
        common.show(f"\n{sentence}")
