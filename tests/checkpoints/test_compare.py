"""Every difference that prevents a merge is reported, and no other difference is."""

import dataclasses
import pathlib

import pytest

from dmm_jax.checkpoints.checkpoint import Component
from dmm_jax.checkpoints.compare import base_problems, check_mergeable, merge_problems, teacher_problems
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.open import open_checkpoint


@pytest.fixture(scope="module")
def base(folder):
    return open_checkpoint(folder)


def changed(base, component="unet", kind="diffusers", **fields):
    config = base.config(component) | fields
    components = {**base.components, component: Component(config, base.components[component].load)}
    return dataclasses.replace(base, path=pathlib.Path("other"), kind=kind, components=components)


def scheduled(base, kind="diffusers", **fields):
    return dataclasses.replace(base, kind=kind, scheduler_config=base.scheduler_config | fields)


def test_a_checkpoint_can_be_merged_on_itself(base):
    assert merge_problems(base, [("X", base)]) == []


def test_differing_tensors_are_counted_and_the_first_ones_named(base):
    (line,) = teacher_problems(base, "X", changed(base, block_out_channels=[32, 128]))
    assert line.startswith("X differs from the base in ") and "unet tensors" in line and "more" in line
    assert "down_blocks.1.resnets.0.conv1.bias: base (64,), teacher (128,)" in line
    (line,) = teacher_problems(base, "X", changed(base, "text_encoder", num_hidden_layers=3))
    assert "16 text_encoder tensors" in line and "base absent" in line


@pytest.mark.parametrize(
    "component, field, value",
    [("unet", "attention_head_dim", 4), ("unet", "norm_eps", 1e-6), ("text_encoder", "hidden_act", "gelu")],
)
def test_settings_that_no_tensor_shows_must_be_equal(base, component, field, value):
    (line,) = teacher_problems(base, "X", changed(base, component, **{field: value}))
    assert f"{component} tensors, but its config.json differs in {field} (base" in line
    assert teacher_problems(base, "X", changed(base, component, "single-file", **{field: value})) == []


def test_one_number_of_heads_means_that_number_on_every_level(base):
    assert teacher_problems(base, "X", changed(base, attention_head_dim=[8, 8])) == []
    config = base.unet_config
    silent = {name: value for name, value in config.items() if name not in ("norm_eps", "attention_head_dim")}
    components = {**base.components, "unet": Component(silent, base.components["unet"].load)}
    assert teacher_problems(base, "X", dataclasses.replace(base, components=components)) == []


def test_prediction_types_must_agree_and_be_known(base):
    (line,) = teacher_problems(base, "X", scheduled(base, prediction_type="v_prediction"))
    assert line.startswith("X predicts v_prediction, the base epsilon")
    (line,) = teacher_problems(base, "X", scheduled(base, prediction_type="unknown"))
    assert line.startswith("X does not say whether")
    (line,) = base_problems(scheduled(base, prediction_type="unknown"), "B")
    assert line.startswith("B does not say whether")


@pytest.mark.parametrize("fields", [{"beta_schedule": "linear"}, {"rescale_betas_zero_snr": True}, {"beta_end": 0.02}])
def test_noise_levels_must_agree(base, fields):
    (line,) = teacher_problems(base, "X", scheduled(base, **fields))
    assert line.startswith("X was trained at other noise levels")


def test_a_scheduler_that_cannot_be_read_is_named(base):
    (line,) = teacher_problems(base, "X", scheduled(base, beta_schedule="sigmoid"))
    assert "scheduler_config.json" in line and "sigmoid" in line
    (line,) = base_problems(scheduled(base, _class_name="EDMEulerScheduler"), "B")
    assert line.startswith("B has a scheduler_config.json") and "EDMEulerScheduler" in line


def test_sampling_options_of_a_scheduler_may_differ(base):
    other = scheduled(base, _class_name="DDIMScheduler", steps_offset=0, timestep_spacing="trailing", clip_sample=True)
    assert teacher_problems(base, "X", other) == []
    assert teacher_problems(base, "X", scheduled(base, final_sigmas_type="sigma_min", thresholding=True)) == []


def test_a_single_file_differs_only_in_noise_levels_that_it_states(base):
    zero = scheduled(base, _class_name="DDIMScheduler", rescale_betas_zero_snr=True)
    silent = dataclasses.replace(base, kind="single-file")
    assert teacher_problems(zero, "X", silent) == []
    stated = dataclasses.replace(zero, kind="single-file", explicit_fields={"rescale_betas_zero_snr"})
    (line,) = teacher_problems(base, "X", stated)
    assert "noise levels" in line


def without(base, *components, **changes):
    remaining = {name: component for name, component in base.components.items() if name not in components}
    return dataclasses.replace(base, components=remaining, **changes)


def test_a_base_must_be_complete_and_a_teacher_needs_only_a_unet(base):
    bare = without(base, "vae", "text_encoder", tokenizer_folder=None)
    assert teacher_problems(base, "X", bare) == []
    (line,) = base_problems(bare, "B")
    assert "no vae, text_encoder, tokenizer" in line
    (line,) = teacher_problems(base, "X", without(base, "unet"))
    assert line.startswith("X holds no unet")


def test_merged_models_are_neither_base_nor_teacher(base, student):
    (line,) = merge_problems(base, [("X", student)])
    assert line.startswith("X is a merged model")
    assert "merged model already" in base_problems(student, "B")[0]


def test_training_raises_every_problem_that_inspect_lists(base):
    teachers = {
        "a": base,
        "b": scheduled(base, prediction_type="v_prediction"),
        "c": changed(base, "unet", cross_attention_dim=32),
    }
    check_mergeable(base, {"a": base})
    with pytest.raises(CheckpointError) as caught:
        check_mergeable(base, teachers)
    message = str(caught.value)
    assert message.count("\n  - ") == 2 and "teacher 'b' (" in message and "teacher 'c' (other)" in message
    named = [(f"teacher {name!r} ({teacher.path})", teacher) for name, teacher in teachers.items()]
    assert all(line in message for line in merge_problems(base, named))


def test_comparing_reads_no_tensor(base):
    def load():
        raise AssertionError("read")

    components = {name: Component(component.config, load) for name, component in base.components.items()}
    assert merge_problems(base, [("X", dataclasses.replace(base, components=components))]) == []


def test_a_silent_file_has_its_bases_prediction_and_says_so(base):
    silent = dataclasses.replace(base, kind="single-file", explicit_fields=())
    velocity = scheduled(base, prediction_type="v_prediction")
    assert teacher_problems(velocity, "X", scheduled(silent, "single-file", prediction_type="unknown")) == []
    assert silent.assumptions(base) == [] and "v_prediction is used" in silent.assumptions(velocity)[0]
