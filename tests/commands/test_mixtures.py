"""Mixtures of experts through the commands: pruned expert by expert, in the checkpoint's own form and names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.families import CONVERTS, VOCABULARY
from tests.mixtures import EXPERTS, FUSED, MIXTURES, save_mixture
from tests.small_models import skeleton_of, with_tensors
from tests.trim_cli import COMPUTE, save_tokens, trim, trim_json, zeros
from trimcli.errors import OptionError
from trimcli.evaluation.perplexity import perplexity
from trimcli.files.calibration import CalibrationFile
from trimcli.files.masks import MaskFile
from trimcli.kernels.bitmap.model import make_sparse
from trimcli.methods.masks import matrix_budget
from trimcli.methods.recipe import Recipe
from trimcli.model.forward import first_output
from trimcli.model.skeleton import DecoderLayer, Skeleton
from trimcli.pipeline.plan import refuse_experts

KNOWN = Path(__file__).parents[1] / "data" / "mixtures.safetensors"
UP = {"mixtral": "block_sparse_moe.experts.2.w1", "gpt_oss": "mlp.experts.gate_up_proj.2"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every mixture, and `tokens`."""
    home = tmp_path_factory.mktemp("mixtures")
    for name in MIXTURES:
        save_mixture(name, home / name)
    save_tokens(home / "tokens", vocabulary=VOCABULARY, nsamples=6)
    return home


def pruned(home: Path, name: str, out: Path, *args: object, sparsity: float | None = 0.5) -> Any:
    """The document of `trim prune`, which leaves `out` and `out.masks`; its `err`, too."""
    share = () if sparsity is None else ("--sparsity", sparsity)
    cache = ("--cache-dir", out.parent / "cache")
    command = ("prune", home / name, "-o", out.with_suffix(".masks"), "--save-model", out, *share, *cache, *args)
    return trim_json(*command, "--tokens", home / "tokens", *COMPUTE)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_loses_its_share_and_the_checkpoint_keeps_its_form(home: Path, name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = pruned(home, name, out)
    skeleton, masks = skeleton_of(home / name), MaskFile.open(out.with_suffix(".masks"))
    assert summary["linears"] == len(skeleton.linears) == len(masks.names)
    before, after = load_file(home / name / "model.safetensors"), load_file(out / "model.safetensors")
    assert {key: (one.dtype, one.shape) for key, one in before.items()} == {
        key: (one.dtype, one.shape) for key, one in after.items()
    }
    routed = [linear for linear in skeleton.linears.values() if linear.routed]
    for linear in skeleton.linears.values():
        keep = masks.keep(linear.name)
        assert zeros(keep) == matrix_budget(*linear.shape, 0.5)
        dense = linear.within(before[str(linear.key)])
        assert torch.equal(linear.within(after[str(linear.key)]), dense * keep), linear.name
    # Each expert by the checkpoint's names: a tensor, or a stack and a place in it.
    kinds = 2 if name in FUSED else 3
    assert len(routed) == EXPERTS * kinds * {"deepseek_v3": 1, "jetmoe": 4}.get(name, 2)
    for linear in routed:
        key = linear.name if linear.place is None else linear.name.rpartition(".")[0]
        assert {key, f"{key}.weight"} & before.keys(), linear.name
        assert (linear.place is None) == (name not in FUSED)
        assert isinstance(masks.entry(linear.name)["tokens"], int)
    assert UP.get(name, "") in "".join(masks.names)
    # Routers, embeddings, norms and biases are as they were.
    others = before.keys() - {linear.key for linear in skeleton.linears.values()}
    assert any("router" in key or "gate.weight" in key for key in others)
    assert all(torch.equal(before[key], after[key]) for key in others)


@pytest.mark.parametrize("name", MIXTURES)
def test_what_is_written_is_the_masked_model(home: Path, name: str, tmp_path: Path) -> None:
    out, windows = tmp_path / "out", torch.randint(2, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(3))
    pruned(home, name, out)
    masks = MaskFile.open(out.with_suffix(".masks"))
    masked = skeleton_of(home / name)
    masked.load_everything()
    for linear in masked.linears.values():
        linear.mask(masks.keep(linear.name))
    written = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = written(input_ids=windows, use_cache=False).logits
        assert torch.equal(logits, masked.model(input_ids=windows, use_cache=False).logits)
    own = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).exp()
    assert perplexity(skeleton_of(home / name), windows, mask=masks) == pytest.approx(float(own), rel=1e-4)
    assert perplexity(skeleton_of(out), windows) == pytest.approx(float(own), rel=1e-4)
    assert trim_json("verify", out)["holds"]
    assert trim_json("verify", out, "--masks", out.with_suffix(".masks"))["holds"]

    again, packed = tmp_path / "again", tmp_path / "packed"
    for target, form in ((again, "dense"), (packed, "packed")):
        assert trim("apply-masks", home / name, masks.path, "-o", target, "--format", form).status == 0
        assert trim_json("verify", target)["holds"]
    entries = json.loads((packed / "trim.json").read_text(encoding="utf-8"))
    tensors = entries["packed"]["tensors"]
    for key in {linear["key"] for linear in entries["linears"].values()}:  # one's own, or of a stack of matrices
        assert tensors[key]["kept"] is not None, key
    assert trim("unpack", packed, "-o", tmp_path / "unpacked").status == 0
    expected = load_file(out / "model.safetensors")
    for target in (again, tmp_path / "unpacked"):
        found = load_file(target / "model.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_every_version_of_transformers_gives_the_same_masks(home: Path, tmp_path: Path) -> None:
    """`KNOWN` holds those that version 5.23 chose; which form the experts take once loaded differs between versions."""
    known = load_file(KNOWN)
    assert {key.partition(":")[0] for key in known} == MIXTURES.keys()
    for name in MIXTURES:
        pruned(home, name, tmp_path / name)
        masks = MaskFile.open(tmp_path / f"{name}.masks")
        bits = {key.partition(":")[2]: bits for key, bits in known.items() if key.startswith(f"{name}:")}
        assert bits.keys() == set(masks.names)
        for linear, one in bits.items():
            assert torch.equal(packed_bits(masks.keep(linear)), one), (name, linear)


def packed_bits(keep: Tensor) -> Tensor:
    """uint8, eight of a mask to the byte, in the order of its rows."""
    return torch.from_numpy(np.packbits(keep.numpy().ravel()))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "args",
    [
        ("--method", "sparsegpt"),
        ("--method", "magnitude"),
        ("--use-trim", "--iterations", 2),
        ("--use-trim", "--iterations", 2, "--input-recalc"),
        ("--refine", "swaps"),
        ("--method", "admm", "--rows", "free"),
        ("--alloc", "owl", "--hyper-m", 3),
        ("--no-propagate",),
    ],
    ids=lambda args: "".join(map(str, args)),
)
def test_methods_take_experts(home: Path, name: str, args: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    if "magnitude" in args:
        masks = out.with_suffix(".masks")
        done = trim("prune", home / name, "-o", masks, "--save-model", out, "--sparsity", 0.5, *args, *COMPUTE)
        assert done.status == 0, done.err
    else:
        pruned(home, name, out, *args)
    skeleton, after = skeleton_of(out), load_file(out / "model.safetensors")
    taken = [zeros(linear.within(after[str(linear.key)])) for linear in skeleton.linears.values()]
    assert sum(taken) == pytest.approx(0.5 * sum(one.numel for one in skeleton.linears.values()), abs=len(taken))
    assert trim_json("verify", out)["holds"]


def test_patterns_hold_in_every_expert(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruned(home, "llama4", out, "--sparsity-type", "2:4", sparsity=None)
    skeleton, after = skeleton_of(out), load_file(out / "model.safetensors")
    for linear in skeleton.linears.values():
        weight = linear.within(after[str(linear.key)])
        assert bool(((weight.reshape(linear.d_out, -1, 4) != 0).sum(dim=2) == 2).all()), linear.name


def test_experts_that_few_tokens_reach_are_pruned_by_magnitude(home: Path, tmp_path: Path) -> None:
    """The fewest that count are given; a remark says which were fewer, and none is said of the others."""
    out = tmp_path / "out"
    pruned(home, "qwen3_moe", out, "--method", "wanda", "--min-expert-tokens", 48)
    masks = MaskFile.open(out.with_suffix(".masks"))
    remarks = dict(line.split(": ", 1) for line in masks.manifest["remarks"])
    assert all(text.endswith("so it is pruned by magnitude") for text in remarks.values())
    counts = {name: int(text.split()[0].replace(",", "").replace("no", "0")) for name, text in remarks.items()}
    skeleton = skeleton_of(home / "qwen3_moe")
    routed = {name for name, linear in skeleton.linears.items() if linear.routed}
    assert set(counts) < routed
    assert len(counts) > 0
    assert max(counts.values()) < 48
    for name in routed:
        weight = skeleton.linears[name].read(skeleton.checkpoint).abs()
        lowest = masks.keep(name) == (weight > weight.flatten().kthvalue(weight.numel() // 2).values)
        assert bool(lowest.all()) == (name in counts), name
    assert trim_json("verify", out)["holds"]

    everything = tmp_path / "everything"
    pruned(home, "qwen3_moe", everything, "--min-expert-tokens", 1)
    reached = MaskFile.open(everything.with_suffix(".masks")).manifest["remarks"]
    assert all(line.split(": ")[1].startswith("no token reached it") for line in reached)


@pytest.mark.parametrize("args", [("--method", "wanda"), ("--method", "sparsegpt"), ("--use-trim",)])
def test_an_expert_that_no_token_reaches_is_pruned_all_the_same(
    home: Path, args: tuple[str, ...], tmp_path: Path
) -> None:
    key = "model.layers.0.mlp.gate.weight"
    router = torch.zeros_like(load_file(home / "qwen3_moe" / "model.safetensors")[key])
    model = with_tensors(home / "qwen3_moe", tmp_path / "model", **{key: router})  # of equals the first are chosen
    done = trim(
        "prune", model, "-o", tmp_path / "masks", "--save-model", tmp_path / "out", "--sparsity", 0.5, *args,
        "--tokens", home / "tokens", "--cache-dir", tmp_path / "cache", *COMPUTE,
    )  # fmt: skip
    assert done.status == 0, done.err
    masks = MaskFile.open(tmp_path / "masks")
    idle = {line.split(": ")[0] for line in masks.manifest["remarks"] if "no token reached it" in line}
    assert len([name for name in idle if "layers.0." in name]) == (EXPERTS - 2) * 3
    assert "no token reached it, so it is pruned by magnitude; and 5 more" in done.err
    for name in idle:
        assert zeros(masks.keep(name)) == matrix_budget(*masks.shape(name), 0.5)


def test_statistics_of_experts_in_a_calibration_file(home: Path, tmp_path: Path) -> None:
    """They choose the same masks as those gathered on the way, where nothing before was pruned; token counts are in."""
    calibration = tmp_path / "calibration"
    trim_json("calibrate", home / "olmoe", "-o", calibration, "--tokens", home / "tokens", *COMPUTE)
    common = ("--sparsity", 0.5, "--calibration", calibration, "--only", "*.layers.0.mlp.*", *COMPUTE)
    for target, more in (("one", ()), ("two", ("--no-propagate",))):
        done = trim("prune", home / "olmoe", "-o", tmp_path / target, *common, *more, "--cache-dir", tmp_path / "c")
        assert done.status == 0, done.err
    one, two = MaskFile.open(tmp_path / "one"), MaskFile.open(tmp_path / "two")
    assert one.names == two.names
    assert all(torch.equal(one.keep(name), two.keep(name)) for name in one.names)
    routed = CalibrationFile(calibration).manifest["routed"]
    down = [count for name, count in routed.items() if "layers.1" in name and name.endswith("down_proj")]
    assert sum(down) == 2 * 6 * 16  # two experts a token


def test_a_batch_that_runs_out_of_memory_leaves_nothing_in_experts_sums(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = ("calibrate", home / "olmoe", "--tokens", home / "tokens", "--stats", "norms", *COMPUTE)
    assert trim(*command, "-o", tmp_path / "whole", "--batch-size", 4, "--cache-dir", tmp_path / "cache").status == 0
    load = Skeleton.load_layer

    def short(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if len(first_output(result)) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def loaded(skeleton: Skeleton, layer: DecoderLayer) -> None:
        load(skeleton, layer)
        if layer.index == 0 and not layer.module._forward_hooks:
            layer.module.register_forward_hook(short, with_kwargs=True)

    monkeypatch.setattr(Skeleton, "load_layer", loaded)
    done = trim(*command, "-o", tmp_path / "halved", "--batch-size", 4, "--cache-dir", tmp_path / "cache")
    assert done.status == 0, done.err
    assert "going on with a batch size of 2" in done.err
    whole, halved = (load_file(tmp_path / name) for name in ("whole", "halved"))
    assert whole.keys() == halved.keys()
    for key, one in whole.items():
        torch.testing.assert_close(halved[key], one, rtol=1e-5, atol=1e-6)


def test_ratios_name_experts_whether_weights_are_read_or_not(home: Path, tmp_path: Path) -> None:
    for name in ("mixtral", "granitemoe"):
        ratios, masks = tmp_path / f"{name}.json", tmp_path / f"{name}.masks"
        trim_json("alloc-layers", home / name, "-o", ratios, "--sparsity", 0.4)
        more = ("--ratios", ratios, "--method", "magnitude", *COMPUTE)
        assert trim("prune", home / name, "-o", masks, *more).status == 0
        assert MaskFile.open(masks).names == list(skeleton_of(home / name).linears)


def test_plan_counts_what_is_gathered_for_experts(home: Path, tmp_path: Path) -> None:
    common = ("plan", home / "qwen3_moe", "--sparsity", 0.5, "--tokens", home / "tokens", "--method", "sparsegpt")
    paths = ("--save-model", tmp_path / "out", "--cache-dir", tmp_path / "cache", *COMPUTE)
    dense, whole = trim_json(*common, *paths, "--skip", "*.experts.*"), trim_json(*common, *paths)
    assert not any("experts" in linear["name"] for linear in dense["linears"])
    assert sum("experts" in linear["name"] for linear in whole["linears"]) == 2 * 3 * EXPERTS
    grams = EXPERTS * 4 * (32**2 + 20**2)
    assert whole["peak_host_bytes"] - dense["peak_host_bytes"] == grams


def test_experts_that_take_further_passes_are_planned_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("plan", home / "qwen3_moe", "--sparsity", 0.5, "--tokens", home / "tokens", "--method", "sparsegpt")
    paths = ("--save-model", home / "unwritten", "--cache-dir", home / "cache", *COMPUTE)
    whole = trim_json(*common, *paths)
    monkeypatch.setattr("trimcli.pipeline.estimate.GATHERED", 8 * 32**2)
    parts = trim_json(*common, *paths)
    grams = EXPERTS * 4 * (32**2 + 20**2)
    assert parts["forward_passes"] - whole["forward_passes"] == -(-grams // (8 * 32**2)) - 1
    assert whole["peak_host_bytes"] - parts["peak_host_bytes"] == grams - 8 * 32**2


def test_experts_are_gathered_in_parts_where_they_are_too_many(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Memory for two Grams at a time: every layer is passed several times, and the masks are the same."""
    pruned(home, "qwen3_moe", tmp_path / "one", "--method", "sparsegpt")
    monkeypatch.setattr("trimcli.pipeline.estimate.GATHERED", 8 * 32**2)
    pruned(home, "qwen3_moe", tmp_path / "two", "--method", "sparsegpt", "--no-resume")
    one, two = MaskFile.open(tmp_path / "one.masks"), MaskFile.open(tmp_path / "two.masks")
    assert all(torch.equal(one.keep(name), two.keep(name)) for name in one.names)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--reconstruct", "layer"), "--reconstruct layer"),
        (("--refine", "learned"), "--refine learned"),
        (("--prune-barber",), "--prune-barber"),
        (("--update", "cg", "--target", "dense"), "--target dense"),
    ],
)
def test_what_does_not_take_experts_says_so_before_any_work(
    home: Path, args: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    command = ("prune", home / "mixtral", "-o", tmp_path / "masks", "--save-model", tmp_path / "out", *COMPUTE)
    done = trim(*command, "--sparsity", 0.5, "--tokens", home / "tokens", "--cache-dir", tmp_path / "cache", *args)
    assert done.status == 2
    assert f"{named} does not work on experts" in done.err.replace("\n", " ")
    assert "--skip '*.block_sparse_moe.experts.*.w1'" in done.err.replace("\n", " ")
    assert not (tmp_path / "masks").exists()


def test_several_processes_do_not_take_experts(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    linears = list(skeleton_of(home / "mixtral").linears.values())
    monkeypatch.setattr("trimcli.pipeline.plan.ranks", lambda: 2)
    with pytest.raises(OptionError, match="a run of several processes does not work on experts"):
        refuse_experts(linears, Recipe().needs, Recipe())
    refuse_experts([linear for linear in linears if not linear.routed], Recipe().needs, Recipe())


@pytest.mark.skipif(not CONVERTS, reason="transformers 4 leaves experts apart")
def test_finetune_refuses_experts_that_share_a_parameter(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruned(home, "olmoe", out)
    done = trim("finetune", out, "-o", tmp_path / "trained", "--tokens", home / "tokens", "--mode", "full")
    assert done.status == 2
    assert "experts that share one parameter cannot be trained yet" in done.err.replace("\n", " ")


def test_sparse_products_leave_experts_dense(home: Path, tmp_path: Path) -> None:
    """No module is there for a stack's slice to be replaced: what is exported are the linears, and experts go along."""
    out, exported = tmp_path / "out", tmp_path / "exported"
    pruned(home, "granitemoe", out)
    found = trim_json("export", out, "--to", "csr", "-o", exported)["linears"]
    skeleton = skeleton_of(out)
    assert set(found) == {name for name, linear in skeleton.linears.items() if not linear.stacked}
    made = make_sparse(skeleton_of(out), MaskFile.open(out.with_suffix(".masks")))
    assert set(made.names) <= set(found)
    assert made.zeros == pytest.approx(0.5, abs=0.01)
