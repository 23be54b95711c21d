"""Where BOS stands, by the tokenizer, the chat template and the option."""

from typing import Any

import pytest

from tests.small_tokenizers import BOS, EOS, TEMPLATE, UNK, WITHOUT_BOS, word_ids, word_tokenizer
from trimcli.errors import InputError, OptionError
from trimcli.text.encoding import Encoder
from trimcli.text.tokens import load_tokenizer

TALK = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
SAID = [*word_ids("user w1 w2 assistant w3"), EOS]


@pytest.mark.parametrize(
    ("sets", "template", "chat", "expected"),
    [
        ("<s> $A", None, False, "each"),
        ("<s> $A </s>", None, False, "each"),
        ("$A", None, False, "once"),
        ("$A </s>", None, False, "once"),
        ("</s> $A", None, False, "once"),
        ("$A", TEMPLATE, False, "once"),
        ("$A", TEMPLATE, True, "each"),
        ("$A", WITHOUT_BOS, True, "once"),
        ("<s> $A", WITHOUT_BOS, True, "each"),
    ],
)
def test_auto_follows_the_tokenizer(sets: str, template: str | None, chat: bool, expected: str) -> None:
    tokenizer = word_tokenizer(sets=sets, template=template)
    assert Encoder.of(tokenizer, chat=chat).bos == expected
    for given in ("each", "once", "none"):
        assert Encoder.of(tokenizer, given, chat=chat).bos == given


def test_a_bos_that_is_also_the_unknown_word_is_no_bos() -> None:
    assert word_tokenizer(sets="$A", bos_token="<unk>")("a").input_ids == [UNK]
    assert Encoder.of(word_tokenizer(sets="$A", bos_token="<unk>")).bos == "once"


def test_the_embedded_tokenizer_sets_none(nano_qwen2: Any) -> None:
    assert Encoder.of(load_tokenizer(nano_qwen2)).bos == "once"


@pytest.mark.parametrize(("bos", "head", "ids"), [("each", [BOS], []), ("once", [], [BOS]), ("none", [], [])])
@pytest.mark.parametrize("sets", ["<s> $A", "$A"])
def test_bos_stands_once_before_a_conversation(bos: Any, head: list[int], ids: list[int], sets: str) -> None:
    """Whether the tokenizer, the template or both write it."""
    encoder = Encoder.of(word_tokenizer(sets=sets, template=TEMPLATE), bos, chat=True)
    text = encoder.render(TALK, "line 1")
    assert text == "user w1 w2 assistant w3</s> "
    assert encoder.head == head
    assert encoder.encode(text) == ids + SAID
    assert encoder.closed(text) == ids + SAID, "closed by the template already"


def test_a_template_without_bos_leaves_it_to_the_tokenizer() -> None:
    talk = Encoder.of(word_tokenizer(template=WITHOUT_BOS), "once", chat=True)
    assert talk.encode(talk.render(TALK, "line 1")) == [BOS, *SAID]
    bare = Encoder.of(word_tokenizer(sets="$A", template=WITHOUT_BOS), "once", chat=True)
    assert bare.encode(bare.render(TALK, "line 1")) == SAID


@pytest.mark.parametrize("sets", ["<s> $A", "$A", "<s> $A </s>"])
def test_a_document_is_closed_by_eos_once(sets: str) -> None:
    tokenizer = word_tokenizer(sets=sets)
    before = [BOS] if sets.startswith("<s>") else []
    assert Encoder.of(tokenizer, "once").closed("w1 w2") == [*before, *word_ids("w1 w2"), EOS]
    for bos in ("each", "none"):
        assert Encoder.of(tokenizer, bos).closed("w1 w2") == [*word_ids("w1 w2"), EOS]
        assert Encoder.of(tokenizer, bos).closed(" \n") == []


def test_what_the_tokenizer_lacks() -> None:
    with pytest.raises(OptionError, match=r"--bos each needs a BOS token, .* has none; leave --bos out"):
        Encoder.of(word_tokenizer(sets="$A", bos_token=None), "each")
    assert Encoder.of(word_tokenizer(sets="$A", bos_token=None)).bos == "once"
    with pytest.raises(OptionError, match=r"--chat needs a chat template, and the tokenizer in .* has none"):
        Encoder.of(word_tokenizer(), chat=True)


@pytest.mark.parametrize(
    "messages", [None, [], "hello", [1], [{"content": "x"}], [{"role": 3, "content": "x"}], {"role": "user"}]
)
def test_what_is_no_conversation(messages: Any) -> None:
    encoder = Encoder.of(word_tokenizer(template=TEMPLATE), chat=True)
    with pytest.raises(InputError, match="`messages` of line 4 of x is no list of objects with `role` and `content`"):
        encoder.render(messages, "line 4 of x")


def test_a_template_that_refuses() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok"
    encoder = Encoder.of(word_tokenizer(template=strict), chat=True)
    with pytest.raises(InputError, match=r"the chat template of .* fails on line 9 \(no system role\); mend such"):
        encoder.render([{"role": "system", "content": "w1"}], "line 9")


def test_fields_that_a_table_adds_are_not_there() -> None:
    template = "{% for m in messages %}{{ 'called' if m.tool_calls is defined else m.content }}{% endfor %}"
    encoder = Encoder.of(word_tokenizer(template=template), chat=True)
    assert encoder.render([{"role": "user", "content": "w1", "tool_calls": None}], "row 1") == "w1"
