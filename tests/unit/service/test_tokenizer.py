from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from gyrfalcon.errors import ModelLoadError
from gyrfalcon.service.tokenizer import TextTokenizer, load_tokenizer
from gyrfalcon.testing.text import EOS_ID, EOS_TOKEN, write_tokenizer


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "copy"))


def change(path: Path, **members: object) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | members))


def add_bos(folder: Path) -> None:
    """Let the tokenizer put `<|user|>` in front of every text."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", pair="<|user|> $A $B", special_tokens=[("<|user|>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("text", ["", "hello", " two  spaces\n\n", "naïve 北京 🦅", EOS_TOKEN])
def test_decoding_gives_back_what_was_encoded(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_known_by_id_and_text(tokenizer: TextTokenizer) -> None:
    assert [id_ for id_ in range(tokenizer.vocab_size) if tokenizer.is_special(id_)] == [0, 1, 2]
    assert tokenizer.special_text(EOS_ID) == EOS_TOKEN


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer: TextTokenizer) -> None:
    assert tokenizer.token_text(tokenizer.vocab_size + 5) == ""
    assert tokenizer.decode([*tokenizer.encode("ab"), 60_000]) == "ab"


def test_spans_are_in_bytes(tokenizer: TextTokenizer) -> None:
    text = "é北a"
    spans = tokenizer.spans(text)
    assert [span.id for span in spans] == tokenizer.encode(text)
    assert spans[-1].stop == len(text.encode())
    assert all(text.encode()[span.start : span.stop].decode() == span.text for span in spans)


def test_added_special_tokens_have_no_span(folder: Path) -> None:
    add_bos(folder)
    first, *_rest = load_tokenizer(folder).spans("hello")
    assert (first.id, first.text, first.start, first.stop) == (1, "", 0, 0)


def test_special_tokens_are_added_as_the_checkpoint_says(folder: Path) -> None:
    add_bos(folder)
    tokenizer = load_tokenizer(folder)
    plain = tokenizer.encode("hello there", add_special_tokens=False)
    assert tokenizer.encode("hello there") == [1, *plain]


@pytest.mark.parametrize("keep_last", [1, 2, 3, 1000])
def test_truncation_keeps_the_texts_end(tokenizer: TextTokenizer, keep_last: int) -> None:
    ids = tokenizer.encode("the people of the town")
    assert tokenizer.encode("the people of the town", keep_last=keep_last) == ids[-keep_last:]


def test_truncation_counts_and_keeps_the_added_tokens(folder: Path) -> None:
    add_bos(folder)
    tokenizer = load_tokenizer(folder)
    plain = tokenizer.encode("the people of the town", add_special_tokens=False)
    assert tokenizer.encode("the people of the town", keep_last=3) == [1, *plain[-2:]]


def test_truncation_and_padding_written_into_the_file_are_not_applied(folder: Path) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=16)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("the people of the town")) == "the people of the town"


class TestEndOfSequence:
    def test_the_tokenizers_own_always_ends(self, folder: Path) -> None:
        change(folder / "generation_config.json", eos_token_id=None)
        assert load_tokenizer(folder).eos_ids == (EOS_ID,)

    def test_a_list_in_generation_config_is_added(self, folder: Path) -> None:
        change(folder / "generation_config.json", eos_token_id=[1, 9])
        assert load_tokenizer(folder).eos_ids == (EOS_ID, 1, 9)

    def test_a_single_id_is_added(self, folder: Path) -> None:
        change(folder / "generation_config.json", eos_token_id=50)
        assert load_tokenizer(folder).eos_ids == (EOS_ID, 50)

    def test_the_mistaken_single_ids_of_old_files_are_not(self, folder: Path) -> None:
        change(folder / "tokenizer_config.json", eos_token="<|pad|>")  # id 0
        change(folder / "generation_config.json", eos_token_id=2)
        assert load_tokenizer(folder).eos_ids == (0,)

    def test_without_one_in_the_tokenizer_the_configuration_decides(self, folder: Path) -> None:
        change(folder / "tokenizer_config.json", eos_token=None)
        change(folder / "generation_config.json", eos_token_id=2)
        assert load_tokenizer(folder).eos_ids == (2,)

    def test_config_json_is_the_last_resort(self, folder: Path) -> None:
        change(folder / "tokenizer_config.json", eos_token=None)
        (folder / "generation_config.json").unlink()
        change(folder / "config.json", eos_token_id=7)
        assert load_tokenizer(folder).eos_ids == (7,)

    def test_there_may_be_none(self, folder: Path) -> None:
        change(folder / "tokenizer_config.json", eos_token=None)
        (folder / "generation_config.json").unlink()
        assert load_tokenizer(folder).eos_ids == ()


def test_tokens_in_special_tokens_map_are_special(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    (comma,) = tokenizer.encode(",")
    change(folder / "special_tokens_map.json", sep_token={"content": ","}, additional_special_tokens=["!"])
    changed = load_tokenizer(folder)
    assert changed.is_special(comma)
    assert changed.is_special(changed.encode("!")[0])


def test_tokens_known_to_the_configuration_alone_are_added(folder: Path) -> None:
    size = load_tokenizer(folder).vocab_size
    entry = {"content": "<|im_end|>", "special": True}
    change(folder / "tokenizer_config.json", added_tokens_decoder={str(size): entry})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<|im_end|>") == [size]
    assert tokenizer.is_special(size)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("generation_config.json", "nonsense", "generation_config.json"),
        ("special_tokens_map.json", "3", "special_tokens_map.json"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9999": {"content": "<x>"}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": 1}}', "added_tokens_decoder"),
    ],
)
def test_a_broken_file_is_named(folder: Path, file: str, content: str, named: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(ModelLoadError, match=named):
        load_tokenizer(folder)


def test_a_missing_tokenizer_is_said_in_one_sentence_without_the_optional_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: missing .* install gyrfalcon\[transformers\]"):
        load_tokenizer(tmp_path)


def test_older_tokenizer_files_are_converted(folder: Path) -> None:
    pytest.importorskip("transformers")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    expected = load_tokenizer(folder).encode("the people of the town")
    (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token=EOS_TOKEN, bos_token=EOS_TOKEN)
    assert load_tokenizer(folder).encode("the people of the town") == expected


def test_writing_the_test_tokenizer_is_repeatable(tmp_path: Path) -> None:
    first, second = write_tokenizer(tmp_path / "a"), write_tokenizer(tmp_path / "b")
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
