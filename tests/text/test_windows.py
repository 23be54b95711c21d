"""Windows with a BOS, packed samples and conversations, each against a slow construction of its own."""

import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small_tokenizers import BOS, EOS, TEMPLATE, WORDS, word_ids, word_tokenizer
from tests.text.test_stdin import stream
from trimcli.errors import InputError, OptionError
from trimcli.text.encoding import Bos
from trimcli.text.tokens import calibration_tokens, evaluation_windows

SEQLEN = 8


def story(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def json_lines(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def heads(bos: str, sets_bos: bool) -> tuple[list[int], list[int]]:
    """What a window begins with, and what a text does."""
    how = bos if bos != "auto" else "each" if sets_bos else "once"
    return [BOS] if how == "each" else [], [BOS] if how == "once" and sets_bos else []


MODES = [(bos, sets) for bos in ("auto", "each", "once", "none") for sets in (True, False)]


@pytest.mark.parametrize(("bos", "sets_bos"), MODES)
def test_evaluation_windows(bos: Any, sets_bos: bool, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(story(1, 101))
    tokenizer = word_tokenizer(sets="<s> $A" if sets_bos else "$A")
    found = evaluation_windows(str(tmp_path / "text.txt"), tokenizer, seqlen=SEQLEN, bos=bos)
    head, before = heads(bos, sets_bos)
    left, expected = before + word_ids(story(1, 101)), []
    tokens = len(left)
    while len(head) + len(left) >= SEQLEN:
        window = list(head)
        while len(window) < SEQLEN:
            window.append(left.pop(0))
        expected.append(window)
    assert found.windows.tolist() == expected
    assert (found.tokens, found.bos) == (tokens, bos if bos != "auto" else "each" if sets_bos else "once")
    assert sum(token == BOS for window in expected for token in window) == (len(expected) if head else len(before))


def test_as_many_windows_of_c4_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "allenai" / "c4" / "en"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"text": story(seed, 3)}) + "\n" for seed in range(1100))
    (folder / "c4-validation.00000-of-00008.json.gz").write_bytes(gzip.compress(lines.encode()))
    monkeypatch.chdir(tmp_path)
    modes: tuple[Bos, ...] = ("each", "once")
    for bos in modes:
        found = evaluation_windows("c4", word_tokenizer(), seqlen=SEQLEN, bos=bos)
        assert found.windows.shape == (256, SEQLEN)


@pytest.mark.parametrize(("bos", "sets_bos"), MODES)
def test_samples_of_one_text(bos: Any, sets_bos: bool, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(story(1, 60))
    tokenizer = word_tokenizer(sets="<s> $A" if sets_bos else "$A")
    found = calibration_tokens(str(tmp_path / "text.txt"), tokenizer, nsamples=20, seqlen=SEQLEN, seed=3, bos=bos)
    head, before = heads(bos, sets_bos)
    tokens, room = before + word_ids(story(1, 60)), SEQLEN - len(head)
    rng = random.Random(3)
    expected: list[list[int]] = []
    for _ in range(20):
        start = rng.randint(0, len(tokens) - room - 1)
        expected.append(head + tokens[start : start + room])
    assert found.tolist() == expected


@pytest.mark.parametrize(("bos", "sets_bos"), MODES)
def test_samples_of_documents(bos: Any, sets_bos: bool, tmp_path: Path) -> None:
    documents = [story(seed, 30 if seed % 4 == 0 else 5) for seed in range(24)]
    path = json_lines(tmp_path / "docs.jsonl", *({"text": text} for text in documents))
    tokenizer = word_tokenizer(sets="<s> $A" if sets_bos else "$A")
    found = calibration_tokens(path, tokenizer, nsamples=20, seqlen=SEQLEN, seed=3, bos=bos)
    head, before = heads(bos, sets_bos)
    room, rng = SEQLEN - len(head), random.Random(3)
    expected: list[list[int]] = []
    while len(expected) < 20:
        tokens = before + word_ids(documents[rng.randint(0, len(documents) - 1)])
        if len(tokens) > room:
            start = rng.randint(0, len(tokens) - room - 1)
            expected.append(head + tokens[start : start + room])
    assert found.tolist() == expected


def test_a_document_that_seqlen_tokens_long_is_long_enough_behind_bos(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "docs.jsonl", {"text": story(1, SEQLEN)})
    found = calibration_tokens(path, word_tokenizer(), nsamples=1, seqlen=SEQLEN, seed=0, bos="each")
    assert found.tolist() == [[BOS, *word_ids(story(1, SEQLEN))[: SEQLEN - 1]]]
    too_long = (
        r"no document of .* has more than 8 tokens \(--seqlen less BOS\), the longest has 8; join them with --pack"
    )
    with pytest.raises(InputError, match=too_long):
        calibration_tokens(path, word_tokenizer(), nsamples=1, seqlen=SEQLEN + 1, seed=0, bos="each")


# --- packed ----------------------------------------------------------------------------------------------


def packed(documents: Sequence[list[int]], head: list[int], nsamples: int, seed: int) -> list[list[int]]:
    """Token by token: take the next document of a shuffled pass when the last one has run out."""
    rng = random.Random(seed)
    waiting: list[int] = []
    tokens: list[int] = []
    samples: list[list[int]] = []
    while len(samples) < nsamples:
        sample = list(head)
        while len(sample) < SEQLEN:
            if not tokens:
                if not waiting:
                    waiting = rng.sample(range(len(documents)), len(documents))
                tokens = [*documents[waiting.pop(0)], EOS]
            sample.append(tokens.pop(0))
        samples.append(sample)
    return samples


@pytest.mark.parametrize(("bos", "sets_bos"), MODES)
def test_short_documents_are_joined_by_eos(bos: Any, sets_bos: bool, tmp_path: Path) -> None:
    """None of them is as long as a sample, so that without --pack nothing could be drawn."""
    documents = [story(seed, 1 + seed % 5) for seed in range(17)]
    path = json_lines(tmp_path / "docs.jsonl", *({"text": text} for text in documents))
    tokenizer = word_tokenizer(sets="<s> $A" if sets_bos else "$A")
    how: Any = {"nsamples": 25, "seqlen": SEQLEN, "bos": bos}
    with pytest.raises(InputError, match="join them with --pack"):
        calibration_tokens(path, tokenizer, seed=5, **how)
    found = calibration_tokens(path, tokenizer, seed=5, pack=True, **how)
    head, before = heads(bos, sets_bos)
    ids = [before + word_ids(text) for text in documents]
    assert sum(len(one) + 1 for one in ids) < 25 * (SEQLEN - 1), "more than one pass"
    assert found.tolist() == packed(ids, head, 25, 5)
    assert calibration_tokens(path, tokenizer, seed=6, pack=True, **how).tolist() != found.tolist()


def test_no_document_is_taken_again_before_all_were(tmp_path: Path) -> None:
    documents = [f"w{number}" for number in range(40)]
    path = json_lines(tmp_path / "docs.jsonl", *({"text": text} for text in documents))
    found = calibration_tokens(path, word_tokenizer(), nsamples=10, seqlen=SEQLEN, seed=0, pack=True, bos="none")
    words = found.flatten()[::2].tolist()
    assert sorted(words) == sorted(word_ids(" ".join(documents)))
    assert words != word_ids(" ".join(documents))
    assert set(found.flatten()[1::2].tolist()) == {EOS}


def test_a_document_longer_than_a_sample_goes_on_in_the_next(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "docs.jsonl", {"text": story(1, 20)}, {"text": ""}, {"text": " \n"})
    found = calibration_tokens(path, word_tokenizer(), nsamples=3, seqlen=SEQLEN, seed=0, pack=True, bos="each")
    assert found[:, 0].tolist() == [BOS] * 3
    assert found[:, 1:].flatten().tolist() == [*word_ids(story(1, 20)), EOS]


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(story(1, 50))
    how: Any = {"nsamples": 1, "seqlen": SEQLEN, "seed": 0, "pack": True}
    with pytest.raises(OptionError, match=r"--pack joins documents, and .*one\.txt is one text; leave --pack out"):
        calibration_tokens(str(tmp_path / "one.txt"), word_tokenizer(), **how)
    path = json_lines(tmp_path / "docs.jsonl", {"text": "w1"})
    with pytest.raises(OptionError, match=r"--pack joins documents by EOS, and the tokenizer in .* has none"):
        calibration_tokens(path, word_tokenizer(eos_token=None), **how)
    blank = json_lines(tmp_path / "blank.jsonl", {"text": ""}, {"text": " "})
    with pytest.raises(InputError, match=r"every document of .*blank\.jsonl is blank"):
        calibration_tokens(blank, word_tokenizer(), **how)


# --- conversations ---------------------------------------------------------------------------------------

TALKS = [
    [{"role": "user", "content": story(seed, 4)}, {"role": "assistant", "content": story(seed + 50, 3 + seed % 3)}]
    for seed in range(12)
]


def said(talk: list[dict[str, str]]) -> list[int]:
    """What the template makes of it, but for BOS."""
    user, assistant = talk
    return word_ids(f"user {user['content']} assistant {assistant['content']} </s>")


def lines_of_talks(folder: Path) -> str:
    return json_lines(folder / "talks.jsonl", *({"messages": talk} for talk in TALKS))


def table_of_talks(folder: Path) -> str:
    # Every message has every field of any.
    rows = [[{**message, "name": None} for message in talk] for talk in TALKS]
    pq.write_table(pa.table({"id": list(range(len(rows))), "messages": rows}), folder / "talks.parquet")
    return str(folder / "talks.parquet")


def hub_of_talks(folder: Path) -> str:
    (folder / "some" / "talks").mkdir(parents=True)
    for split in ("train", "test"):
        json_lines(folder / "some" / "talks" / f"{split}.jsonl", *({"messages": talk} for talk in TALKS))
    return "hf:some/talks"


FORMS = [lines_of_talks, table_of_talks, hub_of_talks]


@pytest.fixture(params=FORMS, ids=lambda form: form.__name__)
def talks(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    form: Callable[[Path], str] = request.param
    return form(tmp_path)


@pytest.mark.parametrize("sets", ["<s> $A", "$A"])
@pytest.mark.parametrize(("bos", "head", "before"), [("auto", [BOS], []), ("once", [], [BOS]), ("none", [], [])])
def test_conversations_are_rendered(bos: Any, head: list[int], before: list[int], sets: str, talks: str) -> None:
    tokenizer = word_tokenizer(sets=sets, template=TEMPLATE)
    how: Any = {"seqlen": SEQLEN, "bos": bos, "chat": True}
    found = calibration_tokens(talks, tokenizer, nsamples=12, seed=4, pack=True, **how)
    assert found.tolist() == packed([before + said(talk)[:-1] for talk in TALKS], head, 12, 4)
    drawn = calibration_tokens(talks, tokenizer, nsamples=12, seed=4, **how)
    rng, room = random.Random(4), SEQLEN - len(head)
    expected: list[list[int]] = []
    while len(expected) < 12:
        tokens = before + said(TALKS[rng.randint(0, len(TALKS) - 1)])
        if len(tokens) > room:
            start = rng.randint(0, len(tokens) - room - 1)
            expected.append(head + tokens[start : start + room])
    assert drawn.tolist() == expected
    measured = evaluation_windows(talks, tokenizer, **how)
    text = before + [token for talk in TALKS for token in said(talk)]
    assert measured.tokens == len(text)
    assert measured.windows[:, len(head) :].flatten().tolist() == text[: len(text) // room * room]


def test_conversations_need_chat(talks: str) -> None:
    tokenizer = word_tokenizer(template=TEMPLATE)
    for read in (
        lambda: calibration_tokens(talks, tokenizer, nsamples=1, seqlen=4, seed=0),
        lambda: evaluation_windows(talks, tokenizer, seqlen=4),
    ):
        with pytest.raises(InputError, match="has `messages` and no `text`; give --chat to render them"):
            read()


def test_chat_needs_conversations(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(template=TEMPLATE)
    (tmp_path / "one.txt").write_text(story(1, 50))
    pq.write_table(pa.table({"text": ["w1"]}), tmp_path / "texts.parquet")
    for dataset, kind, message in (
        (
            json_lines(tmp_path / "docs.jsonl", {"text": "w1"}),
            InputError,
            r"line 1 of .* has no `messages` .*--chat out",
        ),
        (str(tmp_path / "texts.parquet"), InputError, r"texts\.parquet has no `messages` that --chat could render"),
        (str(tmp_path / "one.txt"), InputError, r"one\.txt is plain text; leave --chat out"),
        ("c4", OptionError, "--chat renders `messages`, and c4 has none; leave --chat out"),
    ):
        with pytest.raises(kind, match=message):
            calibration_tokens(dataset, tokenizer, nsamples=1, seqlen=4, seed=0, chat=True)
        with pytest.raises(kind, match=message):
            evaluation_windows(dataset, tokenizer, seqlen=4, chat=True)


def test_a_record_with_both_is_read_as_asked(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(template=TEMPLATE)
    path = json_lines(tmp_path / "both.jsonl", {"text": story(1, 9), "messages": TALKS[0]})
    plain = evaluation_windows(path, tokenizer, seqlen=4, bos="none")
    assert plain.windows.flatten().tolist() == word_ids(story(1, 9))[:8]
    rendered = evaluation_windows(path, tokenizer, seqlen=4, bos="none", chat=True)
    assert rendered.tokens == len(said(TALKS[0]))


# --- standard input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"w1 w2 w3\nw4", "w1 w2 w3 w4"),
        (b'{"text": "w1 w2"}\n{"text": "w3 w4"}\n', "w1 w2 w3 w4"),
        (b'\xef\xbb\xbf\n \t\n {"text": "w1 w2"}\n{"text": "w3 w4"}\n', "w1 w2 w3 w4"),
        (b"[w1 w2 { w3", "[ w1 w2 { w3"),
    ],
)
def test_standard_input_is_text_or_json_lines(content: bytes, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", stream(content))
    for _ in range(2):  # a sweep asks for it more than once
        found = evaluation_windows("-", word_tokenizer(), seqlen=3, bos="none")
        assert found.windows.flatten().tolist() == word_ids(text)[: found.tokens // 3 * 3]
        assert (found.tokens, found.dataset) == (len(word_ids(text)), "-")


def test_documents_of_standard_input_are_packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    documents = [story(seed, 3) for seed in range(9)]
    path = json_lines(tmp_path / "docs.jsonl", *({"text": text} for text in documents))
    how: Any = {"nsamples": 4, "seqlen": SEQLEN, "seed": 2, "pack": True}
    monkeypatch.setattr("sys.stdin", stream(Path(path).read_bytes()))
    assert calibration_tokens("-", word_tokenizer(), **how).equal(calibration_tokens(path, word_tokenizer(), **how))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "standard input holds 0 tokens"),
        (b'{"text": "w1"}\n{no', "line 2 of standard input is not JSON"),
        (b'{"body": "w1"}\n', "line 1 of standard input is no JSON object with a `text`"),
        (b"\xff\xfe", "standard input cannot be read as UTF-8"),
    ],
)
def test_what_standard_input_may_not_be(content: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", stream(content))
    with pytest.raises(InputError, match=message):
        evaluation_windows("-", word_tokenizer(), seqlen=3, bos="none")
