"""`trim calibrate`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from trimcli.cli.options import Model, output
from trimcli.cli.output import Say, facts, memory, size
from trimcli.cli.plan import announcing

if TYPE_CHECKING:
    from trimcli.commands.options import CalibrateOptions


def calibrate(
    model: Model, output: Annotated[Path, output("calibration file")], options: "CalibrateOptions", say: Say
) -> None:
    """Gather samples, activation norms and TRIM's inputs from the dense model.

    One decoder layer is in memory at a time. The file serves every later prune and allocation of this model.
    An interrupted run goes on from the last finished layer.

    Example: trim calibrate Qwen/Qwen2.5-3B -o calib.safetensors --dataset c4 --nsamples 256

    Image classifiers: trim calibrate google/vit-base-patch16-224 -o calib.safetensors --images train --nsamples 4096
    """
    from trimcli.commands.calibrate import calibrate as run

    found = run(model, output, options, force=say.force, progress=say.progress, announce=announcing(say))
    sample = f"{found.seqlen} tokens" if found.picture is None else f"{' x '.join(map(str, found.picture))} pixels"
    rows = {
        "calibration": f"{found.path} ({size(found.path.stat().st_size)})",
        "samples": f"{found.nsamples} of {sample}",
        "statistics": f"{', '.join(found.stats)} of {found.linears} linears",
        "seconds": f"{found.seconds:.1f}",
        "peak memory": memory(found.peak_memory),
    }
    say.result(lambda: asdict(found), lambda: facts(rows))
