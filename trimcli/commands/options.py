"""What the commands take: each option is declared here, or beside the method that it belongs to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trimcli.errors import OptionError
from trimcli.images.options import AUGMENT, IMAGES, LABELLED
from trimcli.methods.choice import parse_pattern, uniform_target
from trimcli.methods.layers.base import ALLOCATIONS, LayerAllocation, Trials
from trimcli.methods.recipe import Recipe
from trimcli.methods.stats import stored_statistics
from trimcli.options import (
    RUN,
    ModelOptions,
    Numerics,
    RunOptions,
    WalkOptions,
    above_zero,
    at_least,
    fraction,
    not_negative,
    one_of,
    option,
    positive,
    share,
    words,
)
from trimcli.registry import misplaced
from trimcli.text.encoding import Bos
from trimcli.text.options import BOS, CHAT, DATASET, SEQLEN, TOKENS
from trimcli.text.stdin import check_stdin

SAMPLES, TARGET, TASKS = "Samples", "Target", "Zero-shot tasks (lm-eval)"
ONLY = "Only linears whose full name matches this glob (repeatable)."
REACH = (
    f"{ONLY} One that matches none of the decoder layers' reaches what lies outside of them, as a vision tower or an "
    "untied head: for magnitude and the like, which read no inputs; at --sparsity, or the target of an allocation."
)
SKIP = "Leave linears that match this glob out (repeatable)."
SELF = "self"
OWN_TEXT = "Or self: samples that the dense model writes, all of it in memory (Ji et al. 2024)."
SELF_SHARE = "Part of the samples that the dense model writes, as under --dataset self; the rest is of the dataset."
BATCH = "Samples a batch; chosen if not given."
PACK = "Join documents in random order, EOS between them, to full samples; else only those longer than one are drawn."
SPARSE = "Hold the pruned matrices of all layers as keep bits and kept values, and multiply with those."
STATS = "What to keep: norms (wanda, OWL) and inputs (TRIM without propagation); nothing keeps the tokens alone."


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(WalkOptions):
    """What to calibrate on."""

    dataset: str = option("c4", f"{DATASET} {OWN_TEXT}", panel=SAMPLES)
    nsamples: int = option(256, "Calibration samples.", panel=SAMPLES, check=positive)
    seqlen: int | None = option(None, f"Tokens a sample; {SEQLEN}", panel=SAMPLES, check=at_least(2))
    tokens: Path | None = option(None, TOKENS, panel=SAMPLES)
    bos: Bos = option("auto", f"{BOS} Under prune --numerics reference, auto is once.", panel=SAMPLES)
    self_share: float = option(0.0, SELF_SHARE, panel=SAMPLES, check=share)
    pack: bool = option(False, PACK, panel=SAMPLES)
    chat: bool = option(False, CHAT, panel=SAMPLES)
    images: Path | None = option(None, IMAGES, panel=SAMPLES)
    augment: bool = option(False, AUGMENT, panel=SAMPLES)
    stats: tuple[str, ...] = option(("norms", "inputs"), STATS, choices=stored_statistics)
    batch_size: int | None = option(None, BATCH, check=positive)
    only: tuple[str, ...] = option((), ONLY, repeated=True)
    skip: tuple[str, ...] = option((), SKIP, repeated=True)

    @property
    def written(self) -> int:
        """How many of the samples the dense model writes itself."""
        if self.tokens is not None or self.images is not None:
            return 0
        return self.nsamples if self.dataset == SELF else round(self.self_share * self.nsamples)

    def check(self) -> None:
        """Raise OptionError for values and combinations that cannot be used."""
        super().check()
        shared = ("--self-share", self.self_share != 0)
        for flag, given in (("--bos", self.bos != "auto"), ("--pack", self.pack), ("--chat", self.chat), shared):
            if given and self.tokens is not None:
                raise OptionError(f"{flag} with --tokens: they are samples already, and no text is read; drop one.")
        for flag, given in (("--pack", self.pack), ("--chat", self.chat), shared):
            if given and self.dataset == SELF:
                raise OptionError(f"{flag} with --dataset {SELF}: the model writes whole samples; drop one.")
        if self.augment and self.images is None:
            raise OptionError("--augment does nothing without --images; give pictures or leave it out.")
        fresh = CalibrateOptions()
        for name in ("dataset", "seqlen", "tokens", "bos", "self_share", "pack", "chat"):
            if self.images is not None and getattr(self, name) != getattr(fresh, name):
                raise OptionError(
                    f"--{name.replace('_', '-')} with --images: pictures are no text; drop one of the two."
                )
        if self.self_share and not self.written:
            few = f"--self-share {self.self_share:g} of --nsamples {self.nsamples} is not one sample"
            raise OptionError(f"{few}; give a larger share or leave it out.")
        check_stdin((self.dataset, self.tokens))

    def under(self, numerics: Numerics) -> CalibrateOptions:
        """The options of a calibration for pruning in these numerics: reference keeps to the published protocol."""
        published = numerics == "reference" and self.bos == "auto" and self.tokens is None
        return replace(self, bos="once") if published else self


@dataclass(frozen=True, kw_only=True)
class AllocateOptions(WalkOptions):
    """How to distribute the target. options: of the method, where they differ from the defaults."""

    method: str = option("uniform", "How layers share the target.", choices=lambda: ALLOCATIONS)
    sparsity: float | None = option(None, "Target: the fraction of weights to prune, in [0, 1).", check=fraction)
    calibration: Path | None = option(None, "A file of `trim calibrate`, for what reads activations (OWL) or tries.")
    metrics_cache: Path | None = option(None, "Alpha: a JSON file of metrics, read and extended.")
    import_file: Path | None = option(None, "A published tool's .npy: OWL keep ratios or Alpha metrics.", "--import")
    numerics: Numerics = option(
        "exact", "exact: the mean is the target, no linear above 0.99. reference: the published code's arithmetic."
    )
    only: tuple[str, ...] = option((), ONLY, repeated=True)
    skip: tuple[str, ...] = option((), SKIP, repeated=True)
    options: tuple[Any, ...] = ()

    def document(self) -> dict[str, Any]:
        """The options as a manifest records them, the method's own among them."""
        own = self.own()
        return {**super().document(), "options": None if own is None else asdict(own)}

    @property
    def allocating(self) -> LayerAllocation:
        """The method's entry. Raises OptionError for an unknown one."""
        return ALLOCATIONS[self.method]

    def own(self) -> Any:
        """The method's options: an instance of its class, None where it has none."""
        kind = self.allocating.options
        if kind is None:
            return None
        return next((given for given in self.options if type(given) is kind), kind())

    @property
    def trials(self) -> Trials | None:
        """What is tried on the way, None where nothing is."""
        return self.own().trials if self.allocating.tries and self.import_file is None else None

    def check(self, *, calibrates: bool = False) -> None:
        """Raise OptionError for what cannot be used. calibrates: a calibration is made on the way."""
        super().check()
        chosen, imported = self.allocating, self.import_file is not None
        wrong = {flag: [owner] for flag, _, owner in misplaced(self.options, [chosen])}
        for flag, given, trait in (
            ("--calibration", self.calibration, "needs"),
            ("--metrics-cache", self.metrics_cache, "remembers"),
            ("--import", self.import_file, "imports"),
        ):
            if given is not None and not getattr(chosen, trait):
                wrong[flag] = [name for name, entry in ALLOCATIONS.items() if getattr(entry, trait)]
        for flag, owners in wrong.items():
            what = f"{flag} does not go with --method {self.method}, only with {' or '.join(owners)}"
            raise OptionError(f"{what}; leave one of them out.")
        unread = {"--calibration": self.calibration, "--metrics-cache": self.metrics_cache}
        for flag, value in {**unread, "--group": getattr(self.own(), "group", None)}.items():
            if imported and value is not None:
                raise OptionError(f"{flag} and --import exclude each other; leave one of them out.")
        if imported and (self.only or self.skip):
            raise OptionError("--import with --only or --skip: the file is for all linears; leave one of them out.")
        if self.sparsity is None and not (imported and chosen.imports == "ratios"):
            raise OptionError(f"--method {self.method} needs --sparsity, the share of weights to prune.")
        if chosen.needs and self.calibration is None and not imported and not calibrates:
            raise OptionError(f"--method {self.method} needs --calibration, a file of trim calibrate for this model.")


@dataclass(frozen=True, kw_only=True)
class PruneOptions(WalkOptions):
    """What to prune, and how. calibrate: made through the stage cache where no file is given."""

    recipe: Recipe = field(default_factory=Recipe)
    calibration: Path | None = option(None, "A file of `trim calibrate` for this model.")
    save_model: Path | None = option(None, "Also write the pruned model to this directory.")
    sparsity: float | None = option(None, "The fraction to prune, in [0, 1).", panel=TARGET, check=fraction)
    sparsity_type: str = option(
        "unstructured",
        "unstructured, or N:M: N weights are KEPT of each M consecutive inputs (2:4, 4:8, ...).",
        panel=TARGET,
    )
    ratios: Path | None = option(None, "Layer sparsities: a file of `trim alloc-layers`.", panel=TARGET)
    only: tuple[str, ...] = option((), REACH, panel=TARGET, repeated=True)
    skip: tuple[str, ...] = option((), SKIP, panel=TARGET, repeated=True)
    keep_zeros: bool | None = option(
        None,
        "Let no weight that is zero already become another value where kept weights change; they count in the target. "
        "The default for a model that trim pruned.",
        "--keep-zeros/--no-keep-zeros",
        panel=TARGET,
    )
    stats_out: Path | None = option(None, "Write what TRIM found: FILE.json, row vectors beside it.", panel="TRIM rows")
    batch_size: int | None = option(None, BATCH, check=positive)
    resume: bool = option(True, "Start over instead of going on with an interrupted run.", "--no-resume", off=True)
    calibrate: CalibrateOptions | None = None
    allocate: AllocateOptions | None = None

    @property
    def calibrates(self) -> bool:
        """Whether statistics of the dense model are gathered on the way, unless the stage cache has them."""
        allocates = bool(self.allocate and self.allocate.allocating.needs)
        return self.calibration is None and (allocates or (not self.recipe.propagate and bool(self.recipe.needs)))

    def check(self) -> None:
        """Raise OptionError for values and combinations that cannot be used, before anything is read."""
        super().check()
        pattern = parse_pattern(self.sparsity_type)
        self.recipe.check(pattern=pattern is not None)
        kind = f"--sparsity-type {self.sparsity_type}"
        refused = [
            (self.ratios and self.sparsity is not None, "--ratios with --sparsity: the ratios file holds the target"),
            (self.ratios and pattern, f"--ratios with {kind}: each says what goes"),
            (self.ratios and self.allocate, "--ratios with --alloc: the ratios file is an allocation"),
            (pattern and self.allocate, f"--alloc with {kind}: each says what goes"),
            (self.calibration and self.calibrate, "--calibration with --dataset, --tokens and the like"),
            (
                self.stats_out and not self.recipe.allocating.searches,
                "--stats-out without --use-trim: it holds what TRIM found",
            ),
            (
                self.recipe.changes_weights and not self.save_model,
                f"{_changing(self.recipe)} without --save-model: it changes the kept weights, so masks alone do "
                "not carry its result; give --save-model DIR",
            ),
        ]
        for wrong, what in refused:
            if wrong:
                raise OptionError(f"these options do not go together: {what}.")
        if self.allocate:
            one_of("--alloc", self.allocate.method, ALLOCATIONS)
            self.allocate.check(calibrates=True)
        elif not self.ratios:
            uniform_target(self.sparsity, self.sparsity_type)


def _changing(recipe: Recipe) -> str:
    """The option that makes a recipe change the kept weights."""
    if recipe.reconstructs:
        return f"--reconstruct {recipe.reconstruct}"
    return f"--method {recipe.method}" if recipe.named.update != "none" else f"--update {recipe.updating.name}"


def prune_words(options: PruneOptions) -> list[str]:
    """The options of the `trim prune` command line that does what `options` say."""
    recipe, calibrate, allocate = options.recipe, options.calibrate, options.allocate
    found = words(options)
    found += ["--method", recipe.method, *words(recipe, "method", "rows")]
    flags = {"even": [], "trim": ["--use-trim"], "variant": ["--use-variant"]}
    found += flags.get(recipe.rows, ["--rows", recipe.rows])
    found += [word for given in recipe.options for word in words(given)]
    if recipe.barber is not None:
        found += ["--prune-barber", *words(recipe.barber)]
    if allocate is not None:
        found += ["--alloc", allocate.method, *(word for given in allocate.options for word in words(given))]
        found += ["--metrics-cache", str(allocate.metrics_cache)] if allocate.metrics_cache else []
    if calibrate is not None and calibrate.images is not None:
        found += ["--images", str(calibrate.images), "--nsamples", str(calibrate.nsamples)]
        found += ["--augment"] if calibrate.augment else []
    elif calibrate is not None and calibrate.tokens is not None:
        found += ["--tokens", str(calibrate.tokens)]
    elif calibrate is not None:
        found += ["--dataset", calibrate.dataset, "--nsamples", str(calibrate.nsamples)]
        found += ["--seqlen", str(calibrate.seqlen)] if calibrate.seqlen is not None else []
        found += ["--bos", calibrate.bos] if calibrate.bos != "auto" else []
        found += ["--self-share", str(calibrate.self_share)] if calibrate.self_share else []
        found += [flag for flag, given in (("--pack", calibrate.pack), ("--chat", calibrate.chat)) if given]
    return found


@dataclass(frozen=True, kw_only=True)
class ApplyOptions(ModelOptions):
    """How masks are applied."""

    format: Literal["dense", "packed"] = option(
        "dense", "dense: an ordinary directory with zeros in it. packed: keep bits and kept values, really smaller."
    )
    max_shard_size: str | None = option(None, "Shard anew, such as 5GB; the model's own shards if not given.")
    other_weights: bool = option(
        False, "Accept other weights in matrices of the same names and shapes: a fine-tuned model."
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(WalkOptions):
    """What to measure; only what is asked for is measured. fewshot_seed: None for lm-eval's own seeds."""

    masks: Path | None = option(None, "Measure the model under these masks, without writing it.")
    ppl: tuple[str, ...] = option(
        (), "Perplexity on wikitext2, c4, ptb, files or - (standard input), separated by commas."
    )
    seqlen: int | None = option(None, f"Tokens a window; {SEQLEN}", check=at_least(2))
    max_windows: int | None = option(None, "Only the first so many windows.", check=positive)
    images: Path | None = option(None, LABELLED)
    bos: Bos = option("auto", BOS)
    chat: bool = option(False, CHAT)
    batch_size: int | None = option(
        None, "Windows, pictures or task sequences a batch; chosen if not given.", check=positive
    )
    sparse: bool = option(False, SPARSE)
    tasks: tuple[str, ...] = option((), "lm-eval tasks or groups: boolq,rte,hellaswag,winogrande,...", panel=TASKS)
    include_path: Path | None = option(None, "A folder of local task files.", panel=TASKS)
    num_fewshot: int | None = option(None, "Examples before each question.", panel=TASKS)
    limit: float | None = option(None, "Documents a task, or their fraction if below 1.", panel=TASKS)
    log_samples: Path | None = option(None, "A folder for one JSON lines file of answers a task.", panel=TASKS)
    fewshot_seed: int | None = None

    def check(self) -> None:
        """Raise OptionError for values that cannot be used."""
        super().check()
        if not self.ppl and not self.tasks and self.images is None:
            raise OptionError(
                "nothing to measure was asked for; give --ppl wikitext2 (or FILE), --tasks boolq,rte, or --images PATH "
                "for an image classifier."
            )
        texts = {"--ppl": self.ppl, "--tasks": self.tasks, "--seqlen": self.seqlen, "--max-windows": self.max_windows}
        for flag, given in {**texts, "--sparse": self.sparse}.items():
            if self.images is not None and given:
                raise OptionError(f"{flag} with --images: an image classifier reads no text; drop one of the two.")
        if not self.ppl and (self.chat or self.bos != "auto"):
            flag = "--chat" if self.chat else f"--bos {self.bos}"
            raise OptionError(f"{flag} does nothing without --ppl; give --ppl or leave it out.")
        if self.sparse and any(self.limits):
            flag = "--max-memory" if self.limits.host is not None else "--max-device-memory"
            what = f"--sparse with {flag}: how much the pruned matrices take shows only when they are read"
            raise OptionError(f"{what}; leave one of them out.")
        check_stdin(self.ppl)
        for name in ("include_path", "num_fewshot", "limit", "log_samples"):
            value = getattr(self, name)
            if value is not None and not self.tasks:
                flag = f"--{name.replace('_', '-')}"
                raise OptionError(f"{flag} {value} does nothing without --tasks; give --tasks or leave it out.")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions):
    """How a text goes on."""

    masks: Path | None = option(None, "The model under these masks, without writing it.")
    max_new_tokens: int = option(128, "Tokens at most; fewer where the model's positions end.", check=positive)
    temperature: float = option(0.0, "Of the draws; 0 takes the likeliest token.", check=not_negative)
    top_p: float | None = option(None, "Draw among the likeliest tokens of this share together.", check=above_zero)
    top_k: int | None = option(None, "Draw among so many likeliest tokens.", check=positive)
    chat: bool = option(False, "The prompt is a message, rendered by the tokenizer's chat template.")
    dense: bool = option(False, "Hold pruned matrices dense, too, for comparison.")

    def check(self) -> None:
        """Raise OptionError for values and combinations that cannot be used."""
        super().check()
        for flag, value in (("--top-p", self.top_p), ("--top-k", self.top_k)):
            if value is not None and not self.temperature:
                raise OptionError(f"{flag} {value} does nothing without --temperature; give one, such as 0.7.")
        if self.top_p is not None and self.top_p > 1:
            raise OptionError(f"--top-p {self.top_p} is above 1; it is a share, such as 0.95.")


@dataclass(frozen=True)
class VerifyOptions:
    """What to hold a directory against; `trust_remote_code` counts where trim did not write it."""

    masks: Path | None = option(None, "Hold the directory against these masks: zero wherever they are.")
    trust_remote_code: bool = option(False, "Run code that the model brings.", panel=RUN)
