"""A teacher: the divergence of a model's next-token distributions from another one's, over the whole vocabulary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimcli.errors import InputError, MismatchError
from trimcli.files.checkpoint import Checkpoint
from trimcli.methods.divergence import divergence
from trimcli.model.skeleton import Skeleton
from trimcli.text.tokens import load_tokenizer


class Teacher:
    """A loaded model that is asked for its logits. id: what it is called."""

    def __init__(self, model: Any, id: str) -> None:
        self.model, self.id = model, id

    def divergence(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Mean over positions of KL(teacher || student), in nats, a scalar float32.

        logits: the student's, [b, L, vocabulary]. tokens: [b, L]. The last position, after which no token is known, is
        left out, as in the loss beside it.
        """
        with torch.no_grad():
            theirs = self.model(input_ids=tokens, use_cache=False).logits
        return divergence(theirs, logits)[:, :-1].mean()


def at_hand(mark: Mapping[str, Any], **how: Any) -> Skeleton | None:
    """The dense model that a pruned directory came from, if it lies here unchanged.

    mark: the directory's `trim.json`. how: as Skeleton takes it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    said = mark.get("model") or {}
    name, content = str(said.get("id")), said.get("content")
    path = Path(name).expanduser()
    if not content:
        return None
    try:
        if not path.is_dir():
            path = Path(snapshot_download(name, local_files_only=True))
        found = Skeleton(Checkpoint(path, name), **how)
    except (HFValidationError, LocalEntryNotFoundError, InputError, OSError):
        return None
    return found if found.fingerprint.has_content(content) else None


def check_vocabulary(teacher: Skeleton, student: Skeleton) -> None:
    """Raise MismatchError unless both have the same tokens, by the rows of their embeddings and by their tokenizers."""
    sizes = [one.model.get_input_embeddings().weight.shape[0] for one in (teacher, student)]
    known = [_vocabulary(one.checkpoint.directory) for one in (teacher, student)]
    pair = f"the teacher {teacher.checkpoint.id} has another vocabulary than {student.checkpoint.id}"
    way = "give a teacher of the same family, or --kl 0 for none"
    if sizes[0] != sizes[1]:
        raise MismatchError(f"{pair}, {sizes[0]:,} tokens where that has {sizes[1]:,}; {way}.")
    if None not in known and known[0] != known[1]:
        raise MismatchError(f"{pair}, of as many but other tokens; {way}.")


def _vocabulary(directory: Path) -> dict[str, int] | None:
    """Tokens and their ids, None where there is no tokenizer that can be used."""
    try:
        return load_tokenizer(directory).get_vocab()
    except InputError:
        return None
