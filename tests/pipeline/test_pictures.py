"""Pictures on their way through an image classifier give what the model's own forward pass gives."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification
from transformers.models.vit.modeling_vit import ViTLayer

from tests.digits import CLASSIFIERS, digits, logits, random_classifier
from trimcli.errors import InputError
from trimcli.model.empty import find_layers
from trimcli.options import RunOptions
from trimcli.pipeline.proof import open_proven
from trimcli.pipeline.walk import Walk

# Between stages the model makes other maps of what a block gives: only its own forward pass knows how.
FORMS = {"vit": "recorded", "deit": "recorded", "convnext": "suspended", "swin": "suspended", "resnet": "suspended"}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_walk_gives_the_model_s_logits(name: str, tmp_path: Path) -> None:
    model, pixels = random_classifier(name, tmp_path / name), digits()[1].first(7).pixels
    skeleton = open_proven(str(model), RunOptions(device="cpu", cache_dir=tmp_path / "cache"), images=True)
    assert skeleton.form == FORMS[name]
    wanted = logits(model, pixels)
    for size in (1, 3, None):
        walk = Walk(skeleton, pixels, batch_size=size)
        assert walk.batch_size == (size or 7)
        for layer in walk.layers():
            walk.advance(layer)
        found: list[Tensor] = []
        with walk.head() as head:
            for start in range(0, 7, walk.batch_size):
                found.append(head(slice(start, min(7, start + walk.batch_size)), slice(None)))
        torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-4, atol=1e-5)


def test_stages_that_are_not_those_of_the_config_are_refused() -> None:
    model = AutoModelForImageClassification.from_config(CLASSIFIERS["convnext"]())
    assert [name.removeprefix("convnext.encoder.") for name, _ in find_layers(model)] == [
        "stages.0.layers.0",
        "stages.1.layers.0",
    ]
    for depths in ([1, 7], [1, 1, 1]):
        model.config.depths = depths
        with pytest.raises(InputError, match="does not hold its blocks in stages of"):
            find_layers(model)


def test_the_proof_is_kept(tmp_path: Path) -> None:
    model, options = random_classifier("convnext", tmp_path / "m"), RunOptions(device="cpu", cache_dir=tmp_path / "c")
    forms = {open_proven(str(model), options, images=True).form for _ in range(2)}
    assert forms == {"suspended"}
    assert len(list((tmp_path / "c").rglob("*.json"))) == 1


def test_a_block_that_looks_at_other_pictures_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ViTLayer.forward

    def mixing(layer: ViTLayer, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        found: Tensor = own(layer, hidden, *args, **kwargs)  # type: ignore[arg-type]
        return found + hidden.mean(dim=0)

    model = random_classifier("vit", tmp_path / "vit")
    monkeypatch.setattr(ViTLayer, "forward", mixing)
    with pytest.raises(InputError, match=r"differs from its own forward pass at .*; its form is not supported"):
        open_proven(str(model), RunOptions(device="cpu", cache_dir=tmp_path / "cache"), images=True)
