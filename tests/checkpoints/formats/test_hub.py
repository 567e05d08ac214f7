"""Of the hub only what is asked for is fetched, and no pickle with it; the network itself is never touched here."""

import fnmatch

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.verbs.main import main


@pytest.fixture
def calls(folder, monkeypatch):
    """Puts the stock folder in the hub's place; returns what was asked for."""
    asked = []

    def snapshot_download(repository, **options):
        asked.append((repository, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def fits(path, options):
    allowed = any(fnmatch.fnmatch(path, pattern) for pattern in options["allow_patterns"])
    return allowed and not any(fnmatch.fnmatch(path, pattern) for pattern in options.get("ignore_patterns", ()))


@pytest.mark.parametrize(
    "text, revision", [("hf:some-one/A.model", None), ("hf:some-one/A.model@refs/pr/1", "refs/pr/1")]
)
def test_a_hub_id_opens_as_the_folder_that_is_fetched(calls, folder, text, revision):
    found = open_checkpoint(text)
    assert found.digest("unet") == open_checkpoint(folder).digest("unet") and found.name == "A.model"
    ((repository, options),) = calls
    assert (repository, options["revision"]) == ("some-one/A.model", revision)
    for path in (
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/merges.txt",
        "model_index.json",
        "vae/config.json",
    ):
        assert fits(path, options)
    for path in (
        "unet/diffusion_pytorch_model.bin", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/x.safetensors",
    ):  # fmt: skip
        assert not fits(path, options)


def test_a_repository_of_half_precision_alone_is_fetched_as_that(folder, tmp_path, monkeypatch):
    (tmp_path / "unet").mkdir()
    asked = []

    def snapshot_download(repository, **options):
        asked.append(options)
        return str(folder if fits("unet/diffusion_pytorch_model.fp16.safetensors", options) else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_checkpoint("hf:a/b").has("unet") and len(asked) == 2


def test_without_the_prefix_nothing_is_fetched_and_the_prefix_is_told(calls):
    with pytest.raises(CheckpointError, match="no checkpoint some-one/model.*hf:OWNER/NAME"):
        open_checkpoint("some-one/model")
    assert calls == []


@pytest.mark.parametrize("text", ["hf:", "hf:one", "hf:a/b/c", "hf:a/b@", "hf:../b c", "hf:a/b\x1b[31m"])
def test_what_is_no_hub_id_is_refused_before_anything_is_fetched(calls, text):
    with pytest.raises(CheckpointError, match="Write hf:OWNER/NAME") as caught:
        open_checkpoint(text)
    assert calls == [] and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("no network"), OfflineModeIsEnabled("off")],
)
def test_a_network_that_is_off_is_one_clear_message(monkeypatch, capsys, error):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert main(["inspect", "hf:a/b"]) == 1
    said = capsys.readouterr().out
    assert "hf:a/b cannot be fetched" in said and "copy the checkpoint" in said
