"""CLIP's preprocessing, embeddings and scores equal those of transformers; other folders are refused."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.evaluation import clip
from dmm_jax.evaluation.feature_networks import from_clip
from tests.text.test_tokenizer import END, IDS, write_files

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

RNG = np.random.default_rng(0)
PROMPTS = ["cat on dog", "dog", "a cat, on a dog!", "", "dog on cat"]
TEXT = {
    "vocab_size": len(IDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 12, "eos_token_id": IDS[END],
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip


def pictures(count=5, height=24, width=40):
    return RNG.integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def write_clip(folder, **text):
    """Writes a random CLIP as transformers does, and returns its twin."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=TEXT | text, vision_config=VISION, projection_dim=8)
    twin = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for module in twin.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    twin.save_pretrained(folder)
    return twin


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A random CLIP and its twin."""
    folder = tmp_path_factory.mktemp("clip")
    return write_files(folder, pad_token=END, model_max_length=12), write_clip(folder)


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "copy")


def pixel_values(images, size):
    processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return processor([image for image in images], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("height, width", [(64, 64), (30, 47), (51, 16), (8, 9)])
@pytest.mark.parametrize("size", [16, 21])
def test_preprocessing_equals_that_of_transformers(height, width, size):
    images = pictures(3, height, width)
    expected = pixel_values(images, size).movedim(1, -1).numpy()
    np.testing.assert_allclose(clip.preprocess(images, size), expected, atol=1e-6, rtol=0)


def test_embeddings_and_scores_equal_those_of_transformers(written, monkeypatch):
    monkeypatch.setattr(clip, "CHUNK_SIZE", 2)
    folder, twin = written
    images, network = pictures(), clip.load(str(folder))
    ids = clip.Tokenizer.from_folder(folder)(PROMPTS)
    with torch.no_grad():
        out = twin(input_ids=torch.from_numpy(ids).long(), pixel_values=pixel_values(images, 16))
    embeddings = clip.image_embeddings(network, images), clip.text_embeddings(network, PROMPTS)
    np.testing.assert_allclose(embeddings[0], out.image_embeds, atol=1e-5)
    np.testing.assert_allclose(embeddings[1], out.text_embeds, atol=1e-5)
    cosines = (out.image_embeds * out.text_embeds).sum(-1).numpy()
    assert (cosines > 0).any() and (cosines < 0).any()
    np.testing.assert_allclose(clip.clip_scores(*embeddings), 100 * np.maximum(cosines, 0), atol=1e-3)


def test_a_score_is_100_for_equal_directions_and_never_negative():
    axes = np.eye(3, dtype=np.float32)
    np.testing.assert_array_equal(clip.clip_scores(axes, np.stack([axes[0], axes[2], -axes[2]])), [100, 0, 0])


def test_pictures_are_scored_against_their_own_prompts(written):
    images, scorer = pictures(), clip.Scorer.open(str(written[0]), PROMPTS)
    scores = scorer(images, 0)
    np.testing.assert_allclose(scorer(images[2:4], 2), scores[2:4], atol=1e-4)
    assert not np.allclose(scorer(images[2:4], 0), scores[2:4], atol=1e-2)


def test_weights_with_a_published_hash_have_a_name(folder, monkeypatch):
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    network = clip.load(str(folder))
    assert network.sha256 == network.settings["weights SHA-256"] == sha256
    assert network.weights_name == f"unknown weights SHA-256 {sha256[:10]}"
    monkeypatch.setitem(clip.PUBLISHED, sha256, "someone/clip")
    assert network.weights_name == "someone/clip"


def test_an_old_configs_config_dict_has_precedence(folder):
    """As in transformers: OpenAI's published files have both, and dozens of fields of text generation."""
    config = json.loads((folder / "config.json").read_text())
    config["vision_config_dict"] = {**VISION, "num_hidden_layers": 3}
    config["vision_config"] |= {"top_k": 50, "id2label": {"0": "LABEL_0"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing: vision_model.encoder.layers.2"):
        clip.load(str(folder))
    del config["vision_config_dict"]
    (folder / "config.json").write_text(json.dumps(config))
    assert clip.load(str(folder)).arguments["num_hidden_layers"] == 2


def test_other_folders_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="not a folder"):
        clip.load(str(tmp_path / "none"))
    tensors = dict(safetensors_io.TensorFile(folder / "model.safetensors"))
    safetensors_io.save(folder / "model.safetensors", tensors | {"classifier.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match="unexpected classifier.weight"):
        clip.load(str(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(CheckpointError, match=r"image_mean is \[0.5, 0.5, 0.5\], not \[0.48"):
        clip.load(str(folder))
    (folder / "preprocessor_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(CheckpointError, match="model_type 'siglip'; expected 'clip'"):
        clip.load(str(folder))


def test_a_pickle_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only .safetensors files are opened"):
        clip.load(str(folder))


def test_prompts_need_the_tokenizers_files(folder):
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match="merges.txt"):
        clip.text_embeddings(clip.load(str(folder)), PROMPTS)


def test_only_the_config_of_cmmds_network_gives_cmmd(written):
    """No hash of the network's safetensors is published, so the name holds only its config and the file's hash."""
    small = clip.load(str(written[0]))
    large = small._replace(arguments=small.arguments | clip.LARGE_336, sha256="0123456789ab")
    assert from_clip(large).distance_name == "CMMD (ViT-L/14 at 336 pixels by its config, weights SHA-256 0123456789)"
    other = large._replace(arguments=large.arguments | {"image_size": 224})
    assert from_clip(other).distance_name == "MMD (unknown weights SHA-256 0123456789)"
    published = other._replace(sha256=next(iter(clip.PUBLISHED)))
    assert from_clip(published).distance_name == "MMD (openai/clip-vit-large-patch14)"
