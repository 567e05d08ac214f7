"""The embedded world in one place: its scenes and captions, its styles, its renderer, its tokenizer files."""

from dmm_jax.world.renderer import render
from dmm_jax.world.scenes import (
    COLOURS,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    SIZES,
    WORDS,
    Content,
    SceneArrays,
    caption,
    captions,
    parse,
    parse_all,
    place,
    sample_content,
    sample_scenes,
)
from dmm_jax.world.styles import REGIONS, STYLES, Style, StyleArrays, sample_styles
from dmm_jax.world.words import write_tokenizer

__all__ = [
    "COLOURS",
    "IMAGE_SIZE",
    "REGIONS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "STYLES",
    "WORDS",
    "Content",
    "SceneArrays",
    "Style",
    "StyleArrays",
    "caption",
    "captions",
    "parse",
    "parse_all",
    "place",
    "render",
    "sample_content",
    "sample_scenes",
    "sample_styles",
    "write_tokenizer",
]
