"""Seconds of the stages beside floors that are measured in the same run: ratios, which machines have in common.

    python -m benchmarks.speed --model tiny-qwen2=DIR --model SmolLM2-135M=DIR --peer PYTHON

Every stage and its floor take turns, and of each the quickest turn counts: a plain transformers forward pass over the
same tokens (through the layers; for perplexity with head and loss), a prune by wanda for what TRIM adds, reading the
shards, copying the checkpoint. Figures go to benchmarks/results/MACHINE.json as they are found, and what is there is
not measured again, so that a run can be cut short; the table of all of them is benchmarks/SPEED.md. Models are those
named, the embedded one, and random weights in the shapes of Qwen2.5, cut to few layers, tokens and a small vocabulary.
Give `--device cuda` more tokens (`--samples 128 --seqlen 512`): of few, a GPU's time is that of starting its kernels.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.memory import config, make_model
from benchmarks.support.provenance import machine, publish, table, versions
from trimcli.commands.apply import apply_masks
from trimcli.commands.calibrate import calibrate
from trimcli.commands.options import CalibrateOptions, PruneOptions
from trimcli.commands.prune import prune
from trimcli.evaluation.perplexity import perplexity
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.tensors import TensorSpec, write_tensors
from trimcli.methods.recipe import Recipe
from trimcli.options import RunOptions
from trimcli.pipeline.proof import open_proven

HERE = Path(__file__).parent
DEMO = HERE.parent / "trimcli" / "demo" / "model"
Work = Callable[[], Any]
# Hidden size, intermediate size, heads, key and value heads; layers and samples that are measured, of the model's own.
SHAPES = {
    "Qwen2.5-0.5B": ((896, 4864, 14, 2), 2, 16),
    "Qwen2.5-1.5B": ((1536, 8960, 12, 2), 2, 8),
    "Qwen2.5-7B": ((3584, 18944, 28, 4), 1, 4),
}
VOCABULARY = 4096
GOALS = {
    "start-up": "1.5 s",
    "wanda": "at most 1.8",
    "wanda + TRIM": "at most 1.25",
    "sparsegpt": "at most 3",
    "perplexity": "at most 1.15",
    "apply-masks": "at most 1.25 (80% of copy speed)",
}
# A command up to its first layer, in a fresh interpreter: how long since the shell started it.
STARTING = """
import os, sys, time
started = float(sys.argv.pop(1))
from trimcli.cli.app import main
from trimcli.memory import collect_rarely
collect_rarely()  # as main does, before it has anything imported
from trimcli.model.skeleton import Skeleton
def first(*_):
    print(time.time() - started, flush=True)
    os._exit(0)
Skeleton.load_layer = first
main()
"""
IMPORTING = """
import os, sys, time
started, kind = float(sys.argv[1]), sys.argv[2]
import torch, transformers
getattr(transformers, kind)
print(time.time() - started)
"""


@dataclass(frozen=True)
class Stage:
    """A stage, what it is measured beside, and the name of that."""

    work: Work
    floor: Work
    beside: str


class Bench:
    """One model's stages. tokens: int64 [nsamples, seqlen]. how: device and dtype, by name."""

    def __init__(self, directory: Path, shape: tuple[int, int], folder: Path, how: Mapping[str, str]) -> None:
        self.directory, self.folder = str(directory), folder
        self.checkpoint = Checkpoint.open(directory)
        vocabulary = self.checkpoint.config_document["vocab_size"]
        self.tokens = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
        self.batch = max(1, (2048 if how["device"] == "cpu" else 1 << 14) // shape[1])
        file = folder / "tokens.safetensors"
        write_tensors(file, {"tokens": TensorSpec(torch.int32, shape)}, lambda _: self.tokens.int())
        self.run: dict[str, Any] = {**how, "cache_dir": folder / "cache"}
        self.calibrating = CalibrateOptions(tokens=file, **self.run)
        own = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, how["dtype"]))
        self.own = own.eval().to(torch.device(how["device"]))

    def stages(self) -> dict[str, Stage]:
        """By name."""
        masks, plain = self.folder / "wanda.safetensors", "forward pass"
        return {
            "calibrate": Stage(self._calibrate, self._forward, plain),
            "wanda": Stage(self._pruned("wanda"), self._forward, plain),
            "wanda + TRIM": Stage(self._pruned("trim", rows="trim"), self._pruned("wanda"), "wanda"),
            "TRIM's product": Stage(self._product, self._forward, plain),
            "sparsegpt": Stage(self._pruned("sparsegpt", method="sparsegpt"), self._forward, plain),
            "perplexity": Stage(self._perplexity, self._losses, "forward pass with loss"),
            "magnitude": Stage(self._pruned("magnitude", method="magnitude"), self._read, "reading the shards"),
            "apply-masks": Stage(lambda: self._apply(masks), self._copy, "copying the checkpoint"),
        }

    def _calibrate(self) -> Any:
        return calibrate(self.directory, self.folder / "calibration", self.calibrating, force=True)

    def _pruned(self, name: str, **choices: Any) -> Work:
        saves = self.folder / f"{name}-model" if name == "sparsegpt" else None
        source: dict[str, Any] = {} if name == "magnitude" else {"calibration": self.folder / "calibration"}
        options = PruneOptions(recipe=Recipe(**choices), sparsity=0.5, save_model=saves, **source, **self.run)

        def work() -> Any:
            return prune(self.directory, self.folder / f"{name}.safetensors", options, force=True)

        return work

    @torch.no_grad()
    def _forward(self) -> None:
        for batch in self.tokens.to(self.own.device).split(self.batch):
            self.own.base_model(input_ids=batch, use_cache=False)

    @torch.no_grad()
    def _losses(self) -> None:
        for batch in self.tokens.to(self.own.device).split(self.batch):
            self.own(input_ids=batch, labels=batch, use_cache=False)

    def _perplexity(self) -> Any:
        return perplexity(open_proven(self.directory, RunOptions(**self.run)), self.tokens)

    @torch.no_grad()
    def _product(self) -> None:
        for module in self.own.base_model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight @ module.weight.new_ones(module.in_features, len(self.tokens))

    def _read(self) -> None:
        for key in self.checkpoint.keys():  # noqa: SIM118 - no mapping
            self.checkpoint.load(key).clone()

    def _apply(self, masks: Path) -> Any:
        return apply_masks(self.directory, masks, self.folder / "applied", force=True)

    def _copy(self) -> None:
        target = self.folder / "copied"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for path in Path(self.directory).iterdir():
            shutil.copyfile(path, target / path.name)
            with (target / path.name).open("rb+") as handle:  # as what trim writes lies on the disk when it ends
                os.fsync(handle.fileno())


def measured(stage: Stage, repeats: int) -> dict[str, Any]:
    """Seconds and processor seconds of a stage and its floor, the least of `repeats` turns, and its peak memory."""
    peaks = getattr(stage.work(), "peak_memory", {})  # the first use is nobody's
    peak = peaks.get("cuda", peaks.get("anonymous"))
    stage.floor()
    turns = [(_timed(stage.floor), _timed(stage.work)) for _ in range(repeats)]
    (floor, floor_cpu), (seconds, cpu) = ([min(one[k][i] for one in turns) for i in (0, 1)] for k in (0, 1))
    found = {"beside": stage.beside, "seconds": seconds, "cpu": cpu, "floor": floor, "floor_cpu": floor_cpu}
    return {**found, "peak": peak}


def _timed(work: Work) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def started(bench: Bench, repeats: int) -> dict[str, Any]:
    """From the shell to the first layer, beside importing torch and the model's class alone."""
    kind = bench.checkpoint.config_document["architectures"][0]
    words = ["prune", bench.directory, "-o", str(bench.folder / "start"), "--sparsity", "0.5"]
    words += ["--calibration", str(bench.folder / "calibration")]
    words += [word for name, value in bench.run.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    def seconds(program: str, *given: str) -> float:
        command = [sys.executable, "-W", "ignore", "-c", program, str(time.time()), *given]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

    pairs = [(seconds(IMPORTING, kind), seconds(STARTING, *words)) for _ in range(repeats)]
    floor, whole = (min(one[k] for one in pairs) for k in (0, 1))
    return {"beside": "importing torch and the model's class", "seconds": whole, "floor": floor, "peak": None}


def peers(bench: Bench, peer: Path, repeats: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """llm-compressor on the same tokens, from the directory to the pruned model in memory, beside the forward pass."""
    script, file = HERE / "support" / "peer.py", bench.folder / "tokens.safetensors"
    for method in ("wanda", "sparsegpt"):
        words = [str(script), bench.directory, str(file), method, str(repeats), "0.5"]
        done = subprocess.run([str(peer), "-W", "ignore", *words], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        floor = min(_timed(bench._forward)[0] for _ in range(repeats))
        yield method, {"beside": "forward pass", "seconds": found["seconds"], "floor": floor, "peak": None}


def models(named: Mapping[str, Path], work: Path) -> dict[str, tuple[Path, int | None, str]]:
    """Name -> directory, samples (None for as asked), and what of the model is measured."""
    found: dict[str, tuple[Path, int | None, str]] = {name: (path, None, "whole") for name, path in named.items()}
    found["embedded"] = (DEMO, None, "whole")
    for name, (_, layers, samples) in SHAPES.items():
        scaled = f"{layers} of its layers, random, vocabulary {VOCABULARY}"
        found[f"{name} shapes"] = (shaped(name, layers, work), samples, scaled)
    return found


def shaped(name: str, layers: int, work: Path) -> Path:
    """The directory inside `work` of a model of so many layers and random weights in the shapes of `name`."""
    hidden, intermediate, heads, kv_heads = SHAPES[name][0]
    shape = {"hidden": hidden, "intermediate": intermediate, "heads": heads, "kv_heads": kv_heads}
    return make_model(work, config(argparse.Namespace(**shape, layers=layers, vocabulary=VOCABULARY)))


def tables(document: Mapping[str, Any]) -> Iterator[str]:
    """The lines of SPEED.md for one machine."""
    yield from (f"## {document['machine']}", "", f"{document['versions']}; the ratio is what tells.", "")
    for name, one in document["models"].items():
        yield from (f"### {name}", "", f"{one['what']}; {one['samples']} x {one['seqlen']} tokens.", "")
        rows = [
            (
                stage,
                f"{fact['seconds']:.2f}",
                f"{fact['seconds'] / one['layers']:.3f}",
                f"{fact['peak'] / 2**20:.0f}" if fact["peak"] else "",
                f"{fact['beside']} {fact['floor']:.2f}",
                f"{fact['seconds'] / fact['floor']:.2f}",
                f"{fact['cpu'] / fact['floor_cpu']:.2f}" if "cpu" in fact else "",
                GOALS.get(stage, ""),
            )
            for stage, fact in one["stages"].items()
        ]
        columns = ("stage", "s", "s a layer", "peak MiB", "floor, s", "ratio", "CPU ratio", "goal")
        yield from (*table(columns, rows), "")
    if peer := document.get("llm-compressor"):
        yield from (f"llm-compressor {peer}: a model read, pruned and left in memory, after its imports.", "")


def main() -> None:
    """Measure what is not there yet, and write the tables anew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR", help="a model (repeatable)")
    parser.add_argument("--only", default="", help="only models whose name holds this")
    parser.add_argument("--samples", type=int, help="calibration samples (default: 64, and fewer of the shapes)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a sample (default 256)")
    parser.add_argument("--device", default="cpu", help="where to compute (default cpu)")
    parser.add_argument("--dtype", default="float32", help="of the computation (default float32)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each stage (default 3)")
    parser.add_argument("--peer", type=Path, help="the interpreter of an environment with llm-compressor")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--work", type=Path, help="where the random models are kept (default: a temporary folder)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the folder of the JSON files")
    parser.add_argument("--out", type=Path, default=HERE / "SPEED.md", help="the Markdown file to write")
    given = parser.parse_args()
    work: Path = given.work or Path(tempfile.gettempdir()) / "trim-benchmarks"
    for folder in (work, given.results):
        folder.mkdir(parents=True, exist_ok=True)
    named = {name: Path(path) for name, _, path in (one.partition("=") for one in given.model)}
    how = {"device": given.device, "dtype": given.dtype}
    where = f"{machine()}; computed in {given.dtype} on {given.device}"
    file = given.results / f"{re.sub(r'[^a-z0-9]+', '-', where.lower()).strip('-')}.json"
    document = json.loads(file.read_text()) if file.is_file() else {"models": {}}
    document |= {"machine": where, "versions": versions()}
    if given.peer:
        asked = [str(given.peer), "-c", "from importlib.metadata import version; print(version('llmcompressor'))"]
        document["llm-compressor"] = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    for name, (directory, samples, what) in models(named, work).items():
        if given.only not in name:
            continue
        samples, seqlen = given.samples or samples or 64, given.seqlen
        layers = Checkpoint.open(directory).config_document["num_hidden_layers"]
        known = {"what": what, "samples": samples, "seqlen": seqlen, "layers": layers, **how}
        entry = document["models"].get(name, {})
        if given.again or {key: entry.get(key) for key in known} != known:
            entry = document["models"][name] = {**known, "stages": {}}
        with tempfile.TemporaryDirectory(dir=work) as folder:
            bench = Bench(directory, (samples, seqlen), Path(folder), how)
            stages = bench.stages()
            missing = [stage for stage in ("start-up", *stages) if stage not in entry["stages"]]
            if missing:
                stages["calibrate"].work()
                stages["wanda"].work()
            for stage in missing:
                start = stage == "start-up"
                fact = started(bench, given.repeats) if start else measured(stages[stage], given.repeats)
                entry["stages"][stage] = fact
                file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                print(f"{name}, {stage}: {fact['seconds'] / fact['floor']:.2f} x {fact['beside']}", file=sys.stderr)
            if given.peer and what == "whole" and "llm-compressor, wanda" not in entry["stages"]:
                for method, fact in peers(bench, given.peer, 1):
                    entry["stages"][f"llm-compressor, {method}"] = fact
                    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lines = ["# Speed", "", "    " + "python -m benchmarks.speed", ""]
    for one in sorted(given.results.glob("*.json")):
        lines += tables(json.loads(one.read_text()))
    publish([*lines, *(HERE / "speed-notes.md").read_text(encoding="utf-8").splitlines()], given.out)


if __name__ == "__main__":
    main()
