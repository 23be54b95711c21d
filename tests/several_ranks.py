"""Runs under torchrun on the loopback; as a program, what one rank of such a run does.

python -m tests.several_ranks MODEL TOKENS TEXT FOLDER...   every stage and recipe in each of the folders, anew
python -m tests.several_ranks failing ...                   `trim ...`, in which TRIM_TEST_FAILS comes to pass
"""

import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.trim_cli import Done

ROOT = Path(__file__).parents[1]
RUN: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
# "RANK HOW": which rank fails at the third layer, and how: killed, or by a damaged file.
FAILS = "TRIM_TEST_FAILS"


def torchrun(ranks: int, *args: object, module: str = "trimcli", **environment: str) -> Done:
    """So many ranks of `python -m module args`, gloo on the loopback, a thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, "-m", module, *map(str, args)]
    found = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    return Done(found.returncode, found.stdout, found.stderr)


def everything(model: str, tokens: Path, text: Path, folder: Path) -> None:
    """Calibrate, allocate, prune by every method and measure, in the working directory `folder`."""
    from trimcli import (
        AllocateOptions,
        CalibrateOptions,
        EvaluateOptions,
        PruneOptions,
        allocate,
        calibrate,
        evaluate,
        prune,
    )
    from trimcli.methods.layers.search import SearchOptions

    folder.mkdir(parents=True, exist_ok=True)  # another rank may have been first
    os.chdir(folder)
    run: dict[str, Any] = {**RUN, "cache_dir": Path("cache")}
    calibration = Path("calibration")
    calibrate(model, calibration, CalibrateOptions(tokens=tokens, **run))
    read: dict[str, Any] = {"calibration": calibration}
    searched = {"options": (SearchOptions(search_samples=3, search_evaluations=12),)}
    for method, more in {"owl": read, "alpha": {}, "search": read | searched}.items():
        allocate(model, Path(f"{method}.json"), AllocateOptions(method=method, sparsity=0.5, **more, **run))
    given = PruneOptions(sparsity=0.5, calibrate=CalibrateOptions(tokens=tokens, **run), **run)
    for name, recipe in recipes().items():
        prune(model, Path(f"{name}.masks"), replace(given, recipe=recipe, save_model=Path(f"{name}.model")))
    evaluate(model, EvaluateOptions(ppl=(str(text),), seqlen=32, max_windows=7, batch_size=2, **run), Path("eval.json"))


def recipes() -> dict[str, Any]:
    """One of every way to a mask. Grams in float64: their float32 sums in another order are another solver's input."""
    from trimcli import BarberOptions, Recipe, TrimOptions
    from trimcli.methods.stats import GramOptions

    exact = (GramOptions(gram_dtype="float64"),)
    return {
        "wanda": Recipe(),
        "magnitude": Recipe(method="magnitude"),
        "dense-statistics": Recipe(propagate=False),
        "trim": Recipe(rows="trim", input_recalc=True, options=(TrimOptions(iterations=2),)),
        "sparsegpt": Recipe(method="sparsegpt", options=exact),
        "swaps": Recipe(refine="swaps", update="cg", options=exact),
        "admm": Recipe(method="admm", target="dense", options=exact),
        "barber": Recipe(barber=BarberOptions()),
    }


def failing(args: list[str]) -> None:
    """The command line, in which one rank fails at the third layer."""
    from trimcli.cli.app import main
    from trimcli.errors import InputError
    from trimcli.pipeline.passes import Passes

    rank, _, how = os.environ[FAILS].partition(" ")
    own = Passes._prune_layer

    def prune_layer(self: Passes, walk: Any, layer: Any, guide: Any) -> Any:
        if layer.index == 2 and self.world.rank == int(rank):
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise InputError("a shard is damaged; fetch the model anew.")
        return own(self, walk, layer, guide)

    Passes._prune_layer = prune_layer  # type: ignore[method-assign]
    sys.argv = ["trim", *args]
    main()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] == "failing":
        failing(sys.argv[2:])
    else:
        from trimcli.world import joined

        with joined():
            for folder in sys.argv[4:]:
                everything(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(folder))
