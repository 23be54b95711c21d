"""Zero-shot tasks on a model in memory; lm-eval's own command finds the same on the directory written of it."""

import contextlib
import difflib
import json
import math
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lm_eval.tasks
import numpy as np
import torch
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimcli.console import NO_PROGRESS, Progress, quiet_libraries
from trimcli.errors import HubError, InputError, OptionError, ResourceError, TrimError
from trimcli.files.atomic import atomic_file, refuse_existing
from trimcli.files.documents import finite_or_none
from trimcli.options import not_negative, positive

# The tasks of the papers (Wanda, OWL, AlphaPruning, TRIM), each with its folder among lm-eval's task files.
SEVEN_TASKS = {
    "boolq": "super_glue/boolq",
    "rte": "glue/rte",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
}
# lm-eval draws 100,000 resamples for metrics without a closed form: minutes, for digits nobody reads.
RESAMPLES = 1000


@dataclass(frozen=True)
class ZeroShotOptions:
    """What to measure: `trim eval`'s options of the same names.

    tasks: names of lm-eval tasks, groups or tags, patterns (`mmlu_*`), or task files (`x.yaml`); those in the folder
    include_path win. limit: documents a task, or their fraction if below 1. log_samples: a folder for one `TASK.jsonl`
    a task; force: replace those that exist. num_fewshot, seed (of the draw): None keeps lm-eval's own.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: int = 8
    log_samples: Path | None = None
    seed: int | None = None
    force: bool = False


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: ZeroShotOptions,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Measure `model`, in its own dtype and on its own device, on the tasks of `options`.

    Data files that a task file names are looked up from the working directory, then from the task file's folder.
    Returns, ready for a results document, `tasks`: name -> `{metric: value, metric_stderr: value or None, n_shot,
    limit, samples, documents, version}`, groups with `subtasks`, a metric behind a filter as `metric,filter`;
    `mean_acc_seven`: the mean of `acc` (not `acc_norm`) over the seven tasks, None unless all were measured; and
    `lm_eval`: its `version`, the `batch_size` that fitted, and how many requests lost their beginning (`truncated`).

    Raises OptionError (unknown task, unusable value), InputError (a task file or its data), HubError (its data set),
    OutputExists, ResourceError (no memory even for single sequences), TrimError (lm-eval failed on its way).
    """
    _check(options)
    seed = DEFAULT_OTHER_SEED if options.seed is None else options.seed
    # Without the variable, lm-eval's resampling would fork this process, model and threads included, once a core.
    with quiet_libraries(), mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}):
        _seed_generators(options.seed)
        loaded = _load_tasks(options, progress)
        for name in loaded["tasks"]:
            if options.log_samples:
                refuse_existing(_samples_file(options.log_samples, name), force=options.force)
        _set_shots(loaded["tasks"], options, progress)
        scorer = _Scorer(model, backend="causal", tokenizer=tokenizer, batch_size=options.batch_size)
        scorer.progress = progress
        found = _evaluate(scorer, loaded, options, seed, progress)
    if options.log_samples:
        for name, samples in found["samples"].items():
            path = _samples_file(options.log_samples, name)
            with atomic_file(path, force=options.force) as temporary, temporary.open("wb") as lines:
                for sample in samples:
                    line = json.dumps(finite_or_none(sample), default=handle_non_serializable, ensure_ascii=False)
                    lines.write(f"{line}\n".encode())
    if scorer.truncated:
        longer = f"{scorer.truncated} requests were longer than the model's {scorer.max_length} positions"
        progress.warn(f"{longer} and lost their beginning")
    tasks = {name: entry for name in found["results"] if (entry := _entry(found, name, options.limit))}
    seven = [tasks[name]["acc"] for name in SEVEN_TASKS if "acc" in tasks.get(name, {})]
    return {
        "tasks": tasks,
        "mean_acc_seven": float(np.mean(seven)) if len(seven) == len(SEVEN_TASKS) else None,
        "lm_eval": {"version": version("lm_eval"), "batch_size": scorer.batch_size, "truncated": scorer.truncated},
    }


def _reporting(method: Callable[..., Any]) -> Callable[..., Any]:
    def reporting(self: Any, requests: list[Any], disable_tqdm: bool = False) -> Any:
        with self.progress.task("zero-shot requests", len(requests)) as advance:
            # A cache hears of every answer; this one keeps none.
            self.set_cache_hook(SimpleNamespace(add_partial=lambda *_: advance()))
            return method(self, requests, disable_tqdm=disable_tqdm)

    return reporting


class _Scorer(HFLM):  # type: ignore[misc]
    """lm-eval's transformers model, reporting to `progress` and counting what it truncates."""

    progress: Progress = NO_PROGRESS
    truncated = 0
    loglikelihood = _reporting(HFLM.loglikelihood)
    loglikelihood_rolling = _reporting(HFLM.loglikelihood_rolling)
    generate_until = _reporting(HFLM.generate_until)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool]]:
        self.truncated += sum(len(given) + len(asked) > self.max_length + 1 for _, given, asked in requests)
        return super()._loglikelihood_tokens(requests, **options)


def _check(options: ZeroShotOptions) -> None:
    if not any(map(str.strip, options.tasks)):
        raise OptionError("--tasks names no task; give one, such as 'hellaswag'.")
    positive("--batch-size", options.batch_size)
    not_negative("--num-fewshot", options.num_fewshot or 0)
    limit = 1.0 if options.limit is None else options.limit
    if not (0 < limit < 1 or (math.isfinite(limit) and limit >= 1 and limit == int(limit))):
        raise OptionError(f"--limit {limit:g} is neither a number of documents nor a fraction below 1.")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise OptionError(f"--seed {options.seed} is no seed for lm-eval; give one from 0 to {2**32 - 1}.")
    if options.include_path is not None and not options.include_path.is_dir():
        raise InputError(f"there is no folder {options.include_path} of task files; check --include-path.")
    if (folder := options.log_samples) is not None:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is no folder; name another for --log-samples.")
        if not folder.parent.is_dir():
            raise InputError(f"there is no folder {folder.parent}; create it for --log-samples.")


def _seed_generators(seed: int | None) -> None:
    """As lm-eval's command does before it loads tasks, some of which shuffle choices."""
    random.seed(DEFAULT_RANDOM_SEED if seed is None else seed)
    np.random.seed(DEFAULT_OTHER_SEED if seed is None else seed)
    torch.manual_seed(DEFAULT_OTHER_SEED if seed is None else seed)


def _load_tasks(options: ZeroShotOptions, progress: Progress) -> dict[str, Any]:
    """lm-eval's `tasks`, `groups` and `group_map` of everything asked for."""
    manager, names = _named(options)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with progress.task("loading tasks", len(names)) as advance:
        # All in one call, as lm-eval's command does: asking a task for its name draws from the generator that shuffles
        # the next one's choices.
        with contextlib.suppress(Exception):
            loaded = dict(manager.load(names))
            advance(len(names))
            return loaded
        _seed_generators(options.seed)
        for name in names:  # which of them fails, or finds its data beside it
            found = _load_task(manager, name)
            if twice := sorted(found["tasks"].keys() & loaded["tasks"].keys()):
                raise OptionError(f"--tasks asks for {twice[0]!r} twice, once within {name!r}; name it once.")
            for part, entries in found.items():
                loaded[part].update(entries)
            advance()
    return loaded


def _named(options: ZeroShotOptions) -> tuple[TaskManager, list[str]]:
    """A small index of tasks (lm-eval's whole tree is slow to read), and the asked names, patterns spelt out."""
    asked, include_path = [name.strip() for name in options.tasks if name.strip()], options.include_path
    tree = Path(lm_eval.tasks.__file__).parent
    folders = [tree / SEVEN_TASKS[name] for name in asked if name in SEVEN_TASKS]
    local = [include_path.resolve()] if include_path else []
    files = {name for name in asked if name.endswith((".yaml", ".yml")) and Path(name).is_file()}
    manager = TaskManager(include_path=[*folders, *local], include_defaults=False)
    if not all(name in manager.all_subtasks or name in files for name in asked):
        manager = TaskManager(include_path=local)
    names: list[str] = []
    for name in asked:
        matches = [name] if name in files else manager.match_tasks([name])
        if not matches:
            where = f"lm-eval {version('lm_eval')}" + (f" or {include_path}" if include_path else "")
            close = difflib.get_close_matches(name, manager.all_tasks, 3, cutoff=0.75)
            hint = f"did you mean {' or '.join(close)}?" if close else "check the name, or --include-path."
            raise OptionError(f"{where} knows no task {name!r}; {hint}")
        names += matches
    return manager, list(dict.fromkeys(names))


def _load_task(manager: TaskManager, name: str) -> dict[str, Any]:
    """Load one task, group or tag with its data, wherever its data files are."""
    entry = manager.task_index.get(name)
    source = entry.yaml_path if entry else Path(name)
    try:
        try:
            return dict(manager.load([name]))
        except FileNotFoundError:
            if source is None:
                raise
            with contextlib.chdir(source.parent):
                return dict(manager.load([name if entry else str(Path.cwd() / source.name)]))
    except (ConnectionError, TimeoutError, HfHubHTTPError, DatasetNotFoundError) as problem:
        what = f"the data of the task {name!r} cannot be reached ({problem})"
        raise HubError(f"{what}; go online, or give a task file over local data with --include-path.") from problem
    except Exception as problem:
        reason = problem.__cause__ or problem
        what = f"the task {name!r} cannot be loaded ({type(reason).__name__}: {reason})"
        raise InputError(f"{what}; check {source or 'it'}.") from problem


def _set_shots(tasks: Mapping[str, Any], options: ZeroShotOptions, progress: Progress) -> None:
    """The number of few-shot examples, by lm-eval's rule: a task that sets 0 itself keeps 0."""
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        if options.num_fewshot and own == 0:
            progress.warn(f"{name} sets its examples to 0: --num-fewshot {options.num_fewshot} is not applied")
        elif options.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)


def _evaluate(
    scorer: _Scorer, loaded: dict[str, Any], options: ZeroShotOptions, seed: int, progress: Progress
) -> dict[str, Any]:
    """lm-eval's results; the batch is halved while it does not fit."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    while True:
        scorer.truncated = 0
        # At every try anew, so that each draws the same examples and shuffles the same way.
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed)
        try:
            logs = options.log_samples is not None
            return dict(evaluate(scorer, loaded, options.limit, bootstrap_iters=RESAMPLES, log_samples=logs))
        except torch.OutOfMemoryError:
            pass  # what follows is outside the clause, whose traceback keeps the failed batch in memory
        except Exception as problem:
            what = f"lm-eval failed on {', '.join(loaded['tasks'])} ({type(problem).__name__}: {problem})"
            raise TrimError(f"{what}; check the task file, or find the document by a smaller --limit.") from problem
        if scorer.batch_size == 1:
            raise ResourceError("the tasks do not fit into memory even one sequence at a time; use another device.")
        scorer.batch_size_per_gpu = scorer.batch_size // 2
        if scorer.device.type != "cpu":
            torch.get_device_module(scorer.device).empty_cache()
        progress.warn(f"out of memory: trying again with {scorer.batch_size} sequences at a time")


def _entry(found: Mapping[str, Any], name: str, limit: float | None) -> dict[str, Any]:
    """One task's or group's line of the results document; empty for a group that aggregates nothing."""
    entry: dict[str, Any] = {}
    for key, value in found["results"][name].items():
        metric, comma, filtered = key.rpartition(",")
        if not comma:
            continue
        base = metric.removesuffix("_stderr")
        shown = base if filtered == "none" else f"{base},{filtered}"
        entry[shown + metric[len(base) :]] = float(value) if isinstance(value, int | float | np.number) else None
    if entry:
        entry |= {"n_shot": found["n-shot"].get(name), "limit": limit, "version": found["versions"].get(name)}
        counts = [found["n-samples"][leaf] for leaf in _leaves(found, name)]
        for shown, key in (("samples", "effective"), ("documents", "original")):
            entry[shown] = sum(count[key] for count in counts)
        if subtasks := found["group_subtasks"].get(name):
            entry["subtasks"] = list(subtasks)
    return entry


def _leaves(found: Mapping[str, Any], name: str) -> list[str]:
    """The tasks behind a task's or a group's name."""
    if name in found["n-samples"]:
        return [name]
    return [leaf for child in found["group_subtasks"][name] for leaf in _leaves(found, child)]


def _samples_file(folder: Path, task: str) -> Path:
    folder.mkdir(exist_ok=True)
    return folder / (re.sub(r"[^\w.-]", "_", task) + ".jsonl")
