"""AUTOMATIC1111's API, with the client webuiapi, and fields that this server cannot follow."""

import threading

import pytest
import webuiapi

from dmm_jax.diffusion import solvers
from dmm_jax.serve.a1111_fields import NEUTRAL, Txt2ImgBody
from tests.serve.fake import STYLES, FakeEngine
from tests.serve.running import running, until

SIZE = {"width": 64, "height": 64}


def client_of(web):
    return webuiapi.WebUIApi(port=web.service.settings.port)


@pytest.fixture(scope="module")
def client(web):
    return client_of(web)


def test_styles_are_checkpoints(client):
    assert sorted(STYLES) == client.util_get_model_names()
    client.util_set_model("photo")
    assert client.util_get_current_model() == "photo"
    assert "Style: photo" in client.txt2img(prompt="a", **SIZE).image.info["parameters"]


def test_batches_have_consecutive_seeds(client):
    result = client.txt2img(prompt="a", seed=5, batch_size=2, n_iter=2, steps=2, **SIZE)
    assert result.info["all_seeds"] == [5, 6, 7, 8] and result.info["seed"] == 5
    assert [image.getpixel((0, 0))[0] for image in result.images] == [5, 6, 7, 8]
    assert [image.info["parameters"] for image in result.images] == result.info["infotexts"]


def test_a_request_may_name_a_mix_as_checkpoint(client):
    override = {"sd_model_checkpoint": "anime=0.5,ink=0.5", "sd_vae": "Automatic"}
    result = client.txt2img(prompt="a", override_settings=override, **SIZE)
    assert result.info["sd_model_name"] == "anime=0.5,ink=0.5"


def test_lists_have_every_sampler_and_scheduler(client):
    assert client.util_get_sampler_names() == sorted(solvers.NAMES.values())
    assert "karras" in client.util_get_scheduler_names()


@pytest.mark.parametrize(
    "sampler, scheduler, solver",
    [
        ("Euler a", "automatic", "euler_ancestral"),
        ("DPM++ 2M", "karras", "dpmpp_2m_karras"),
        ("DPM++ 2M", "Karras", "dpmpp_2m_karras"),
        ("DPM++ 2M Karras", None, "dpmpp_2m_karras"),
        ("DPM++ SDE", "sgm_uniform", "dpmpp_sde_sgm_uniform"),
        ("Euler", "align_your_steps", "euler_ays"),
        (None, None, "euler"),
    ],
)
def test_sampler_and_scheduler_make_a_solver(sampler, scheduler, solver):
    assert Txt2ImgBody(sampler_name=sampler, scheduler=scheduler).solver() == solver


@pytest.mark.parametrize("field", sorted(NEUTRAL))
def test_features_that_are_missing_are_refused_by_name(web, field):
    if field != "disable_extra_networks":
        answer = web.post("/sdapi/v1/txt2img", {"prompt": "a", field: "something", **SIZE})
        assert answer.status_code == 422 and field in answer.json()["errors"]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"alwayson_scripts": {"controlnet": {"args": [{"image": "x"}]}}}, "runs no scripts; got 'controlnet'"),
        ({"guidance_scale": 3}, "did you mean 'cfg_scale'"),
        ({"styles": ["ink"]}, "A style of the model is a checkpoint here: send it as override_settings.sd_model"),
        (
            {"override_settings": {"CLIP_stop_at_last_layers": 2}},
            "cannot change 'CLIP_stop_at_last_layers'; here it is 1",
        ),
        ({"override_settings": {"sd_model_checkpoint": "../../etc/passwd"}}, "there is no style"),
        ({"sampler_name": "Eular"}, "did you mean 'euler'"),
        ({"sampler_name": "DPM2 a"}, "no solver 'DPM2 a'. There are, with A1111's names in brackets: ddim (DDIM)"),
        ({"sampler_name": "DDIM", "eta": 0.5}, "eta: DDIM has 0 here"),
        ({"clip_skip": 2}, "clip_skip is 1 here"),
        ({"batch_size": 9, "n_iter": 2}, "one request may ask for 16 images; got 18"),
        ({"batch_size": 65}, "Input should be less than or equal to 64"),
        ({"n_iter": 65}, "Input should be less than or equal to 64"),
    ],
)
def test_errors_say_what_to_send(web, fields, expected):
    answer = web.post("/sdapi/v1/txt2img", {"prompt": "a", **SIZE, **fields})
    assert answer.status_code in (400, 422) and expected in answer.json()["errors"]
    assert set(answer.json()) == {"error", "detail", "body", "errors"}


def test_the_returned_parameters_are_those_that_drew(web):
    parameters = web.post("/sdapi/v1/txt2img", {"prompt": "a", "styles": []}).json()["parameters"]
    assert (parameters["width"], parameters["height"], parameters["sampler_name"]) == (64, 64, "Euler")


def test_scripts_that_are_off_are_accepted(client):
    assert client.txt2img(prompt="a", alwayson_scripts={"ADetailer": {"args": [False]}}, **SIZE).image


def test_interrupt_ends_the_clients_own_images():
    with running(FakeEngine(num_slots=1, period_s=0.02)) as web:
        client, results = client_of(web), []
        thread = threading.Thread(target=lambda: results.append(client.txt2img(prompt="a", batch_size=3, **SIZE)))
        thread.start()
        other = client_of(web)
        until(lambda: web.engine.numbers["finished"] == 1)
        progress = other.get_progress()
        assert 0.3 < progress["progress"] < 1 and progress["state"]["job_count"] == 3
        other.interrupt()
        thread.join(20)
        assert 1 <= len(results[0].images) < 3 and other.get_progress()["state"]["job_count"] == 0
