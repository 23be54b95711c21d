"""Random command lines: every command, every option that it has, values good and bad."""

import random
import re
from functools import cache
from typing import Any

import typer

from benchmarks.support.corpus import Corpus
from trimcli.cli.app import COMMANDS, app

# What takes long by itself, or a folder of the user's.
LEFT_OUT = {"demo", "kernels"}
# Options that say how long the work takes get small numbers alone.
SMALL = ("0", "1", "2", "3", "-1", "x", "", "nan")
NUMBERS = (*SMALL, "0.5", "0.999", "1.5", "1e9", "-0", "2:4", "9" * 30, "inf", "٣", "0x10", "1_0")
TEXTS = (
    "", "x", "-", "--", "none", "auto", "cpu", "float32", "wanda", "2:4", "1:0", "4:2", "unstructured", "*", "[",
    "*.q_proj", "model.layers.0.*", "[bold]x[/bold]", "[/]", "\x1b[31mred\x1b[0m", "\u202egnp.exe", "a\nb", "ü",
    "\ud800", "~", "..", "%s", "{}", "hf:", "hf:x:y:z", "c4", "org/name", "https://example.com/x", "a" * 300, "5GB",
    "0B", "1e3KB", "WD", "output1", "trim",
)  # fmt: skip


@cache
def _command(name: str) -> Any:
    program: Any = typer.main.get_command(app)
    return program.get_command(None, name)


def random_line(corpus: Corpus, rng: random.Random) -> list[str]:
    """A command line; outputs lie in the corpus' `out`, caches in its `cache`."""
    name = rng.choice([*sorted(COMMANDS.keys() - LEFT_OUT), "prune", "x"])
    if name not in COMMANDS:
        return [name, rng.choice(TEXTS)]
    line = [name]
    usable = [one for _, lines in corpus.readers().values() for one in lines if one[0] == name]
    if usable and rng.random() < 0.6:
        line = list(rng.choice(usable))
    else:
        arguments = [one for one in _command(name).params if one.param_type_name == "argument"]
        for _ in range(max(0, len(arguments) + rng.choice((0, 0, 0, 0, -1, 1)))):
            line.append(_path(corpus, rng))
    options = [one for one in _command(name).params if one.param_type_name == "option" and one.name != "help"]
    for option in rng.sample(options, min(len(options), rng.choice((0, 1, 1, 2, 3, 6)))):
        line += _given(option, corpus, rng)
    if "--cache-dir" not in line and any(one.name == "cache_dir" for one in options):
        line += ["--cache-dir", str(corpus.home / "cache")]
    return line


def _given(option: Any, corpus: Corpus, rng: random.Random) -> list[str]:
    flag = rng.choice([*option.opts, *option.secondary_opts])
    if getattr(option, "is_flag", False):
        return [flag]
    if option.name == "cache_dir":
        # Not inside of `out`: a command that fails later may leave a cache, which is whole, and no output.
        return [flag, str(corpus.home / rng.choice(("cache", "other-cache", "masks.safetensors")))]
    if option.name in ("output", "save_model", "stats_out", "log_samples", "metrics_cache"):
        return [
            flag,
            rng.choice((f"{corpus.out}/{rng.choice('abc')}", f"{corpus.out}/a/b", f"{corpus.out}/[b]\x1b[31m")),
        ]
    kind: str = option.bare_type()
    choices = re.findall(r"'([^']*)'", kind)
    if choices and rng.random() < 0.7:
        return [flag, rng.choice(choices)]
    if kind == "Path" or rng.random() < 0.15:
        return [flag, _path(corpus, rng)]
    if kind == "int":
        return [flag, rng.choice(SMALL)]
    return [flag, rng.choice(NUMBERS if kind == "float" else (*TEXTS, *NUMBERS))]


def _path(corpus: Corpus, rng: random.Random) -> str:
    home = corpus.home
    known = [path.name for path in home.iterdir() if path.name not in ("cache", "out")]
    if rng.random() < 0.75:
        return str(home / rng.choice(sorted(known)))
    return rng.choice((*TEXTS, str(home), str(home / "model" / "config.json"), "/dev/null", "/nonexistent/x", "/"))
