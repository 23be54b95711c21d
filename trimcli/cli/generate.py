"""`trim generate`."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from trimcli.cli.options import Model
from trimcli.cli.output import Say, size
from trimcli.console import inert

if TYPE_CHECKING:
    from trimcli.commands.options import GenerateOptions


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the text begins with.")],
    options: "GenerateOptions",
    say: Say,
) -> None:
    """Go on with a text, by a dense, pruned or packed model, or by one under masks.

    On a CPU, pruned matrices are held and multiplied as keep bits and kept values, which is smaller in memory and,
    from half of them zero on, faster. The text goes to stdout as it comes; what it took, to stderr.

    Example: trim generate Qwen2.5-3B-70-packed "The capital of France is"
    """
    from trimcli.commands.generate import generate as run

    shown = not (say.as_json or say.quiet)

    def write(piece: str) -> None:
        print(inert(piece, lines=True), end="", flush=True)

    if shown:
        write(prompt)
    found = run(model, prompt, options, write=write if shown else lambda _: None, progress=say.progress)
    if say.quiet and not say.as_json:
        print(inert(found.text, lines=True))
    elif shown:
        print(flush=True)
        form = f"{found.sparse} of {found.linears} matrices sparse, {size(found.memory)}"
        took = f"{found.new_tokens} tokens, {found.tokens_per_second:.1f} a second"
        print(f"trim: {took}; {form}, {found.compute_dtype}", file=sys.stderr)
    say.result(lambda: {**asdict(found), "tokens_per_second": found.tokens_per_second}, lambda: None)
