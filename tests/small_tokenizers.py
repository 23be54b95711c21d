"""Small tokenizers that put a BOS before a text, with and without a chat template."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

UNK, BOS, EOS = 0, 1, 2
SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = ("user", "assistant", "system", *(f"w{number}" for number in range(50)))
# As many models have it: the template writes BOS, and closes what the assistant says with EOS.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }} {{ message.content }}"
    "{{ eos_token if message.role == 'assistant' }} {% endfor %}"
)
WITHOUT_BOS = TEMPLATE.removeprefix("{{ bos_token }}")


def word_tokenizer(*, sets: str = "<s> $A", template: str | None = None, **special: Any) -> PreTrainedTokenizerFast:
    """A token a word, ids by `word_id`. sets: what it makes of a text $A. special: other special tokens, or None."""
    backend = Tokenizer(WordLevel({word: place for place, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single=sets, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special}
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: token for name, token in names.items() if token is not None}
    )
    found.chat_template = template
    return found


def word_id(word: str) -> int:
    """Straight from the list of words."""
    return (SPECIAL + WORDS).index(word) if word in SPECIAL + WORDS else UNK


def word_ids(text: str) -> list[int]:
    """The ids of a text without what a tokenizer would add."""
    return [word_id(word) for word in text.split()]


def put_bos(model: Path) -> Path:
    """Let the tokenizer of a copy of the embedded model begin every text with its BOS, `<|endoftext|>`, 0."""
    path, config = model / "tokenizer.json", model / "tokenizer_config.json"
    document = json.loads(path.read_text())
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    document["post_processor"]["single"].insert(0, bos)
    document["post_processor"]["special_tokens"] = {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    }
    path.write_text(json.dumps(document))
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
    return model
