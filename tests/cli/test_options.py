"""The command line that is made of the options classes: what help shows, what is built of what was given."""

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

import trimcli.commands.allocate
import trimcli.commands.calibrate
import trimcli.commands.evaluate
import trimcli.commands.prune
import trimcli.sweep.run
from tests.trim_cli import trim
from trimcli import (
    AllocateOptions,
    AlphaOptions,
    BarberOptions,
    CalibrateOptions,
    EvaluateOptions,
    ObsOptions,
    OwlOptions,
    PruneOptions,
    Recipe,
    TrimError,
    TrimOptions,
)
from trimcli.cli.app import app
from trimcli.cli.groups import ALLOCATE, PRUNE, SWEEP
from trimcli.cli.options import plain, several, word
from trimcli.commands.options import prune_words
from trimcli.errors import OptionError
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.named import methods
from trimcli.methods.rows.base import ROWS
from trimcli.methods.rows.metrics import QUALITIES, ROW_QUALITIES
from trimcli.methods.scores import SCORES
from trimcli.methods.stats import GramOptions, stored_statistics
from trimcli.methods.updates.base import UPDATES
from trimcli.options import RunOptions, declared, option
from trimcli.sweep.grid import SweepOptions, axes

PROGRAM: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {name: PROGRAM.get_command(None, name) for name in PROGRAM.list_commands(None)}


def shown(command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The command's help on a terminal that is wide enough to cut nothing, in single spaces."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 4000)
    done = trim(command, "--help")
    assert done.status == 0
    return " ".join(done.out.split())


def parameter(command: str, flag: str) -> Any:
    return next(one for one in COMMANDS[command].params if flag in one.opts)


# --- help ------------------------------------------------------------------------------------------------

CHOICES: list[tuple[str, str, Callable[[], Mapping[str, Any]]]] = [
    *((command, "--method", methods) for command in ("prune", "plan", "sweep")),
    *((command, "--rows", lambda: ROWS) for command in ("prune", "plan")),
    *((command, "--update", lambda: UPDATES) for command in ("prune", "plan")),
    *((command, "--mask-score", lambda: SCORES) for command in ("prune", "plan", "sweep")),
    *((command, "--qmetric", lambda: QUALITIES) for command in ("prune", "plan", "sweep")),
    *((command, "--qmetric-dimwise", lambda: ROW_QUALITIES) for command in ("prune", "plan", "sweep")),
    *((command, "--alloc", lambda: ALLOCATIONS) for command in ("prune", "plan", "sweep")),
    ("alloc-layers", "--method", lambda: ALLOCATIONS),
    ("calibrate", "--stats", stored_statistics),
]


@pytest.mark.parametrize(("command", "flag", "known"), CHOICES, ids=[f"{one} {flag}" for one, flag, _ in CHOICES])
def test_every_alternative_is_listed_with_its_help_and_source(
    command: str, flag: str, known: Callable[[], Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    help_text = shown(command, monkeypatch)
    alternatives = known()
    assert len(alternatives) >= 2
    for name, entry in alternatives.items():
        assert f"{name}: {entry.help.rstrip('.')} ({entry.source})." in help_text
        assert entry.help
        assert re.search(r"\d{4}", entry.source), entry.source  # a paper, with its year
    if command not in ("sweep", "calibrate"):  # those take several, separated by commas
        assert f"{flag} <{'|'.join(alternatives)}>" in help_text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_reads_as_it_was_written(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No type behind a switch, no emoji where it says N:M, no markup left over, no bracket lost."""
    help_text = shown(command, monkeypatch)
    assert "<bool>" not in help_text
    odd = {sign for sign in help_text if ord(sign) > 0x2000 and not 0x2500 <= ord(sign) <= 0x257F}  # but for boxes
    assert not odd
    assert not re.search(r"\[/?b\]|\\\[", help_text)
    for one in COMMANDS[command].params:
        if getattr(one, "hidden", False) or one.name == "help":
            continue
        written = Console(file=io.StringIO()).render_str(one.help or "").plain
        assert " ".join(written.split()) in help_text, one.name


def test_what_is_kept_of_a_pattern_stands_in_help(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("prune", "plan"):
        help_text = shown(command, monkeypatch)
        assert "unstructured, or N:M: N weights are KEPT of each M consecutive inputs (2:4, 4:8, ...)." in help_text
        assert "The fraction to prune, in [0, 1)." in help_text
    assert "Mixed N:M patterns with groups of this many inputs; N is what is kept." in shown(
        "alloc-layers", monkeypatch
    )


@pytest.mark.parametrize(
    "text", ["N:M: N weights", "2:4, 3:8: kept", ":smile: [bold]x[/bold] [0, 1)", r"a\[b]", "a:b:c:d"]
)
def test_plain_text_is_shown_as_it_stands(text: str) -> None:
    out = io.StringIO()
    Console(file=out, width=200, emoji=True, markup=True).print(plain(text))
    assert out.getvalue() == f"{text}\n"


def test_flags_are_given_once() -> None:
    for name, command in COMMANDS.items():
        flags = [flag for one in command.params for flag in (*one.opts, *one.secondary_opts)]
        assert len(flags) == len(set(flags)), name


@pytest.mark.parametrize("kind", [PruneOptions, Recipe, BarberOptions, ObsOptions, TrimOptions, OwlOptions, RunOptions])
def test_prune_takes_every_option_that_is_declared(kind: type[Any]) -> None:
    offered = {flag for one in COMMANDS["prune"].params for flag in (*one.opts, *one.secondary_opts)}
    assert {flag for one in declared(kind) for flag in one.spelled.split("/")} <= offered


def test_an_axis_stands_for_every_option_of_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    help_text = shown("sweep", monkeypatch)
    for kind in axes():
        for one in declared(kind):
            assert one.spelled in help_text
            if one.type is not bool and one.default is not None:
                assert f"Several values. (default {word(one.default)})" in str(parameter("sweep", one.spelled).help)


# --- what is built ---------------------------------------------------------------------------------------


@dataclass
class Caught:
    """What a command was about to run with."""

    options: Any = None

    def __call__(self, *arguments: Any, **_: Any) -> None:
        [self.options] = [one for one in arguments if isinstance(one, RunOptions)]
        raise TrimError("it is enough.")


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Caught:
    found = Caught()
    for module, name in (
        (trimcli.commands.allocate, "allocate"),
        (trimcli.commands.calibrate, "calibrate"),
        (trimcli.commands.evaluate, "evaluate"),
        (trimcli.commands.prune, "prune"),
        (trimcli.sweep.run, "sweep"),
    ):
        monkeypatch.setattr(module, name, found)
    return found


def built(caught: Caught, *args: object) -> Any:
    caught.options = None
    done = trim(*args)
    assert (done.status, done.err) == (1, "trim: it is enough.\n")
    return caught.options


def pruned(caught: Caught, *args: object) -> PruneOptions:
    found: PruneOptions = built(caught, "prune", "model", "-o", "masks", *args)
    return found


def test_what_is_not_given_is_as_the_class_says(caught: Caught) -> None:
    assert pruned(caught) == PruneOptions(calibrate=CalibrateOptions())
    assert built(caught, "calibrate", "model", "-o", "c") == CalibrateOptions()
    assert built(caught, "alloc-layers", "model", "-o", "r") == AllocateOptions()
    assert built(caught, "eval", "model") == EvaluateOptions()
    assert built(caught, "sweep", "model", "--sparsity", 0.5) == SweepOptions(sparsity=0.5)


def test_the_seed_of_few_shot_draws_is_lm_evals_own_unless_given(caught: Caught) -> None:
    assert built(caught, "eval", "model").fewshot_seed is None
    for seed in (0, 7):
        found = built(caught, "eval", "model", "--seed", seed)
        assert (found.seed, found.fewshot_seed) == (seed, seed)


RUN: dict[str, Any] = {
    "device": "cpu",
    "dtype": "bfloat16",
    "seed": 3,
    "cache_dir": Path("the cache"),
    "revision": "main",
    "trust_remote_code": True,
}
DRAWN = CalibrateOptions(dataset="my text.txt", nsamples=5, seqlen=33)
ROUND: dict[str, PruneOptions] = {
    "nothing": PruneOptions(sparsity=0.5),
    "the run": PruneOptions(sparsity=0.5, **RUN),
    "targets": PruneOptions(
        sparsity=0.25, only=("*.mlp.*", "a b"), skip=("*.1.*",), batch_size=3, resume=False, save_model=Path("out dir")
    ),
    "a pattern": PruneOptions(sparsity_type="2:4", calibration=Path("calib")),
    "ratios": PruneOptions(ratios=Path("ratios.json"), recipe=Recipe(method="magnitude", numerics="reference")),
    "trim": PruneOptions(
        sparsity=0.5,
        stats_out=Path("rows.json"),
        recipe=Recipe(rows="trim", input_recalc=True, options=(TrimOptions("mse", "psnr", 3, forbid_negative=True),)),
    ),
    "variant": PruneOptions(sparsity=0.5, recipe=Recipe(rows="variant", propagate=False)),
    "sparsegpt": PruneOptions(
        sparsity=0.5,
        save_model=Path("m"),
        recipe=Recipe(method="sparsegpt", options=(ObsOptions("wanda", "once", 0.5, 7), GramOptions("float64"))),
    ),
    "an update": PruneOptions(sparsity=0.5, save_model=Path("m"), recipe=Recipe(update="obs", rows="variant")),
    "barber": PruneOptions(
        sparsity=0.5, recipe=Recipe(barber=BarberOptions("input1", "W", 0.125, retain_reconstruction=True))
    ),
    "learned masks": PruneOptions(
        sparsity=0.5,
        recipe=Recipe(refine="learned", refine_steps=7, refine_lr=0.2, refine_rows="held", reconstruct_batch=3),
    ),
    "barber as it is": PruneOptions(sparsity=0.5, recipe=Recipe(barber=BarberOptions())),
    "owl in one go": PruneOptions(
        sparsity=0.5,
        allocate=AllocateOptions(method="owl", sparsity=0.5, options=(OwlOptions(0.02, 3.5, 8, special=True),)),
        calibrate=DRAWN,
    ),
    "alpha in one go": PruneOptions(
        sparsity=0.625,
        recipe=Recipe(numerics="reference"),
        allocate=AllocateOptions(
            method="alpha",
            sparsity=0.625,
            numerics="reference",
            metrics_cache=Path("m.json"),
            options=(AlphaOptions("alpha_mid", 0.2, "layer"),),
        ),
    ),
    "texts": PruneOptions(
        sparsity=0.5, calibrate=CalibrateOptions(dataset="talks.jsonl", bos="each", pack=True, chat=True)
    ),
    "tokens": PruneOptions(sparsity=0.5, calibrate=CalibrateOptions(tokens=Path("tokens.safetensors")), **RUN),
}


@pytest.mark.parametrize("case", ROUND)
def test_the_words_of_a_prune_build_the_same_prune(case: str, caught: Caught) -> None:
    options = ROUND[case]
    found = pruned(caught, *prune_words(options))
    run: dict[str, Any] = options.run()
    drawn = options.calibrate or CalibrateOptions()
    expected = replace(
        options,
        calibrate=None if options.calibration else replace(drawn, batch_size=options.batch_size, **run),
        allocate=options.allocate and replace(options.allocate, **run),
    )
    assert found == expected


def test_only_what_differs_from_the_defaults_is_said() -> None:
    assert prune_words(PruneOptions(sparsity=0.5)) == ["--sparsity", "0.5", "--method", "wanda"]
    with_defaults = Recipe(rows="trim", options=(TrimOptions(), ObsOptions(), GramOptions()))
    assert prune_words(PruneOptions(sparsity=0.5, recipe=with_defaults)) == [
        *("--sparsity", "0.5", "--method", "wanda", "--use-trim")
    ]
    barber = PruneOptions(sparsity=0.5, recipe=Recipe(barber=BarberOptions(threshold=0.5)))
    assert prune_words(barber)[4:] == ["--prune-barber", "--threshold", "0.5"]


@pytest.mark.parametrize(
    ("words", "rows"),
    [((), "even"), (("--use-trim",), "trim"), (("--use-variant",), "variant"), (("--rows", "trim"), "trim"),
     (("--rows", "even"), "even"), (("--rows", "trim", "--use-trim"), "trim"), (("--rows", "variant"), "variant")],
)  # fmt: skip
def test_rows_are_named_or_switched(words: tuple[str, ...], rows: str, caught: Caught) -> None:
    assert pruned(caught, *words).recipe.rows == rows


@pytest.mark.parametrize("words", [("--use-trim", "--use-variant"), ("--use-trim", "--rows", "variant"),
                                   ("--use-variant", "--rows", "trim")])  # fmt: skip
def test_two_ways_to_choose_rows_are_refused(words: tuple[str, ...]) -> None:
    for command in (("prune", "model", "-o", "masks"), ("plan", "model")):
        done = trim(*command, "--sparsity", 0.5, *words)
        assert (done.status, done.out) == (2, "")
        assert done.err.startswith("trim: these options do not go together: --use-variant with --use-trim")
        assert done.err.count("\n") == 1


def test_options_of_what_is_not_chosen_shape_nothing(caught: Caught) -> None:
    """One command line serves several methods; the recipe takes of it what is its own."""
    words = ("--sparsity", 0.5, "--iterations", 3, "--block-size", 64, "--gram-dtype", "float64")
    found = pruned(caught, *words)
    assert found.recipe.document() == Recipe().document()
    found.recipe.check()
    assert found.allocate is None
    threshold = pruned(caught, "--sparsity", 0.5, "--threshold", 0.5)
    assert threshold.recipe.barber is None


def test_values_separated_by_commas(caught: Caught) -> None:
    found = built(
        caught, "sweep", "model", "--sparsity", 0.5, "--method", "wanda, magnitude", "--alloc", "owl,uniform", "--trim",
        "on", "--lambda", "0.02,0.05,", "--group", "4,8", "--special", "--qmetric", "mse,mae",
    )  # fmt: skip
    assert (found.method, found.alloc, found.trim) == (("wanda", "magnitude"), ("owl", "uniform"), (True,))
    expected = {"lambda_": (0.02, 0.05), "group": (4, 8), "special": (True,), "qmetric": ("mse", "mae")}
    assert found.settings == expected
    assert built(caught, "calibrate", "m", "-o", "c", "--stats", "inputs , norms").stats == ("inputs", "norms")
    assert built(caught, "calibrate", "m", "-o", "c", "--stats", "").stats == ()
    globs = built(caught, "calibrate", "m", "-o", "c", "--skip", "a,b", "--skip", "c", "--only", "d")
    assert (globs.skip, globs.only) == (("a,b", "c"), ("d",))


def test_a_value_of_another_type_is_named() -> None:
    @dataclass(frozen=True)
    class Some:
        numbers: tuple[int, ...] = option((1,), "Numbers.")
        switches: tuple[bool, ...] = option((True,), "Switches.")
        group: int | None = option(None, "An axis.")

    numbers, switches, group = declared(Some)
    assert several(numbers, "1, 2,3,") == (1, 2, 3)
    assert several(switches, "on,off") == (True, False)
    assert several(group, "4,8") == (4, 8)
    for one, text, part in ((numbers, "1,x", "x"), (switches, "on,yes", "yes"), (group, "4.5", "4.5")):
        with pytest.raises(OptionError, match=f"{one.spelled} '{text}': '{part}' is not usable; separate values by"):
            several(one, text)


def test_the_groups_offer_what_they_build_from() -> None:
    for group in (ALLOCATE, PRUNE, SWEEP):
        names = [one.name for one in group.parameters()]
        assert len(names) == len(set(names))
