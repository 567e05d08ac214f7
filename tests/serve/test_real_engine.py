"""The HTTP side with the real engine on tiny random networks."""

import base64
import io
import socket

import numpy as np
import pytest
from PIL import Image

from tests.serve.running import running, until
from tests.serve.students import drawn_alone, request, small_pipeline, started


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


@pytest.fixture(scope="module")
def web(pipeline):
    with running(started(pipeline), start=False) as server:
        yield server


def test_an_image_over_http_is_the_pipelines(web, pipeline):
    prompts = ["a large red circle", "a small blue star"]
    styles = ["style_0", {"style_0": 0.25, "style_1": 0.75}]
    for prompt, style in zip(prompts, styles, strict=True):
        body = {"prompt": prompt, "styles": [style], "seeds": [5], "steps": 2, "solver": "euler"}
        (image,) = web.post("/api/draw", body).json()["images"]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["png"]))), np.int32)
        expected = drawn_alone(pipeline, request(prompt, style=style, seed=5, solver="euler")).astype(np.int32)
        assert np.abs(pixels - expected).max() <= 1


def test_a_client_that_leaves_frees_the_real_slots(web):
    with socket.create_connection(("127.0.0.1", web.service.settings.port), 10) as connection:
        body = b'{"prompt": "a", "styles": ["style_0"], "num_images": 4, "steps": 100}'
        head = "POST /api/draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: web.engine.counts()["running"] == 4)
    until(lambda: web.engine.counts()["running"] == 0)
    assert web.engine.counts()["cancelled"] == 4


def test_a_stream_of_the_real_engine_has_previews(web):
    body = {"prompt": "a", "styles": ["style_1"], "seeds": [1], "steps": 40, "stream": True}
    text = web.post("/api/draw", body).text
    assert '"preview": "' in text and "event: image" in text and text.rstrip().endswith("event: done\ndata: {}")


def test_metrics_of_the_real_engine_are_readable(web):
    text = web.get("/metrics").text
    assert "dmm_jax_slots 4.0" in text and 'dmm_jax_images_seconds_bucket{le="+Inf"}' in text
    assert 'dmm_jax_step_s{size="64x64"}' in text
