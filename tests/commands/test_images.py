"""Image classifiers through every stage: the seeds' masks, accuracy, what is written, and what is refused."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from tests.digits import PROCESSOR, classifier, digits, logits, random_classifier
from tests.trim_cli import COMPUTE, trim, trim_json
from trimcli.files.calibration import CalibrationFile
from trimcli.files.masks import MaskFile

# DeiT's blocks are ViT's.
TRAINED = ["vit", pytest.param("deit", marks=pytest.mark.slow), "convnext", "swin"]
NSAMPLES = 64


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("digits")
    train, test = digits()
    return train.save(base / "train.npz"), test.save(base / "test.npz")


@pytest.fixture(scope="session", params=TRAINED)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def calibration(model: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(model.name) / "calib.safetensors"
    trim_json("calibrate", model, "-o", path, "--images", data[0], "--nsamples", NSAMPLES, *COMPUTE)
    return path


def accuracy(model: Path, test: Path, *more: object) -> float:
    (entry,) = trim_json("eval", model, "--images", test, *more, *COMPUTE)["images"]
    assert entry["images"] == len(digits()[1].labels)
    assert entry["top1"] <= entry["top5"] <= 1
    return float(entry["top1"])


def own_accuracy(model: Any) -> float:
    """Top-1 of transformers' own model."""
    test = digits()[1]
    with torch.no_grad():
        found = model(pixel_values=test.pixels).logits.argmax(dim=1)
    return float((found == torch.from_numpy(test.labels)).double().mean())


def masked(model: Any, masks: Path) -> Any:
    """A copy of transformers' own model under masks."""
    model, found = copy.deepcopy(model), MaskFile.open(masks)
    with torch.no_grad():
        for name in found.names:
            weight = model.get_submodule(name).weight
            weight *= found.keep(name).view(weight.shape)
    return model


def input_means(model: Any, pixels: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Mean square of each matrix's inputs over all tokens of all pictures, by transformers' own forward pass."""
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0]
        if isinstance(module, nn.Conv2d):
            inputs = inputs[:, :, :: module.stride[0], :: module.stride[1]].permute(0, 2, 3, 1)
        found[name] = inputs.reshape(-1, inputs.shape[-1]).double().square().mean(dim=0)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: note(name, module, args))
        for name in names
    ]
    with torch.no_grad():
        model(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    return found


def seeds_mask(weight: Tensor, means: Tensor, sparsity: float, compare: str) -> Tensor:
    """Which weights stay by the image code of Wanda: an entry at a time, the threshold inside a row or over all."""
    d_out, d_in = weight.shape
    scores = [[abs(float(weight[r, c])) * math.sqrt(float(means[c])) for c in range(d_in)] for r in range(d_out)]
    keep = torch.ones(d_out, d_in, dtype=torch.bool)
    if compare == "layer":
        threshold = sorted(score for row in scores for score in row)[int(d_out * d_in * sparsity)]
        for r in range(d_out):
            for c in range(d_in):
                keep[r, c] = scores[r][c] > threshold
        return keep
    for r in range(d_out):
        for c in sorted(range(d_in), key=lambda c: scores[r][c])[: int(d_in * sparsity)]:
            keep[r, c] = False
    return keep


@pytest.mark.parametrize("compare", ["row", "layer"])
def test_masks_are_the_seeds(model: Path, calibration: Path, tmp_path: Path, compare: str) -> None:
    same_as_the_seeds(model, calibration, tmp_path, "wanda", compare)


@pytest.mark.parametrize("compare", ["row", "layer"])
def test_masks_by_magnitude_are_the_seeds(vit: Path, vit_calibration: Path, tmp_path: Path, compare: str) -> None:
    same_as_the_seeds(vit, vit_calibration, tmp_path, "magnitude", compare)


def same_as_the_seeds(model: Path, calibration: Path, tmp_path: Path, method: str, compare: str) -> None:
    given = ("--method", method, "--compare", compare, "--sparsity", 0.7, "--no-propagate", "--numerics", "reference")
    trim_json("prune", model, "-o", tmp_path / "masks", "--calibration", calibration, *given, *COMPUTE)
    found, own = MaskFile.open(tmp_path / "masks"), AutoModelForImageClassification.from_pretrained(model)
    means = input_means(own, CalibrationFile(calibration).samples, found.names)
    differing = total = 0
    for name in found.names:
        weight = own.get_submodule(name).weight.detach()
        ones = torch.ones(weight.shape[1]) if method == "magnitude" else means[name]
        keep = seeds_mask(weight, ones, 0.7, compare)
        differing += int((keep ^ found.keep(name)).sum())
        total += keep.numel()
    assert total > 5000
    assert differing <= 2  # ties of scores that float32 rounds either way


@pytest.mark.parametrize("compare", ["row", "layer"])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_accuracy_falls_with_sparsity(
    model: Path, calibration: Path, tmp_path: Path, method: str, compare: str
) -> None:
    own, test = AutoModelForImageClassification.from_pretrained(model), digits()[1]
    found = [own_accuracy(own)]
    for sparsity in (0.5, 0.7, 0.9):
        masks = tmp_path / f"masks-{sparsity}"
        given = ("--method", method, "--compare", compare, "--sparsity", sparsity)
        done = trim_json("prune", model, "-o", masks, "--calibration", calibration, *given, *COMPUTE)
        assert done["sparsity"] == pytest.approx(sparsity, abs=1e-3)
        found.append(own_accuracy(masked(own, masks)))
    dense, half, _, tenth = found
    assert dense > 0.9
    assert dense + 0.02 >= half > 0.6
    assert half > tenth + 0.1
    assert len(test.labels) == 500


def test_what_is_written_is_the_masked_model(
    model: Path, calibration: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    masks, out = tmp_path / "masks", tmp_path / "pruned"
    trim_json("prune", model, "-o", masks, "--calibration", calibration, "--sparsity", 0.6, *COMPUTE)
    trim_json("apply-masks", model, masks, "-o", out)
    assert trim_json("verify", out, "--masks", masks)["failures"] == []
    own = AutoModelForImageClassification.from_pretrained(model)
    assert accuracy(model, data[1]) == own_accuracy(own)
    expected = masked(own, masks)
    with torch.no_grad():
        wanted = expected(pixel_values=digits()[1].pixels).logits
    assert torch.equal(logits(out, digits()[1].pixels), wanted)
    assert accuracy(model, data[1], "--masks", masks) == own_accuracy(expected)
    trim_json("apply-masks", model, masks, "-o", tmp_path / "packed", "--format", "packed")
    assert accuracy(tmp_path / "packed", data[1]) == own_accuracy(expected)
    trim_json("unpack", tmp_path / "packed", "-o", tmp_path / "unpacked")
    assert torch.equal(logits(tmp_path / "unpacked", digits()[1].pixels), wanted)


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier("vit", tmp_path_factory)


@pytest.fixture(scope="session")
def vit_calibration(vit: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "calib.safetensors"
    trim_json("calibrate", vit, "-o", path, "--images", data[0], "--nsamples", 48, *COMPUTE)
    return path


def test_calibration_keeps_the_pictures_that_were_drawn(vit_calibration: Path, data: tuple[Path, Path]) -> None:
    found, train = CalibrationFile(vit_calibration), digits()[0].pixels
    assert found.samples.shape == (48, 1, 8, 8)
    assert found.manifest["picture"] == [1, 8, 8]
    assert found.manifest["sources"]["images"]["path"] == str(data[0])
    same = (found.samples[:, None] == train).flatten(2).all(dim=2)
    assert same.any(dim=1).all()  # each is a picture of the file, to the last bit
    assert len({tuple(one.flatten().tolist()) for one in found.samples}) == 48


def test_statistics_are_the_model_s_own_whatever_the_batch(
    vit: Path, vit_calibration: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    given = ("--images", data[0], "--nsamples", 48, "--batch-size", 5)
    trim_json("calibrate", vit, "-o", small, *given, *COMPUTE)
    one, other = CalibrationFile(vit_calibration), CalibrationFile(small)
    assert torch.equal(one.samples, other.samples)
    own = AutoModelForImageClassification.from_pretrained(vit)
    for name, means in input_means(own, one.samples, list(one.manifest["shares"])).items():
        places = 5  # four patches and the class token
        for file in (one, other):
            torch.testing.assert_close(file.statistics(name, len(means)).sqnorm, (means * places).float())


def test_resnet_loses_its_convolutions_of_single_places(data: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = random_classifier("resnet", tmp_path / "resnet"), tmp_path / "pruned"
    given = ("--images", data[0], "--nsamples", 16, "--sparsity", 0.5, "--save-model", out)
    trim_json("prune", model, *given, "--no-propagate", *COMPUTE)
    own, written = (AutoModelForImageClassification.from_pretrained(one).state_dict() for one in (model, out))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "train.npz" in card
    assert "c4" not in card
    pruned = {name for name, tensor in written.items() if not torch.equal(tensor, own[name])}
    single = {name for name, one in own.items() if one.ndim == 4 and one.shape[2:] == (1, 1)}
    assert pruned == single
    assert len(single) == 7
    zeros = {name: float((written[name] == 0).double().mean()) for name in single}
    assert zeros == pytest.approx(dict.fromkeys(single, 0.5))
    done = trim_json("plan", model, "--sparsity", 0.5, "--method", "magnitude", *COMPUTE)
    whys = {why for name, why in done["why_dense"].items() if len(done["left_dense"][name]) == 4}
    assert whys == {"it is a convolution of neighbouring places"}


def test_convolutions_of_single_places_are_verified_and_packed(tmp_path: Path) -> None:
    model, masks, out = random_classifier("resnet", tmp_path / "resnet"), tmp_path / "masks", tmp_path / "pruned"
    given = ("--sparsity", 0.5, "--method", "magnitude", "--only", "*.convolution", "--only", "classifier.1")
    trim_json("prune", model, "-o", masks, "--save-model", out, *given, *COMPUTE)
    trim_json("apply-masks", model, masks, "-o", tmp_path / "packed", "--format", "packed")
    trim_json("unpack", tmp_path / "packed", "-o", tmp_path / "unpacked")
    for directory in (out, tmp_path / "packed", tmp_path / "unpacked"):
        found = trim_json("verify", directory, "--masks", masks)
        assert found["holds"]
        assert len(found["linears"]) == 8
        assert found["sparsity"] == 0.5
    pixels = digits()[1].pixels
    assert torch.equal(logits(tmp_path / "unpacked", pixels), logits(out, pixels))


@pytest.mark.parametrize(("name", "glob"), [("vit", "classifier"), ("swin", "*.downsample.reduction")])
def test_what_lies_outside_of_the_blocks_is_reached_by_magnitude(
    name: str, glob: str, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    model, masks, out = classifier(name, tmp_path_factory), tmp_path / "masks", tmp_path / "out"
    common = ("prune", model, "-o", masks, "--sparsity", 0.8, *COMPUTE)
    done = trim(*common, "--images", data[0], "--only", glob)
    assert done.status == 2
    assert "blocks, whose inputs alone pictures tell, and --method wanda reads inputs" in " ".join(done.err.split())
    done = trim(*common, "--method", "magnitude", "--only", "*patch_embeddings.projection")
    assert done.status == 2
    assert "patch_embeddings.projection stays dense, as it is a convolution that is no 1x1" in " ".join(
        done.err.split()
    )
    trim_json(*common, "--method", "magnitude", "--only", glob, "--save-model", out)
    own = AutoModelForImageClassification.from_pretrained(model).eval()
    expected = own_accuracy(masked(own, masks))
    assert accuracy(model, data[1], "--masks", masks) == accuracy(out, data[1]) == expected
    assert accuracy(model, data[1]) == own_accuracy(own) != expected


@pytest.mark.parametrize("name", ["convnext", "swin"])
def test_what_lies_between_stages_stays_dense(name: str, data: tuple[Path, Path], tmp_path: Path) -> None:
    model = random_classifier(name, tmp_path / name)
    done = trim_json("plan", model, "--sparsity", 0.5, "--method", "magnitude", *COMPUTE)
    pruned = {linear["name"] for linear in done["linears"]}
    if name == "convnext":
        assert {one.rpartition(".")[2] for one in pruned} == {"pwconv1", "pwconv2"}
        assert {one.rpartition(".")[0].rpartition(".")[2] for one in done["left_dense"]} == {"dwconv"}
    else:
        assert {one.rpartition(".")[2] for one in pruned} == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    assert not any("downsampl" in one or "classifier" in one or "embeddings" in one for one in pruned)


ON_PICTURES: dict[str, tuple[object, ...]] = {
    "sparsegpt": ("--method", "sparsegpt", "--save-model"),
    "admm": ("--method", "admm", "--save-model"),
    "trim": ("--use-trim", "--iterations", 2, "--alloc", "owl", "-o"),
    "groups": ("--sparsity-type", "2:4", "-o"),
    "swaps": ("--refine", "swaps", "-o"),
    "aimed": ("--update", "cg", "--target", "dense", "--save-model"),
}


@pytest.mark.parametrize(
    ("name", "way"), [*(("vit", way) for way in ON_PICTURES), ("convnext", "sparsegpt"), ("convnext", "aimed")]
)
def test_other_methods_run_on_pictures(
    name: str, way: str, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    model = classifier(name, tmp_path_factory)
    target = () if way == "groups" else ("--sparsity", 0.5)
    drawn = ("--images", data[0], "--nsamples", 48)
    done = trim_json("prune", model, *ON_PICTURES[way], tmp_path / "out", *target, *drawn, *COMPUTE)
    assert done["sparsity"] == pytest.approx(0.5, abs=2e-3)


def test_alpha_takes_the_image_code_s_metric(vit: Path, tmp_path: Path) -> None:
    given = ("--method", "alpha", "--ww-metric", "norm", "--mapping-type", "layer", "--epsilon", 0.2)
    trim_json("alloc-layers", vit, "-o", tmp_path / "ratios.json", *given, "--sparsity", 0.6)
    found = json.loads((tmp_path / "ratios.json").read_text())
    own = AutoModelForImageClassification.from_pretrained(vit)
    norms = {name: float(own.get_submodule(name).weight.detach().double().square().sum()) for name in found["metric"]}
    assert found["metric"] == pytest.approx(norms)
    assert len(norms) == 12
    counts = {name: own.get_submodule(name).weight.numel() for name in norms}
    low, high = min(norms.values()), max(norms.values())
    shares = {name: (norm - low) / (high - low) * 0.4 + 0.8 for name, norm in norms.items()}
    scale = 0.6 * sum(counts.values()) / sum(counts[name] * shares[name] for name in norms)
    assert found["sparsity"] == pytest.approx({name: share * scale for name, share in shares.items()})


def test_a_folder_a_parquet_and_an_npz_hold_the_same_pictures(vit: Path, tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    few = digits()[1].first(60)
    few.save(tmp_path / "few.npz")
    few.save_pictures(tmp_path / "folder")
    pictures = [Image.fromarray(one) for one in few.images]
    (tmp_path / "folder" / "0" / "notes.txt").write_text("no picture")
    table = datasets.Dataset.from_dict({"image": pictures, "label": few.labels.tolist()})
    table.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "few.parquet"))
    entries = [
        trim_json("eval", vit, "--images", tmp_path / name, *COMPUTE)["images"][0]
        for name in ("few.npz", "folder", "few.parquet")
    ]
    assert {(entry["top1"], entry["top5"], entry["images"]) for entry in entries} == {
        (entries[0]["top1"], entries[0]["top5"], 60)
    }
    assert entries[0]["top1"] > 0.8
    flat = tmp_path / "flat"
    shutil.copytree(tmp_path / "folder" / "1", flat)
    trim_json("calibrate", vit, "-o", tmp_path / "calib", "--images", flat, "--nsamples", 4, *COMPUTE)
    done = trim("eval", vit, "--images", flat, *COMPUTE)
    assert done.status == 2
    assert "does not say which class each picture is of" in done.err


def test_classes_are_looked_up_by_name(vit: Path, tmp_path: Path) -> None:
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    model = Path(shutil.copytree(vit, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["id2label"], config["label2id"] = dict(enumerate(names)), {name: at for at, name in enumerate(names)}
    (model / "config.json").write_text(json.dumps(config))
    digits()[1].first(40).save_pictures(tmp_path / "all")
    for label in range(5):
        shutil.copytree(tmp_path / "all" / str(label), tmp_path / "some" / names[label])
    (entry,) = trim_json("eval", model, "--images", tmp_path / "some", *COMPUTE)["images"]
    assert entry["top1"] > 0.8
    done = trim("eval", vit, "--images", tmp_path / "some", *COMPUTE)
    assert done.status == 2
    assert "has 5 classes, such as 'four', and the model 10" in done.err


def test_augmented_pictures_are_drawn_alike_every_time(vit: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    for name, more in (("one", ("--augment",)), ("two", ("--augment",)), ("plain", ())):
        given = ("--images", data[0], "--nsamples", 12, *more)
        trim_json("calibrate", vit, "-o", tmp_path / name, *given, *COMPUTE)
    one, two, plain = (CalibrationFile(tmp_path / name).samples for name in ("one", "two", "plain"))
    assert torch.equal(one, two)
    assert one.shape == plain.shape
    assert (one != plain).flatten(1).any(dim=1).all()


def test_a_limit_of_memory(vit: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimcli.pipeline.fit.available_bytes", lambda: 1 << 40)
    given = ("eval", vit, "--images", data[1], "--cache-dir", tmp_path / "cache", *COMPUTE)
    plain = trim_json(*given)
    assert plain["planned"]["hidden_states"] == "host"
    tight = trim_json(*given, "--max-memory", plain["planned"]["peak_host_bytes"] - 1)
    assert tight["planned"]["hidden_states"] == "files"
    assert tight["images"] == plain["images"]
    pictures = ("--images", data[0], "--nsamples", NSAMPLES)
    words = ("prune", vit, "-o", tmp_path / "m", "--sparsity", 0.5, *pictures, *COMPUTE)
    for command, what in ((given, "measuring accuracy of "), (words, "pruning ")):
        refused = trim(*command, "--cache-dir", tmp_path / "cache", "--max-memory", "100MiB")
        assert refused.status == 1
        assert what in refused.err
        assert "--max-memory allows 100.0 MiB; give --max-memory 36" in refused.err
    assert not (tmp_path / "m").exists()


def test_results_are_compared(vit: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    trim_json("eval", vit, "--images", data[1], "-o", tmp_path / "dense.json", *COMPUTE)
    table = trim_json("compare", tmp_path / "dense.json")
    measures = {(one["of"], one["metric"]): one["value"] for one in table["rows"][0]["measures"]}
    found = json.loads((tmp_path / "dense.json").read_text())["images"][0]
    assert measures == {("test.npz", "top-1"): found["top1"], ("test.npz", "top-5"): found["top5"]}
    trim_json("report", tmp_path / "dense.json", "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Accuracy" in page
    assert f"{found['top1']:.4f}" in page


def refusals(base: Path, model: Path, text: Path, data: Path) -> dict[str, tuple[list[object], str]]:
    """What is asked for, and a part of the sentence that refuses it."""
    (base / "empty").mkdir()
    bare = Path(shutil.copytree(model, base / "bare"))
    (bare / "preprocessor_config.json").unlink()
    broken = Path(shutil.copytree(model, base / "broken"))
    (broken / "preprocessor_config.json").write_text("{")
    other = Path(shutil.copytree(model, base / "other"))
    size = {"size": {"height": 16, "width": 16}}
    (other / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **size}))
    absurd: dict[str, dict[str, object]] = {
        "wide": {"size": {"height": 8, "width": 2_000_000_000}},
        "cropped": {"do_center_crop": True, "crop_size": 100_000},
        "endless": {"size": {"shortest_edge": math.inf}},
        "tiny part": {"size": 384, "crop_pct": 1e-6},
    }
    for name, found in absurd.items():
        shutil.copytree(model, base / name)
        (base / name / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **found}))
    np.savez(base / "strip.npz", images=np.zeros((4, 1, 1_000_000), np.uint8))
    np.savez(base / "floats.npz", images=np.zeros((4, 8, 8), np.float32))
    np.savez(base / "four.npz", images=np.zeros((4, 8, 8, 4), np.uint8))
    np.savez(base / "labels.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.array([0, 1, 12, 2]))
    np.savez(base / "fewer.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.array([0, 1]))
    np.savez(base / "none.npz", images=np.zeros((0, 8, 8), np.uint8))
    (base / "torn.npz").write_bytes(data.read_bytes()[:200])
    (base / "torn.parquet").write_bytes(b"PAR1 and no more")
    (base / "pictures").mkdir()
    (base / "pictures" / "a.png").write_bytes(b"no picture")
    out, half = ["-o", base / "out"], ["--sparsity", 0.5]
    images, few, one = ["--images", data], ["--nsamples", 4], ["--nsamples", 1]
    return {
        "text to a classifier": (["calibrate", model, *out], "is an image classifier (ViTForImageClassification)"),
        "perplexity": (["eval", model, "--ppl", "a.txt"], "for models of text"),
        "generate": (["generate", model, "one"], "for models of text"),
        "finetune": (["finetune", model, *out, "--mode", "full", "--steps", 1], "for models of text"),
        "sweep": (["sweep", model, *out, "--sparsity", 0.5], "for models of text"),
        "no pictures": (["prune", model, *out, "--sparsity", 0.5], "give pictures with --images, or --calibration"),
        "a text model": (["calibrate", text, *out, *images], "is no image classifier (Qwen2ForCausalLM)"),
        "a text model pruned": (["prune", text, *out, *images, "--sparsity", 0.5], "is no image classifier"),
        "a text model measured": (["eval", text, *images], "is no image classifier"),
        "text beside": (["calibrate", model, *out, *images, "--seqlen", 8], "--seqlen with --images"),
        "perplexity beside": (["eval", model, *images, "--ppl", "a.txt"], "--ppl with --images"),
        "augment alone": (["calibrate", model, *out, "--augment"], "--augment does nothing without --images"),
        "no processor": (["calibrate", bare, *out, *images, *few], "there is no image processor in"),
        "another's processor": (["calibrate", other, *out, *images, *few], "does not take pictures of [1, 16, 16]"),
        "absurd sides": (["calibrate", base / "wide", *out, *images, *few], "a size of 2000000000 pixels, more"),
        "an absurd crop": (["calibrate", base / "cropped", *out, *images, *few], "a crop_size of 100000 pixels"),
        "endless sides": (["calibrate", base / "endless", *out, *images, *few], "a size of inf pixels"),
        "a tiny part": (["calibrate", base / "tiny part", *out, *images, *few], "a crop_pct of 1e-06, not 0.1 to 1"),
        "a strip": (["calibrate", model, *out, "--images", base / "strip.npz", *few], "picture of 1000000 x 1 pixels"),
        "a broken processor": (["calibrate", broken, *out, *images, *few], "is not usable"),
        "nowhere": (["calibrate", model, *out, "--images", base / "no"], "there is no "),
        "an empty folder": (["calibrate", model, *out, "--images", base / "empty"], "holds no pictures"),
        "an empty file": (["calibrate", model, *out, "--images", base / "none.npz"], "holds no pictures"),
        "too few": (["calibrate", model, *out, *images, "--nsamples", 1500], "more than the 1297 pictures in"),
        "no bytes": (["calibrate", model, *out, "--images", base / "floats.npz"], "does not hold `images`, uint8"),
        "channels": (["calibrate", model, *out, "--images", base / "four.npz"], "pictures of 4 channels"),
        "torn": (["calibrate", model, *out, "--images", base / "torn.npz"], "is no whole npz file"),
        "torn table": (["calibrate", model, *out, "--images", base / "torn.parquet"], "is no whole parquet file"),
        "no picture": (["calibrate", model, *out, "--images", base / "pictures", *one], "is no whole picture"),
        "other": (["calibrate", model, *out, "--images", model / "config.json"], "is neither a folder of pictures"),
        "label": (["eval", model, "--images", base / "labels.npz"], "has the label 12, outside the model's 10 classes"),
        "labels": (["eval", model, "--images", base / "fewer.npz"], "not an integer for each picture"),
        "barber": (["prune", model, *out, *images, *half, "--prune-barber"], "--prune-barber works on text"),
        "search": (
            ["prune", model, *out, *images, "--sparsity", 0.5, "--alloc", "search"],
            "--alloc search works on text",
        ),
        "compare and rows": (
            ["prune", model, *out, *images, "--sparsity", 0.5, "--compare", "layer", "--use-trim"],
            "--compare layer with --use-trim",
        ),
        "compare and groups": (
            ["prune", model, *out, *images, "--sparsity-type", "2:4", "--compare", "row"],
            "--compare row with an N:M pattern",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("named", [7, 0.5, "ViTForImageClassification", {"a": 1}, [3, None]])
def test_architectures_that_are_no_list_of_names(
    named: Any, vit: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(vit, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": named}))
    done = trim("eval", model, "--images", data[1], *COMPUTE)
    assert done.status == 2
    assert "is no image classifier (no architecture in its config.json)" in " ".join(done.err.split())


def test_bad_input_is_refused_in_one_sentence(
    vit: Path, nano_qwen2: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    for what, (words, part) in refusals(tmp_path, vit, nano_qwen2, data[0]).items():
        done = trim(*words)
        assert done.status == 2, f"{what}: {done.err or done.out}"
        assert part in done.err, f"{what}: {done.err}"
        assert done.err.count("\n") == 1, f"{what}: {done.err}"
        assert not (tmp_path / "out").exists(), what


def test_text_and_pictures_have_each_their_calibration(vit: Path, nano_qwen2: Path, vit_calibration: Path) -> None:
    done = trim("prune", nano_qwen2, "-o", "out", "--calibration", vit_calibration, "--sparsity", 0.5, *COMPUTE)
    assert done.status == 2
    assert "was made for the model" in done.err or "another model" in done.err
