"""A folder with one artifact of every kind that trim reads, of one tiny model, for what damages them."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.interrupt import InterruptAt, Interrupted
from tests.small_models import llama_config, random_model, save
from tests.trim_cli import COMPUTE, save_tokens, trim
from trimcli import PruneOptions, Recipe, prune

VOCABULARY = 64
WEIGHT = "model.layers.0.mlp.up_proj.weight"
HALF = ("--sparsity", "0.5")


@dataclass(frozen=True)
class Corpus:
    """A folder of artifacts; `out` in it is where commands write, `cache` their stage cache."""

    home: Path

    @property
    def out(self) -> Path:
        """Where commands write."""
        return self.home / "out"

    @property
    def run(self) -> tuple[str, ...]:
        """How every command computes and caches."""
        return ("--cache-dir", str(self.home / "cache"), *COMPUTE)

    def readers(self) -> dict[str, tuple[list[str], list[list[str]]]]:
        """Kind -> the files of that kind, and the command lines that read them."""
        home, out, run = self.home, self.out, list(self.run)
        model, calib, masks = str(home / "model"), str(home / "calib"), str(home / "masks.safetensors")
        tokens = ["--tokens", str(home / "tokens.safetensors")]
        magnitude = ["prune", "{}", "-o", f"{out}/m", "--method", "magnitude", *HALF, *run]

        def of(where: str, *lines: list[str]) -> list[list[str]]:
            return [[word.replace("{}", str(home / where)) for word in line] for line in lines]

        def model_lines(where: str) -> list[list[str]]:
            return of(
                where,
                magnitude,
                ["calibrate", "{}", "-o", f"{out}/c", *tokens, *run],
                ["plan", "{}", *HALF],
                ["prune", "{}", "-o", f"{out}/m", "--save-model", f"{out}/p", *HALF, *tokens, *run],
                ["verify", "{}"],
            )

        page = ["--format", "html", "-o", f"{out}/r"]
        written = of("pruned", ["verify", "{}"], ["verify", "{}", "--masks", masks], magnitude, ["report", "{}", *page])
        pack = of("packed", ["unpack", "{}", "-o", f"{out}/u"], ["verify", "{}"], magnitude)
        exported = of("exported", ["bench", "{}", "--tokens", "2", "--batch", "1", "--repeat", "1"])
        calibrated = [
            ["prune", model, "-o", f"{out}/m", *HALF, "--calibration", calib, *run],
            ["prune", model, "-o", f"{out}/m", *HALF, "--calibration", calib, "--no-propagate", "--use-trim", *run],
            ["alloc-layers", model, "-o", f"{out}/a", *HALF, "--method", "owl", "--calibration", calib],
        ]
        masked = [
            ["apply-masks", model, masks, "-o", f"{out}/d"],
            ["apply-masks", model, masks, "-o", f"{out}/d", "--format", "packed"],
            ["verify", masks],
            ["verify", str(home / "pruned"), "--masks", masks],
            ["report", masks, "--format", "md", "-o", f"{out}/r"],
        ]
        ratios = [
            ["prune", model, "-o", f"{out}/m", "--method", "magnitude", "--ratios", str(home / "ratios.json"), *run],
            ["report", str(home / "ratios.json"), "--format", "md", "-o", f"{out}/r"],
        ]
        mixed = [[word.replace("ratios.json", "mixed.json") for word in ratios[0]]]
        results = [
            ["compare", str(home / "results.json")],
            ["report", str(home / "results.json"), "--format", "html", "-o", f"{out}/r"],
        ]
        rows = [["report", str(home / "rows.json"), "--format", "html", "-o", f"{out}/r"]]
        samples = [
            ["calibrate", model, "-o", f"{out}/c", *tokens, *run],
            ["prune", model, "-o", f"{out}/m", *HALF, *tokens, *run],
        ]
        alpha = ["alloc-layers", model, "-o", f"{out}/a", *HALF, "--method", "alpha"]
        metrics = [[*alpha, "--metrics-cache", str(home / "metrics.json")]]
        imported = [["alloc-layers", model, "-o", f"{out}/a", "--method", "owl", "--import", str(home / "keep.npy")]]
        pictures, vit = ["--images", str(home / "pictures.npz")], str(home / "vit")
        seen = [
            ["eval", vit, *pictures, *run],
            ["prune", vit, "-o", f"{out}/m", "--save-model", f"{out}/p", *HALF, *pictures, "--nsamples", "4", *run],
            ["prune", vit, "-o", f"{out}/m", *HALF, "--calibration", str(home / "calib-images"), *run],
        ]
        shards = [str(path.relative_to(home)) for path in sorted((home / "model").glob("*.safetensors"))]
        return {
            "safetensors shards": (shards, model_lines("model")),
            "config": (["model/config.json"], model_lines("model")),
            "index": (["model/model.safetensors.index.json"], model_lines("model")),
            "pickled shards": (["bin/pytorch_model.bin"], model_lines("bin")),
            "float8": (["float8/model.safetensors"], model_lines("float8")),
            "bitmask": (["bitmask/model.safetensors"], model_lines("bitmask")),
            "calibration": (["calib"], calibrated),
            "ratios": (["ratios.json"], ratios),
            "mixed ratios": (["mixed.json"], mixed),
            "masks": (["masks.safetensors"], masked),
            "pruned mark": (["pruned/trim.json"], written),
            "packed shards": (_named(home, "packed", ".safetensors"), pack),
            "packed mark": (["packed/trim.json"], pack),
            "exported": ([*_named(home, "exported", ".safetensors"), "exported/trim.json"], exported),
            "parts": (_named(home, "cache", "layer-00000.safetensors"), [self.interrupted]),
            "results": (["results.json"], results),
            "rows": (["rows.json", "rows.safetensors"], rows),
            "tokens": (["tokens.safetensors"], samples),
            "metrics": (["metrics.json"], metrics),
            "npy": (["keep.npy"], imported),
            "pictures": (["pictures.npz"], seen[:2]),
            "image processor": (["vit/preprocessor_config.json"], seen[:2]),
            "classifier": (["vit/config.json"], seen),
            "calibration of pictures": (["calib-images"], seen[2:]),
        }

    @property
    def interrupted(self) -> list[str]:
        """The prune whose parts lie in the cache."""
        home = self.home
        given = ["--calibration", str(home / "calib"), *HALF, "--method", "sparsegpt"]
        return ["prune", str(home / "model"), "-o", f"{self.out}/m", "--save-model", f"{self.out}/p", *given, *self.run]


def _named(home: Path, folder: str, end: str) -> list[str]:
    return [str(path.relative_to(home)) for path in sorted((home / folder).rglob(f"*{end}"))]


def done(*args: object) -> None:
    """Run a command of trim that must succeed."""
    found = trim(*args)
    if found.status:
        raise RuntimeError(found.err)


def build(home: Path) -> Corpus:
    """Make the folder `home`, which must not exist."""
    home.mkdir()
    corpus = Corpus(home)
    corpus.out.mkdir()
    config = llama_config(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
    dense = random_model(config)
    save(dense, home / "model", max_shard_size="10KB")
    save(dense, home / "whole")
    _other_forms(home, load_file(home / "whole" / "model.safetensors"))
    tokens = ("--tokens", save_tokens(home / "tokens.safetensors", vocabulary=VOCABULARY))
    model, run = home / "model", corpus.run
    done("calibrate", model, "-o", home / "calib", *tokens, *run)
    done("alloc-layers", model, "-o", home / "ratios.json", *HALF, "--method", "owl", "--calibration", home / "calib")
    ratios = json.loads((home / "ratios.json").read_text())
    mixed = {**ratios, "pattern": {key: [2, 4] for key in ratios["sparsity"]}}
    mixed["sparsity"] = dict.fromkeys(ratios["sparsity"], 0.5)
    (home / "mixed.json").write_text(json.dumps(mixed))
    made = ("-o", home / "masks.safetensors", "--save-model", home / "pruned", "--stats-out", home / "rows.json")
    done("prune", model, *made, *HALF, "--use-trim", "--iterations", 2, "--calibration", home / "calib", *run)
    done("apply-masks", model, home / "masks.safetensors", "-o", home / "packed", "--format", "packed")
    done("export", home / "pruned", "--to", "csr", "-o", home / "exported", "--device", "cpu")
    done(
        "alloc-layers",
        model,
        "-o",
        home / "a.json",
        *HALF,
        "--method",
        "alpha",
        "--metrics-cache",
        home / "metrics.json",
    )
    np.save(home / "keep.npy", np.array([0.4, 0.6]))
    _classifier(corpus)
    _results(home)
    _interrupted(corpus)
    return corpus


def _classifier(corpus: Corpus) -> None:
    from transformers import AutoModelForImageClassification

    from tests.digits import CLASSIFIERS, PROCESSOR

    home, rng = corpus.home, np.random.default_rng(0)
    AutoModelForImageClassification.from_config(CLASSIFIERS["vit"]()).save_pretrained(home / "vit")
    (home / "vit" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    images = rng.integers(256, size=(8, 8, 8), dtype=np.uint8)
    np.savez(home / "pictures.npz", images=images, labels=np.arange(8))
    given = ("--images", home / "pictures.npz", "--nsamples", 4)
    done("calibrate", home / "vit", "-o", home / "calib-images", *given, *corpus.run)


def _results(home: Path) -> None:
    from tests.report_documents import results

    results(home / "results.json", 0.5)


def _interrupted(corpus: Corpus) -> None:
    """Leave the part of the first of two layers in the cache."""
    home = corpus.home
    options = PruneOptions(
        device="cpu",
        dtype="float32",
        sparsity=0.5,
        calibration=home / "calib",
        recipe=Recipe(method="sparsegpt"),
        save_model=corpus.out / "p",
        cache_dir=home / "cache",
    )
    try:
        prune(str(home / "model"), corpus.out / "m", options, progress=InterruptAt("layer 2/2 collect"))
    except Interrupted:
        return
    raise RuntimeError("the prune was not interrupted")


def _other_forms(home: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The model as `.bin`, and two of its quantized forms; and texts."""
    for name in ("bin", "float8", "bitmask"):
        (home / name).mkdir()
        (home / name / "config.json").write_bytes((home / "whole" / "config.json").read_bytes())
    torch.save(tensors, home / "bin" / "pytorch_model.bin")
    eighth = {key: value for key, value in tensors.items() if key != WEIGHT}
    scaled = {WEIGHT: tensors[WEIGHT].to(torch.float8_e4m3fn), f"{WEIGHT}_scale_inv": torch.ones(1, 1)}
    save_file({**eighth, **scaled}, home / "float8" / "model.safetensors", metadata={"format": "pt"})
    weight, stem = tensors[WEIGHT], WEIGHT.removesuffix(".weight")
    keep = weight > 0
    bits = torch.from_numpy(np.packbits(keep.numpy(), axis=-1, bitorder="little"))
    parts = {f"{stem}.compressed": weight[keep], f"{stem}.bitmask": bits, f"{stem}.shape": torch.tensor(weight.shape)}
    save_file({**eighth, **parts}, home / "bitmask" / "model.safetensors", metadata={"format": "pt"})
    lines = "".join(json.dumps({"text": f"text number {n} " * 9}) + "\n" for n in range(20))
    (home / "text.jsonl").write_text(lines)
    (home / "text.json.gz").write_bytes(gzip.compress(lines.encode()))
    (home / "text.txt").write_text("One line after another. " * 200)
