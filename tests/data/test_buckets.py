"""Laws of the aspect-ratio buckets."""

import pytest

from dmm_jax.data.buckets import bucket_sizes, nearest_bucket
from dmm_jax.runtime.errors import UserError

# Height and width in SDXL's published list (arXiv:2307.01952, app. I), without the transposed ones.
SDXL = """512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344
768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024"""


def test_the_rule_gives_the_published_buckets_of_sdxl():
    published = {tuple(map(int, pair.split("x"))) for pair in SDXL.split()}
    published |= {size[::-1] for size in published}
    sizes = bucket_sizes(1024, 4.0, 64)
    assert sizes[0] == (1024, 1024) and set(sizes) == published and len(sizes) == len(published) == 41


@pytest.mark.parametrize("resolution, ratio, unit", [(512, 2.0, 64), (768, 3.0, 64), (64, 2.0, 16), (512, 1.0, 64)])
def test_buckets_keep_unit_ratio_and_number_of_pixels(resolution, ratio, unit):
    sizes = bucket_sizes(resolution, ratio, unit)
    assert sizes[0] == (resolution, resolution) and (len(sizes) == 1) == (ratio == 1.0)
    for height, width in sizes:
        assert height % unit == width % unit == 0 and 1 / ratio <= width / height <= ratio
        assert 0.9 <= height * width / resolution**2 <= 1.0
    assert {size[::-1] for size in sizes} == set(sizes)


def test_an_image_goes_to_the_nearest_ratio_of_sides():
    sizes = bucket_sizes(1024, 4.0, 64)
    assert all(sizes[nearest_bucket(2 * height, 2 * width, sizes)] == (height, width) for height, width in sizes)
    assert sizes[nearest_bucket(3000, 2000, sizes)] == (1216, 832) and sizes[nearest_bucket(1, 9, sizes)] == (512, 2048)


@pytest.mark.parametrize("arguments, message", [
    ((512, 0.5, 64), "from 1 to 4; got 0.5"), ((512, 5.0, 64), "from 1 to 4"),
    ((500, 2.0, 64), "multiple of 64 pixels for buckets; got 500. Use 512"),
])  # fmt: skip
def test_sizes_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        bucket_sizes(*arguments)
