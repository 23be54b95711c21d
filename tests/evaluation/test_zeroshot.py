import contextlib
import json
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import numpy as np
import pytest
import torch
from lm_eval._cli import HarnessCLI
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.small_models import NANO as MODEL
from tests.trim_cli import COMPUTE, trim, trim_json
from trimcli.errors import HubError, InputError, OptionError, OutputExists, ResourceError, TrimError
from trimcli.evaluation import zeroshot
from trimcli.evaluation.zeroshot import SEVEN_TASKS, ZeroShotOptions, evaluate_tasks

TASKS = Path(__file__).parents[2] / "examples" / "tasks"
MULTIPLE_CHOICE = """
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / name).read_text().splitlines()]


def task_file(folder: Path, name: str, body: str = MULTIPLE_CHOICE, data: str = "data.jsonl") -> None:
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    (folder / f"{name}.yaml").write_text(head + body)


def quiz(folder: Path, *names: str, documents: int = 4) -> None:
    chosen = lines("seasons.jsonl")[:documents]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
    for name in names:
        task_file(folder, name)


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """log p(continuation | context), the plain way: no batch, no padding, no cache."""
    before = len(tokenizer(context).input_ids)
    tokens = torch.tensor([tokenizer(context + continuation).input_ids])
    with torch.no_grad():
        logs = model(tokens).logits[0].log_softmax(-1)
    return sum(float(logs[i - 1, tokens[0, i]]) for i in range(before, tokens.shape[1]))


class Spoken:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.done: dict[str, int] = {}

    @contextlib.contextmanager
    def task(self, description: str, total: int) -> Iterator[Any]:
        self.done[description] = -total

        def advance(count: int = 1) -> None:
            self.done[description] += count

        yield advance

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_scores_are_those_of_the_plain_computation(
    model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    spoken = Spoken()
    options = ZeroShotOptions(tasks=("seasons", " last_word"), include_path=TASKS, batch_size=5)
    found = evaluate_tasks(model, tokenizer, options, spoken)

    right = normed = 0
    for line in lines("seasons.jsonl"):
        scores = [
            log_likelihood(model, tokenizer, line["question"] + "\nAnswer:", f" {choice}") for choice in line["choices"]
        ]
        by_length = [score / len(choice) for score, choice in zip(scores, line["choices"], strict=True)]
        right += scores.index(max(scores)) == line["answer"]
        normed += by_length.index(max(by_length)) == line["answer"]
    seasons = found["tasks"]["seasons"]
    assert seasons["acc"] == pytest.approx(right / 24)
    assert seasons["acc_norm"] == pytest.approx(normed / 24)
    assert seasons["acc_stderr"] > 0
    assert {key: seasons[key] for key in ("n_shot", "limit", "samples", "documents", "version")} == {
        "n_shot": 0, "limit": None, "samples": 24, "documents": 24, "version": 1.0
    }  # fmt: skip

    words = [log_likelihood(model, tokenizer, line["text"], " " + line["word"]) for line in lines("last_word.jsonl")]
    mean = torch.tensor(words, dtype=torch.float64).mean()
    assert found["tasks"]["last_word"]["perplexity"] == pytest.approx(float((-mean).exp()), rel=1e-4)
    assert found["mean_acc_seven"] is None
    assert found["lm_eval"]["batch_size"] == 5
    assert found["lm_eval"]["truncated"] == 0
    assert spoken.done == {"loading tasks": 0, "zero-shot requests": 0}
    assert spoken.warnings == []
    assert capfd.readouterr() == ("", "")


def test_a_pruned_model_scores_as_lm_eval_scores_its_written_directory(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        for module in pruned.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= module.weight.abs() > module.weight.abs().median()
    pruned.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = evaluate_tasks(
        pruned, tokenizer, ZeroShotOptions(("seasons",), include_path=TASKS, num_fewshot=2, batch_size=4)
    )
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    monkeypatch.chdir(TASKS)
    theirs = lm_eval.evaluator.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path), "dtype": "float32"},
        tasks=["seasons"],
        num_fewshot=2,
        batch_size=4,
        device="cpu",
        task_manager=TaskManager(include_path=TASKS, include_defaults=False),
    )["results"]["seasons"]
    entry = ours["tasks"]["seasons"]
    assert (entry["acc"], entry["acc_norm"]) == (theirs["acc,none"], theirs["acc_norm,none"])
    assert entry["acc_stderr"] == pytest.approx(theirs["acc_stderr,none"])
    assert entry["n_shot"] == 2


def prompts(samples: Path | list[dict[str, Any]]) -> list[Any]:
    """What the model was asked, document by document."""
    if isinstance(samples, Path):
        samples = [json.loads(line) for line in samples.read_text().splitlines()]
    # In memory the requests' arguments are a list of tuples, in a file a dictionary of dictionaries.
    asked = [sample["arguments"] for sample in samples]
    return [[list(one.values()) for one in of.values()] if isinstance(of, dict) else [*map(list, of)] for of in asked]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_the_seed_draws_the_examples_as_lm_evals_own(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    quiz(tmp_path, documents=12)
    task_file(tmp_path, "shown", MULTIPLE_CHOICE + "num_fewshot: 3\n")

    def asked(seed: int | None, folder: str) -> list[Any]:
        samples = tmp_path / folder
        options = ZeroShotOptions(("shown",), include_path=tmp_path, limit=4, seed=seed, log_samples=samples)
        evaluate_tasks(model, tokenizer, options)
        return prompts(samples / "shown.jsonl")

    ours = asked(seed, "ours")
    assert ours[0][0][0].count("Answer:") == 4
    assert asked(seed, "again") == ours
    assert asked(7, "other") != ours
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    monkeypatch.chdir(tmp_path)
    theirs = lm_eval.evaluator.simple_evaluate(
        model=HFLM(model, tokenizer=tokenizer),
        tasks=["shown"],
        limit=4,
        task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
        **({} if seed is None else {"fewshot_random_seed": seed}),
    )
    assert prompts(theirs["samples"]["shown"]) == ours


SHUFFLE = """
import random
import numpy as np

def shuffled(documents):
    def once(document):
        order = random.sample(range(len(document["choices"])), len(document["choices"]))
        if np.random.random() < 0.5:
            order.reverse()
        answer = order.index(document["answer"])
        return {**document, "choices": [document["choices"][place] for place in order], "answer": answer}
    return documents.map(once, load_from_cache_file=False)
"""


@pytest.mark.parametrize("seed", [None, 7])
def test_the_seed_of_the_command_asks_what_lm_evals_own_command_asks(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    """`--seed 7` of both: examples, and the choices that a task shuffles when it is loaded, in two tasks in a row."""
    quiz(tmp_path, documents=12)
    (tmp_path / "shuffle.py").write_text(SHUFFLE)
    body = MULTIPLE_CHOICE + "process_docs: !function shuffle.shuffled\nfewshot_split: test\n"
    tasks = ("second", "first")
    for name in tasks:
        task_file(tmp_path, name, body)
    monkeypatch.chdir(tmp_path)
    asked = ("--tasks", ",".join(tasks), "--include-path", tmp_path, "--num-fewshot", 3, "--limit", 4)
    given = () if seed is None else ("--seed", seed)
    trim_json("eval", MODEL, *asked, "--log-samples", tmp_path / "ours", *given, *COMPUTE)
    ours = {name: prompts(tmp_path / "ours" / f"{name}.jsonl") for name in tasks}
    assert all(one.count("Answer:") == 4 for name in tasks for document in ours[name] for one, _ in document)

    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    seeds: dict[str, int] = {}
    if seed is not None:  # the command gives it to every generator
        monkeypatch.setattr("sys.argv", ["lm-eval", "run", "--model", "hf", "--tasks", "x", "--seed", str(seed)])
        names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        seeds = dict(zip(names, HarnessCLI().parse_args().seed, strict=True))
        assert set(seeds.values()) == {seed}
    theirs = lm_eval.evaluator.simple_evaluate(
        model=HFLM(model, tokenizer=tokenizer),
        tasks=list(tasks),
        num_fewshot=3,
        limit=4,
        task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
        **seeds,
    )
    assert {name: prompts(theirs["samples"][name]) for name in tasks} == ours
    other = tmp_path / "other"
    trim_json("eval", MODEL, *asked, "--log-samples", other, "--seed", 8, *COMPUTE)
    assert all(prompts(other / f"{name}.jsonl") != ours[name] for name in tasks)


def test_a_retry_shuffles_the_same_way(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiz(tmp_path, documents=12)
    (tmp_path / "shuffle.py").write_text(SHUFFLE)
    task_file(tmp_path, "mixed", MULTIPLE_CHOICE + "process_docs: !function shuffle.shuffled\nfewshot_split: test\n")
    call, asked = HFLM._model_call, []
    for folder, full in (("whole", False), ("retried", True)):
        pending = [True] if full else []

        def once_full(self: Any, tokens: torch.Tensor, pending: list[bool] = pending, **kwargs: Any) -> Any:
            if pending:
                pending.clear()
                raise torch.OutOfMemoryError("no room")
            return call(self, tokens, **kwargs)

        monkeypatch.setattr(HFLM, "_model_call", once_full)
        options = ZeroShotOptions(
            ("mixed",), include_path=tmp_path, num_fewshot=2, limit=6, log_samples=tmp_path / folder
        )
        found = evaluate_tasks(model, tokenizer, options, Spoken())
        assert found["lm_eval"]["batch_size"] == (4 if full else 8)
        asked.append(prompts(tmp_path / folder / "mixed.jsonl"))
    assert asked[0] == asked[1]


def test_the_seed_sets_every_generator(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[float, float, float]] = []

    def drawing(*_: Any, **__: Any) -> Any:
        found.append((random.random(), float(np.random.random()), float(torch.rand(1))))
        raise InputError("enough")

    monkeypatch.setattr(zeroshot, "_load_tasks", drawing)
    for seed in (None, 3, 3, 4):
        with pytest.raises(InputError, match="enough"):
            evaluate_tasks(model, tokenizer, ZeroShotOptions(("seasons",), seed=seed))
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    assert found[0] == (random.random(), float(np.random.random()), float(torch.rand(1)))
    assert found[1] == found[2]
    assert len({value for draw in found for value in draw}) == 9


def test_dense_masked_and_packed_from_the_command_line(tmp_path: Path) -> None:
    masks, dense, packed = tmp_path / "masks.safetensors", tmp_path / "dense", tmp_path / "packed"
    trim_json("prune", MODEL, "-o", masks, "--method", "magnitude", "--sparsity", 0.6, *COMPUTE)
    trim_json("apply-masks", MODEL, masks, "-o", dense)
    trim_json("apply-masks", MODEL, masks, "-o", packed, "--format", "packed")
    asked = ("--tasks", "seasons,last_word", "--include-path", TASKS, *COMPUTE)
    whole = trim_json("eval", MODEL, *asked)["tasks"]
    pruned = [
        trim_json("eval", MODEL, "--masks", masks, *asked)["tasks"],
        trim_json("eval", dense, *asked)["tasks"],
        trim_json("eval", packed, *asked)["tasks"],
    ]
    assert pruned[0] == pruned[1] == pruned[2]
    assert pruned[0]["last_word"]["perplexity"] != whole["last_word"]["perplexity"]
    shown = trim("eval", dense, *asked)
    assert (shown.status, shown.err) == (0, "")
    refused = trim("eval", dense, "--tasks", TASKS / "rte_local.yaml", *COMPUTE)
    assert refused.status == 2
    assert "rte.jsonl" in refused.err


def test_limit_groups_tags_patterns_and_shots(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    quiz(tmp_path, "quiz_a", "quiz_b")
    task_file(tmp_path, "fixed", MULTIPLE_CHOICE + "num_fewshot: 0\n")
    members = "task: [quiz_a, quiz_b]\n"
    aggregate = "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    (tmp_path / "both.yaml").write_text("group: both\n" + members + aggregate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zeroshot, "TaskManager", lambda **k: TaskManager(**{**k, "include_defaults": False}))
        found = evaluate_tasks(model, tokenizer, ZeroShotOptions(("both",), include_path=tmp_path, limit=0.5))["tasks"]
        with pytest.raises(OptionError, match="'quiz_a' twice"):
            evaluate_tasks(model, tokenizer, ZeroShotOptions(("both", "quiz_a"), include_path=tmp_path))
        with pytest.raises(OptionError, match=r"knows no task 'quiz_c'; did you mean quiz_"):
            evaluate_tasks(model, tokenizer, ZeroShotOptions(("quiz_c",), include_path=tmp_path))
    assert found["both"]["acc"] == pytest.approx((found["quiz_a"]["acc"] + found["quiz_b"]["acc"]) / 2)
    assert found["both"]["subtasks"] == ["quiz_a", "quiz_b"]
    assert (found["both"]["samples"], found["both"]["documents"]) == (4, 8)
    assert (found["quiz_a"]["samples"], found["quiz_a"]["documents"], found["quiz_a"]["limit"]) == (2, 4, 0.5)

    spoken = Spoken()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zeroshot, "TaskManager", lambda **k: TaskManager(**{**k, "include_defaults": False}))
        options = ZeroShotOptions(("quiz_*", "fixed"), include_path=tmp_path, num_fewshot=1, limit=1)
        found = evaluate_tasks(model, tokenizer, options, spoken)["tasks"]
    assert {name: entry["n_shot"] for name, entry in found.items()} == {"quiz_a": 1, "quiz_b": 1, "fixed": 0}
    assert found["quiz_a"]["acc_stderr"] is None
    assert spoken.warnings == ["fixed sets its examples to 0: --num-fewshot 1 is not applied"]


def test_the_seven_tasks_mean_and_local_files_winning(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    quiz(tmp_path, *SEVEN_TASKS)
    options = ZeroShotOptions(tuple(SEVEN_TASKS), include_path=tmp_path)
    found = evaluate_tasks(model, tokenizer, options)
    assert set(found["tasks"]) == set(SEVEN_TASKS)
    mean = sum(entry["acc"] for entry in found["tasks"].values()) / 7
    assert found["mean_acc_seven"] == pytest.approx(mean)


def test_lm_eval_keeps_the_seven_where_they_are_looked_up() -> None:
    tree = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_path=[tree / folder for folder in SEVEN_TASKS.values()], include_defaults=False)
    assert set(SEVEN_TASKS) <= set(manager.all_subtasks)


def test_a_data_file_is_found_from_the_working_directory_then_beside_the_task(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "tasks", tmp_path / "here"
    beside.mkdir()
    here.mkdir()
    quiz(beside, "quiz", documents=3)
    monkeypatch.chdir(here)
    by_file = ZeroShotOptions(("../tasks/quiz.yaml",))
    assert evaluate_tasks(model, tokenizer, by_file)["tasks"]["quiz"]["documents"] == 3
    by_name = ZeroShotOptions(("quiz",), include_path=Path("../tasks"))
    assert evaluate_tasks(model, tokenizer, by_name)["tasks"]["quiz"]["documents"] == 3
    quiz(here, documents=2)
    assert evaluate_tasks(model, tokenizer, by_name)["tasks"]["quiz"]["documents"] == 2


def test_rolling_log_likelihood_and_filters(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "one two"}\n{"text": "the war of the worlds and more"}\n')
    rolling = 'output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ""\n'
    task_file(tmp_path, "rolling", rolling + 'doc_to_target: "{{text}}"\n')
    filtered = (
        'output_type: generate_until\ntest_split: test\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{text}}"\n'
        "generation_kwargs: {max_gen_toks: 2, until: ['.']}\n"
        "filter_list: [{name: first, filter: [{function: take_first}]}]\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    task_file(tmp_path, "generated", filtered)
    options = ZeroShotOptions(("rolling", "generated"), include_path=tmp_path)
    found = evaluate_tasks(model, tokenizer, options)["tasks"]
    total = sum(log_likelihood(model, tokenizer, "<|endoftext|>", line["text"]) for line in [
        {"text": "one two"}, {"text": "the war of the worlds and more"}
    ])  # fmt: skip
    bytes_ = len("one two") + len("the war of the worlds and more")
    assert found["rolling"]["bits_per_byte"] == pytest.approx(-total / bytes_ / 0.6931471805599453, rel=1e-4)
    assert found["generated"]["exact_match,first"] == 0
    assert "exact_match,first_stderr" in found["generated"]


def test_samples_are_logged_on_request(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    options = ZeroShotOptions(("seasons",), include_path=TASKS, limit=3, log_samples=folder)
    found = evaluate_tasks(model, tokenizer, options)
    logged = [json.loads(line) for line in (folder / "seasons.jsonl").read_text().splitlines()]
    assert [line["doc"] for line in logged] == lines("seasons.jsonl")[:3]
    assert sum(line["acc"] for line in logged) / 3 == found["tasks"]["seasons"]["acc"]
    with pytest.raises(OutputExists):
        evaluate_tasks(model, tokenizer, options)
    lost = ZeroShotOptions(("seasons",), include_path=TASKS, log_samples=tmp_path / "a" / "b")
    with pytest.raises(InputError, match="create it"):
        evaluate_tasks(model, tokenizer, lost)


def test_long_requests_are_counted(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    long = {"question": "word " * 600, "choices": ["a", "b"], "answer": 0}
    (tmp_path / "data.jsonl").write_text(json.dumps(long) + "\n")
    task_file(tmp_path, "long")
    spoken = Spoken()
    found = evaluate_tasks(model, tokenizer, ZeroShotOptions(("long",), include_path=tmp_path), spoken)
    assert found["lm_eval"]["truncated"] == 2
    assert spoken.warnings == ["2 requests were longer than the model's 512 positions and lost their beginning"]


def test_memory_running_out_halves_the_batch(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ZeroShotOptions(
        ("seasons",), include_path=TASKS, batch_size=8, limit=8, num_fewshot=2, log_samples=tmp_path, force=True
    )
    expected = evaluate_tasks(model, tokenizer, options)["tasks"]
    examples = prompts(tmp_path / "seasons.jsonl")
    call = HFLM._model_call
    room = 3
    held: list[weakref.ref[torch.Tensor]] = []

    def small(self: Any, tokens: torch.Tensor, **kwargs: Any) -> Any:
        if tokens.shape[0] > room:
            activations = tokens.clone()
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("no room")
        return call(self, tokens, **kwargs)

    class Listening(Spoken):
        def warn(self, message: str) -> None:
            super().warn(message)
            assert held[-1]() is None, "the failed batch is gone before another one is tried"

    monkeypatch.setattr(HFLM, "_model_call", small)
    spoken = Listening()
    found = evaluate_tasks(model, tokenizer, options, spoken)
    assert found["lm_eval"]["batch_size"] == 2
    assert len(spoken.warnings) == 2
    assert found["tasks"]["seasons"]["acc"] == expected["seasons"]["acc"]
    assert prompts(tmp_path / "seasons.jsonl") == examples
    room = 0
    with pytest.raises(ResourceError, match="one sequence at a time"):
        evaluate_tasks(model, tokenizer, options, Spoken())


def test_what_cannot_be_measured_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    def run(*tasks: str, **options: Any) -> None:
        evaluate_tasks(model, tokenizer, ZeroShotOptions(tasks, **options))

    with pytest.raises(HubError, match="'rte' cannot be reached"):
        run("rte")
    with pytest.raises(OptionError, match="names no task"):
        run(" ")
    for limit in (0, -1, 2.5):
        with pytest.raises(OptionError, match="--limit"):
            run("seasons", include_path=TASKS, limit=limit)
    with pytest.raises(OptionError, match="--batch-size 0"):
        run("seasons", include_path=TASKS, batch_size=0)
    with pytest.raises(OptionError, match="--seed -1"):
        run("seasons", include_path=TASKS, seed=-1)
    with pytest.raises(OptionError, match="--num-fewshot -1"):
        run("seasons", include_path=TASKS, num_fewshot=-1)
    with pytest.raises(InputError, match="check --include-path"):
        run("seasons", include_path=tmp_path / "nowhere")
    task_file(tmp_path, "lost")
    with pytest.raises(InputError, match=r"'lost' cannot be loaded .*data\.jsonl.*lost\.yaml"):
        run("lost", include_path=tmp_path)
    (tmp_path / "data.jsonl").write_text("{broken")
    with pytest.raises(InputError, match="'lost' cannot be loaded"):
        run("lost", include_path=tmp_path)
    quiz(tmp_path)
    task_file(tmp_path, "broken", MULTIPLE_CHOICE.replace("multiple_choice", "multiple_choices"))
    with pytest.raises(InputError, match="'broken' cannot be loaded"):
        run("broken", include_path=tmp_path)


def test_lm_eval_failing_on_its_way_is_an_error(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFLM, "_model_call", lambda *_, **__: 1 / 0)
    with pytest.raises(TrimError, match="lm-eval failed on seasons \\(ZeroDivisionError"):
        evaluate_tasks(model, tokenizer, ZeroShotOptions(("seasons",), include_path=TASKS))
