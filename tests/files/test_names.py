import pytest

from trimcli.files.names import grouped, inside_layer, kind_of, kinds_of, layer_index, layer_of, list_of


@pytest.mark.parametrize(
    ("name", "layer", "index", "inside", "kind"),
    [
        ("model.layers.12.mlp.up_proj", "model.layers.12", 12, "mlp.up_proj", "mlp.up_proj"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0", 0, "attn.c_attn", "attn.c_attn"),
        ("model.layers.3.experts.5.w1", "model.layers.3", 3, "experts.5.w1", "experts.*.w1"),
        ("vit2.layer.1.fc1", "vit2.layer.1", 1, "fc1", "fc1"),
        ("stack.0.1.fc", "stack.0", 0, "1.fc", "*.fc"),
        ("blocks.7", "blocks.7", 7, "blocks.7", "blocks.*"),
        ("0.fc", "0", 0, "fc", "fc"),
        ("lm_head", "lm_head", 0, "lm_head", "lm_head"),
        ("model.head", "model.head", 0, "model.head", "model.head"),
    ],
)
def test_names_tell_layer_and_place(name: str, layer: str, index: int, inside: str, kind: str) -> None:
    assert (layer_of(name), layer_index(name), inside_layer(name), kind_of(name)) == (layer, index, inside, kind)


def test_kinds_are_told_apart_where_layers_of_several_lists_are_there() -> None:
    decoder = ["model.layers.0.attn.q", "model.layers.0.experts.1.w", "model.layers.1.attn.q", "head"]
    assert [list_of(name) for name in decoder] == ["model.layers"] * 3 + [""]
    assert list(kinds_of(decoder)) == ["attn.q", "experts.*.w", "head"]
    tower = ["visual.blocks.0.attn.q", "visual.blocks.3.attn.q", "visual.merger.2"]
    assert kinds_of([*decoder, *tower]) == {
        "model.layers.*.attn.q": [decoder[0], decoder[2]],
        "model.layers.*.experts.*.w": [decoder[1]],
        "head": ["head"],
        "visual.blocks.*.attn.q": tower[:2],
        "visual.merger.*": tower[2:],
    }


def test_grouped_in_the_order_given() -> None:
    names = ["m.10.b", "m.2.a", "m.10.a", "m.2.e.0.x", "m.2.e.1.x"]
    assert grouped(names, layer_of) == {"m.10": ["m.10.b", "m.10.a"], "m.2": ["m.2.a", "m.2.e.0.x", "m.2.e.1.x"]}
    assert grouped(names, kind_of) == {"b": ["m.10.b"], "a": ["m.2.a", "m.10.a"], "e.*.x": ["m.2.e.0.x", "m.2.e.1.x"]}
    assert list(grouped(names, layer_index)) == [10, 2]
