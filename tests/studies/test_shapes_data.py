"""The study's data: mixtures of two caches, and short prompts."""

import numpy as np

from dmm_jax.data.cache import LatentCache
from dmm_jax.studies import shapes_data


def test_a_mixture_has_the_share_of_teacher_made_examples(tiny, tmp_path):
    rendered = LatentCache(tiny[1].data.cache)

    class Made(LatentCache):
        """The same pictures with recognisable latents."""

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return super().__getitem__(index) | {"latents": np.full(self.header.latent_shape, 7, np.float16)}

    mixed = shapes_data.mix(rendered, Made(tiny[1].data.cache), tmp_path / "mixed", 0.25)
    examples = [mixed[k] for k in range(len(mixed))]
    assert [bool((example["latents"] == 7).all()) for example in examples] == [True] * 2 + [False] * 6
    for name in ("latents", "input_ids", "time_ids"):
        np.testing.assert_array_equal(examples[5][name], rendered[3][name])
    mixed.check(vae=rendered.header.vae, tokenizer=rendered.header.tokenizer)
    assert "2 of [" in mixed.header.source and "6 of [" in mixed.header.source
    assert len(shapes_data.mix(rendered, rendered, tmp_path / "mixed", 0.5)) == 8  # An existing cache is kept.


def test_short_prompts_name_one_object():
    assert shapes_data.short("a large red circle left of a small blue square") == "red circle"
