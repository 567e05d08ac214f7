"""Laws of the tokenizer on a small vocabulary: its rows are CLIP's, and a warning quotes the text that is cut off."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest

from dmm_jax.checkpoints.write import copy_tokenizer
from dmm_jax.runtime.errors import UserError
from dmm_jax.text.tokenizer import Tokenizer, Tokenizers
from dmm_jax.text.vocabulary import CLIP, CLIP_VOCAB_SIZE, OPEN_CLIP, all_ids, clip_bpe, read_bpe

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "o n</w>"]
VOCAB = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *(merge.replace(" ", "") for merge in MERGES), START, END]
IDS = {token: i for i, token in enumerate(VOCAB)}


def write_files(folder, vocab=IDS, **config):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **config}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_files(tmp_path / "tokenizer", pad_token=END, model_max_length=77)


def ids(*tokens):
    return [IDS[token] for token in tokens]


def test_a_row_is_start_merged_words_end_padding(folder):
    rows = Tokenizer.from_folder(folder)(["cat on dog", ""])
    assert rows.shape == (2, 77) and rows.dtype == np.int32
    assert rows[0].tolist() == ids(START, "cat</w>", "on</w>", "dog</w>") + ids(END) * 73
    assert rows[1].tolist() == ids(START) + ids(END) * 76


def test_no_prompts_give_no_rows(folder):
    assert Tokenizer.from_folder(folder)([]).shape == (0, 77)


def test_case_and_spaces_do_not_matter_and_punctuation_splits_words(folder):
    rows = Tokenizer.from_folder(folder)(["  Cat \n ON   dog! ", "cat on dog !", "cat on do g !"])
    assert (rows[0] == rows[1]).all() and (rows[1] != rows[2]).any()
    assert rows[2, 3:6].tolist() == ids("d", "o</w>", "g</w>")


def test_a_special_token_written_in_a_prompt_is_that_token(folder):
    row = Tokenizer.from_folder(folder)([f"cat {END} dog"])[0]
    assert row[:5].tolist() == ids(START, "cat</w>", END, "dog</w>", END)


def test_the_rows_are_those_of_transformers(folder):
    from transformers import CLIPTokenizer

    prompts = ["", "cat", "Cats, 3 dogs & a man's hat... (on:1.2)", "x" * 60, "cat " * 100]
    expected = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", truncation=True, max_length=77, return_tensors="np"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (Tokenizer.from_folder(folder)(prompts) == expected["input_ids"]).all()


def test_the_folder_determines_the_padding(tmp_path):
    padded_with_zero = Tokenizer.from_folder(write_files(tmp_path / "t", pad_token="!", model_max_length=77))
    assert padded_with_zero.pad_id == 0
    assert padded_with_zero(["cat"])[0].tolist() == ids(START, "cat</w>", END) + [0] * 74


def test_older_folders_set_padding_in_the_special_tokens_map(tmp_path):
    folder = write_files(tmp_path / "t")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    assert Tokenizer.from_folder(folder)(["cat"])[0, -1] == 0


def test_a_prompt_that_fills_the_row_is_not_cut(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = Tokenizer.from_folder(folder)(["cat " * 75])[0]
    assert row[-1] == IDS[END] and (row[1:-1] == IDS["cat</w>"]).all()


def test_a_long_prompt_is_cut_and_the_warning_quotes_the_lost_text(folder):
    with pytest.warns(UserWarning, match=r'78 tokens was cut to 75 .*lost: "Dog, ON"$') as warned:
        row = Tokenizer.from_folder(folder)(["cat " * 74 + "on Dog, ON"])[0]
    assert row[-2:].tolist() == ids("on</w>", END)
    assert len(warned) == 1


def test_a_saved_folder_gives_the_same_ids_to_old_and_new_readers(tmp_path):
    prompts = ["cat! on dog", "Dog"]
    source = Tokenizer.from_folder(write_files(tmp_path / "a", pad_token="!", model_max_length=20))
    source.save(tmp_path / "b")
    assert (Tokenizer.from_folder(tmp_path / "b")(prompts) == source(prompts)).all()
    (tmp_path / "b" / "tokenizer.json").unlink()
    assert (Tokenizer.from_folder(tmp_path / "b")(prompts) == source(prompts)).all()
    assert json.loads((tmp_path / "b" / "vocab.json").read_text()) == IDS
    assert "local" not in (tmp_path / "b" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"])
def test_a_file_of_gigabytes_is_refused_unread(folder, name):
    with (folder / name).open("ab") as file:
        file.truncate(2**33)  # A hole takes no space on the disk.
    for read in (Tokenizer.from_folder, all_ids):
        with pytest.raises(UserError, match=f"{name} is larger than"):
            read(folder)


def test_a_missing_file_is_named(folder):
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match="merges.txt"):
        Tokenizer.from_folder(folder)


def test_a_vocabulary_without_the_end_token_is_refused_not_extended(tmp_path):
    folder = write_files(tmp_path / "t", vocab={token: i for token, i in IDS.items() if token != END})
    with pytest.raises(ValueError, match=r"eos_token '<\|endoftext\|>'"):
        Tokenizer.from_folder(folder)


def test_a_single_string_is_refused(folder):
    with pytest.raises(ValueError, match=r"\['cat'\]"):
        Tokenizer.from_folder(folder)("cat")


def test_reading_without_pytorch_is_silent_and_never_imports_it(folder):
    program = f"""
import sys
sys.modules["torch"] = None
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
import dmm_jax.checkpoints.write
from dmm_jax.text.tokenizer import Tokenizer
Tokenizer.from_folder({str(folder)!r})(["cat"])
import transformers
assert not transformers.is_torch_available()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def newer(folder, **changes):
    """Rewrites a folder as today's transformers saves it: tokenizer.json and tokenizer_config.json alone."""
    from transformers import CLIPTokenizer

    config = json.loads((folder / "tokenizer_config.json").read_text())
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    contents = json.loads((folder / "tokenizer.json").read_text())
    contents["model"] |= changes
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    assert config["pad_token"] == json.loads((folder / "tokenizer_config.json").read_text())["pad_token"]
    return folder


@pytest.mark.parametrize("pad", [END, "!"])
def test_old_and_new_folders_give_the_same_ids_and_digest(tmp_path, pad):
    old = write_files(tmp_path / "old", pad_token=pad, model_max_length=77)
    new = newer(write_files(tmp_path / "new", pad_token=pad, model_max_length=77))
    assert sorted(path.name for path in new.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    prompts = ["cat on dog!", "Dog, on CAT", ""]
    assert (Tokenizer.from_folder(new)(prompts) == Tokenizer.from_folder(old)(prompts)).all()
    assert Tokenizers.from_folders([new]).digest == Tokenizers.from_folders([old]).digest
    padded = Tokenizers.from_folders([write_files(tmp_path / "x", pad_token="#", model_max_length=77)])
    assert padded.digest != Tokenizers.from_folders([old]).digest
    copy_tokenizer(new, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "vocab.json").read_text(encoding="utf-8")) == IDS
    (tmp_path / "copy" / "tokenizer.json").unlink()
    assert (Tokenizer.from_folder(tmp_path / "copy")(prompts) == Tokenizer.from_folder(old)(prompts)).all()


def test_a_tokenizer_json_may_list_merges_as_text(tmp_path):
    folder = newer(write_files(tmp_path / "t", pad_token=END), merges=MERGES)
    assert read_bpe(folder) == read_bpe(write_files(tmp_path / "old"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "b"}}}', "[" * 10**5]
)
def test_a_malformed_tokenizer_json_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json is not a CLIP tokenizer's"):
        Tokenizer.from_folder(tmp_path)


# Ids from OpenAI's own code: its README, and the documentation of transformers.
PUBLISHED = {
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "a photo of a dog": [49406, 320, 1125, 539, 320, 1929, 49407],
    "hello world": [49406, 3306, 1002, 49407],
}


@pytest.mark.parametrize("folder, pad", [(CLIP, 49407), (OPEN_CLIP, 0)])
def test_the_bundled_tokenizers_give_the_published_ids(folder, pad):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == CLIP_VOCAB_SIZE == len(set(clip_bpe().vocabulary.values()))
    for prompt, row in zip(PUBLISHED, tokenizer(list(PUBLISHED)), strict=True):
        assert row.tolist() == PUBLISHED[prompt] + [pad] * (77 - len(PUBLISHED[prompt]))


def test_a_copy_of_the_bundled_tokenizer_gives_the_same_ids(tmp_path):
    from transformers import CLIPTokenizer

    copy_tokenizer(OPEN_CLIP, tmp_path / "t")
    assert read_bpe(tmp_path / "t") == clip_bpe()
    rng = np.random.default_rng(0)
    symbols = [chr(code) for code in [*range(32, 127), *range(0xA1, 0x180), 0x3B1, 0x4E2D, 0x1F600]]
    prompts = ["".join(rng.choice(symbols, size)) for size in rng.integers(1, 30, 100)]
    expected = CLIPTokenizer.from_pretrained(tmp_path / "t")(prompts, padding="max_length", return_tensors="np")
    assert (Tokenizer.from_folder(OPEN_CLIP)(prompts) == expected["input_ids"]).all()


@pytest.mark.parametrize("name, text", [("vocab.json", "{"), ("vocab.json", "[]"), ("merges.txt", "one\n")])
def test_errors_in_broken_files_name_the_folder(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{folder}.* (cannot be read|is not a CLIP tokenizer's)"):
        Tokenizer.from_folder(folder)


ADDED = {"content": "<cat>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
EXTENSIONS = {
    "none": {},
    "added_tokens.json": {"added_tokens.json": {"<cat>": len(IDS), "<dog>": len(IDS) + 1}},
    "added_tokens_decoder": {"tokenizer_config.json": {"added_tokens_decoder": {str(len(IDS)): ADDED}}},
    "additional_special_tokens": {"special_tokens_map.json": {"additional_special_tokens": ["<cat>", "<dog>"]}},
}


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_all_ids_count_the_tokens_that_transformers_counts(folder, extension):
    for name, fields in EXTENSIONS[extension].items():
        old = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(old | fields))
    assert max(all_ids(folder).values()) + 1 == Tokenizer.from_folder(folder).vocab_size


@pytest.mark.parametrize(
    "fields",
    [{"model_max_length": "77"}, {"model_max_length": 1}, {"model_max_length": -1},
     {"pad_token": ["!"]}, {"pad_token": 3}, {"eos_token": {"a": 1}}, {"bos_token": None}, {"added_tokens_decoder": 3}],
)  # fmt: skip
def test_a_tokenizer_config_of_wrong_types_is_one_error(folder, fields):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError):
        Tokenizer.from_folder(folder)
