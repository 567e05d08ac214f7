"""The plan of a server has the arrays that the engine holds, and temporaries that follow its slots and sizes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from dmm_jax.bench import networks
from dmm_jax.checkpoints import published
from dmm_jax.models.unet_config import merged_config
from dmm_jax.planning import compiler, lifetimes, memory, requirements, serving
from dmm_jax.runtime.errors import UserError
from dmm_jax.serve.engine import Engine
from dmm_jax.verbs import main as cli
from tests.serve.students import ONE_LEVEL, SIZE, small_pipeline

MIB = 2.0**20
ONE_LEVEL_VAE = {
    "block_out_channels": [32], "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
}  # fmt: skip
CONFIGS = networks.SIZES["tiny"] | {
    "unet": networks.SIZES["tiny"]["unet"] | ONE_LEVEL, "vae": networks.SIZES["tiny"]["vae"] | ONE_LEVEL_VAE,
}  # fmt: skip
LATENT = (8, 8)  # One pixel per latent cell, since the VAE has one level.


@pytest.fixture(scope="module")
def tiny():
    return published.checkpoint("tiny", {"tiny": CONFIGS})


@pytest.fixture(scope="module")
def planned(tiny):
    return serving.plan(tiny, "gpu:1x24GB", [LATENT], 4, num_styles=2, dtype="float32")


def test_planned_arrays_are_those_of_the_engine():
    pipeline = small_pipeline("tiny", **ONE_LEVEL)
    pool = Engine(pipeline, [SIZE], 4).pools[SIZE]
    pool.reset()
    parts = {"UNet": pipeline.unet, "VAE": pipeline.vae, "text encoders": pipeline.text_encoders}
    expected = {name: memory.per_device(network.params) for name, network in parts.items()}
    config = pipeline.unet.merged().config
    mesh = AbstractMesh((1,), ("batch",))
    server = serving.Server(pipeline.source, config, pipeline.dtype, mesh, "xla", 4)
    assert server.num_styles == 2
    assert server.array_bytes([SIZE]) == expected | {"slots 64x64": memory.per_device(pool.slots)}


def test_two_devices_share_the_slots_and_have_the_parameters_each(tiny, planned):
    both = serving.plan(tiny, "gpu:2x24GB", [LATENT, (4, 8)], 8, num_styles=2, dtype="float32")
    assert {kind: size for kind, size in both.memory.items() if kind != "slots 8x4"} == planned.memory
    assert both.images_per_s["8x8"] == pytest.approx(2 * planned.images_per_s["8x8"])
    assert both.images_per_s["8x4"] > both.images_per_s["8x8"]


def test_temporaries_follow_the_slots(tiny):
    mesh, config = AbstractMesh((1,), ("batch",)), merged_config(tiny.unet_config, 2)
    servers = [serving.Server(tiny, config, np.dtype("float32"), mesh, "xla", count) for count in (8, 16)]
    programs = [serving.per_device(*server.evaluation(LATENT, 1)) for server in servers]
    fewer, more = map(lifetimes.temporaries, programs)
    assert 1.8 < more / fewer <= 2.0
    half = dataclasses.replace(servers[0], dtype=np.dtype(jnp.bfloat16)).array_bytes([])
    assert 0.5 < half["UNet"] / servers[0].array_bytes([])["UNet"] < 0.6  # Norms and tables stay float32.


def test_the_verb_prints_what_fits_and_what_does_not(capsys, monkeypatch, planned):
    command = ["plan", "--serve", "sd15", "--topology", "gpu:1x24GB", "--slots", "4", "--sizes", "8x4", "--styles", "2"]
    calls = []
    monkeypatch.setattr(serving, "plan", lambda *args, **options: calls.append((args, options)) or planned)
    assert cli.main([*command, "--steps", "30", "--no-compile", "--json"]) == 0
    (checkpoint, *args), options = calls[0]
    assert checkpoint.kind == "published" and args == ["gpu:1x24GB", [(4, 8)], 4]
    assert options == {"num_styles": 2, "num_steps": 30, "dtype": "bfloat16", "compiled": False}
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["sizes"] == ["8x8"] and report["slots"] == 4
    assert report["memory_total_gb"] == pytest.approx(sum(report["memory_gb"].values()))
    assert {"UNet", "VAE", "text encoders", "slots 8x8", "temporaries", "margin"} == set(report["memory_gb"])
    small = dataclasses.replace(planned.topology.device, memory=MIB)
    planned = dataclasses.replace(planned, topology=dataclasses.replace(planned.topology, device=small))
    assert cli.main(command) == 1
    printed = capsys.readouterr()
    assert "DOES NOT FIT" in printed.out and "8x8: " in printed.out and "fewer --slots" in printed.err
    assert "  at the speed of " in printed.out


def test_the_verb_reads_a_checkpoint_s_own_styles(monkeypatch, planned):
    calls = []
    monkeypatch.setattr("dmm_jax.checkpoints.open.open_checkpoint", lambda path: f"opened {path}")
    monkeypatch.setattr(serving, "plan", lambda *args, **options: calls.append((args, options)) or planned)
    assert cli.main(["plan", "--serve", "x", "--json"]) == 0
    ((args, options),) = calls
    assert args[:3] == ("opened x", "gpu:1x80GB", []) and options["num_styles"] == 0


@pytest.mark.parametrize(
    "topology, slots, message",
    [
        ("gpu:2x24GB", 3, "a multiple of the 2 devices; got 3. Use 4"),
        ("gpu:16x80GB", 16, "one host; gpu:16x80GB has 16"),
        ("gpu:1x24GB", 0, "slots must be a whole number"),
    ],
)
def test_a_server_that_cannot_be_is_refused(tiny, topology, slots, message):
    with pytest.raises(UserError, match=message):
        serving.plan(tiny, topology, [LATENT], slots)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--serve", "sd15", "--config", "sd15"],
        ["--serve", "sd15", "--full-effort"],
        ["--serve", "sd15", "--config.batch_size=3"],
        ["--serve", "sd15", "--sizes", "512"],
    ],
)
def test_arguments_that_contradict_are_usage_errors(arguments):
    try:
        assert cli.main(["plan", *arguments]) == 2
    except SystemExit as end:
        assert end.code == 2


@pytest.mark.skipif(not compiler.is_installed(), reason="needs libtpu: pip install 'dmm-jax[plan]'")
def test_the_tpu_compiler_compiles_the_server(tiny):
    with jax.default_matmul_precision("default"):
        compiled = serving.plan(tiny, "v5e:2x2", [LATENT], 4, num_styles=2)
    assert compiled.method == requirements.COMPILED and compiled.fits and compiled.memory["temporaries"] > 0
