"""What trim says of every causal-LM type, beside what transformers says.

`python -m tests.causal_survey` writes `tests/data/causal_types.json`, which the tests compare with, and
`docs/families.md` for readers.
"""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.causal_types import NOT_BUILT, VOCABULARY, causal_types, save_causal_type
from trimcli.errors import TrimError
from trimcli.evaluation.perplexity import perplexity
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.names import grouped, kind_of
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline.proof import prove

HERE = Path(__file__).parent
TABLE = HERE / "data" / "causal_types.json"
DOCUMENT = HERE.parent / "docs" / "families.md"
BATCHES = (1, 2, None)
TOLERANCE = 1e-4
FORMS = {"recorded": "walk", "suspended": "own forward"}
WORDS = {"walk": "layer by layer", "own forward": "within its own forward pass", "refused": "refused"}

INTRODUCTION = """# Model families

Every causal language model type of transformers {version}, tried tiny and with random weights: its perplexity at batch
sizes 1, 2 and the default is that of `from_pretrained`, or it is refused before anything is measured. Written by
`python -m tests.causal_survey`, held by `tests/model/test_causal_types.py`.
"""
EXPLANATION = """*Layer by layer*: every decoder layer is called as the model calls it. *Within its own forward pass*:
the layers hand on more than hidden states, so each sample waits inside the model's own forward pass until its layer is
loaded. One layer is resident either way. A name with `+` is a form of the type before it. `*` stands for every expert.
"""


@dataclass(frozen=True)
class Finding:
    """Of one type: its class, its own perplexity (windows together, and one by one), and trim's by batch size.

    refusal: why trim refuses, None where it does not. linears: kinds of those found. dense: kind -> why left dense.
    """

    type: str
    model_class: str
    directory: Path
    own: float
    one_by_one: float
    found: dict[int | None, float] = field(default_factory=dict)
    form: str | None = None
    refusal: str | None = None
    linears: tuple[str, ...] = ()
    dense: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """`walk`, `own forward` or `refused`."""
        return "refused" if self.refusal is not None else FORMS[str(self.form)]

    @property
    def why(self) -> str | None:
        """The refusal without what changes from run to run: the directory, measured differences."""
        if self.refusal is None:
            return None
        return re.sub(r"\d+(\.\d+)?%", "N%", self.refusal.replace(str(self.directory), "MODEL"))

    @property
    def agrees(self) -> bool:
        """Whether trim's perplexities are all the model's own; of what is refused there are none."""
        return all(math.isclose(value, self.own, rel_tol=TOLERANCE) for value in self.found.values())

    def row(self) -> dict[str, Any]:
        """What the table keeps."""
        return {"verdict": self.verdict, "why": self.why}


def survey(name: str, directory: Path, cache: Path) -> Finding:
    """Make the type's model in `directory` and measure it both ways. Raises what is no refusal."""
    save_causal_type(name, directory)
    tokens = sample_windows()
    own = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    seen: dict[str, Any] = {
        "own": math.exp(own_loss(own, tokens)),
        "one_by_one": math.exp(sum(own_loss(own, window) for window in tokens.split(1)) / len(tokens)),
    }
    try:
        skeleton = Skeleton(Checkpoint.open(directory))
        seen["linears"] = tuple(dict.fromkeys(kind_of(linear) for linear in skeleton.linears))
        seen["dense"] = {kind_of(matrix): left.why for matrix, left in skeleton.left_dense().items()}
        prove(skeleton, cache_dir=cache)
        seen["form"] = skeleton.form
        seen["found"] = {size: perplexity(skeleton, tokens, batch_size=size) for size in BATCHES}
    except TrimError as problem:
        seen["refusal"] = str(problem)
    return Finding(name, type(own).__name__, directory, **seen)


def sample_windows() -> Tensor:
    """Five windows of 16 tokens, int64: one more than a batch of two or four holds."""
    return torch.randint(2, VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(0))


def own_loss(model: Any, tokens: Tensor) -> float:
    """The mean cross-entropy by the model's own forward pass."""
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def document(findings: Iterable[Finding]) -> str:
    """The page for readers."""
    findings = list(findings)
    counts = grouped(findings, lambda finding: finding.verdict)
    summary = [f"- {len(counts.get(verdict, []))} {word}" for verdict, word in WORDS.items()]
    lines = [
        INTRODUCTION.format(version=transformers.__version__),
        *summary,
        f"- {len(NOT_BUILT)} not tried",
        "",
        EXPLANATION,
        "| type | class | how | linears pruned | left dense |",
        "|---|---|---|---|---|",
        *(_line(finding) for finding in findings if finding.refusal is None),
        "",
        "## Refused",
        "",
        "| type | class | why |",
        "|---|---|---|",
        *(f"| {one.type} | {one.model_class} | {_escaped(one.why)} |" for one in findings if one.refusal is not None),
        "",
        "## Not tried",
        "",
        "| type | why |",
        "|---|---|",
        *(f"| {name} | {why} |" for name, why in NOT_BUILT.items()),
    ]
    return "\n".join(lines) + "\n"


def _line(one: Finding) -> str:
    dense = grouped(one.dense, one.dense.__getitem__)
    left = "; ".join(f"{', '.join(f'`{name}`' for name in names)}: {why}" for why, names in dense.items())
    linears = ", ".join(f"`{name}`" for name in one.linears)
    return f"| {one.type} | {one.model_class} | {WORDS[one.verdict]} | {linears} | {_escaped(left)} |"


def _escaped(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def main() -> None:
    """Survey everything and write both files."""
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in causal_types():
            directory = Path(scratch) / name
            findings.append(survey(name, directory, Path(scratch) / "cache"))
            shutil.rmtree(directory)
            print(f"{name}: {findings[-1].verdict}", flush=True)
    if wrong := [finding.type for finding in findings if not finding.agrees]:
        raise SystemExit(f"nothing written: other perplexities than their own for {', '.join(wrong)}")
    types = {finding.type: finding.row() for finding in findings}
    table = {"transformers": transformers.__version__, "types": types}
    TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(findings), encoding="utf-8")


if __name__ == "__main__":
    main()
