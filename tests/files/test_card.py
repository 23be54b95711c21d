from typing import Any

from trimcli.files.card import model_card_section, with_card


def document(**fields: Any) -> dict[str, Any]:
    linears = {
        "model.layers.0.mlp.up_proj": {"shape": [10, 20], "zeros": 100},
        "model.layers.1.mlp.up_proj": {"shape": [10, 20], "zeros": 140},
        "model.layers.1.self_attn.o_proj": {"shape": [10, 10], "zeros": 0},
        "model.layers.1.mlp.experts.0.w1": {"shape": [10, 10], "zeros": 25},
        "model.layers.1.mlp.experts.1.w1": {"shape": [10, 10], "zeros": 75},
    }
    made = {
        "schema": "trim.pruned/1",
        "trim": "1.2.3",
        "command": "prune",
        "model": {"id": "some/model"},
        "options": {"method": "wanda", "sparsity": 0.5, "use_trim": False, "ratios": None, "only": []},
        "linears": linears,
        "sparsity": 340 / 700,
        "commands": ["trim calibrate some/model -o c", "trim prune some/model -o m"],
    }
    return {**made, **fields}


def test_the_section_says_what_how_and_by_which_commands() -> None:
    section = model_card_section(document())
    assert section.startswith("<!-- trim:begin -->\n## ")
    assert section.endswith("<!-- trim:end -->\n")
    assert "5 weight matrices of `some/model` were pruned: 48.57% of their weights are zero" in section
    assert "- method: `wanda`\n- sparsity: `0.5`\n\n" in section
    assert "```sh\ntrim calibrate some/model -o c\ntrim prune some/model -o m\n```" in section
    assert "| `mlp.up_proj` | 2 | 400 | 240 | 60.00% |" in section
    assert "| `self_attn.o_proj` | 1 | 100 | 0 | 0.00% |" in section
    assert "| `mlp.experts.*.w1` | 2 | 200 | 100 | 50.00% |" in section
    assert "unpack" not in section


def test_options_are_told_in_words() -> None:
    update = {"damping": 0.01, "mask_update": None}
    recipe = {"method": "wanda", "rows": {"qmetric": "mse"}, "update": update, "propagate": True}
    options = {"recipe": recipe, "device": "cpu", "seed": 0, "skip": ["*.k_proj", "*.v_proj"], "only": []}
    assert (
        "\n- method: `wanda`\n- rows: qmetric `mse`\n- propagate: yes\n- seed: `0`\n- skip: `*.k_proj`, `*.v_proj`\n\n"
    ) in model_card_section(document(options=options))
    options = {"recipe": {"method": "sparsegpt", "update": update}}
    assert "- method: `sparsegpt`\n- update: damping `0.01`\n\n" in model_card_section(document(options=options))


def test_samples_that_were_given_were_not_drawn() -> None:
    ran = {"device": "auto", "dtype": "auto", "batch_size": 4, "stats": ["norms"]}
    drawn = {**ran, "dataset": "c4", "nsamples": 256, "seqlen": None, "seed": 0, "tokens": None}
    shown = model_card_section(document(options={"calibrate": drawn}))
    assert "\n- calibrate: stats `norms`, dataset `c4`, nsamples `256`, seed `0`\n" in shown
    shown = model_card_section(document(options={"calibrate": {**drawn, "bos": "auto"}}, bos="each"))
    assert ", seed `0`, bos `each`\n" in shown
    shown = model_card_section(document(options={"calibrate": {**drawn, "tokens": "t.safetensors"}}))
    assert "\n- calibrate: stats `norms`, tokens `t.safetensors`\n" in shown


def test_the_papers_behind_the_choices_are_named_once_each() -> None:
    recipe: dict[str, Any] = {
        "method": "sparsegpt",
        "score": "obs",
        "rows": "trim",
        "update": "obs",
        "barber": {"threshold": 0.01},
    }
    options = {"recipe": recipe, "sparsity": 0.7}
    told = model_card_section(document(options=options, allocation={"method": "owl"}))
    [line] = [line for line in told.splitlines() if line.startswith("- sources: ")]
    sources = line.removeprefix("- sources: ").split("; ")
    assert len(sources) == len(set(sources))
    for name in ("Frantar & Alistarh 2023", "Beck et al. 2025", "Yin et al. 2024", "Su et al. 2024"):
        assert name in line
    recipe = {"method": "theirs", "score": "theirs", "rows": "even", "update": "none", "barber": None}
    assert "- sources: Sun et al. 2023, section 3\n" in model_card_section(document(options={"recipe": recipe}))


def test_the_masks_manifest_says_how_where_masks_were_applied() -> None:
    pruning = {"model": {"id": "first/model"}, "options": {"method": "magnitude"}}
    section = model_card_section(document(pruning=pruning, schema="trim.packed/1", commands=[]))
    assert "`first/model`" in section
    assert "- method: `magnitude`\n\n|" in section
    assert "trim unpack" in section
    assert "```" not in section


def test_a_directory_without_a_readme_gets_one() -> None:
    readme = with_card(None, document())
    assert readme.startswith("---\nlibrary_name: transformers\n")
    assert readme.count("---\n") == 2
    assert model_card_section(document()) in readme


def test_a_readme_keeps_its_own_text() -> None:
    once = with_card("---\nlicense: mit\n---\n# Mine\nText.", document())
    assert once.startswith("---\nlicense: mit\n---\n# Mine\nText.\n\n<!-- trim:begin -->")
    edited = once + "\nMore of mine.\n"
    again = with_card(edited, document(sparsity=0.9))
    assert "90.00%" in again
    assert "48.57%" not in again
    assert again.startswith("---\nlicense: mit\n---\n# Mine\nText.\n\n<!-- trim:begin -->")
    assert again.endswith("<!-- trim:end -->\n\nMore of mine.\n")
    assert with_card(again, document(sparsity=0.9)) == again


def test_names_are_shown_letter_by_letter() -> None:
    commands = ["trim prune 'a```b' -o m"]
    found = document(model={"id": "a`b"}, options={"dataset": "x``y\n| z"}, commands=commands)
    section = model_card_section(found)
    assert "matrices of `` a`b `` were pruned" in section
    assert "- dataset: ``` x``y | z ```\n" in section
    assert "````sh\ntrim prune 'a```b' -o m\n````" in section
