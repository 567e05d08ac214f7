"""Our own interface: every style with every seed, schedules, and progress as server-sent events."""

import base64
import io
import json

import pytest
from PIL import Image

from dmm_jax.serve import documents
from tests.serve.fake import FakeEngine
from tests.serve.running import running


def events_of(answer):
    """Returns (name, data) of every event in a stream."""
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    return [(lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))) for lines in blocks]


def test_every_style_with_every_seed(web):
    styles = ["anime", {"anime": 0.5, "photo": 0.5}, [[1000, "anime"], [[600, 300], "photo"]], "photo:500:ink"]
    answer = web.post("/api/draw", {"prompt": "a cat", "styles": styles, "seeds": [1, 9], "steps": 2})
    images = answer.json()["images"]
    written = ["anime", "anime=0.5,photo=0.5", "anime:600-300:photo", "photo:500:ink"]
    assert [(image["style"], image["parameters"]["seed"]) for image in images] == [
        (s, k) for s in written for k in (1, 9)
    ]
    assert Image.open(io.BytesIO(base64.b64decode(images[1]["png"]))).info["parameters"] == images[1]["text"]


def test_what_a_picture_says_draws_it_again(web):
    answer = web.post("/api/draw", {"prompt": "a", "styles": ["anime:400:ink"], "seeds": [3], "solver": "Heun"}).json()
    first = answer["images"][0]["parameters"]
    body = {name: first[name] for name in ("prompt", "negative_prompt", "steps", "guidance_scale", "solver", "width")}
    second = web.post("/api/draw", body | {"styles": [first["styles"]], "seeds": [first["seed"]]}).json()
    assert second["images"][0]["parameters"] == first


def test_a_stream_has_progress_previews_and_images(web, monkeypatch):
    monkeypatch.setattr(web.engine, "period_s", 0.02)
    body = {"prompt": "a", "styles": ["anime", "ink"], "seeds": [1], "stream": True, "steps": 60}
    events = events_of(web.post("/api/draw", body))
    names = [name for name, _ in events]
    assert names[0] == "start" and names[-1] == "done" and names.count("image") == 2
    assert [image["style"] for image in events[0][1]["images"]] == ["anime", "ink"]
    steps = [data["step"] for name, data in events if name == "progress" and data["index"] == 1]
    assert steps == sorted(steps) and len(steps) > 1
    assert any("preview" in data for name, data in events if name == "progress")


def test_in_a_stream_an_image_fails_alone(web):
    body = {"prompt": "NaN", "styles": ["anime"], "seeds": [1, 2], "stream": True}
    events = events_of(web.post("/api/draw", body))
    failed = {data["index"]: data["error"]["code"] for name, data in events if name == "failed"}  # In any order.
    assert failed == {0: "not_finite", 1: "not_finite"}


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"styles": ["anime"] * 3, "seeds": [1] * 6}, "3 styles and 6 seeds are 18 images; a request may have 16"),
        ({"styles": []}, "styles"),
        ({"styles": ["anime"] * 65}, "styles: List should have at most 64 items"),
        ({"seeds": [1] * 65}, "seeds: List should have at most 64 items"),
        ({"num_images": 65}, "num_images: Input should be less than or equal to 64"),
        ({"styles": [[]]}, "a schedule is not empty"),
        ({"style": "anime"}, "did you mean 'styles'"),
        ({"cfg_scale": 3}, "did you mean 'guidance_scale'"),
        ({"styles": [[[900, "anime"], [400, "ink"]]]}, "must hold from the first timestep"),
        ({"seeds": [-1]}, "seed must be a whole number from 0 to 4294967295"),
        ({"guidance_rescale": 2}, "guidance_rescale must be a finite number from 0 to 1"),
    ],
)
def test_errors_say_what_to_send(web, fields, expected):
    answer = web.post("/api/draw", {"prompt": "a", "styles": ["anime"], **fields})
    assert answer.status_code in (400, 422) and expected in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "styles, default", [(("anime", "photo"), "anime"), (("anime", "none"), "none"), ((), None)], ids=str
)
def test_a_request_without_a_style_gets_the_same_in_every_interface(styles, default):
    with running(FakeEngine(styles=styles)) as web:
        body = {"prompt": "a"}
        for path in ("/api/draw", "/v1/images/generations", "/sdapi/v1/txt2img"):
            assert web.post(path, body).status_code == 200
        assert web.post("/api/draw", body | {"styles": None}).status_code == 200
        assert web.post("/api/draw", body | {"styles": [None]}).status_code == 200
        assert web.post("/v1/images/generations", body | {"model": ""}).status_code == 200
        assert [job.request.style for job in web.engine.jobs] == [default] * 6


def test_the_model_says_what_can_be_asked_for(web):
    model = web.get("/api/model").json()
    assert model["styles"] == ["anime", "photo", "ink"] and {"width": 128, "height": 64} in model["sizes"]
    assert model["limits"] == {"images": 16, "steps": 100} and not model["needs_key"]


def test_documents_list_every_address_and_load_nothing(web):
    document, page = web.get("/openapi.json").json(), web.get("/docs").text
    assert {"/api/draw", "/v1/images/generations", "/sdapi/v1/txt2img", "/metrics"} <= set(document["paths"])
    assert "<script" not in page and "//" not in page.replace("://json", "").split("<main>")[0]
    assert all(f"<code>{name}</code>" in page for name in ("cfg_scale", "guidance_rescale", "response_format"))
    assert documents.render(document) == page


@pytest.mark.parametrize(
    "path, body",
    [("/api/draw", {"prompt": "a", "styles": ["ink"]}), ("/v1/images/generations", {"prompt": "a", "model": "ink"})],
)
def test_a_request_of_a_prompt_alone_is_drawn_as_the_model_says(path, body):
    engine = FakeEngine()
    sampling = {"num_inference_steps": 9, "guidance_scale": 2.5, "guidance_rescale": 0.5, "solver": "euler_karras"}
    engine.pipeline.sampling = sampling
    with running(engine) as web:
        assert web.get("/api/model").json()["sampling"] == sampling
        assert web.post(path, body).status_code == 200
    (job,) = engine.jobs
    assert {name: getattr(job.request, name) for name in sampling} == sampling
