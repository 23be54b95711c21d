import gzip
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from trimcli import demo
from trimcli.errors import HubError, InputError, OptionError
from trimcli.text.tokens import calibration_tokens, evaluation_windows, load_tokenizer, read_tokens

WORDS = ["the", "a", "of", "one", "two", "sparse", "dense", "matrix", "row", "layer", "weight", "goes", "under"]
WriteDocuments = Callable[[Sequence[str], Path], Path]


def story(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


# Every fifth document is long: most draws are rejected, as they are in C4.
DOCUMENTS = [story(seed, 90 if seed % 5 == 0 else 12) for seed in range(40)]


def write_json_lines(documents: Sequence[str], path: Path, field: str = "text") -> Path:
    lines = "".join(json.dumps({field: text, "url": "x"}) + "\n" for text in documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def write_parquet(documents: Sequence[str], path: Path, field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(range(len(documents))), field: list(documents)}), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(nano_qwen2: Path) -> Any:
    return load_tokenizer(nano_qwen2)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` takes for the hub: it prefers a local directory of the data set's name."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text).ids)


def published_text_sampling(tokens: list[int], nsamples: int, seqlen: int, seed: int) -> list[list[int]]:
    random.seed(seed)
    samples = []
    for _ in range(nsamples):
        i = random.randint(0, len(tokens) - seqlen - 1)
        samples.append(tokens[i : i + seqlen])
    return samples


def published_document_sampling(
    tokenizer: Any, documents: Sequence[str], nsamples: int, seqlen: int, seed: int
) -> list[list[int]]:
    random.seed(seed)
    samples = []
    for _ in range(nsamples):
        while True:
            tokens = ids(tokenizer, documents[random.randint(0, len(documents) - 1)])
            if len(tokens) > seqlen:
                break
        i = random.randint(0, len(tokens) - seqlen - 1)
        samples.append(tokens[i : i + seqlen])
    return samples


class TestLocalCalibration:
    def test_text_is_sampled_as_published(self, tokenizer: Any, tmp_path: Path) -> None:
        path = tmp_path / "train.txt"
        path.write_text(story(1, 500))
        found = calibration_tokens(str(path), tokenizer, nsamples=9, seqlen=32, seed=3)
        assert found.dtype == torch.int32
        assert found.tolist() == published_text_sampling(ids(tokenizer, story(1, 500)), 9, 32, 3)

    @pytest.mark.parametrize(
        ("name", "write"),
        [
            ("docs.jsonl", write_json_lines),
            ("docs.json", write_json_lines),
            ("docs.jsonl.gz", write_json_lines),
            ("c4-train.00000-of-01024.json.gz", write_json_lines),
            ("docs.parquet", write_parquet),
        ],
    )
    def test_documents_are_sampled_as_published(
        self, tokenizer: Any, tmp_path: Path, name: str, write: WriteDocuments
    ) -> None:
        """Complaint 4: C4 does not load; files of the same form do, without a hub."""
        path = write(DOCUMENTS, tmp_path / name)
        found = calibration_tokens(str(path), tokenizer, nsamples=12, seqlen=40, seed=7)
        assert found.tolist() == published_document_sampling(tokenizer, DOCUMENTS, 12, 40, 7)
        assert [entry.name for entry in tmp_path.iterdir()] == [name]

    def test_seeds_differ(self, tokenizer: Any, tmp_path: Path) -> None:
        path = str(write_json_lines(DOCUMENTS, tmp_path / "docs.jsonl"))
        one, other = (calibration_tokens(path, tokenizer, nsamples=8, seqlen=40, seed=seed) for seed in (0, 1))
        assert not torch.equal(one, other)

    def test_document_of_exactly_seqlen_is_too_short(self, tokenizer: Any, tmp_path: Path) -> None:
        length = len(ids(tokenizer, DOCUMENTS[0]))
        path = str(write_json_lines([DOCUMENTS[0]], tmp_path / "docs.jsonl"))
        with pytest.raises(InputError, match=f"more than --seqlen {length} tokens, the longest has {length}"):
            calibration_tokens(path, tokenizer, nsamples=1, seqlen=length, seed=0)
        one_less = calibration_tokens(path, tokenizer, nsamples=1, seqlen=length - 1, seed=0)
        assert one_less.tolist() == [ids(tokenizer, DOCUMENTS[0])[: length - 1]]

    def test_wide_characters_keep_their_documents_apart(self, tokenizer: Any, tmp_path: Path) -> None:
        documents = ["é漢字🙂 " * 20, "plain " * 20]
        path = str(write_json_lines(documents, tmp_path / "docs.jsonl"))
        found = calibration_tokens(path, tokenizer, nsamples=6, seqlen=10, seed=0)
        assert found.tolist() == published_document_sampling(tokenizer, documents, 6, 10, 0)

    def test_text_shorter_than_seqlen(self, tokenizer: Any, tmp_path: Path) -> None:
        path = tmp_path / "short.txt"
        path.write_text(story(1, 5))
        count = len(ids(tokenizer, story(1, 5)))
        with pytest.raises(InputError, match=f"short.txt holds {count} tokens"):
            calibration_tokens(str(path), tokenizer, nsamples=1, seqlen=count, seed=0)

    def test_counts_below_one(self, tokenizer: Any) -> None:
        with pytest.raises(OptionError, match="--nsamples 0"):
            calibration_tokens("x.txt", tokenizer, nsamples=0, seqlen=8, seed=0)


class TestLocalEvaluation:
    def test_text_is_cut_into_consecutive_windows(self, tokenizer: Any, tmp_path: Path) -> None:
        path = tmp_path / "test.txt"
        path.write_text(story(2, 300))
        tokens = ids(tokenizer, story(2, 300))
        found = evaluation_windows(str(path), tokenizer, seqlen=64)
        assert found.tokens == len(tokens)
        assert found.dataset == str(path)
        assert found.windows.shape == (len(tokens) // 64, 64)
        assert found.windows.flatten().tolist() == tokens[: len(tokens) // 64 * 64]

    def test_max_windows_takes_the_first(self, tokenizer: Any, tmp_path: Path) -> None:
        path = tmp_path / "test.txt"
        path.write_text(story(2, 300))
        whole = evaluation_windows(str(path), tokenizer, seqlen=16)
        head = evaluation_windows(str(path), tokenizer, seqlen=16, max_windows=2)
        assert torch.equal(head.windows, whole.windows[:2])
        assert head.tokens == whole.tokens

    def test_line_ends_of_any_system_are_newlines(self, tokenizer: Any, tmp_path: Path) -> None:
        (tmp_path / "unix.txt").write_bytes(b"one\n\n two = \n\n\n three" * 9)
        (tmp_path / "windows.txt").write_bytes(b"one\r\n\r\n two = \r\n\r\n\r\n three" * 9)
        unix, windows = (
            evaluation_windows(str(tmp_path / name), tokenizer, seqlen=8) for name in ("unix.txt", "windows.txt")
        )
        assert torch.equal(unix.windows, windows.windows)

    @pytest.mark.parametrize("name", ["docs.jsonl.gz", "docs.parquet"])
    def test_documents_are_joined_by_spaces(self, tokenizer: Any, tmp_path: Path, name: str) -> None:
        write = write_parquet if name.endswith("parquet") else write_json_lines
        path = write(DOCUMENTS, tmp_path / name)
        tokens = ids(tokenizer, " ".join(DOCUMENTS))
        found = evaluation_windows(str(path), tokenizer, seqlen=32)
        assert found.windows.flatten().tolist() == tokens[: len(tokens) // 32 * 32]

    def test_text_shorter_than_a_window(self, tokenizer: Any, tmp_path: Path) -> None:
        path = tmp_path / "short.txt"
        path.write_text("one two")
        with pytest.raises(InputError, match=r"short.txt holds \d+ tokens, fewer than one window"):
            evaluation_windows(str(path), tokenizer, seqlen=64)

    @pytest.mark.parametrize(
        ("options", "message"), [({"seqlen": 1}, "--seqlen 1"), ({"seqlen": 8, "max_windows": 0}, "--max-windows 0")]
    )
    def test_nothing_to_measure(self, tokenizer: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            evaluation_windows("x.txt", tokenizer, **options)


class TestUnusableSources:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("bad.jsonl", b'{"text": "a"}\n{"text": b}\n', "line 2 of .*bad.jsonl is not JSON"),
            ("other.jsonl", b'{"content": "a"}\n', "line 1 of .*other.jsonl is no JSON object with a `text`"),
            ("null.jsonl", b'{"text": null}\n', "line 1 of .*null.jsonl is no JSON object with a `text`"),
            ("array.json", b'[{"text": "a"}]', "line 1 of .*array.json is no JSON object"),
            ("empty.jsonl", b"\n\n", "empty.jsonl holds no document"),
            ("plain.json.gz", b'{"text": "a"}', "plain.json.gz is damaged"),
            ("cut.json.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-12], "cut.json.gz is damaged"),
            ("latin.jsonl", '{"text": "é"}'.encode("latin-1"), "latin.jsonl is damaged"),
            ("latin.txt", "é".encode("latin-1"), "latin.txt cannot be read as UTF-8"),
            ("cut.parquet", b"PAR1 and no more", "cut.parquet is no whole parquet file"),
        ],
    )
    def test_damaged_file(self, tokenizer: Any, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            calibration_tokens(str(tmp_path / name), tokenizer, nsamples=1, seqlen=4, seed=0)
        with pytest.raises(InputError, match=message):
            evaluation_windows(str(tmp_path / name), tokenizer, seqlen=4)

    def test_parquet_without_text(self, tokenizer: Any, tmp_path: Path) -> None:
        path = str(write_parquet(DOCUMENTS, tmp_path / "a.parquet", field="content"))
        with pytest.raises(InputError, match="no column `text`, only id, content"):
            evaluation_windows(path, tokenizer, seqlen=4)

    def test_parquet_of_other_values(self, tokenizer: Any, tmp_path: Path) -> None:
        pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
        with pytest.raises(InputError, match="holds 1 where text is needed"):
            evaluation_windows(str(tmp_path / "a.parquet"), tokenizer, seqlen=4)

    def test_missing_file(self, tokenizer: Any, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"there is no file .*none\.json\.gz"):
            calibration_tokens(str(tmp_path / "none.json.gz"), tokenizer, nsamples=1, seqlen=4, seed=0)

    def test_misspelt_name(self, tokenizer: Any) -> None:
        with pytest.raises(OptionError, match=r"'wikitext' .* did you mean wikitext2\?"):
            evaluation_windows("wikitext", tokenizer, seqlen=4)

    @pytest.mark.parametrize("dataset", ["hf:", "hf::config", "notes.csv"])
    def test_unknown_form(self, tokenizer: Any, dataset: str) -> None:
        with pytest.raises(OptionError, match="hf:NAME"):
            calibration_tokens(dataset, tokenizer, nsamples=1, seqlen=4, seed=0)


class TestHub:
    """The loading code itself, on directories laid out as the hub's repositories are."""

    @pytest.mark.parametrize(
        ("dataset", "local_form"),
        [("c4", r"c4-train\.\*\.json\.gz"), ("wikitext2", r"raw lines in a \.txt"), ("ptb", r"in a \.txt")],
    )
    def test_unreachable_hub_names_the_local_form(self, tokenizer: Any, dataset: str, local_form: str) -> None:
        """Complaint 4."""
        with pytest.raises(HubError, match=rf"could not be fetched .*{local_form}.*--tokens"):
            calibration_tokens(dataset, tokenizer, nsamples=1, seqlen=4, seed=0)
        with pytest.raises(HubError, match=local_form):
            evaluation_windows(dataset, tokenizer, seqlen=4)

    def test_c4(self, tokenizer: Any, hub: Path) -> None:
        folder = hub / "allenai" / "c4" / "en"
        write_json_lines(DOCUMENTS, folder / "c4-train.00000-of-01024.json.gz")
        validation = [story(seed, 3) for seed in range(1200)]
        write_json_lines(validation, folder / "c4-validation.00000-of-00008.json.gz")
        found = calibration_tokens("c4", tokenizer, nsamples=6, seqlen=40, seed=5)
        assert found.tolist() == published_document_sampling(tokenizer, DOCUMENTS, 6, 40, 5)
        tokens = ids(tokenizer, " ".join(validation[:1100]))
        short = evaluation_windows("c4", tokenizer, seqlen=4)
        assert short.tokens == 256 * 4
        assert short.windows.flatten().tolist() == tokens[: 256 * 4]
        assert evaluation_windows("c4", tokenizer, seqlen=512).tokens == len(tokens)

    def test_wikitext2(self, tokenizer: Any, hub: Path) -> None:
        folder = hub / "Salesforce" / "wikitext"
        card = "\n".join(
            [
                "---",
                "configs:",
                "- config_name: wikitext-2-raw-v1",
                "  data_files:",
                "  - split: test",
                "    path: wikitext-2-raw-v1/test-*",
                "  - split: train",
                "    path: wikitext-2-raw-v1/train-*",
                "---",
            ]
        )
        lines = ["", " = A title = \n", "", f" {story(4, 60)} \n", ""]
        for split in ("train", "test"):
            write_parquet(lines, folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet")
        (folder / "README.md").write_text(card)
        found = calibration_tokens("wikitext2", tokenizer, nsamples=5, seqlen=16, seed=2)
        assert found.tolist() == published_text_sampling(ids(tokenizer, " ".join(lines)), 5, 16, 2)
        measured = evaluation_windows("wikitext2", tokenizer, seqlen=16)
        assert measured.tokens == len(ids(tokenizer, "\n\n".join(lines)))

    def test_ptb(self, tokenizer: Any, hub: Path) -> None:
        folder = hub / "ptb-text-only" / "ptb_text_only" / "penn_treebank"
        sentences = [story(seed, 9) for seed in range(30)]
        for split in ("train", "test"):
            write_parquet(sentences, folder / split / "0000.parquet", field="sentence")
        tokens = ids(tokenizer, " ".join(sentences))
        found = calibration_tokens("ptb", tokenizer, nsamples=5, seqlen=16, seed=2)
        assert found.tolist() == published_text_sampling(tokens, 5, 16, 2)
        assert evaluation_windows("ptb", tokenizer, seqlen=16).tokens == len(tokens)

    def test_named_data_set(self, tokenizer: Any, hub: Path) -> None:
        write_json_lines(DOCUMENTS, hub / "some" / "texts" / "train.jsonl")
        write_json_lines(DOCUMENTS[:9], hub / "some" / "texts" / "validation.jsonl")
        found = calibration_tokens("hf:some/texts", tokenizer, nsamples=4, seqlen=40, seed=1)
        assert found.tolist() == published_document_sampling(tokenizer, DOCUMENTS, 4, 40, 1)
        measured = evaluation_windows("hf:some/texts::validation", tokenizer, seqlen=16)
        assert measured.tokens == len(ids(tokenizer, " ".join(DOCUMENTS[:9])))
        sliced = evaluation_windows("hf:some/texts::train[:5]", tokenizer, seqlen=16)
        assert sliced.tokens == len(ids(tokenizer, " ".join(DOCUMENTS[:5])))

    def test_named_data_set_without_the_split(self, tokenizer: Any, hub: Path) -> None:
        write_json_lines(DOCUMENTS, hub / "some" / "texts" / "train.jsonl")
        with pytest.raises(InputError, match="some/texts has no usable split 'test'"):
            evaluation_windows("hf:some/texts", tokenizer, seqlen=16)

    def test_named_data_set_without_text(self, tokenizer: Any, hub: Path) -> None:
        write_json_lines(DOCUMENTS, hub / "some" / "rows" / "train.jsonl", field="body")
        with pytest.raises(InputError, match="no column `text`, only body, url"):
            calibration_tokens("hf:some/rows", tokenizer, nsamples=1, seqlen=4, seed=0)


class TestReadTokens:
    def save(self, path: Path, tokens: torch.Tensor, name: str = "tokens") -> Path:
        save_file({name: tokens}, path)
        return path

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
    def test_integer_types(self, tmp_path: Path, dtype: torch.dtype) -> None:
        expected = torch.arange(12, dtype=dtype).view(3, 4)
        found = read_tokens(self.save(tmp_path / "t.safetensors", expected), vocab_size=12)
        assert found.dtype == torch.int32
        assert found.tolist() == expected.tolist()

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (torch.zeros(2, 4), r"torch.float32 of shape \[2, 4\]"),
            (torch.zeros(8, dtype=torch.int32), r"torch.int32 of shape \[8\]"),
            (torch.zeros(0, 4, dtype=torch.int32), r"shape \[0, 4\]"),
            (torch.tensor([[0, -1]]), r"holds the id -1, outside 0\.\.2147483647"),
            (torch.tensor([[0, 2**31]]), r"holds the id 2147483648"),
        ],
    )
    def test_unusable(self, tmp_path: Path, tokens: torch.Tensor, message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_tokens(self.save(tmp_path / "t.safetensors", tokens))

    def test_outside_the_vocabulary(self, tmp_path: Path) -> None:
        path = self.save(tmp_path / "t.safetensors", torch.tensor([[1, 12]]))
        with pytest.raises(InputError, match=r"holds the id 12, outside 0\.\.11; give samples made with this"):
            read_tokens(path, vocab_size=12)

    def test_no_tokens(self, tmp_path: Path) -> None:
        path = self.save(tmp_path / "t.safetensors", torch.zeros(2), name="weights")
        with pytest.raises(InputError, match="holds weights but no tensor `tokens`"):
            read_tokens(path)


class TestTokenizer:
    def test_missing(self, model_copy: Path) -> None:
        (model_copy / "tokenizer.json").unlink()
        with pytest.raises(InputError, match=r"the tokenizer in .* is missing.*--tokens"):
            load_tokenizer(model_copy)

    def test_damaged(self, model_copy: Path) -> None:
        whole = (model_copy / "tokenizer.json").read_bytes()
        (model_copy / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=r"the tokenizer in .* is missing or not usable"):
            load_tokenizer(model_copy)

    def test_own_code_needs_trust(self, tmp_path: Path) -> None:
        custom = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(custom))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "of-its-own"}))
        with pytest.raises(InputError, match="--trust-remote-code"):
            load_tokenizer(tmp_path)


class TestDemoTexts:
    def test_every_topic_is_in_its_half(self, tmp_path: Path) -> None:
        texts = demo.write_texts(tmp_path)
        assert texts.calibration.read_text() == demo.calibration_text()
        assert texts.measurement.read_text() == demo.measurement_text()
        for name, text in topics.items():
            held_back = hashlib.md5(name.encode()).hexdigest().startswith(("0", "1", "2"))
            assert text in (demo.measurement_text() if held_back else demo.calibration_text())
        joints = 2 * (len(topics) - 2)
        both = len(demo.calibration_text()) + len(demo.measurement_text())
        assert both == sum(len(text) for text in topics.values()) + joints

    def test_enough_text_to_measure_on(self, tokenizer: Any) -> None:
        assert len(ids(tokenizer, demo.calibration_text())) > 100_000
        assert len(ids(tokenizer, demo.measurement_text())) > 10_000
