"""A tokenizer as one run uses it: where BOS stands, how documents end, how conversations become text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trimcli.errors import InputError, OptionError, first_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "each", "once", "none"]


@dataclass(frozen=True)
class Encoder:
    """Text to ids.

    bos: `each`, at the head of every window and nowhere else; `once`, as the tokenizer (or, of conversations, the chat
    template) has it, at the head of a text; `none`, nowhere. chat: documents are conversations. templated: whether the
    chat template writes the BOS.
    """

    tokenizer: "PreTrainedTokenizerBase"
    bos: Literal["each", "once", "none"]
    chat: bool = False
    templated: bool = False

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", bos: Bos = "auto", *, chat: bool = False) -> "Encoder":
        """The encoder of these options; `auto` is `each` where the tokenizer or the template sets a BOS of itself.

        Raises OptionError where the tokenizer lacks what they need, a BOS or a chat template; InputError for a template
        that fails.
        """
        if chat and not getattr(tokenizer, "chat_template", None):
            lacks = f"--chat needs a chat template, and the tokenizer in {tokenizer.name_or_path} has none"
            raise OptionError(f"{lacks}; take the instruction-tuned model's, or give records with a `text`.")
        if bos == "each" and tokenizer.bos_token_id is None:
            lacks = f"--bos each needs a BOS token, and the tokenizer in {tokenizer.name_or_path} has none"
            raise OptionError(f"{lacks}; leave --bos out.")
        templated = False
        if chat and tokenizer.bos_token:
            probe = [{"role": "user", "content": "a"}]
            templated = _rendered(tokenizer, probe, "a short message").startswith(tokenizer.bos_token)
        if bos == "auto":
            bos = "each" if templated or _sets_bos(tokenizer) else "once"
        return cls(tokenizer, bos, chat, templated)

    @property
    def head(self) -> list[int]:
        """What every window begins with."""
        return [int(self.tokenizer.bos_token_id)] if self.bos == "each" else []

    def headed(self, windows: "Tensor") -> "Tensor":
        """The windows [n, l] behind `head`: [n, len(head) + l]."""
        import torch

        return torch.cat([windows.new_tensor(self.head).expand(len(windows), -1), windows], dim=1)

    def document(self) -> dict[str, Any]:
        """What the ids of a text depend on beside the vocabulary, as JSON."""
        return {"bos": self.bos, "chat_template": self.tokenizer.chat_template if self.chat else None}

    def encode(self, text: str) -> list[int]:
        """The ids of a text: under `once` with the special tokens of its own, else without any."""
        ids = _ids(self.tokenizer, text, special=self.bos == "once")
        bos = self.tokenizer.bos_token_id
        return [int(bos), *ids] if self.templated and self.bos == "once" and ids[:1] != [bos] else ids

    def closed(self, text: str) -> list[int]:
        """The ids of a document that another one follows: they end in EOS, once. Of a blank one, none."""
        if not text.strip():
            return []
        ids, eos = self.encode(text), self.tokenizer.eos_token_id
        # Templates close a conversation with EOS, some of them with a line end after it.
        ends = ids[-1] == eos or (self.chat and text.rstrip().endswith(str(self.tokenizer.eos_token)))
        return ids if ends else [*ids, int(eos)]

    def render(self, messages: Any, where: str) -> str:
        """A conversation by the chat template, but for a BOS at its head, which is the encoder's to set.

        where: what errors call it. Raises InputError for what is no list of messages or makes the template fail.
        """
        given = messages if isinstance(messages, list) else []
        if not given or not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in given):
            raise InputError(f"`messages` of {where} is no list of objects with `role` and `content`; mend it.")
        # A parquet column gives every message the fields of all.
        plain = [{key: part for key, part in one.items() if part is not None or key == "content"} for one in given]
        return _rendered(self.tokenizer, plain, where).removeprefix(self.tokenizer.bos_token or "")


def _rendered(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], where: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as problem:
        # A template is a program of its model's, and fails in its own way.
        failed = f"the chat template of {tokenizer.name_or_path} fails on {where} ({first_line(problem)})"
        raise InputError(f"{failed}; mend such records or leave them out.") from None


def _sets_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer begins a text with its BOS."""
    plain = _ids(tokenizer, "a", special=False)
    # What "a" itself becomes may be the same token: some tokenizers have one for BOS and for what they do not know.
    return _ids(tokenizer, "a", special=True)[: 1 + len(plain)] == [tokenizer.bos_token_id, *plain]


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, *, special: bool) -> list[int]:
    """One call, without the tokenizer's warning about length."""
    found = tokenizer(
        text, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return list(found["input_ids"])
