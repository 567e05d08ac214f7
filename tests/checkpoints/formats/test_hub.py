"""Only the files of the named checkpoint are fetched from the hub, and no pickles. These tests use no network."""

import fnmatch

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import hub
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.verbs.main import main


@pytest.fixture
def calls(folder, monkeypatch):
    """Replaces the hub by the stock folder; returns the recorded requests."""
    requests = []

    def snapshot_download(repository, **options):
        requests.append((repository, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return requests


def fits(path, options):
    allowed = any(fnmatch.fnmatch(path, pattern) for pattern in options["allow_patterns"])
    return allowed and not any(fnmatch.fnmatch(path, pattern) for pattern in options.get("ignore_patterns", ()))


@pytest.mark.parametrize(
    "text, revision", [("hf:some-one/A.model", None), ("hf:some-one/A.model@refs/pr/1", "refs/pr/1")]
)
def test_a_hub_id_opens_the_fetched_folder(calls, folder, text, revision):
    checkpoint = open_checkpoint(text)
    assert checkpoint.digest("unet") == open_checkpoint(folder).digest("unet") and checkpoint.name == "A.model"
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


def test_a_repository_with_half_precision_weights_only_is_fetched(folder, tmp_path, monkeypatch):
    (tmp_path / "unet").mkdir()
    requests = []

    def snapshot_download(repository, **options):
        requests.append(options)
        return str(folder if fits("unet/diffusion_pytorch_model.fp16.safetensors", options) else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_checkpoint("hf:a/b").has("unet") and len(requests) == 2


def test_a_name_that_nobody_typed_is_taken_from_the_cache_alone(calls, folder, monkeypatch):
    with hub.cache_only():
        open_checkpoint("hf:a/b")
    open_checkpoint("hf:a/b")
    assert [options["local_files_only"] for _, options in calls] == [True, False]

    def snapshot_download(*_, **__):
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with hub.cache_only(), pytest.raises(CheckpointError, match="a run's config.json.*dmm-jax inspect hf:a/b"):
        open_checkpoint("hf:a/b")


def test_without_the_prefix_nothing_is_fetched(calls):
    with pytest.raises(CheckpointError, match="no checkpoint some-one/model.*hf:OWNER/NAME"):
        open_checkpoint("some-one/model")
    assert calls == []


@pytest.mark.parametrize("text", ["hf:", "hf:one", "hf:a/b/c", "hf:a/b@", "hf:../b c", "hf:a/b\x1b[31m"])
def test_a_malformed_hub_id_is_refused_before_fetching(calls, text):
    with pytest.raises(CheckpointError, match="Write hf:OWNER/NAME") as caught:
        open_checkpoint(text)
    assert calls == [] and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("no network"), OfflineModeIsEnabled("off")],
)
def test_an_unreachable_network_gives_one_clear_message(monkeypatch, capsys, error):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert main(["inspect", "hf:a/b"]) == 1
    output = capsys.readouterr().out
    assert "hf:a/b cannot be fetched" in output and "copy the checkpoint" in output
