"""The eval stage: what is measured, what is written, and that pruned directories are ordinary ones."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.small_tokenizers import put_bos
from tests.trim_cli import COMPUTE, save_tokens, tree, trim, trim_json
from trimcli import (
    ApplyOptions,
    CalibrateOptions,
    EvaluateOptions,
    PruneOptions,
    Recipe,
    apply_masks,
    evaluate,
    prune,
    unpack,
)
from trimcli.demo import write_texts
from trimcli.errors import InputError, MismatchError, OptionError, OutputExists

RUN: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
SEQLEN, WINDOWS = 64, 6

# What plain transformers gives for directories on a text, in a process of its own.
PLAIN = """
import json, math, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
text, seqlen, count = open(sys.argv[1], encoding="utf-8").read(), int(sys.argv[2]), int(sys.argv[3])
found = []
for directory in sys.argv[4:]:
    tokens = torch.tensor(AutoTokenizer.from_pretrained(directory)(text)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in tokens[: count * seqlen].view(count, -1)]
    found.append(math.exp(sum(losses) / len(losses)))
assert not [name for name in sys.modules if name.startswith("trimcli")]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, nano_qwen2: Path) -> Path:
    """`text`, and of the embedded model `masks`, `pruned`, `packed` and `sparsegpt` with its `sparsegpt-masks`."""
    base = tmp_path_factory.mktemp("evaluate")
    write_texts(base).measurement.rename(base / "text.txt")
    save_tokens(base / "tokens.safetensors", vocabulary=2048, nsamples=2, seqlen=32)
    drawn = CalibrateOptions(tokens=base / "tokens.safetensors", **RUN, cache_dir=base / "cache")
    run: dict[str, Any] = {**RUN, "calibrate": drawn, "sparsity": 0.6, "cache_dir": base / "cache"}
    prune(str(nano_qwen2), base / "masks", PruneOptions(**run, save_model=base / "pruned"))
    apply_masks(str(nano_qwen2), base / "masks", base / "packed", ApplyOptions(format="packed"))
    recipe = Recipe(method="sparsegpt")
    prune(str(nano_qwen2), base / "sparsegpt-masks", PruneOptions(**run, recipe=recipe, save_model=base / "sparsegpt"))
    return base


def options_for(base: Path, **fields: Any) -> EvaluateOptions:
    given = {"ppl": (str(base / "text.txt"),), "seqlen": SEQLEN, "max_windows": WINDOWS, **fields}
    return EvaluateOptions(**RUN, **given)


def value(base: Path, model: Path, **fields: Any) -> float:
    found: float = evaluate(str(model), options_for(base, **fields))["perplexity"][0]["value"]
    return found


def test_runs_of_one_model_are_of_one_structure(base: Path, nano_qwen2: Path) -> None:
    """Its head is tied to the embedding, which the walk fills and empties apart."""
    dense, masked = (
        evaluate(str(nano_qwen2), options_for(base, masks=masks))["model"] for masks in (None, base / "masks")
    )
    assert dense == masked
    for name in ("pruned", "packed", "sparsegpt"):
        assert evaluate(str(base / name), options_for(base))["model"]["structure"] == dense["structure"]


def test_it_is_plain_transformers_on_the_same_windows(base: Path, nano_qwen2: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(nano_qwen2, dtype=torch.float32)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(nano_qwen2)((base / "text.txt").read_text())["input_ids"])
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in tokens[: SEQLEN * WINDOWS].view(-1, SEQLEN)]
    expected = float(torch.tensor(losses, dtype=torch.float64).mean().exp())
    assert value(base, nano_qwen2) == pytest.approx(expected, rel=1e-5)


def test_the_document(base: Path, nano_qwen2: Path, tmp_path: Path) -> None:
    texts = (str(base / "text.txt"), str(tmp_path / "other.txt"))
    (tmp_path / "other.txt").write_text("Nothing is as it was. " * 40)
    options = options_for(base, ppl=texts, max_windows=2)
    document = evaluate(str(nano_qwen2), options, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(document))
    assert document["schema"] == "trim.results/1"
    first, second = document["perplexity"]
    assert (first["dataset"], second["dataset"]) == texts
    for entry in (first, second):
        assert (entry["seqlen"], entry["windows"], entry["dtype"]) == (SEQLEN, 2, "float32")
        assert entry["tokens"] >= 2 * SEQLEN
    assert "tasks" not in document
    assert document["sparsity"]["total"] < 1e-4
    assert document["pruning"] is None
    assert document["label"] == "nano-qwen2"
    assert document["seconds"] > 0
    assert document["peak_memory"]["anonymous"] > 0


def test_masks_give_what_the_directories_give(base: Path, nano_qwen2: Path) -> None:
    masked = evaluate(str(nano_qwen2), options_for(base, masks=base / "masks"))
    pruned, packed = (evaluate(str(base / name), options_for(base)) for name in ("pruned", "packed"))
    values = [document["perplexity"][0]["value"] for document in (masked, pruned, packed)]
    assert values[0] == values[1] == values[2] > value(base, nano_qwen2)
    dense = load_file(nano_qwen2 / "model.safetensors")
    stored = load_file(base / "pruned" / "model.safetensors")
    linears = masked["sparsity"]["linears"]
    assert all(f"{name}.weight" in dense for name in linears)
    zeros = sum(int((stored[f"{name}.weight"] == 0).sum()) for name in linears)
    for document in (masked, pruned, packed):
        assert document["sparsity"]["zeros"] == zeros
        assert document["sparsity"]["total"] == pytest.approx(0.6, abs=1e-4)
        assert document["pruning"]["options"]
    assert masked["label"] == "nano-qwen2 + masks"
    assert masked["sources"]["masks"]["path"] == str(base / "masks")


@pytest.mark.slow
def test_pruned_directories_load_where_trim_was_never_imported(base: Path, tmp_path: Path) -> None:
    names = ("pruned", "sparsegpt")
    found = subprocess.run(
        [sys.executable, "-c", PLAIN, base / "text.txt", str(SEQLEN), str(WINDOWS), *(base / name for name in names)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert json.loads(found.stdout) == pytest.approx([value(base, base / name) for name in names], rel=1e-3)


def test_unpacked_is_the_pruned_directory(base: Path, tmp_path: Path) -> None:
    unpack(base / "packed", tmp_path / "unpacked")
    one, other = (load_file(path / "model.safetensors") for path in (tmp_path / "unpacked", base / "pruned"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_measured_directory_is_left_untouched(base: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(base / "pruned", tmp_path / "model"))
    before = {path: path.read_bytes() for path in model.iterdir()}
    value(base, model)
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert tree(tmp_path) == sorted(["model", *(f"model/{path.name}" for path in before)])


def test_what_cannot_be_measured(base: Path, nano_qwen2: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"ppl": ()}, OptionError, "nothing to measure was asked for"),
        ({"limit": 5.0}, OptionError, "--limit 5.0 does nothing without --tasks"),
        ({"num_fewshot": 1}, OptionError, "--num-fewshot 1 does nothing without --tasks"),
        ({"seqlen": 100_000}, OptionError, "--seqlen 100000 is beyond the .* positions"),
        ({"seqlen": 1}, OptionError, "--seqlen 1"),
        ({"max_windows": 0}, OptionError, "--max-windows 0"),
        ({"batch_size": 0}, OptionError, "--batch-size 0 must be at least 1"),
        ({"bos": "ech"}, OptionError, "--bos 'ech' is none of auto, each, once, none; did you mean 'each'"),
        ({"ppl": (), "tasks": ("seasons",), "bos": "each"}, OptionError, "--bos each does nothing without --ppl"),
        ({"ppl": (), "tasks": ("seasons",), "chat": True}, OptionError, "--chat does nothing without --ppl"),
        ({"ppl": ("-", "a.txt", "-")}, OptionError, "- is named twice"),
        ({"chat": True}, OptionError, "--chat needs a chat template"),
        ({"ppl": ("wikitext",)}, OptionError, "did you mean wikitext2"),
        ({"ppl": (str(tmp_path / "none.txt"),)}, InputError, "there is no file"),
        ({"masks": tmp_path / "none"}, InputError, "there is no file"),
        ({"masks": base / "tokens.safetensors"}, MismatchError, "carries no trim manifest"),
        ({"masks": base / "sparsegpt-masks"}, MismatchError, "changed the kept weights"),
    ]
    for fields, kind, message in wrong:
        with pytest.raises(kind, match=message):
            evaluate(str(nano_qwen2), options_for(base, **fields), tmp_path / "results.json")
    with pytest.raises(MismatchError, match="other weights of this structure"):
        evaluate(str(base / "pruned"), options_for(base, masks=base / "masks"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "results.json").touch()
    with pytest.raises(OutputExists):
        evaluate(str(nano_qwen2), options_for(base), tmp_path / "results.json")


def test_a_text_that_is_too_short(base: Path, nano_qwen2: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(InputError, match=r"short\.txt holds \d+ tokens, fewer than one window of --seqlen 64"):
        value(base, nano_qwen2, ppl=(str(tmp_path / "short.txt"),))


def plain_perplexity(directory: Path, windows: list[list[int]]) -> float:
    """Window by window, by transformers alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        losses = [model(torch.tensor([one]), labels=torch.tensor([one])).loss.item() for one in windows]
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())


@pytest.mark.parametrize("bos", ["auto", "each", "once", "none"])
def test_bos_stands_where_it_is_asked_for(bos: str, base: Path, model_copy: Path) -> None:
    """Of a tokenizer that begins a text with BOS (0), perplexity is that of windows cut by hand."""
    text = (base / "text.txt").read_text()
    words = AutoTokenizer.from_pretrained(model_copy)(text)["input_ids"]
    put_bos(model_copy)
    assert AutoTokenizer.from_pretrained(model_copy)(text)["input_ids"] == [0, *words]
    how = "each" if bos == "auto" else bos
    head, tokens = {"each": ([0], words), "once": ([], [0, *words]), "none": ([], words)}[how]
    room = SEQLEN - len(head)
    windows = [[*head, *tokens[place * room : (place + 1) * room]] for place in range(WINDOWS)]
    [entry] = evaluate(str(model_copy), options_for(base, bos=bos))["perplexity"]
    assert entry["value"] == pytest.approx(plain_perplexity(model_copy, windows), rel=1e-5)
    assert (entry["bos"], entry["seqlen"], entry["windows"]) == (how, SEQLEN, WINDOWS)
    assert entry["tokens"] == len(tokens)


def test_the_table_says_where_bos_stands(base: Path, model_copy: Path) -> None:
    put_bos(model_copy)
    asked = ("eval", model_copy, "--ppl", base / "text.txt", "--seqlen", 64, "--max-windows", 2, *COMPUTE)
    assert "(2 windows of 64 tokens, float32, BOS in each)" in trim(*asked).out
    assert "(2 windows of 64 tokens, float32, no BOS)" in trim(*asked, "--bos", "none").out
    assert "(2 windows of 64 tokens, float32)" in trim(*asked, "--bos", "once").out


def test_a_tokenizer_without_bos_keeps_the_published_windows(base: Path, nano_qwen2: Path) -> None:
    found = [evaluate(str(nano_qwen2), options_for(base, bos=bos))["perplexity"][0] for bos in ("auto", "once", "none")]
    assert [entry["bos"] for entry in found] == ["once", "once", "none"]
    assert found[0]["value"] == found[1]["value"] == found[2]["value"]


def test_standard_input_is_measured(base: Path, nano_qwen2: Path) -> None:
    asked = ("--seqlen", SEQLEN, "--max-windows", WINDOWS, *COMPUTE)
    found = trim_json("eval", nano_qwen2, "--ppl", "-", *asked, stdin=(base / "text.txt").read_bytes())["perplexity"]
    assert [entry["dataset"] for entry in found] == ["-"]
    assert found[0]["value"] == value(base, nano_qwen2)
    twice = trim("eval", nano_qwen2, "--ppl", "-,-", *asked, stdin=b"a text")
    assert (twice.status, twice.out) == (2, "")
    assert twice.err.startswith("trim: - is named twice, ")


def test_conversations_are_measured_as_the_template_says(nano_qwen2: Path, model_copy: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (model_copy / "chat_template.jinja").write_text(template)
    talks = [[{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "A number."}]
             for number in range(40)]  # fmt: skip
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    said = "".join(f"{m['role']}: {m['content']}\n" for talk in talks for m in talk)
    (tmp_path / "said.txt").write_text(said)
    asked = ("--seqlen", 32, *COMPUTE)
    [entry] = trim_json("eval", model_copy, "--ppl", tmp_path / "talks.jsonl", "--chat", *asked)["perplexity"]
    [plain] = trim_json("eval", nano_qwen2, "--ppl", tmp_path / "said.txt", *asked)["perplexity"]
    assert (entry["value"], entry["tokens"]) == (plain["value"], plain["tokens"])
    refused = trim("eval", model_copy, "--ppl", tmp_path / "talks.jsonl", *asked)
    assert (refused.status, refused.out) == (2, "")
    assert "has `messages` and no `text`; give --chat" in refused.err


def test_a_head_that_is_not_finite_gives_no_number(base: Path, model_copy: Path) -> None:
    tensors = load_file(model_copy / "model.safetensors")
    norm = next(key for key in tensors if key.endswith("model.norm.weight"))
    save_file({**tensors, norm: torch.full_like(tensors[norm], torch.nan)}, model_copy / "model.safetensors")
    with pytest.raises(InputError, match=r"the head of .* gives NaN"):
        value(base, model_copy)


def test_masks_fit_a_model_whose_config_was_saved_anew(base: Path, model_copy: Path) -> None:
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({**config, "note": "saved anew"}))
    assert value(base, model_copy, masks=base / "masks") == value(base, base / "pruned")
