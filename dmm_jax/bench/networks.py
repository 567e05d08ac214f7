"""Networks, batches and pipelines of random numbers for `bench`, as `train` and `sample` hold them."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dmm_jax.checkpoints import published
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.config import checks
from dmm_jax.data.batches import Batch
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.distill import teachers as teachers_lib
from dmm_jax.distill.definition import Definition
from dmm_jax.distill.layout import as_read, state_specs
from dmm_jax.distill.teachers import Frozen, Teachers
from dmm_jax.kernels.attention import choose_implementation
from dmm_jax.models import layers
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.block_loops import is_stacked
from dmm_jax.models.network import Network
from dmm_jax.models.text_encoders import NUM_TIME_IDS, TextEncoders
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.models.unet_config import merged_config
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError
from dmm_jax.text.tokenizer import Tokenizers
from dmm_jax.world.random_checkpoints import SIZES
from dmm_jax.world.tokenizer import write_tokenizer

SAMPLING = {"num_inference_steps": 25, "guidance_scale": 7.0, "solver": "dpmpp_2m_karras"}


def abstract_checkpoint(size: str) -> Checkpoint:
    """Returns a checkpoint of a size in `SIZES` that has configs and no tensors."""
    return published.checkpoint(size, SIZES)


def make_mesh(config, num_devices: int = 0) -> jax.sharding.Mesh:
    """Returns the config's mesh on the first devices, or on all (0).

    Raises:
      UserError: there are fewer devices, or the batch does not divide among them.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise UserError(f"{num_devices} devices were asked for; there are {len(devices)}.")
    mesh = sharding.make_mesh(**config.mesh, devices=devices[: num_devices or None])
    without_validation = config.copy_and_resolve_references()
    without_validation.validation_size = 0  # No job validates.
    checks.check_mesh(without_validation, mesh.shape)
    return mesh


def random_params(abstract, mesh, dtype=jnp.float32, *, fsdp: bool = False, copies: int = 0, seed: int = 0):
    """Returns parameters of these shapes, normal numbers of PyTorch's initial scale, on the mesh.

    Args:
      dtype: of the layers; norms and tables are float32, as in training.
      fsdp: place them as the student; otherwise whole on every device.
      copies: number of teachers to lay out as `put_teachers` does; 0: one network.
    """
    longest = max(leaf.size for leaf in jax.tree.leaves(abstract))

    def make():
        noise = jax.random.normal(jax.random.key(seed), (longest,))  # Every leaf takes a part of the same noise.

        def fill(path, leaf):
            num_blocks = leaf.shape[0] if is_stacked(path) else 1
            fan_in = max(leaf.size // leaf.shape[-1] // num_blocks, 1)
            values = noise[: leaf.size].reshape(leaf.shape) * (3 * fan_in) ** -0.5
            values = jnp.abs(values) if path[-1].key == "running_var" else values
            values = values + (path[-1].key in ("scale", "running_var"))
            values = values.astype(layers.stored_dtype(path, dtype))
            if not copies:
                return values
            return teachers_lib.for_each_stack(
                lambda rows: jnp.stack([values] * copies)[rows], path, leaf, copies, mesh
            )

        return jax.tree.map_with_path(fill, abstract)

    specs = state_specs(abstract, mesh) if fsdp else sharding.TEACHERS if copies else sharding.COPY
    return jax.jit(make, out_shardings=sharding.shardings(mesh, specs))()


def random_networks(definition: Definition) -> tuple[dict, Teachers, Frozen]:
    """Returns trained parameters by network, teachers and frozen networks: random numbers, placed for the step."""
    base, mesh, num_teachers = definition.base, definition.mesh, len(definition.config.teachers)
    trained = {"student": random_params(definition.abstract_state().student.params, mesh, fsdp=True)}
    rows = np.arange(num_teachers, dtype=np.int32)
    numbers = np.full_like(rows, -1), np.stack([rows, np.ones_like(rows)], 1), rows  # Encoders, styles, batch rows.
    numbers = sharding.put(numbers, mesh, sharding.TEACHERS)
    unet = random_params(base.abstract("unet"), mesh, definition.dtype, copies=num_teachers)
    frozen = Frozen({name: random_params(base.abstract(name), mesh, definition.dtype) for name in base.text_encoders})
    if definition.config.adversarial.weight:
        judge, fixed = definition.abstract_discriminator()
        trained["discriminator"] = random_params(judge, mesh, fsdp=True)
        frozen = frozen._replace(**random_params(fixed, mesh, definition.dtype))
    if definition.ranks:
        _, shapes = definition.abstract_frozen(0)
        frozen = frozen._replace(student=as_read(random_params(shapes.student, mesh, definition.dtype)))
    return trained, Teachers(unet, None, *numbers), frozen


def random_batch(config, base: Checkpoint) -> Batch:
    """Returns a batch as the latent cache gives it: leaves (N, B/N, ...)."""
    rng = np.random.default_rng(0)
    num_teachers, side = len(config.teachers), base.unet_config["sample_size"]
    leading = (num_teachers, config.batch_size // num_teachers)
    return Batch(
        latents=rng.standard_normal((*leading, side, side, 4), np.float32).astype(np.float16),
        input_ids=rng.integers(0, 1000, (*leading, 77 * len(base.text_encoders)), dtype=np.int32),
        time_ids=rng.integers(0, 1024, (*leading, NUM_TIME_IDS), dtype=np.int32),
    )


def random_pipeline(size: str, config) -> Pipeline:
    """Returns a sampling pipeline with a merged UNet of random weights."""
    base, mesh = abstract_checkpoint(size), sharding.make_mesh(data=jax.device_count())
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
