"""Training from directory to directory: zeros, forms, resumption, the best step, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.finetuned import assert_same, options, pruned_model, save_counting, tuned, weights
from tests.several_ranks import torchrun
from tests.sharded import SHARDED
from tests.small_models import gpt2_config, llama_config, masks_for, random_model, save
from tests.trim_cli import save_tokens, tree, trim_json, zeros
from trimcli.commands.apply import apply_masks
from trimcli.commands.finetune import FinetuneSummary, finetune
from trimcli.commands.options import ApplyOptions, VerifyOptions
from trimcli.commands.unpack import unpack
from trimcli.commands.verify import verify
from trimcli.errors import InputError, MismatchError, OptionError, OutputExists, TrimError
from trimcli.files.atomic import MARK
from trimcli.files.checkpoint import Checkpoint

CONFIGS = {"llama": llama_config, "tied llama": lambda: llama_config(tie_word_embeddings=True), "gpt2": gpt2_config}
MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full", "weight_decay": 0.3, "clip": 0.1},
    "lora": {"mode": "lora", "targets": ("all",), "lr": 3e-2},
    "admm": {"mode": "admm", "interval": 1, "steps": 8},
}


def pruned_zeros(directory: Path) -> dict[str, int]:
    linears = json.loads((directory / MARK).read_text())["linears"]
    return {name: entry["zeros"] for name, entry in linears.items()}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("mode", MODES)
def test_every_zero_stays(mode: str, family: str, tmp_path: Path) -> None:
    """And what is no zero learns; the directory is an ordinary one, tied weights still tied."""
    pruned = pruned_model(CONFIGS[family](), tmp_path, dtype=torch.float16)
    summary = tuned(pruned, tmp_path / "out", **MODES[mode])
    assert summary.after < summary.before
    verify(tmp_path / "out").check()
    before, after = weights(pruned), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.float16 for name in after)
    assert summary.zeros == sum(pruned_zeros(pruned).values())
    if mode != "admm":
        assert pruned_zeros(tmp_path / "out") == pruned_zeros(pruned)
        verify(tmp_path / "out", VerifyOptions(masks=tmp_path / "masks")).check()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) >= (len(before) * 9 // 10 if mode != "lora" else len(pruned_zeros(pruned)))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool(loaded.config.tie_word_embeddings) == (family != "llama")
    one, other = (end.weight for end in (loaded.get_input_embeddings(), loaded.get_output_embeddings()))
    assert (one.data_ptr() == other.data_ptr()) == (family != "llama")


@pytest.mark.parametrize("mode", MODES)
def test_patterns_stay(mode: str, tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path, pattern=(2, 4))
    tuned(pruned, tmp_path / "out", **MODES[mode])
    report = verify(tmp_path / "out")
    report.check()
    assert all(linear.pattern == (2, 4) for linear in report.linears)


@pytest.mark.parametrize("mode", ["full", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("lora", "admm"))])
def test_a_packed_model_stays_packed(mode: str, tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path, format="packed", dtype=torch.bfloat16)
    summary = tuned(pruned, tmp_path / "out", **MODES[mode])
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (pruned, tmp_path / "out")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert summary.nbytes == sizes[1]
    verify(tmp_path / "out").check()
    unpack(tmp_path / "out", tmp_path / "plain")
    tuned(pruned, tmp_path / "as-dense", format="dense", **MODES[mode])
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "as-dense"))


def test_what_was_trained_packs_under_its_masks_to_the_size_before(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path)
    tuned(pruned, tmp_path / "out")
    form = ApplyOptions(format="packed", other_weights=True)
    sizes = [
        apply_masks(str(tmp_path / name), tmp_path / "masks", tmp_path / f"{name}-packed", form).nbytes
        for name in ("pruned", "out")
    ]
    assert sizes[0] == sizes[1]


def test_a_trained_model_can_be_trained_again(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path)
    tuned(pruned, tmp_path / "once")
    summary = finetune(str(tmp_path / "once"), tmp_path / "twice", options(pruned))
    assert summary.teacher == str(tmp_path / "dense")
    assert pruned_zeros(tmp_path / "twice") == pruned_zeros(pruned)
    verify(tmp_path / "twice", VerifyOptions(masks=tmp_path / "masks")).check()


def test_embeddings_stay_where_they_are_frozen(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path)
    tuned(pruned, tmp_path / "out", freeze_embeddings=True)
    before, after = weights(pruned), weights(tmp_path / "out")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}


def test_masks_from_a_file_for_a_model_that_another_tool_saved(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path)
    (pruned / MARK).unlink()
    summary = tuned(pruned, tmp_path / "out", masks=tmp_path / "masks")
    assert summary.teacher == str(tmp_path / "dense")
    verify(tmp_path / "out", VerifyOptions(masks=tmp_path / "masks")).check()


# --- the best step ---------------------------------------------------------------------------------------


def test_what_no_step_betters_stays(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path)
    for mode in ("full", "lora"):
        summary = tuned(pruned, tmp_path / mode, mode=mode, lr=1.0, warmup=0.0, kl=0.0)
        assert (summary.best, summary.after) == (0, summary.before)
        assert "no step was better than before" in summary.remarks[-1]
        assert_same(weights(tmp_path / mode), weights(pruned))


def test_the_best_step_stands_and_a_run_that_gets_worse_ends(tmp_path: Path) -> None:
    """Held-out samples that the others say nothing of: learning these soon does harm."""
    pruned = pruned_model(llama_config(), tmp_path)
    save_tokens(tmp_path / "tokens", vocabulary=64, nsamples=33, seqlen=16)
    summary = tuned(pruned, tmp_path / "out", steps=60, every=1, patience=2, lr=3e-3, kl=0.0)
    record = summary.records[0]
    losses = dict(record["heldout"])
    assert summary.stopped_early
    assert 0 < summary.best == summary.steps - 2 < 58
    assert losses[summary.best] == min(losses.values()) == summary.after
    tokens = load_file(tmp_path / "tokens")["tokens"][31:].long()
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=tokens, labels=tokens).loss
    assert float(loss) == pytest.approx(summary.after, abs=1e-5)


def test_a_loss_that_is_not_finite_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path)
    before = tree(tmp_path)
    with pytest.raises(TrimError, match=r"the loss is not finite.*smaller --lr"):
        tuned(pruned, tmp_path / "out", lr=1e6, clip=0.0, warmup=0.0, kl=0.0)
    assert tree(tmp_path) == before


# --- several processes ---


@pytest.mark.parametrize("mode", ["full", pytest.param("admm", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_with_twice_the_samples(mode: str, tmp_path: Path) -> None:
    """Each takes half of a step's samples; one speaks, and one writes."""
    pruned = pruned_model(llama_config(), tmp_path)
    shared = ["--tokens", tmp_path / "tokens", "--mode", mode, "--steps", 4, "--lr", 1e-3, "--device", "cpu", "--json"]
    done = torchrun(2, "finetune", pruned, "-o", tmp_path / "two", *shared, "--batch-size", 2)
    assert done.status == 0, done.err
    two, one = done.document, trim_json("finetune", pruned, "-o", tmp_path / "one", *shared, "--batch-size", 4)
    assert two["tokens"] == one["tokens"]
    assert two["zeros"] == one["zeros"] > 0
    assert two["after"] == pytest.approx(one["after"], rel=0.02)
    assert done.err.count("step 4 of 4") == (mode == "full")
    verify(tmp_path / "two", VerifyOptions()).check()
    assert not [name for name in tree(tmp_path) if name.startswith(".")]


def in_shards(states: str, output: Path, pruned: Path, *more: object) -> Any:
    """The summary of two ranks that train a model in shards, checkpoints written as FSDP's state dict type says."""
    command = ["finetune", pruned, "-o", output, "--tokens", pruned.parent / "tokens", "--device", "cpu", "--json"]
    environment = {**SHARDED, "FSDP_STATE_DICT_TYPE": states}
    done = torchrun(2, *command, "--batch-size", 2, *more, module="tests.sharded", **environment)
    assert done.status == 0, done.err
    return done.document


@pytest.mark.parametrize(
    ("mode", "states"),
    [(mode, states) for states in ("SHARDED_STATE_DICT", "FULL_STATE_DICT") for mode in ("full", "lora")],
)
@pytest.mark.slow
def test_a_model_in_shards_trains_as_a_whole_one(mode: str, states: str, tmp_path: Path) -> None:
    """Masks hold the shards; the best step's weights are gathered, and adapters merged whole."""
    pruned = pruned_model(llama_config(), tmp_path)
    shared = ("--mode", mode, "--steps", 4, "--lr", 1e-3)
    sharded = in_shards(states, tmp_path / "shards", pruned, *shared)
    command = ["finetune", pruned, "-o", tmp_path / "whole", "--tokens", tmp_path / "tokens", "--device", "cpu"]
    whole = torchrun(2, *command, "--batch-size", 2, "--json", *shared)
    assert whole.status == 0, whole.err
    assert sharded["after"] == pytest.approx(whole.document["after"], rel=1e-5)
    assert sharded["after"] < sharded["before"]
    verify(tmp_path / "shards", VerifyOptions(masks=tmp_path / "masks")).check()
    found, expected = weights(tmp_path / "shards"), weights(tmp_path / "whole")
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)


# --- interrupted -----------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    pass


def stopped_at(line: str, pruned: Path, output: Path, **fields: Any) -> None:
    """Train until it says `line`."""

    def note(text: str) -> None:
        if text.startswith(line):
            raise Stopped

    with pytest.raises(Stopped):
        finetune(str(pruned), output, options(pruned, **fields), note=note)


@pytest.mark.parametrize(
    ("mode", "line"),
    [
        ("full", "step 4 of 6"),
        ("lora", "step 4 of 6"),
        pytest.param("admm", "step 4 of 6", marks=pytest.mark.slow),
        ("admm", "step 4 of 5"),
    ],
)
def test_a_run_that_goes_on_ends_as_one_that_was_never_stopped(mode: str, line: str, tmp_path: Path) -> None:
    """With dropout, a teacher, momentum and masks half learned: the same weights to the bit, and the same curves."""
    pruned = pruned_model(llama_config(), tmp_path)
    fields = {**MODES[mode], **({"steps": 11, "polish": 0.45} if mode == "admm" else {}), "every": 2}
    whole = tuned(pruned, tmp_path / "whole", **fields)
    stopped_at(line, pruned, tmp_path / "cut", **fields)
    assert not (tmp_path / "cut").exists()
    assert (tmp_path / ".cut.finetune").is_dir()
    found = tuned(pruned, tmp_path / "cut", resume=True, **fields)
    assert_same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert found.records == whole.records
    assert not [name for name in tree(tmp_path) if name.startswith(".")]


def test_a_killed_process_is_gone_on_with(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path)
    tuned(pruned, tmp_path / "whole")
    script = f"""
import os, signal
from pathlib import Path
from tests.finetuned import options
from trimcli.commands.finetune import finetune
def note(line):
    if line.startswith("step 4"):
        os.kill(os.getpid(), signal.SIGKILL)
finetune({str(pruned)!r}, Path({str(tmp_path / "cut")!r}), options(Path({str(pruned)!r})), note=note)
"""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    found = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], env=environment, check=False)
    assert found.returncode == -signal.SIGKILL
    broken = tmp_path / ".cut.finetune" / "train" / "checkpoint-4"
    broken.mkdir(exist_ok=True)  # as killed while it was being written
    (broken / "model.safetensors").write_bytes(b"half")
    tuned(pruned, tmp_path / "cut", resume=True)
    assert_same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_a_run_that_is_stopped_while_it_tidies_up_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = pruned_model(llama_config(), tmp_path)
    first = tuned(pruned, tmp_path / "out")

    remove = shutil.rmtree

    def stopped(folder: Any, **how: Any) -> None:
        if any(Path(folder).glob("*/checkpoint-*")):
            raise KeyboardInterrupt
        remove(folder, **how)

    with monkeypatch.context() as patch:
        patch.setattr("trimcli.training.work.shutil.rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            finetune(str(pruned), tmp_path / "out", options(pruned, resume=True), force=True)
    assert list((tmp_path / ".out.finetune").glob("*/checkpoint-*"))
    again = finetune(str(pruned), tmp_path / "out", options(pruned, resume=True), force=True)
    assert again.records == first.records
    assert not [name for name in tree(tmp_path) if name.startswith(".")]


def test_checkpoints_of_an_interrupted_run_are_neither_lost_nor_mixed_up(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path)
    stopped_at("step 4", pruned, tmp_path / "out")
    with pytest.raises(OutputExists, match="holds checkpoints of an interrupted run; give --resume"):
        tuned(pruned, tmp_path / "out")
    with pytest.raises(MismatchError, match=r"interrupted run .* had another options; repeat its command"):
        tuned(pruned, tmp_path / "out", resume=True, lr=1e-3)
    finetune(str(pruned), tmp_path / "out", options(pruned), force=True)
    assert not (tmp_path / ".out.finetune").exists()


def test_a_run_that_is_stopped_before_its_first_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path)
    before = tree(tmp_path)
    stopped_at("step 2", pruned, tmp_path / "out")
    assert tree(tmp_path) == before
    tuned(pruned, tmp_path / "out", resume=True)


# --- the manifest ----------------------------------------------------------------------------------------


def test_the_manifest_tells_of_the_training_and_of_the_prune(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path)
    summary: FinetuneSummary = tuned(pruned, tmp_path / "out")
    document, before = (json.loads((folder / MARK).read_text()) for folder in (tmp_path / "out", pruned))
    assert document["schema"] == "trim.pruned/1"
    assert document["command"] == "finetune"
    assert document["model"] == before["model"]
    assert document["pruning"] == before["pruning"]
    assert document["options"]["mode"] == "full"
    (phase,) = document["training"]["phases"]
    assert [step for step, _ in phase["heldout"]] == [0, 2, 4, 6]
    assert [step for step, _ in phase["loss"]] == [1, 2, 3, 4, 5, 6]
    assert phase["tokens"] == summary.tokens == 6 * 8 * 16
    assert set(document["sources"]) == {"tokens", "pruned"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Fine-tuned (full, taught by `{tmp_path / 'dense'}`): 6 steps, 768 tokens, every zero kept;" in card


def test_kept_weights_that_are_zero_are_listed(tmp_path: Path) -> None:
    """float16 has no number for some of them: masks are still told from the directory."""
    model = random_model(llama_config(), dtype=torch.float16)
    up = model.model.layers[0].mlp.up_proj.weight
    up.data[2, 5] = up.data[3, 7] = 0
    save(model, tmp_path / "dense")
    masks_for(tmp_path / "dense", tmp_path / "masks", keep_of=lambda _, weight: torch.ones_like(weight).bool())
    apply_masks(str(tmp_path / "dense"), tmp_path / "masks", tmp_path / "pruned")
    entry = json.loads((tmp_path / "pruned" / MARK).read_text())["linears"]["model.layers.0.mlp.up_proj"]
    assert (entry["pruned"], entry["zeros"], entry["kept_zeros"]) == (0, 2, [2 * 32 + 5, 3 * 32 + 7])
    save_counting(tmp_path / "tokens")
    tuned(tmp_path / "pruned", tmp_path / "out")
    assert zeros(weights(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]) == 0


# --- refused ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("refused")
    pruned_model(llama_config(), base)
    save(random_model(gpt2_config()), base / "other")
    masks_for(base / "other", base / "other masks")
    masks_for(base / "dense", base / "more masks", sparsity=0.875)
    save_tokens(base / "one", vocabulary=64, nsamples=1)
    save_tokens(base / "long", vocabulary=64, nsamples=4, seqlen=40)
    return base


REFUSED: dict[str, tuple[str, dict[str, Any], type[TrimError], str]] = {
    "a dense model": ("dense", {}, InputError, r"dense has no trim.json, .*; give a directory that trim pruned, or"),
    "a dense model and its masks": (
        "dense",
        {"masks": "masks"},
        MismatchError,
        r"[\d,]+ weights of .*q_proj in .*dense are not zero where the masks .*masks take them; give the pruned model",
    ),
    "masks of another model": ("pruned", {"masks": "other masks"}, MismatchError, "made for the model"),
    "other masks": ("pruned", {"masks": "more masks"}, MismatchError, "are not zero where the masks"),
    "no masks file": ("pruned", {"masks": "none"}, InputError, "there is no file"),
    "one sample": ("pruned", {"tokens": "one"}, InputError, "one holds 1 sample, and one is to be held out"),
    "long samples": ("pruned", {"tokens": "long"}, OptionError, "samples of 40 tokens, beyond the 32 positions"),
    "no target": ("dense", {"mode": "admm"}, OptionError, "dense is dense, so --mode admm needs a target"),
    "no such pattern": (
        "dense",
        {"mode": "admm", "sparsity_type": "2:5"},
        OptionError,
        "32 inputs, which do not divide into groups of 5",
    ),
    "targets of nothing": ("pruned", {"mode": "lora", "targets": ("x",)}, OptionError, "'x' matches no linear"),
    "steps and epochs": ("pruned", {"epochs": 1.0}, OptionError, "--steps with --epochs"),
    "a sparsity for given masks": ("pruned", {"sparsity": 0.5}, OptionError, "--sparsity with --mode full"),
    "two targets": (
        "pruned",
        {"mode": "admm", "sparsity": 0.5, "sparsity_type": "2:4"},
        OptionError,
        "--sparsity with --sparsity-type",
    ),
    "a merge without adapter": ("pruned", {"merge": "none"}, OptionError, "--merge none with --mode full"),
    "a teacher unheard": ("pruned", {"teacher": "dense", "kl": 0.0}, OptionError, "--teacher with --kl 0"),
    "no teacher": ("pruned", {"teacher": "/none"}, InputError, "there is no model directory /none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_told_and_leaves_nothing(case: str, home: Path) -> None:
    model, fields, error, message = REFUSED[case]
    fields = {name: home / value if name in ("masks", "tokens") else value for name, value in fields.items()}
    before = tree(home)
    with pytest.raises(error, match=message):
        tuned(home / model, home / "out", **fields)
    assert tree(home) == before


@pytest.mark.parametrize(
    ("mode", "version", "message"),
    [("admm", "2", "--mode admm does not go with FSDP"), ("full", "1", "FSDP 1 makes one flat .* --fsdp_version 2")],
)
def test_shards_that_masks_do_not_fit_are_refused(
    mode: str, version: str, message: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    before = tree(home)
    with pytest.raises(OptionError, match=message):
        tuned(home / "pruned", home / "out", mode=mode)
    assert tree(home) == before


def test_a_manifest_that_no_longer_fits_the_weights_is_refused(home: Path, tmp_path: Path) -> None:
    """A pruned weight that came back, as an ordinary merge of an adapter leaves it, is no mask."""

    shutil.copytree(home / "pruned", tmp_path / "pruned")
    shutil.copy(home / "tokens", tmp_path / "tokens")
    found = weights(tmp_path / "pruned")
    weight = found["model.layers.0.mlp.up_proj.weight"]
    weight[weight == 0] = 0.5
    save_file(found, tmp_path / "pruned" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"does not tell the weights of .*up_proj that were pruned .*--masks"):
        tuned(tmp_path / "pruned", tmp_path / "out")
    assert Checkpoint.open(tmp_path / "pruned").keep_bits("model.layers.0.mlp.up_proj.weight") is None
