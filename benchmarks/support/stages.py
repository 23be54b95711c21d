"""Every command that writes, on one small model, in a folder of its own: what is killed, and what disks fail."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.small_models import llama_config, random_model, save
from tests.trim_cli import COMPUTE, save_tokens, trim

LAYERS = 3
CACHE = ("--cache-dir", "cache", *COMPUTE)
HALF = ("--sparsity", "0.5")
# Of a results file: what another run of the same command has otherwise.
TIMES = {"seconds", "peak_memory"}


@dataclass(frozen=True)
class Stage:
    """A command by name, with its outputs. timed: its outputs hang on time."""

    name: str
    line: tuple[str, ...]
    outputs: tuple[str, ...]
    timed: bool = False


def _prune(name: str, *more: str, given: tuple[str, ...] = ("--calibration", "calib")) -> Stage:
    line = ("prune", "model", "-o", "masks", "--save-model", "pruned", *HALF, *given, *more, *CACHE)
    return Stage(f"prune, {name}", line, ("masks", "pruned"))


def _finetune(mode: str, *more: str) -> Stage:
    line = ("finetune", "given-pruned", "-o", "tuned", "--mode", mode, "--tokens", "tokens.safetensors", "--steps", "8",
            "--batch-size", "2", "--accumulate", "1", "--every", "2", "--resume", *more, *CACHE)  # fmt: skip
    return Stage(f"finetune, {mode}", line, ("tuned",))


RECONSTRUCT = ("--reconstruct-steps", "2")
ROWS = Stage(
    "prune, TRIM",
    ("prune", "model", "-o", "masks", "--stats-out", "rows.json", "--save-model", "pruned", *HALF, "--use-trim",
     "--iterations", "2", "--calibration", "calib", *CACHE),
    ("masks", "rows.json", "rows.safetensors", "pruned"),
)  # fmt: skip
TOKENS = ("--tokens", "tokens.safetensors")
PIPELINE = (
    Stage("calibrate", ("calibrate", "model", "-o", "calibration", *TOKENS, *CACHE), ("calibration",)),
    Stage("alloc-layers", ("alloc-layers", "model", "-o", "ratios.json", *HALF, "--method", "owl", "--calibration",
          "calib", *CACHE), ("ratios.json",)),
    ROWS,
    Stage("apply-masks", ("apply-masks", "model", "given-masks", "-o", "applied"), ("applied",)),
    Stage("eval", ("eval", "nano", "-o", "results.json", "--ppl", "text.txt", "--seqlen", "16", "--max-windows", "4",
          *COMPUTE), ("results.json",)),
)  # fmt: skip
STAGES = (
    *PIPELINE,
    _prune("wanda"),
    _prune("obs", "--method", "sparsegpt"),
    _prune("cg", "--update", "cg"),
    _prune("admm", "--method", "admm"),
    _prune("swaps", "--refine", "swaps"),
    _prune("reconstruction of layers", "--reconstruct", "layer", *RECONSTRUCT),
    _prune("reconstruction of halves", "--update", "cg", "--reconstruct", "halves", *RECONSTRUCT),
    _prune("Barber", "--prune-barber"),
    _prune("Barber, obs", "--prune-barber", "--method", "sparsegpt"),
    _prune("in one go", "--alloc", "owl", given=TOKENS),
    Stage("apply-masks, packed", ("apply-masks", "model", "given-masks", "-o", "applied", "--format", "packed"),
          ("applied",)),
    Stage("unpack", ("unpack", "given-packed", "-o", "unpacked"), ("unpacked",)),
    Stage("export", ("export", "given-pruned", "-o", "exported"), ("exported",), timed=True),
    _finetune("full", "--teacher", "model"),
    _finetune("lora"),
    _finetune("admm", "--interval", "2"),
    Stage("sweep", ("sweep", "model", "-o", "sweep.json", *HALF, "--method", "wanda,magnitude", "--alloc", "uniform",
          "--trim", "off", "--holdout", "2", *TOKENS, *CACHE), ("sweep.json",)),
)  # fmt: skip


def build(home: Path) -> Path:
    """Make the folder `home` with all that the stages read."""
    home.mkdir()
    save(random_model(llama_config(num_hidden_layers=LAYERS, hidden_size=16, intermediate_size=24)), home / "model")
    save_tokens(home / "tokens.safetensors", vocabulary=64, nsamples=8)
    shutil.copytree(Path(__file__).parents[2] / "tests" / "data" / "nano-qwen2", home / "nano")
    (home / "text.txt").write_text("Whatever is written down is read again one day. " * 40)
    model, run = home / "model", ("--cache-dir", home / "cache", *COMPUTE)
    _done("calibrate", model, "-o", home / "calib", "--tokens", home / "tokens.safetensors", *run)
    made = ("-o", home / "given-masks", "--save-model", home / "given-pruned")
    _done("prune", model, *made, *HALF, "--calibration", home / "calib", *run)
    _done("apply-masks", model, home / "given-masks", "-o", home / "given-packed", "--format", "packed")
    shutil.rmtree(home / "cache")
    return home


def _done(*args: object) -> None:
    found = trim(*args)
    if found.status:
        raise RuntimeError(found.err)


def contents(folder: Path, names: tuple[str, ...]) -> dict[str, bytes | None]:
    """What lies under these names: a file's bytes, None for a directory, without what differs from run to run."""
    places = [folder / name for name in names]
    found = [path for place in places if place.exists() for path in (place, *place.rglob("*"))]
    return {str(path.relative_to(folder)): None if path.is_dir() else _lasting(path) for path in sorted(found)}


def _lasting(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name not in ("results.json", "sweep.json"):
        return data
    try:
        return json.dumps(_without_times(json.loads(data))).encode()
    except ValueError:
        return data


def _without_times(document: object) -> object:
    if isinstance(document, dict):
        return {key: _without_times(value) for key, value in document.items() if key not in TIMES}
    return [_without_times(one) for one in document] if isinstance(document, list) else document


def put_old(folder: Path, stage: Stage) -> None:
    """Outputs of an earlier run, for `--force` to replace."""
    for name in stage.outputs:
        if name in ("pruned", "applied", "unpacked", "exported", "tuned"):
            (folder / name).mkdir()
            (folder / name / "trim.json").write_text("{}")
            (folder / name / "old").write_text("old")
        else:
            (folder / name).write_text("old")


def pieces(folder: Path) -> list[str]:
    """What unfinished runs left beside outputs and in the cache."""
    ends = (".part", ".old")
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(ends))
