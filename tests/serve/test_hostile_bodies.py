"""Bodies that no client should send: each is answered with a 4xx in the shape of its interface, and draws nothing."""

import json
import random

import pytest

VALID = {
    "/v1/images/generations": {"prompt": "a", "model": "anime", "n": 1, "size": "64x64", "steps": 2, "seed": 1,
                               "guidance_scale": 2.0, "solver": "euler"},
    "/sdapi/v1/txt2img": {"prompt": "a", "steps": 2, "cfg_scale": 2.0, "width": 64, "height": 64,
                          "sampler_name": "Euler", "batch_size": 1, "override_settings": {}},
    "/api/draw": {"prompt": "a", "styles": ["anime"], "seeds": [1], "steps": 2, "guidance_scale": 2.0,
                  "solver": "ddim"},
}  # fmt: skip
NAMES = {"prompt", "model", "size", "solver", "sampler_name"}  # Fields that hold text.
WRONG = [[], {}, [[[]]], {"a": 1}, ["\ud800"], [None], {"": {"": {}}}]
WRONG_NUMBERS = [*WRONG, "many", -(10**400), 10**400, float("nan"), float("-inf"), float("inf"), "0x10"]
WRONG_TEXTS = [*WRONG, 5, 1e300, True, "\ud800", "\x00" * 3, "x" * 30_000]


def malformed(rng: random.Random, valid: dict) -> bytes:
    """Returns one body that is wrong in a random way."""
    kind = rng.randrange(8)
    text = json.dumps(valid)
    if kind == 0:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 60)))
    if kind == 1:
        return text[: rng.randrange(1, len(text))].encode()
    if kind == 2:
        return json.dumps(rng.choice([[], [valid], "text", 7, None, True])).encode()
    if kind == 3:
        return ("[" * 50_000 if rng.random() < 0.5 else '{"a":' * 50_000).encode()
    if kind == 4:
        return json.dumps(
            valid | {rng.choice(["promt", "path", "__class__", "\ud800", "file", "x" * 500]): "/etc"}
        ).encode()
    field = rng.choice([name for name in valid if name not in ("override_settings", "prompt")] + ["prompt"] * 2)
    if kind == 5 and "styles" not in valid:
        field = "prompt"
    values = WRONG_TEXTS if field in NAMES else WRONG_NUMBERS
    if field == "prompt":  # Every text without surrogates is a prompt, and neither null nor "" need be wrong.
        values = [value for value in values if value not in ("\x00" * 3,)]
    if field in ("styles", "seeds"):
        values = [
            5,
            "many",
            {},
            [],
            [[[]]],
            [{}],
            [["a"]],
            [float("nan")],
            [10**400],
            [{"anime": float("inf")}],
            ["\ud800"],
        ]
    return json.dumps(valid | {field: rng.choice(values)}).encode()


@pytest.mark.parametrize("path", VALID)
def test_every_malformed_body_is_refused_in_the_interfaces_shape(web, path):
    rng = random.Random(23)
    accepted = web.engine.numbers["accepted"]
    for _ in range(167):
        body = malformed(rng, VALID[path])
        answer = web.post(path, data=body, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, (answer.status_code, body[:200])
        content = answer.json()
        if path.startswith("/v1/"):
            assert set(content["error"]) == {"message", "type", "param", "code"}, body[:200]
            assert content["error"]["message"] and content["error"]["type"] == "invalid_request_error"
        elif path.startswith("/sdapi/"):
            assert set(content) == {"error", "detail", "body", "errors"} and content["detail"]
        else:
            assert set(content["error"]) == {"code", "message", "field"} and content["error"]["message"]
    assert web.engine.numbers["accepted"] == accepted


@pytest.mark.parametrize("path", VALID)
def test_the_valid_body_is_accepted(web, path):
    assert web.post(path, VALID[path]).status_code == 200


def test_a_body_of_another_type_is_refused(web):
    text = json.dumps(VALID["/api/draw"])
    answer = web.post("/api/draw", data=text, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 422 and "with Content-Type: application/json" in answer.text
