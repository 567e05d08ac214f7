"""The meanings of options, as the comments in the file of options state them."""

from dmm_jax.config import meanings
from dmm_jax.config import options as config_lib
from dmm_jax.config.serialization import flat_values


def test_every_option_has_a_meaning_and_no_other_name_has_one():
    options = flat_values(config_lib.get_config().to_dict())
    found = {name: text for section in meanings.sections() for name, text in section.meanings.items()}
    groups = {name.rpartition(".")[0] for name in options if "." in name}
    assert set(found) == set(options) | groups
    assert [name for name in options if not found[name].endswith(".")] == []


def test_comments_above_and_after_an_option_and_headings_are_told_apart():
    by_name = {name: (section, text) for section in meanings.sections() for name, text in section.meanings.items()}
    section, text = by_name["batch_size"]
    assert section.heading == "Optimisation." and text.startswith("Images per step over all rows")
    section, text = by_name["mesh.fsdp"]
    assert section.heading == "How it is computed." and text.startswith("As `data`, but gradients are summed")


def test_the_text_shows_values_defaults_that_differ_and_choices():
    config = config_lib.get_config()
    config.batch_size, config.mesh.teacher = 96, 8
    text = meanings.render(config)
    assert "--config.batch_size=96  (default: 48)\n" in text and "--config.mesh.teacher=8  (default: 1)\n" in text
    assert '--config.base=""\n' in text and text.count("(default:") == 2
    assert "One of: adamw, muon." in " ".join(text.split())
