"""What `bench` runs, and the work in it: networks, batches and pipelines of random numbers, as `train` holds them."""

import tempfile
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dmm_jax.checkpoints import published
from dmm_jax.checkpoints.abstract import abstract_model, abstract_params
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.data.batches import Batch
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.distill import teachers as teachers_lib
from dmm_jax.distill.teachers import Frozen, Teachers
from dmm_jax.distillation import Definition
from dmm_jax.kernels.attention import choose_implementation
from dmm_jax.models import layers
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.text_encoders import NUM_TIME_IDS, TextEncoders
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.models.unet_config import merged_config
from dmm_jax.pipeline import Network, Pipeline
from dmm_jax.planning import flops
from dmm_jax.runtime import sharding
from dmm_jax.text.tokenizer import Tokenizers
from dmm_jax.world.random_checkpoints import SIZES
from dmm_jax.world.tokenizer import write_tokenizer

SAMPLING = {"num_inference_steps": 25, "guidance_scale": 7.0, "solver": "dpmpp_2m_karras"}


def described(size: str) -> Checkpoint:
    """Returns a checkpoint of a size in `SIZES` that has configs and no tensors."""
    return published.checkpoint(size, SIZES)


def random_params(abstract, mesh, dtype=jnp.float32, *, fsdp: bool = False, copies: int = 0, seed: int = 0):
    """Fills parameters of these shapes with normal numbers of PyTorch's initial scale, on the mesh, in one program.

    Args:
      dtype: of the layers; norms and tables are float32, as in training.
      fsdp: place them as the student; otherwise whole on every device.
      copies: of so many teachers, as `put_teachers` lays them out; 0: of one network.
    """
    longest = max(leaf.size for leaf in jax.tree.leaves(abstract))

    def spec(leaf):
        return sharding.parameter_spec(leaf.shape, mesh) if fsdp else sharding.COPY

    def make():
        noise = jax.random.normal(jax.random.key(seed), (longest,))  # Every leaf takes a piece of the same noise.

        def one(path, leaf):
            fan_in = max(leaf.size // leaf.shape[-1], 1)
            values = noise[: leaf.size].reshape(leaf.shape) * (3 * fan_in) ** -0.5
            values = jnp.abs(values) if path[-1].key == "running_var" else values
            values = values + (path[-1].key in ("scale", "running_var"))
            values = values.astype(layers.stored_dtype(path, dtype))
            if not copies:
                return values
            return teachers_lib.for_each_stack(
                lambda rows: jnp.stack([values] * copies)[rows], path, leaf, copies, mesh
            )

        return jax.tree.map_with_path(one, abstract)

    places = sharding.shardings(mesh, sharding.TEACHERS if copies else jax.tree.map(spec, abstract))
    return jax.jit(make, out_shardings=places)()


def random_networks(definition: Definition) -> tuple[dict, Teachers, Frozen]:
    """Returns trained parameters by network, teachers and frozen networks: random numbers, placed as the step wants."""
    base, mesh, num_teachers = definition.base, definition.mesh, len(definition.config.teachers)
    trained = {"student": random_params(abstract_params("unet", definition.student_config), mesh, fsdp=True)}
    numbers = np.full(num_teachers, -1, np.int32), np.array([(k, 1) for k in range(num_teachers)], np.int32)
    encoder, styles = sharding.put(numbers, mesh, sharding.TEACHERS)
    unet = random_params(base.abstract("unet"), mesh, definition.dtype, copies=num_teachers)
    frozen = Frozen({name: random_params(base.abstract(name), mesh, definition.dtype) for name in base.text_encoders})
    if definition.config.adversarial.weight:
        judge, fixed = definition.abstract_discriminator()
        trained["discriminator"] = random_params(judge, mesh, fsdp=True)
        frozen = frozen._replace(**random_params(fixed, mesh, definition.dtype))
    return trained, Teachers(unet, None, encoder, styles), frozen


def random_batch(config, base: Checkpoint) -> Batch:
    """Returns a batch as the latent cache gives it: leaves (N, B/N, ...)."""
    rng = np.random.default_rng(0)
    num_teachers, side = len(config.teachers), base.unet_config["sample_size"]
    lead = (num_teachers, config.batch_size // num_teachers)
    return Batch(
        latents=rng.standard_normal((*lead, side, side, 4), np.float32).astype(np.float16),
        input_ids=rng.integers(0, 1000, (*lead, 77 * len(base.text_encoders)), dtype=np.int32),
        time_ids=rng.integers(0, 1024, (*lead, NUM_TIME_IDS), dtype=np.int32),
    )


def random_pipeline(size: str, config) -> Pipeline:
    """Builds a sampling pipeline around a merged UNet of random weights."""
    base, mesh = described(size), sharding.make_mesh(data=jax.device_count())
    names = [name for name, _ in config.teachers]
    student_config = merged_config(base.unet_config, len(names))
    dtype = jnp.dtype(config.dtype)
    implementation = choose_implementation(config.attention, dtype, num_devices=mesh.size)

    def network(build):
        graph, state = nnx.split(abstract_model(build), nnx.Param)
        return Network(graph, sharding.on_each_device(random_params(nnx.to_pure_dict(state), mesh, dtype)))

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder)
        tokenizers = Tokenizers.from_folders([folder] * len(base.text_encoders))
    unet = {"dtype": dtype, "attention_implementation": implementation}
    return Pipeline(
        unet=network(lambda rngs: UNet2DConditionModel.from_config(student_config, rngs=rngs, **unet)),
        vae=network(lambda rngs: AutoencoderKL.from_config(base.vae_config, dtype=dtype, rngs=rngs)),
        text_encoders=network(lambda rngs: TextEncoders(base.text_configs, dtype=dtype, rngs=rngs)),
        tokenizers=tokenizers,
        schedule=NoiseSchedule.from_config(base.scheduler_config),
        styles=tuple(names),
        source=base,
    )


def train_tflop(base: Checkpoint, student_config: Mapping) -> float:
    """Counts the TFLOP per image of a step: student forward and backward (twice the forward), one teacher's forward.

    Recomputation is not counted: it is a way of computing, not a part of the work. Nor are text encoders.
    """
    return 3 * unet_tflop(student_config) + unet_tflop(base.unet_config)


def sample_tflop(base: Checkpoint) -> float:
    """Counts the TFLOP per sampled image: at each step the UNet for two prompts, for guidance; and the decoder.

    As the pipeline computes it: Stable Diffusion 1 and 2 share what comes before the first look at a prompt.
    """
    decode = _network_flops(AutoencoderKL, "vae", base.vae_config, _latents(base.unet_config), method="decode")
    config = base.unet_config
    both = 2 * unet_tflop(config) if config.get("addition_time_embed_dim") else unet_tflop(config, num_prompts=2)
    return SAMPLING["num_inference_steps"] * both + decode


def unet_tflop(config: Mapping, num_prompts: int = 1) -> float:
    """Counts the TFLOP of a UNet's forward pass for one image, or for several prompts to one."""
    states = jax.ShapeDtypeStruct((num_prompts, 77, config["cross_attention_dim"]), jnp.float32)
    inputs = [_latents(config), jax.ShapeDtypeStruct((1,), jnp.int32), states]
    style = (1, 4 * config["block_out_channels"][0]) if config.get("num_models") else None
    inputs.append(style and jax.ShapeDtypeStruct(style, jnp.float32))
    if config.get("addition_time_embed_dim"):
        pooled = config["projection_class_embeddings_input_dim"] - NUM_TIME_IDS * config["addition_time_embed_dim"]
        widths = {"text_embeds": pooled, "time_ids": NUM_TIME_IDS}
        inputs.append({name: jax.ShapeDtypeStruct((1, width), jnp.float32) for name, width in widths.items()})
    return _network_flops(UNet2DConditionModel, "unet", config, *inputs)


def _latents(config):
    return jax.ShapeDtypeStruct((1, config["sample_size"], config["sample_size"], 4), jnp.float32)


def _network_flops(model, component, config, *inputs, method="__call__") -> float:
    graph = nnx.split(abstract_model(lambda rngs: model.from_config(config, rngs=rngs)))[0]

    def forward(params, *inputs):
        return jax.tree.leaves(getattr(nnx.merge(graph, params), method)(*inputs))

    return flops.count(forward, abstract_params(component, config), *inputs) / 1e12
