import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimcli.kernels.bitmap.build
import trimcli.kernels.bitmap.model
from tests.small_models import gpt2_config, llama_config, masks_for, random_model, save, skeleton_of
from tests.trim_cli import COMPUTE, trim, trim_json
from trimcli import GenerateOptions, generate, load_packed, load_sparse
from trimcli.commands.apply import apply_masks
from trimcli.commands.options import ApplyOptions
from trimcli.errors import InputError, MismatchError, OptionError, ResourceError
from trimcli.kernels.bitmap.linear import SparseLinear
from trimcli.kernels.bitmap.model import model_bytes, sparsify
from trimcli.kernels.forms import FormLinear

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="products on a CUDA device need one")
PROMPT = "The king"
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def written(model: Path, base: Path, sparsity: float = 0.7) -> Path:
    """`model`, its `masks`, `pruned` and `packed` in one folder."""
    if model != base / "model":
        (base / "model").symlink_to(model)
    masks_for(base / "model", base / "masks", sparsity=sparsity)
    apply_masks(str(base / "model"), base / "masks", base / "pruned")
    apply_masks(str(base / "model"), base / "masks", base / "packed", ApplyOptions(format="packed"))
    return base


@pytest.fixture(scope="module")
def nano(nano_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(nano_qwen2, tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("gpt2")
    return written(save(random_model(gpt2_config()), base / "model"), base)


def dense(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).logits
    return found


def sparse_modules(model: Any) -> list[SparseLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


@pytest.mark.parametrize("kind", ["pruned", "packed", "masks"])
@pytest.mark.parametrize("family", ["nano", "gpt2"])
def test_the_logits_are_those_of_the_written_directory(
    family: str, kind: str, compiled: Path, request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(family)
    masks = base / "masks" if kind == "masks" else None
    model: Any = load_sparse(base / ("model" if kind == "masks" else kind), dtype=torch.float32, masks=masks)
    assert len(sparse_modules(model)) == (8 if family == "gpt2" else 28)
    expected = logits(dense(base / "pruned"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    # More tokens at once than the kernels take columns.
    many = TOKENS.repeat(1, 3)
    expected = logits(dense(base / "pruned"), many)
    torch.testing.assert_close(logits(model, many), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_values_stay_as_stored_and_the_model_computes_as_asked(nano: Path, compiled: Path) -> None:
    model: Any = load_sparse(nano / "packed", dtype=torch.float32)
    assert {module.values.dtype for module in sparse_modules(model)} == {torch.float16}
    assert logits(model).dtype == torch.float32
    model = load_sparse(nano / "packed", dtype=torch.bfloat16)
    assert {module.values.dtype for module in sparse_modules(model)} == {torch.bfloat16}
    assert load_sparse(nano / "packed").dtype == torch.float16
    assert load_sparse(nano / "packed", dtype="auto").dtype == torch.float16
    assert load_sparse(nano / "packed", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(OptionError, match=r"'float23' is none of auto, float32, .*did you mean 'float32'"):
        load_sparse(nano / "packed", dtype="float23")


def test_it_generates_greedily_what_the_written_directory_does(nano: Path, compiled: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(nano / "pruned")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    how = {"max_new_tokens": 24, "do_sample": False}
    expected = dense(nano / "pruned").generate(**inputs, **how)
    model: Any = load_sparse(nano / "packed", dtype=torch.float32)
    assert torch.equal(model.generate(**inputs, **how), expected)
    pieces: list[str] = []
    found = generate(
        str(nano / "packed"),
        PROMPT,
        GenerateOptions(dtype="float32", device="cpu", max_new_tokens=24),
        write=pieces.append,
    )
    assert PROMPT + found.text == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert "".join(pieces) == found.text
    assert len(pieces) > 1
    assert (found.prompt_tokens, found.new_tokens) == (inputs.input_ids.shape[1], 24)
    assert (found.sparse, found.linears) == (28, 28)


@pytest.mark.slow
def test_it_runs_compiled_by_torch(nano: Path, compiled: Path) -> None:
    model: Any = load_sparse(nano / "packed", dtype=torch.float32)
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager")), expected)


def test_a_dense_model_is_loaded_dense(nano: Path, compiled: Path) -> None:
    model = load_sparse(nano / "model")
    assert sparse_modules(model) == []
    assert torch.equal(logits(model), logits(dense(nano / "model", torch.float16)))


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 million weights in float32, next to none of them outside of the linears."""
    base = tmp_path_factory.mktemp("larger")
    config = llama_config(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_key_value_heads=4)
    return written(save(random_model(config), base / "model"), base)


def test_at_seventy_percent_it_holds_less_than_half(larger: Path, compiled: Path) -> None:
    whole = model_bytes(dense(larger / "pruned"))
    assert model_bytes(load_sparse(larger / "packed")) <= 0.45 * whole
    assert model_bytes(load_packed(larger / "packed")) == whole


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.slow
def test_the_process_grows_by_less_than_half(larger: Path, compiled: Path) -> None:
    work = """
import ctypes, gc, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from trimcli import load_sparse

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

tokens, (directory, small, cache) = torch.tensor([[1, 2, 3]]), sys.argv[1:]
load = lambda where: load_sparse(where, cache_dir=Path(cache))
with torch.no_grad():
    load(small)(input_ids=tokens)  # what is imported and allocated once
    before = resident()
    model = load(directory)
    model(input_ids=tokens)
    print(resident() - before)
"""

    def grown(kind: str) -> int:
        given = map(str, (larger / kind, larger.parent / "small", compiled))
        found = subprocess.run([sys.executable, "-c", work, *given], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        return int(found.stdout)

    save(random_model(llama_config()), larger.parent / "small")
    assert grown("packed") <= 0.45 * grown("model")


def test_without_a_compiler_it_says_so_and_is_dense(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(_: object) -> None:
        raise ResourceError("there is no C++ compiler; install g++.")

    monkeypatch.setattr(trimcli.kernels.bitmap.build, "load", lacking)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler; install g\+\+; pruned matrices are held dense\.$"):
        model = load_sparse(nano / "model", masks=nano / "masks", dtype=torch.float32)
    assert sparse_modules(model) == []
    assert torch.equal(logits(model), logits(dense(nano / "pruned")))


def test_what_cannot_be_loaded_is_refused(nano: Path, gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no config"):
        load_sparse(tmp_path)
    with pytest.raises(MismatchError):
        load_sparse(nano / "model", masks=gpt2 / "masks")


def test_the_command_streams_the_text(nano: Path, compiled: Path) -> None:
    how = ("--max-new-tokens", 8, *COMPUTE)
    found = trim("generate", nano / "packed", PROMPT, *how)
    document = trim_json("generate", nano / "packed", PROMPT, *how)
    assert found.status == 0, found.err
    assert found.out == f"{PROMPT}{document['text']}\n"
    assert "8 tokens" in found.err
    assert "28 of 28 matrices sparse" in found.err
    assert document["new_tokens"] == 8
    assert document["tokens_per_second"] > 0
    compared = trim_json("generate", nano / "packed", PROMPT, *how, "--dense")
    assert (compared["text"], compared["sparse"]) == (document["text"], 0)
    assert document["memory"] < compared["memory"]
    masked = trim_json("generate", nano / "model", PROMPT, *how, "--masks", nano / "masks")
    assert (masked["text"], masked["sparse"]) == (document["text"], 28)
    assert trim("generate", nano / "packed", PROMPT, *how, "--quiet").out == f"{document['text']}\n"


def test_draws_follow_the_seed(nano: Path, compiled: Path) -> None:
    def drawn(seed: int, **more: Any) -> str:
        options = GenerateOptions(max_new_tokens=12, seed=seed, device="cpu", dtype="float32", **more)
        return generate(str(nano / "packed"), PROMPT, options).text

    assert drawn(1, temperature=1.0) == drawn(1, temperature=1.0) != drawn(2, temperature=1.0)
    assert drawn(1, temperature=1.0, top_k=1) == drawn(2, temperature=0.5, top_p=1e-6) == drawn(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0 must be at least 1"),
        ({"temperature": -1.0}, "--temperature -1 is not usable"),
        ({"top_p": 0.9}, "--top-p 0.9 does nothing without --temperature"),
        ({"top_k": 5}, "--top-k 5 does nothing without --temperature"),
        ({"temperature": 1.0, "top_p": 1.5}, r"--top-p 1\.5 is above 1"),
        ({"chat": True}, "--chat needs a chat template"),
    ],
)
def test_unusable_options(nano: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        generate(str(nano / "packed"), PROMPT, GenerateOptions(device="cpu", **options))


def test_prompts_that_leave_nothing_to_do(nano: Path) -> None:
    with pytest.raises(OptionError, match="the prompt is empty"):
        generate(str(nano / "packed"), "", GenerateOptions(device="cpu"))
    with pytest.raises(OptionError, match=r"the prompt's \d+ tokens fill the \d+ positions"):
        generate(str(nano / "packed"), "king " * 5000, GenerateOptions(device="cpu"))


def test_eval_on_the_sparse_form(nano: Path, compiled: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The king and the queen of the land. " * 60)
    how = ("--ppl", tmp_path / "text.txt", "--seqlen", 32, "--max-windows", 4, *COMPUTE)
    plain = trim_json("eval", nano / "packed", *how)
    sparse = trim_json("eval", nano / "packed", *how, "--sparse")
    masked = trim_json("eval", nano / "model", *how, "--sparse", "--masks", nano / "masks")
    assert (plain["multiplied_sparse"], sparse["multiplied_sparse"], masked["multiplied_sparse"]) == (None, 28, 28)
    for found in (sparse, masked):
        assert found["perplexity"][0]["value"] == pytest.approx(plain["perplexity"][0]["value"], rel=1e-5)
        assert found["sparsity"]["total"] == pytest.approx(plain["sparsity"]["total"])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["nano", "gpt2"])
def test_the_logits_on_a_gpu(family: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    base: Path = request.getfixturevalue(family)
    model: Any = load_sparse(base / "packed", dtype=dtype, device="cuda")
    assert len(sparse_modules(model)) == (8 if family == "gpt2" else 28)
    assert {one.device.type for one in (*model.parameters(), *model.buffers())} == {"cuda"}
    whole = dense(base / "pruned", dtype).cuda()
    close = 1e-5 if dtype == torch.float32 else 1e-2
    for tokens in (TOKENS[:, :1], TOKENS, TOKENS.repeat(1, 3)):
        expected = logits(whole, tokens.cuda())
        most = float(expected.abs().max())
        torch.testing.assert_close(logits(model, tokens.cuda()), expected, rtol=close, atol=close * most)


@needs_gpu
def test_a_model_that_is_moved_to_a_gpu(nano: Path, compiled: Path) -> None:
    model: Any = load_sparse(nano / "packed", dtype=torch.float32)
    expected = logits(model)
    torch.testing.assert_close(logits(model.cuda(), TOKENS.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)


@needs_gpu
def test_it_generates_greedily_on_a_gpu_what_the_written_directory_does(nano: Path, tmp_path: Path) -> None:
    inputs = AutoTokenizer.from_pretrained(nano / "pruned")(PROMPT, return_tensors="pt").to("cuda")
    how = {"max_new_tokens": 24, "do_sample": False}
    expected = dense(nano / "pruned").cuda().generate(**inputs, **how)
    model: Any = load_sparse(nano / "packed", dtype=torch.float32, device="cuda")
    assert torch.equal(model.generate(**inputs, **how), expected)
    options = ("--max-new-tokens", 8, "--device", "cuda", "--dtype", "float32")
    found = trim_json("generate", nano / "packed", PROMPT, *options)
    compared = trim_json("generate", nano / "packed", PROMPT, *options, "--dense")
    assert (found["text"], found["sparse"], compared["sparse"]) == (compared["text"], 28, 0)
    (tmp_path / "text.txt").write_text("The king and the queen of the land. " * 60)
    how_long = ("--ppl", tmp_path / "text.txt", "--seqlen", 32, "--max-windows", 4, *options[2:])
    plain, sparse = (trim_json("eval", nano / "packed", *how_long, *more) for more in ((), ("--sparse",)))
    assert sparse["multiplied_sparse"] == 28
    assert sparse["perplexity"][0]["value"] == pytest.approx(plain["perplexity"][0]["value"], rel=1e-5)


@needs_gpu
@pytest.mark.parametrize("wins", [True, False])
def test_two_of_four_is_semi_structured_on_a_gpu_where_that_wins(
    wins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(random_model(llama_config(hidden_size=64, intermediate_size=128), dtype=torch.bfloat16), tmp_path / "model")
    masks_for(tmp_path / "model", tmp_path / "masks", pattern=(2, 4))
    apply_masks(str(tmp_path / "model"), tmp_path / "masks", tmp_path / "pruned")
    seconds = {"semi": 1.0, "bitmap": 2.0 if wins else 0.5, "dense": 3.0}
    monkeypatch.setattr(
        trimcli.kernels.bitmap.model, "timed", lambda runs, device: {name: seconds[name] for name in runs}
    )
    model: Any = load_sparse(tmp_path / "pruned", device="cuda")
    semi = [module for module in model.modules() if isinstance(module, FormLinear)]
    assert (len(semi), len(sparse_modules(model))) == ((14, 0) if wins else (0, 14))
    expected = logits(dense(tmp_path / "pruned", torch.bfloat16).cuda(), TOKENS.cuda())
    torch.testing.assert_close(logits(model, TOKENS.cuda()), expected, rtol=3e-2, atol=3e-2)


def test_where_a_gpu_has_no_triton_it_says_so(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trimcli.kernels.bitmap.gpu", None)
    skeleton = skeleton_of(nano / "packed")
    skeleton.device = torch.device("cuda")
    with pytest.warns(UserWarning, match=r"install triton and a C compiler; pruned matrices are held dense\.$"):
        assert sparsify(skeleton, None, None).names == ()
