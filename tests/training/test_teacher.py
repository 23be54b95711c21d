"""The divergence from a teacher, against its definition, and which model teaches."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.finetuned import options, pruned_model, save_counting, tuned
from tests.small_models import llama_config, random_model, save
from trimcli.commands.finetune import finetune
from trimcli.errors import MismatchError
from trimcli.training.teacher import Teacher

TOKENS = torch.arange(10).view(2, 5)


def test_the_divergence_is_its_definition() -> None:
    student, teacher = (random_model(llama_config(), seed=seed) for seed in (0, 1))
    with torch.no_grad():
        ours, theirs = (model(input_ids=TOKENS).logits.double().softmax(-1) for model in (student, teacher))
        logits = student(input_ids=TOKENS).logits
    total = 0.0
    for sample in range(2):
        for place in range(4):  # after the last token nothing is known
            pairs = zip(theirs[sample, place].tolist(), ours[sample, place].tolist(), strict=True)
            total += sum(p * math.log(p / q) for p, q in pairs)
    found = Teacher(teacher, "teacher").divergence(logits, TOKENS)
    assert float(found) == pytest.approx(total / 8, rel=1e-5)
    assert float(Teacher(student, "itself").divergence(logits, TOKENS)) == pytest.approx(0, abs=1e-6)


def test_a_token_that_both_rule_out_is_no_difference() -> None:
    student, teacher = (random_model(llama_config(), seed=seed) for seed in (0, 1))
    with torch.no_grad():
        logits = student(input_ids=TOKENS).logits
    barred = torch.zeros(logits.shape[-1]).index_fill(0, torch.tensor([3]), -torch.inf)
    teacher.lm_head.register_forward_hook(lambda module, args, output: output + barred)
    usable = [token for token in range(logits.shape[-1]) if token != 3]
    with torch.enable_grad():
        ours = (logits + barred).requires_grad_()
        found = Teacher(teacher, "teacher").divergence(ours, TOKENS)
        found.backward()
    with torch.no_grad():
        aim = teacher(input_ids=TOKENS).logits[:, :-1, usable].log_softmax(-1)
    wanted = (aim.exp() * (aim - logits[:, :-1, usable].log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(found.detach(), wanted)
    assert ours.grad is not None
    assert ours.grad.isfinite().all()


def test_what_is_minimised_is_the_loss_and_the_weighted_divergence(tmp_path: Path) -> None:
    """The first step's loss, in which all samples are, and the teacher that the directory came from."""
    pruned = pruned_model(llama_config(), tmp_path)
    summary = tuned(pruned, tmp_path / "out", steps=1, batch_size=31, accumulate=1, kl=0.5, every=1)
    assert summary.teacher == str(tmp_path / "dense")
    student, teacher = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("pruned", "dense"))
    tokens = load_file(tmp_path / "tokens")["tokens"][:31].long()
    with torch.no_grad():
        found = student(input_ids=tokens, labels=tokens)
        divergence = Teacher(teacher, "dense").divergence(found.logits, tokens)
    assert summary.records[0]["loss"] == [(1, pytest.approx(float(found.loss) + 0.5 * float(divergence), rel=1e-5))]


def test_a_teacher_is_named_or_the_dense_model_at_hand(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path)
    save(random_model(llama_config(), seed=5), tmp_path / "named")
    assert tuned(pruned, tmp_path / "1", teacher=str(tmp_path / "named"), steps=1).teacher == str(tmp_path / "named")
    assert tuned(pruned, tmp_path / "2", kl=0.0, steps=1).teacher is None
    shutil.rmtree(tmp_path / "dense")
    shutil.copytree(tmp_path / "named", tmp_path / "dense")  # another model in its place
    found = tuned(pruned, tmp_path / "3", steps=1)
    assert found.teacher is None
    assert found.remarks[0].startswith(f"{tmp_path / 'dense'}, which it came from, is not at hand")
    shutil.rmtree(tmp_path / "dense")
    assert tuned(pruned, tmp_path / "4", steps=1).teacher is None


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path / "home")
    save(random_model(llama_config(vocab_size=80)), tmp_path / "other")
    with pytest.raises(MismatchError, match=r"other has another vocabulary than .*pruned, 80 tokens where that has 64"):
        tuned(pruned, tmp_path / "out", teacher=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_as_many_tokens_that_are_others_are_another_vocabulary(nano_qwen2: Path, model_copy: Path) -> None:
    path = model_copy / "tokenizer.json"
    document = json.loads(path.read_text())
    known = document["model"]["vocab"]
    known["x"], known["y"] = known["y"], known["x"]
    path.write_text(json.dumps(document))
    tokens = save_counting(model_copy.parent / "tokens")
    chosen = options(model_copy, mode="admm", sparsity=0.5, teacher=str(nano_qwen2), tokens=tokens)
    with pytest.raises(MismatchError, match="of as many but other tokens"):
        finetune(str(model_copy), model_copy.parent / "out", chosen)
