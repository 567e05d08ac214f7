"""The config: what it refuses, and that it survives a round trip."""

import json

import pytest

from dmm_jax.config import checks
from dmm_jax.config.options import as_kept, get_config
from dmm_jax.config.serialization import differences, from_json, load_config, to_json


def valid():
    config = get_config()
    config.base, config.teachers, config.batch_size = "base", (("a", "x"), ("b", "y")), 8
    return config


def test_a_valid_config_passes():
    checks.check(valid())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("base", "", "base is empty"),
        ("teachers", (), "at least one"),
        ("teachers", (("a", "x"), ("a", "y")), "'a' is listed twice"),
        ("teachers", (("a=b", "x"), ("c", "y")), "a=b"),
        ("batch_size", 7, "Use 6"),
        ("num_steps", 0, "num_steps"),
        ("max_skipped_in_a_row", 0, "max_skipped_in_a_row must be at least 1"),
        ("checkpoints_kept_every", -1, "checkpoints_kept_every must not be negative"),
        ("learning_rate", -1.0, "learning_rate"),
        ("prompt_dropout", 1.0, r"\[0, 1\)"),
        ("dtype", "float8", "float32, bfloat16"),
        ("feature_loss", "l1", "l2, normalized, cosine"),
        ("ema_width", 0.3, "at most 0.28"),
        ("timestep_power", 0.0, "at least 0.1"),
    ],
)
def test_each_wrong_option_is_named_with_what_to_do(name, value, message):
    config = valid()
    config[name] = value
    with pytest.raises(ValueError, match=message):
        checks.check(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ema_decay": 0.9, "ema_width": 0.1}, "two averages"),
        ({"learning_rate_schedule": "cosine", "decay_share": 0.2}, "decay_share ends a constant"),
        ({"mix_every": 2, "adversarial": {"weight": 0.1}}, "discriminator knows no mixes"),
        ({"mix_every": 2, "mesh": {"teacher": 2}}, "set mesh.teacher=1"),
        ({"mix_every": 2, "teachers": (("a", "x"),)}, "list a second one"),
        ({"mix_every": 5, "batch_size": 12}, "x mix_every 5 = .* Use"),
    ],
)
def test_options_that_exclude_each_other_are_refused(changes, message):
    config = valid()
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        checks.check(config)


def options(tree, prefix=""):
    """Yields the name and the value of every option."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from options(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


NUMBERS = {
    name: value
    for name, value in options(get_config().to_dict())
    if isinstance(value, (int, float)) and not isinstance(value, bool)
}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_finite_and_not_negative(name):
    wrong = [-1, 10**20] if isinstance(NUMBERS[name], int) else [-1.0, float("nan"), float("inf"), 1e39]
    for value in wrong:
        config = valid()
        config.update_from_flattened_dict({name: value})
        with pytest.raises(ValueError, match=name) as refused:
            checks.check(config)
        assert str(refused.value).count(f"- {name} must") <= 1


@pytest.mark.parametrize("name, value", [("adam_b1", 1.0), ("adam_eps", 0.0), ("sampling.num_inference_steps", 0)])
def test_numbers_have_the_ranges_that_their_use_wants(name, value):
    config = valid()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=f"{name} must .*; got {value}"):
        checks.check(config)


@pytest.mark.parametrize("entry", ["=comic", "a,b=ink", " a=ink", ""])
def test_a_style_that_is_kept_gets_a_name_that_a_mix_can_hold(entry):
    with pytest.raises(ValueError, match="cannot be written in a mix"):
        as_kept([entry])


def test_sample_grids_need_prompts():
    config = valid()
    config.samples.every = 2
    with pytest.raises(ValueError, match="samples.prompts is empty"):
        checks.check(config)


def test_sample_prompts_that_cannot_be_read_are_refused():
    config = valid()
    config.samples.every, config.samples.prompts = 5, ("a (cat:nan)",)
    with pytest.raises(ValueError, match="samples.prompts: .* not a finite number"):
        checks.check(config)
    config.sampling.prompt_grammar = "plain"
    checks.check(config)


@pytest.mark.parametrize(
    "option, entries, message",
    [
        ("clip_skip", ("teachr=2",), "clip_skip has 'teachr' with 2; expected 'NAME=2'"),
        ("clip_skip", ("base=two",), "clip_skip has 'base' with 0"),
        ("embeddings", ("file.safetensors",), "embeddings has 'file.safetensors'; expected 'NAME=FILE'"),
    ],
)
def test_options_of_parents_name_a_parent(option, entries, message):
    config = valid()
    config[option] = entries
    with pytest.raises(ValueError, match=message):
        checks.check(config)


def test_one_error_lists_all_problems():
    config = valid()
    config.base, config.num_steps = "", 0
    with pytest.raises(ValueError, match="base is empty[^$]*num_steps"):
        checks.check(config)


def test_a_mesh_that_does_not_divide_the_teachers_is_refused():
    config = valid()
    config.mesh.teacher = 3
    with pytest.raises(ValueError, match="must divide the 2 teachers"):
        checks.check(config)


@pytest.mark.parametrize("name, value", [("teacher", 0), ("teacher", -1), ("data", -1), ("fsdp", 0)])
def test_an_axis_of_no_devices_is_refused(name, value):
    config = valid()
    config.mesh[name] = value
    expected = "not be negative" if name == "data" else "be at least 1"
    with pytest.raises(ValueError, match=f"mesh.{name} must {expected}; got {value}") as refused:
        checks.check(config)
    assert "must divide" not in str(refused.value)


@pytest.mark.parametrize(
    "batch_size, accumulation, shape, multiple, nearest",
    [(8, 1, (1, 8, 1), 16, 16), (40, 1, (2, 4, 2), 16, 48), (24, 2, (1, 2, 2), 16, 32), (2, 1, (1, 1, 4), 8, 8)],
)
def test_a_batch_that_devices_do_not_divide_is_refused_with_advice(batch_size, accumulation, shape, multiple, nearest):
    config = valid()
    config.batch_size, config.gradient_accumulation = batch_size, accumulation
    checks.check(config)
    mesh_shape = dict(zip(("teacher", "data", "fsdp"), shape, strict=True))
    with pytest.raises(ValueError, match=f"batch_size {batch_size} .* multiple of {multiple}. Use {nearest}"):
        checks.check_mesh(config, mesh_shape)
    config.batch_size = nearest
    checks.check_mesh(config, mesh_shape)


def test_a_validation_set_that_devices_do_not_divide_is_refused():
    config = valid()
    config.validation_size = 3
    with pytest.raises(ValueError, match="validation_size 3 .* multiple of 4. Use 4"):
        checks.check_mesh(config, {"teacher": 1, "data": 2, "fsdp": 2})
    config.validation_size = 0
    checks.check_mesh(config, {"teacher": 1, "data": 2, "fsdp": 2})


def test_json_round_trip_is_exact():
    config = valid()
    config.samples.prompts = ("a", "b")
    back = from_json(to_json(config))
    assert differences(config, back) == []
    assert back.teachers == config.teachers and back.samples.prompts == ("a", "b")


def test_options_of_wrong_types_are_refused_with_file_and_types(tmp_path):
    values = json.loads(to_json(valid()))
    values |= {
        "seed": "a",
        "mesh": 3,
        "learning_rate": 1,
        "num_steps": True,
        "samples": {"prompts": [3]},
        "data": {"source": None},
        "grow": {"styles": [[["x"]]]},
        "weight_decay": 10**400,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError) as refused:
        load_config(tmp_path)
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'config.json'} cannot be read:") and "learning_rate" not in message
    for line in (
        'seed: expected a whole number, got a text: "a"',
        "mesh: expected a group of options, got a whole number: 3",
        "num_steps: expected a whole number, got true or false: true",
        "samples.prompts: expected a list of texts",
        "data.source: expected a text, got null: null",
        "grow.styles: expected a list of texts",
        "weight_decay: expected a number, got a whole number: 1000",
    ):
        assert f"  - {line}" in message


@pytest.mark.parametrize(
    "text, message", [("[1]", "must hold a JSON object"), ("{", "is not JSON"), ("\xff", "not UTF-8")]
)
def test_a_config_json_that_is_none_is_named(text, message, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as refused:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(refused.value)


def test_differences_name_option_and_both_values():
    changed = valid()
    changed.mesh.fsdp = 2
    assert differences(valid(), changed) == ["mesh.fsdp: 1 -> 2"]


def test_a_folder_without_config_is_no_workdir(tmp_path):
    with pytest.raises(ValueError, match="not a training workdir"):
        load_config(tmp_path)
