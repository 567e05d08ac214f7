"""ShapesSource: captioned images of the embedded world, rendered when they are read."""

import hashlib
import threading

import jax
import numpy as np

from dmm_jax.runtime.errors import UserError
from dmm_jax.world.renderer import render
from dmm_jax.world.scenes import sample_scenes
from dmm_jax.world.styles import STYLES, sample_styles


class ShapesSource:
    """Random scenes in one named style, or each in a random style; entries are {"image", "caption", "id"}."""

    _CHUNK = 64

    def __init__(self, count: int, style: str | None = None, seed: int = 0, shuffled: bool = False):
        """Draws `count` scenes and styles from the seed; pictures are rendered in chunks when they are read.

        Args:
          shuffled: whether to order the pictures by a hash of their ids. Latent caches have this order.

        Raises:
          ValueError: the style is unknown, or count is not positive.
        """
        if count < 1:
            raise UserError(f"the embedded world needs at least one picture to draw; got {count}.")
        if style is not None and style not in STYLES:
            raise UserError(f"style must be None (random) or one of {', '.join(STYLES)}; got {style!r}.")
        rng = np.random.default_rng(seed)
        self.scenes, self.captions = sample_scenes(rng, count)
        self.styles = sample_styles(rng, count) if style is None else STYLES[style].repeat(count)
        self._order = np.arange(count)  # The id of each picture.
        if shuffled:  # As TensorFlow Datasets shuffles a split "train": caches of earlier versions have this order.
            hashes = [hashlib.md5(f"train{index}".encode(), usedforsecurity=False).digest() for index in range(count)]
            self._order = np.array(sorted(range(count), key=hashes.__getitem__))
        self._chunks: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk, row = divmod(int(index), self._CHUNK)
        with self._lock:
            if chunk not in self._chunks:
                self._chunks = dict([*self._chunks.items()][-1:]) | {chunk: self._draw(chunk)}
            image = self._chunks[chunk][row]
        picture = int(self._order[index])
        return {"image": image, "caption": self.captions[picture], "id": picture}

    @property
    def digest(self) -> str:
        """A hash of all captions, scenes and styles."""
        digest = hashlib.sha256("\n".join(self.captions).encode())
        for leaf in jax.tree.leaves((self.scenes, self.styles)):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()

    def _draw(self, chunk: int) -> np.ndarray:
        """Renders a chunk; the last one repeats its last picture, so that the renderer compiles once."""
        rows = self._order[np.minimum(np.arange(chunk * self._CHUNK, (chunk + 1) * self._CHUNK), len(self) - 1)]
        images = render(*jax.tree.map(lambda leaf: leaf[rows], (self.scenes, self.styles)))
        return np.round(np.asarray(images) * 255.0).astype(np.uint8)
