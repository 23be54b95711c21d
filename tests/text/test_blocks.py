"""Blocks to train on: consecutive tokens, each once, in random order."""

import json
from pathlib import Path

import pytest
from torch import Tensor

from tests.small_tokenizers import BOS, EOS, TEMPLATE, word_id, word_ids, word_tokenizer
from trimcli.errors import InputError
from trimcli.text.blocks import training_blocks

WORDS = [f"w{number}" for number in range(50)]
PLAIN = word_tokenizer(sets="$A")


def text_file(path: Path, words: list[str]) -> str:
    path.write_text(" ".join(words))
    return str(path)


def lines(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    return str(path)


def blocks(dataset: str, nsamples: int = 100, seqlen: int = 8, seed: int = 0, **how: object) -> Tensor:
    tokenizer = how.pop("tokenizer", PLAIN)
    return training_blocks(dataset, tokenizer, nsamples=nsamples, seqlen=seqlen, seed=seed, **how)  # type: ignore[arg-type]


def test_a_text_is_cut_into_blocks_and_none_twice(tmp_path: Path) -> None:
    found = blocks(text_file(tmp_path / "a.txt", WORDS)).tolist()
    ids = word_ids(" ".join(WORDS))
    assert sorted(found) == sorted(ids[start : start + 8] for start in range(0, 48, 8))
    assert found != sorted(found)
    assert blocks(str(tmp_path / "a.txt")).tolist() == found
    assert blocks(str(tmp_path / "a.txt"), seed=1).tolist() != found
    assert len(blocks(str(tmp_path / "a.txt"), nsamples=3)) == 3


def test_documents_are_joined_each_once(tmp_path: Path) -> None:
    documents = [" ".join(WORDS[start : start + 5]) for start in range(0, 50, 5)]
    found = blocks(lines(tmp_path / "a.jsonl", documents), seqlen=6)
    rows = [[*word_ids(one), EOS] for one in documents]
    assert sorted(found.tolist()) == sorted(rows)
    assert found.tolist() != rows
    assert len(blocks(str(tmp_path / "a.jsonl"), seqlen=6, nsamples=4)) == 4


def test_a_bos_heads_every_block_where_the_tokenizer_sets_one(tmp_path: Path) -> None:
    found = blocks(text_file(tmp_path / "a.txt", WORDS), tokenizer=word_tokenizer())
    assert found[:, 0].tolist() == [BOS] * len(found) == [BOS] * 7
    assert sorted(found[:, 1:].flatten().tolist()) == sorted(word_ids(" ".join(WORDS[:49])))


def test_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}) * 1 + "\n" + json.dumps({"messages": messages}) + "\n")
    found = blocks(str(path), seqlen=3, tokenizer=word_tokenizer(sets="$A", template=TEMPLATE), chat=True, bos="none")
    one = [word_id("user"), word_id("w1"), word_id("w2"), word_id("assistant"), word_id("w3"), EOS]
    assert sorted(found.tolist()) == sorted([one[:3], one[3:]] * 2)


def test_a_text_of_less_than_two_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.txt holds 15 tokens, fewer than two blocks of --seqlen 8, one to"):
        blocks(text_file(tmp_path / "a.txt", WORDS[:15]))
    with pytest.raises(InputError, match=r"b.jsonl holds 4 tokens, fewer than two blocks"):
        blocks(lines(tmp_path / "b.jsonl", ["w1", "w2"]))
