"""`trim export`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimcli.cli import common
from trimcli.cli.common import boundary

if TYPE_CHECKING:
    from trimcli.commands.export import ExportSummary


@boundary
def export(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A pruned directory, ordinary or packed (or a hub id).")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="csr: for the CPU, where a matrix is measured to be faster so. semi-structured: 2:4 for a CUDA GPU.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write.")],
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
    """Write a pruned model in a form that sparse kernels read, for this machine.

    csr: every pruned matrix is timed with one input row, dense and as csr, and stays dense where that is as fast.
    semi-structured: needs matrices that are 2:4 and a CUDA GPU. trimcli.exported.load_exported(DIR) loads what is
    written; trim bench measures it.

    Example: trim export Qwen2.5-3B-90 --to csr -o Qwen2.5-3B-90-csr
    """
    progress = common.start(quiet, as_json)
    from trimcli.commands.export import ExportOptions
    from trimcli.commands.export import export as run

    options = ExportOptions(
        device=device,
        dtype=dtype,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
        cache_dir=cache_dir,
        to=to,  # type: ignore[arg-type]
    )
    summary = run(model, output, options, force=force, progress=progress)
    if as_json:
        linears = {name: linear.document() for name, linear in summary.linears.items()}
        common.emit_json({**asdict(summary), "linears": linears, "sparse": summary.sparse})
    elif not quiet:
        _print(summary)


def _print(summary: "ExportSummary") -> None:
    # Lines rather than a table: names are long, and a narrow terminal or a pipe would cut them.
    width = max(map(len, summary.linears))
    for name, linear in summary.linears.items():
        zeros = linear.zeros / (linear.shape[0] * linear.shape[1])
        words = [f"{name:<{width}}", f"{zeros:7.2%} zeros"]
        if linear.dense_seconds is not None and linear.sparse_seconds is not None:
            words.append(
                f"dense {linear.dense_seconds * 1e6:6.0f} µs, {summary.to} {linear.sparse_seconds * 1e6:6.0f} µs"
            )
        words.append(linear.form + (f" ({linear.reason})" if linear.reason else ""))
        print("  ".join(words))
    share = summary.nbytes / summary.dense_bytes
    common.facts(
        {
            "export": summary.output,
            "matrices": f"{summary.sparse} of {len(summary.linears)} as {summary.to}, the others dense",
            "bytes": f"{common.size(summary.nbytes)}, dense {common.size(summary.dense_bytes)} ({share:.1%})",
            "note": None
            if summary.sparse
            else f"no matrix is faster as {summary.to} on this machine: nothing is gained",
        }
    )
