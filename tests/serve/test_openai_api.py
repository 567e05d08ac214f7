"""OpenAI's images API, with OpenAI's own client."""

import base64
import io

import openai
import pytest
from PIL import Image

from tests.serve.fake import STYLES


@pytest.fixture(scope="module")
def client(web):
    return openai.OpenAI(base_url=f"{web.address}/v1", api_key="none", max_retries=0)


def image_of(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_models_are_the_styles(client):
    assert tuple(model.id for model in client.models.list()) == STYLES


def test_a_mix_is_a_model(client):
    assert client.models.retrieve("anime=0.7,photo=0.3").id == "anime=0.7,photo=0.3"
    with pytest.raises(openai.NotFoundError, match="did you mean 'anime'"):
        client.models.retrieve("anim")


def test_images_have_size_seed_and_parameters(client):
    answer = client.images.generate(
        model="anime=0.7,photo=0.3", prompt="a cat", n=2, size="128x64", response_format="b64_json",
        extra_body={"seed": 7, "steps": 3, "negative_prompt": "blurry"},
    )  # fmt: skip
    assert answer.size == "128x64" and [image.seed for image in answer.data] == [7, 8]
    for seed, item in zip((7, 8), answer.data, strict=True):
        image = image_of(item.b64_json)
        assert image.size == (128, 64) and image.getpixel((0, 0)) == (seed, seed, seed)
        text = image.info["parameters"]
        assert text.startswith("a cat\nNegative prompt: blurry\nSteps: 3, ") and 'Style: "anime=0.7,photo=0.3"' in text


def test_seeds_differ_without_a_seed(client):
    seeds = {client.images.generate(model="ink", prompt="a", extra_body={"steps": 1}).data[0].seed for _ in range(3)}
    assert len(seeds) == 3


def test_a_stream_has_previews_and_the_image(client):
    events = list(
        client.images.generate(model="ink", prompt="a", stream=True, partial_images=2, extra_body={"steps": 100})
    )
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert image_of(events[0].b64_json).size == (8, 8) and image_of(events[-1].b64_json).size == (64, 64)


def test_a_stream_ends_with_the_error_of_its_image(client):
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.images.generate(model="ink", prompt="NaN", stream=True))


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"model": "anim"}, "did you mean 'anime'"),
        ({"size": "512x512"}, "there are: 64 x 64, 128 x 64"),
        ({"size": "large"}, "WIDTHxHEIGHT"),
        ({"n": 17}, "n may be up to 16; got 17"),
        ({"response_format": "url"}, "ask for b64_json"),
        ({"background": "transparent"}, "'auto' or 'opaque'"),
        ({"style": "vivid"}, "did you mean 'model'"),
        ({"partial_images": 1}, "set stream to true"),
        ({"stream": True, "n": 2}, "a stream has one image"),
        ({"extra_body": {"steps": 101}}, "num_inference_steps must be a whole number from 1 to 100"),
        ({"extra_body": {"solver": "eular"}}, "did you mean 'euler'"),
    ],
)
def test_errors_say_what_to_send(client, fields, expected):
    with pytest.raises(openai.APIStatusError, match=expected) as caught:
        client.images.generate(**{"prompt": "a", "model": "ink"} | fields)
    assert caught.value.status_code in (400, 422)
    assert caught.value.body["type"] == "invalid_request_error"
