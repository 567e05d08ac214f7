"""The compiled programs of the engine, and the arrays of its slots.

A slot holds one image on its way. `denoise` runs one evaluation of the network for every slot, whatever solver, step,
style and guidance each has; `place` puts new requests into slots; `decode` makes pixels of finished slots. Each local
device has its own slots and runs the programs on them without asking another device (`shard_map`).

Prompts of several lengths share a batch: a slot has room for the longest prompt, and attention does not see the room
that a prompt leaves free (`num_states`), so that the image is the one that `Pipeline` draws without padding. While all
prompts have one chunk, a program without that room runs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt, UInt8

from dmm_jax.diffusion import solvers
from dmm_jax.models import drawing
from dmm_jax.models.preview import Preview
from dmm_jax.models.text_encoders import TextConditioning
from dmm_jax.serve import work

SLOTS = P("batch")  # The first axis is divided among the devices.


class Slots(NamedTuple):
    """The arrays of S slots."""

    latents: Float[Array, "S h w C"]
    memory: Float[Array, "S h w C"]
    x0: Float[Array, "S h w C"]  # The last evaluation's.
    seeds: UInt[Array, " S"]
    states: Float[Array, "S 2 K L D"]  # Negative prompt and prompt, in chunks.
    pooled: Float[Array, "S 2 P"] | None


class Variant(NamedTuple):
    """One compiled form of `denoise`."""

    num_slots: int  # On each device: the first slots.
    guided: bool
    num_chunks: int

    def serves(self, other: "Variant") -> bool:
        """Tells whether this form computes all that the other form does."""
        return self.num_slots >= other.num_slots and self.guided >= other.guided and self.num_chunks >= other.num_chunks

    @property
    def cost(self) -> tuple[int, int]:
        """Orders forms by their time."""
        return self.num_slots * (1 + self.guided), self.num_chunks


def _on_each_device(mesh: Mesh | AbstractMesh, local, in_specs, out_specs):
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@functools.partial(jax.jit, static_argnames=("mesh", "shape", "text_shape", "pooled", "dtype"))
def empty(mesh: Mesh | AbstractMesh, shape: tuple, text_shape: tuple, pooled: int, dtype) -> Slots:
    """Returns empty slots.

    Args:
      shape: of the latents, (S, h, w, C).
      text_shape: of a prompt's states, (K, L, D).
      pooled: width of the pooled states; 0: there are none.
    """

    def local():
        count = shape[0] // mesh.size
        images = [jnp.zeros((count, *shape[1:]), jnp.float32) for _ in range(3)]
        states = jnp.zeros((count, 2, *text_shape), dtype)
        return Slots(
            *images, jnp.zeros(count, jnp.uint32), states, jnp.zeros((count, 2, pooled), dtype) if pooled else None
        )

    return _on_each_device(mesh, local, (), SLOTS)()


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="slots")
def place(
    mesh: Mesh | AbstractMesh,
    slots: Slots,
    text: TextConditioning,
    chunks: Int[Array, "S 2 K"],
    seeds: UInt[Array, " S"],
    scales: Float[Array, " S"],
) -> Slots:
    """Returns the slots with new requests in some of them: their prompts, and the noise that sampling starts from.

    Args:
      text: encoded chunks (C, L, D).
      chunks: for each slot, both its prompts and each of their chunks, the row of `text`, or -1; a slot without a
        first chunk keeps what it has.
      scales: standard deviation of the first latents.
    """

    def local(slots, text, chunks, seeds, scales):
        used = (chunks >= 0)[..., None, None].astype(slots.states.dtype)
        states = text.encoder_hidden_states.astype(slots.states.dtype)[chunks] * used  # (S, 2, K, L, D)
        noise = drawing.unit_noise(jax.vmap(jax.random.key)(seeds), slots.latents.shape[1:])
        latents = noise * scales[:, None, None, None]
        pooled = None if slots.pooled is None else text.pooled.astype(slots.pooled.dtype)[chunks[:, :, 0]]
        zeros = jnp.zeros_like(latents)
        new = Slots(latents, zeros, zeros, seeds, states, pooled)
        is_new = chunks[:, 0, 0] >= 0

        def choose(after, before):
            return jnp.where(is_new.reshape(-1, *[1] * (before.ndim - 1)), after, before)

        return jax.tree.map(choose, new, slots)

    return _on_each_device(mesh, local, (SLOTS, P(), SLOTS, SLOTS, SLOTS), SLOTS)(slots, text, chunks, seeds, scales)


@functools.partial(jax.jit, static_argnames=("graph", "mesh", "variant", "size"), donate_argnames="slots")
def denoise(
    graph: nnx.GraphDef,
    mesh: Mesh | AbstractMesh,
    variant: Variant,
    size: work.Size,
    params,
    slots: Slots,
    rows: Float[Array, "S columns"],
    preview: Preview,
) -> tuple[Slots, UInt8[Array, "s h w 3"], Bool[Array, " s"]]:
    """Returns the slots after one evaluation, previews of each x0, and whether each slot's latents are finite.

    Args:
      size: of the images in pixels, for the models that are conditioned on it.
      rows: what each slot computes (`work.COLUMNS`); zeros leave latents of 0.
    """

    def local(params, slots, rows, preview):
        part = jax.tree.map(lambda leaf: leaf[: variant.num_slots], slots)
        row, correction, request, weights = work.unpack(rows[: variant.num_slots])
        predict = _predictor(graph, variant, size, params, part, request)
        prediction = predict(part.latents * row["c_in"], row["timesteps"], *([weights] if weights.shape[1] else []))
        keys = jax.vmap(jax.random.key)(part.seeds)
        noise = solvers.step_noise(keys, request["number"], part.latents.shape[1:])
        state = solvers.update(row, correction, part[:3], prediction, noise)
        new = [leaf.at[: variant.num_slots].set(after) for leaf, after in zip(slots[:3], state, strict=True)]
        previews = preview.draw(state[2])
        return slots._replace(latents=new[0], memory=new[1], x0=new[2]), previews, _finite(state[0])

    return _on_each_device(mesh, local, (P(), SLOTS, SLOTS, P()), SLOTS)(params, slots, rows, preview)


def _finite(images):
    return jnp.isfinite(images).all(axis=(1, 2, 3))


def _predictor(graph, variant, size, params, part, request):
    """Returns the network for the slots of a variant, as `drawing.predictor` does."""
    count, prompts = len(part.latents), 2 if variant.guided else 1

    def per_prompt(array):  # (S, 2, ...) to (S P, ...): negative prompt and prompt, or the prompt alone.
        return array[:, 2 - prompts :].reshape(count * prompts, *array.shape[2:])

    text = per_prompt(part.states[:, :, : variant.num_chunks])
    text = text.reshape(len(text), -1, text.shape[-1])  # (S P, K L, D)
    added, num_states = None, None
    if part.pooled is not None:
        time_ids = jnp.array([*size, 0, 0, *size], jnp.float32)
        added = {"text_embeds": per_prompt(part.pooled), "time_ids": jnp.tile(time_ids, (count * prompts, 1))}
    if variant.num_chunks > 1:
        num_states = jnp.repeat(request["num_states"], prompts)
    scales = request["guidance_scale"], request["guidance_rescale"]
    return drawing.predictor(graph, variant.guided, params, count, text, added, *scales, num_states)


@functools.partial(jax.jit, static_argnames=("graph", "mesh"))
def decode(
    graph: nnx.GraphDef, mesh: Mesh | AbstractMesh, params, latents: Float[Array, "S h w C"], numbers: Int[Array, " n"]
) -> tuple[UInt8[Array, "n H W 3"], Bool[Array, " n"]]:
    """Returns the images of some slots, and whether each is finite.

    Args:
      numbers: of slots, counted on their own device; each device decodes equally many.
    """

    def local(params, latents, numbers):
        return drawing.decode(graph, params, latents[numbers])

    return _on_each_device(mesh, local, (P(), SLOTS, SLOTS), SLOTS)(params, latents, numbers)
