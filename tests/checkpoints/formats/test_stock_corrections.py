"""A folder's configs are corrected as diffusers' pipeline corrects them, and only then."""

import json
import warnings

import pytest

from dmm_jax.checkpoints.architecture import SD1, SDXL
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.stock_corrections import corrected_scheduler, corrected_unet
from dmm_jax.checkpoints.open import open_checkpoint
from tests.checkpoints.files import rewrite_json

OUTDATED = {
    "an old offset": ("DDIMScheduler", {"steps_offset": 0}, {}),
    "no offset": ("PNDMScheduler", {"steps_offset": None}, {}),
    "a clipped sample": ("DDIMScheduler", {"clip_sample": True}, {}),
    "an old size": ("PNDMScheduler", {}, {"sample_size": 32, "_diffusers_version": "0.6.0"}),
    "a sound size": ("PNDMScheduler", {}, {"sample_size": 32, "_diffusers_version": "0.10.2"}),
}


@pytest.mark.parametrize("case", OUTDATED)
def test_configs_are_those_of_the_stock_pipeline(stock, copy, case):
    diffusers = pytest.importorskip("diffusers")
    scheduler_class, scheduler, unet = OUTDATED[case]
    path = copy / "scheduler" / "scheduler_config.json"
    config = {name: v for name, v in (json.loads(path.read_text()) | scheduler).items() if v is not None}
    path.write_text(json.dumps(config | {"_class_name": scheduler_class}))
    rewrite_json(copy / "unet" / "config.json", **unet)
    networks = {name: getattr(stock, name) for name in ("vae", "text_encoder")}
    stock_pipeline = diffusers.StableDiffusionPipeline(
        **networks, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        unet=diffusers.UNet2DConditionModel.from_pretrained(copy / "unet"),
        scheduler=getattr(diffusers, scheduler_class).from_pretrained(copy / "scheduler"),
    )  # fmt: skip
    opened = open_checkpoint(copy)
    assert opened.unet_config["sample_size"] == stock_pipeline.unet.config.sample_size
    assert opened.scheduler_config["steps_offset"] == stock_pipeline.scheduler.config.steps_offset == 1
    assert opened.scheduler_config.get("clip_sample", False) == stock_pipeline.scheduler.config.get(
        "clip_sample", False
    )


def test_the_pipeline_of_xl_corrects_nothing():
    assert corrected_scheduler({"steps_offset": 0, "clip_sample": True}, SDXL) == {
        "steps_offset": 0, "clip_sample": True,
    }  # fmt: skip
    assert corrected_unet({"sample_size": 8, "_diffusers_version": "0.6.0"}, SDXL)["sample_size"] == 8


@pytest.mark.parametrize(
    "stated, used",
    [({}, (64, 64)), ({"sample_size": None}, (64, 64)), ({"sample_size": [64, 64]}, (64, 64)),
     ({"sample_size": [48, 64]}, ([48, 64], 64)), ({"cross_attention_dim": [768] * 4, "sample_size": 8}, (8, 768))],
)  # fmt: skip
def test_sizes_that_are_absent_or_lists_are_one_number(stated, used):
    config = corrected_unet({"cross_attention_dim": 64} | stated, SD1)
    assert (config["sample_size"], config["cross_attention_dim"]) == used


@pytest.mark.parametrize("size", ["64", 0, -1, 10**9, 8.5, True, [8, 8, 16], [8, "8"], {}])
def test_a_senseless_sample_size_is_refused(copy, size):
    rewrite_json(copy / "unet" / "config.json", sample_size=size)
    with pytest.raises(CheckpointError, match="unet of .*copy cannot be built"):
        open_checkpoint(copy).shapes("unet")


def test_noise_levels_that_no_solver_has_are_named_once():
    with pytest.warns(UserWarning, match="sets use_lu_lambdas, which no solver here has"):
        corrected_scheduler({"use_lu_lambdas": True}, SD1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corrected_scheduler({"use_lu_lambdas": False, "use_karras_sigmas": True}, SD1)
