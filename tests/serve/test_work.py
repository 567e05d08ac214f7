"""A request's arrays: everything that does not fit is refused with what would, and rows hold what a slot computes."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.diffusion import solvers
from dmm_jax.serve import work
from tests.serve.students import ONE_LEVEL, request, small_pipeline

LIMITS = work.Limits(((64, 64), (64, 128)), max_steps=10, max_chunks=2)


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline(**ONE_LEVEL)


def check(pipeline, **changes):
    return work.check(vars(request()) | changes, pipeline, LIMITS, work.plans(pipeline))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": None}, "prompt must be a text; got None"),
        ({"prompt": "a" * (work.MAX_CHARACTERS + 1)}, "prompt may have 16,384 characters; this one has 16,385"),
        ({"negative_prompt": 3}, "negative_prompt must be a text; got 3"),
        ({"prompt": "a BREAK b BREAK c"}, "may fill 2 chunks of tokens here; this one fills 3"),
        ({"negative_prompt": "a BREAK b BREAK c"}, "may fill 2 chunks"),
        ({"style": "stile_0"}, "no style 'stile_0'; did you mean 'style_0'"),
        ({"style": None}, "needs a style"),
        ({"solver": "DPM+ 2M"}, "no solver 'DPM. 2M'; did you mean 'dpmpp_2m'"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"num_inference_steps": 11}, "num_inference_steps must be a whole number from 1 to 10; got 11"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"guidance_rescale": 1.5}, "guidance_rescale must be a finite number from 0 to 1"),
        ({"height": 128}, "no size 64 x 128 here .width x height.; there are: 64 x 64, 128 x 64"),
        ({"width": -8}, "width must be a whole number of at least 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(pipeline, changes, message):
    with pytest.raises(ValueError, match=message):
        check(pipeline, **changes)


def test_defaults_are_filled_in(pipeline):
    fields, arrays = check(pipeline, solver="DPM++ 2M Karras", width=128)
    assert (fields["height"], fields["width"], fields["solver"]) == (64, 128, "dpmpp_2m_karras")
    assert arrays.size == (64, 128) and arrays.guided and arrays.num_chunks == 1


def test_what_a_request_leaves_out_is_as_the_model_draws(pipeline):
    sampling = {"num_inference_steps": 50, "guidance_scale": 2.5, "guidance_rescale": 0.5, "solver": "euler"}
    vars(pipeline)["sampling"] = sampling
    fields, _ = check(pipeline, **dict.fromkeys(sampling))
    assert {name: fields[name] for name in sampling} == sampling | {"num_inference_steps": LIMITS.max_steps}
    fields, _ = check(pipeline, **dict.fromkeys(sampling) | {"guidance_scale": 1.0, "guidance_rescale": 0.0})
    assert (fields["guidance_scale"], fields["guidance_rescale"], fields["solver"]) == (1.0, 0.0, "euler")


def test_a_request_without_guidance_reads_no_negative_prompt(pipeline):
    _, arrays = check(pipeline, guidance_scale=1.0, negative_prompt="a BREAK b")
    assert not arrays.guided and arrays.num_chunks == 1


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "heun"])
def test_rows_hold_the_plan_the_request_and_the_styles(pipeline, solver):
    schedule = [(1000, "style_0"), (500, "style_1")]
    _, arrays = check(pipeline, solver=solver, style=schedule, num_inference_steps=4, guidance_rescale=0.25)
    plan = solvers.plan(solver, pipeline.schedule, 4)
    row, correction, columns, weights = work.unpack(jnp.asarray(arrays.table))
    for name in solvers.COLUMNS:
        assert np.array_equal(np.ravel(row[name]), getattr(plan, name))
    for name, column in correction._asdict().items():
        assert np.array_equal(
            np.ravel(column), getattr(plan.previous, name) if plan.previous else np.zeros(len(column))
        )
    assert columns["number"].tolist() == list(range(len(plan.timesteps)))
    assert set(columns["guidance_rescale"].tolist()) == {0.25} and set(columns["num_states"].tolist()) == {77}
    assert np.array_equal(weights, pipeline.style_weights([schedule], 1, plan.timesteps)[0])
