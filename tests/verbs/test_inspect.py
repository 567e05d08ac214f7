"""`dmm-jax inspect`: a report on stdout, and what prevents a merge on stderr."""

import json
import re

import numpy as np
import pytest

from dmm_jax.checkpoints.formats.safetensors_io import save
from dmm_jax.verbs import main as cli


def test_json_reports_that_the_checkpoints_can_be_merged(capsys, tiny):
    assert cli.main(["inspect", *map(str, tiny[0].values()), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mergeable"] is True


def test_what_prevents_a_merge_is_an_error_too(capsys, tmp_path):
    assert cli.main(["inspect", str(tmp_path / "x.safetensors"), "--json"]) == cli.EXIT_ERROR
    printed = capsys.readouterr()
    assert json.loads(printed.out)["obstacles"][0] in printed.err
    assert printed.err.startswith("dmm-jax inspect: error: ")


def test_the_text_says_once_what_prevents_a_merge(capsys, tmp_path):
    for names in (["x"], ["x", "x + y"]):
        assert cli.main(["inspect", *(str(tmp_path / name) for name in names)]) == cli.EXIT_ERROR
        printed = capsys.readouterr()
        assert printed.out.count("there is no checkpoint") == 1 and printed.err == ""


def test_a_sound_adapter_alone_is_no_error(capsys, tmp_path):
    factors = {"lora_unet_x.lora_up.weight": np.ones((4, 1)), "lora_unet_x.lora_down.weight": np.ones((1, 4))}
    sound, refused = tmp_path / "sound.safetensors", tmp_path / "refused.safetensors"
    save(sound, factors)
    assert cli.main(["inspect", str(sound)]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("LoRA of 1 layers") == 1 and printed.err == ""
    assert cli.main(["inspect", str(sound), str(sound)]) == cli.EXIT_ERROR
    save(refused, factors | {"lora_unet_x.oft_blocks": np.ones((2, 2))})
    assert cli.main(["inspect", str(refused)]) == cli.EXIT_ERROR
    printed = capsys.readouterr()
    assert "refused.safetensors cannot be used:" in printed.out and "OFT" in printed.out


FACTORS = {"lora_unet_x.lora_up.weight": np.ones((4, 1)), "lora_unet_x.lora_down.weight": np.ones((1, 4))}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"lora_unet_y.lora_up.weight": np.ones((4, 1))}, "is a damaged adapter: .*lora_unet_y. Fetch it again"),
        ({"lora_unet_x.lora_up.weight": np.ones((4, 2))}, "is a damaged adapter: .*lora_unet_x. Fetch it again"),
        ({"lora_unet_x.lora_up.weight": np.full((4, 1), np.nan)}, "not finite: lora_unet_x.lora_up.weight"),
    ],
)
def test_a_faulty_adapter_gets_a_verdict(capsys, tmp_path, changes, expected):
    save(tmp_path / "x.safetensors", FACTORS | changes)
    assert cli.main(["inspect", str(tmp_path / "x.safetensors")]) == cli.EXIT_ERROR
    verdict = capsys.readouterr().out.split("\n\n")[-1]
    assert verdict.startswith("x.safetensors cannot be used:") and re.search(expected, verdict)
    assert "as one text" not in verdict
