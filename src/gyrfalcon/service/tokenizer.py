"""A checkpoint's tokenizer: text to token ids and back, and which ids are special or end a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders

from gyrfalcon.errors import ModelLoadError
from gyrfalcon.service.interface import TextSpan

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not, or not yet, a character
# Oldest Falcon files name these single ids as end-of-sequence although they are ordinary entries there.
MISTAKEN_EOS_IDS = frozenset({1, 2})
NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenPiece(NamedTuple):
    """A token of a byte-level tokenizer by itself. text: None where its bytes are no whole characters."""

    raw: bytes
    text: str | None
    is_special: bool


class TextTokenizer:
    """Encodes and decodes for one checkpoint. Safe to use from several threads."""

    def __init__(
        self,
        backend: Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Sequence[str] = (),
        extra_eos_ids: Sequence[int] = (),
    ) -> None:
        """special_tokens: literal texts that are special besides those the backend marks. extra_eos_ids: ids that
        end a text besides that of `eos_token`.
        """
        # A tokenizer.json may carry its author's truncation and padding; whether to cut is the request's business.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._special_texts: dict[int, str] = {id_: token.content for id_, token in added.items() if token.special}
        for text in (*special_tokens, bos_token, eos_token):
            id_ = None if text is None else backend.token_to_id(text)
            if text is not None and id_ is not None:
                self._special_texts[id_] = text
        eos_id = None if eos_token is None else backend.token_to_id(eos_token)
        own = () if eos_id is None else (eos_id,)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((*own, *extra_eos_ids)))
        # Whether every token stands for bytes of its own, whatever is next to it.
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._token_texts: dict[int, str] = {}
        self._token_pieces: dict[int, TokenPiece] = {}

    def is_special(self, token_id: int) -> bool:
        """Whether answers leave this token's text out."""
        return token_id in self._special_texts

    def special_text(self, token_id: int) -> str:
        """The literal text of a special token."""
        return self._special_texts[token_id]

    def encode(self, text: str, *, add_special_tokens: bool = True, keep_last: int | None = None) -> list[int]:
        """The text's token ids, with the special tokens that the checkpoint puts around a text.

        keep_last: at most this many ids, the special ones included; the text's start is dropped for it.
        """
        if keep_last is None:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return ids
        encoding = self._backend.encode(text, add_special_tokens=False)
        num_special = self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        encoding.truncate(max(keep_last - num_special, 0), direction="left")
        kept: list[int] = self._backend.post_process(encoding, None, add_special_tokens).ids
        return kept[-keep_last:]

    def spans(self, text: str, *, add_special_tokens: bool = True) -> tuple[TextSpan, ...]:
        """The text's tokens with the bytes each came from; those added around the text have none."""
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        byte_offsets = [0]
        for char in text:
            byte_offsets.append(byte_offsets[-1] + len(char.encode("utf-8")))
        return tuple(
            TextSpan(id_, text[start:stop], byte_offsets[start], byte_offsets[stop])
            for id_, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The ids' text, special tokens in full; ids that the tokenizer does not know decode to nothing."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def token_text(self, token_id: int) -> str:
        """One id's text without its neighbours."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id])
        return text

    def token_piece(self, token_id: int) -> TokenPiece:
        """One token of a byte-level tokenizer; an id that it does not know is nothing."""
        piece = self._token_pieces.get(token_id)
        if piece is None:
            piece = self._token_pieces[token_id] = self._make_piece(token_id)
        return piece

    def _make_piece(self, token_id: int) -> TokenPiece:
        spelled = self._backend.id_to_token(token_id) or ""
        try:
            raw = bytes(_BYTE_OF_SYMBOL[symbol] for symbol in spelled)
        except KeyError:  # an added token is spelled as it is
            raw = spelled.encode("utf-8")
        if self.is_special(token_id):
            return TokenPiece(raw, self.special_text(token_id), True)
        text = raw.decode("utf-8", "replace")
        return TokenPiece(raw, None if REPLACEMENT in text else text, False)


def _symbols_of_bytes() -> dict[str, int]:
    """The character by which byte-level vocabularies spell each byte: itself where it can be seen."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in shown)
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF_SYMBOL = _symbols_of_bytes()


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a checkpoint folder. Raises ModelLoadError naming the file at fault."""
    config = read_json_object(folder / "tokenizer_config.json")
    names = config | read_json_object(folder / "special_tokens_map.json")
    backend = _load_backend(folder)
    _add_configured_tokens(backend, config, folder / "tokenizer_config.json")
    specials = [text for name in NAMED_SPECIALS if (text := _token_text(names.get(name))) is not None]
    additional = names.get("additional_special_tokens")
    if isinstance(additional, list):
        specials += [text for entry in additional if (text := _token_text(entry)) is not None]
    eos_token = _token_text(config.get("eos_token", names.get("eos_token")))
    bos_token = _token_text(config.get("bos_token", names.get("bos_token")))
    eos_id = None if eos_token is None else backend.token_to_id(eos_token)
    return TextTokenizer(
        backend,
        bos_token=bos_token,
        eos_token=eos_token,
        special_tokens=specials,
        extra_eos_ids=_generation_eos_ids(folder, eos_id),
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object, {} where there is no such file. Raises ModelLoadError when it is anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path.name}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path.name}: expected a JSON object, found {type(value).__name__}")
    return value


def _load_backend(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _convert_backend(folder)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises the base class
        raise ModelLoadError(f"tokenizer.json: not a tokenizer ({error})") from error


def _convert_backend(folder: Path) -> Tokenizer:
    """A tokenizer from older files than tokenizer.json, converted by transformers where that is installed."""
    try:
        import transformers
    except ImportError:
        raise ModelLoadError(
            f"tokenizer.json: missing in {folder.name}; to convert the checkpoint's older tokenizer files, "
            "install gyrfalcon[transformers]"
        ) from None
    try:
        converted = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        backend = converted.backend_tokenizer
    except Exception as error:  # whatever a broken folder makes the library raise
        reason = str(error).partition("\n")[0]
        raise ModelLoadError(
            f"tokenizer.json: missing in {folder.name}, and no other tokenizer files can be converted ({reason})"
        ) from error
    if not isinstance(backend, Tokenizer):
        raise ModelLoadError(f"tokenizer.json: missing in {folder.name}, and its tokenizer has no such form")
    return backend


def _add_configured_tokens(backend: Tokenizer, config: dict[str, Any], path: Path) -> None:
    """Add the tokens that only tokenizer_config.json knows of, at the ids it gives them."""
    entries = config.get("added_tokens_decoder")
    if not isinstance(entries, dict):
        return
    try:
        wanted = sorted((int(id_), entry) for id_, entry in entries.items())
        for id_, entry in wanted:
            if backend.token_to_id(entry["content"]) is not None:
                continue
            flags = {key: bool(entry[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in entry}
            token = AddedToken(entry["content"], special=bool(entry.get("special", False)), **flags)
            backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
            if backend.token_to_id(token.content) != id_:
                raise ModelLoadError(
                    f"{path.name}: added_tokens_decoder puts {token.content!r} at {id_}, but the next free id of "
                    f"tokenizer.json is {backend.token_to_id(token.content)}"
                )
    except (TypeError, KeyError, ValueError) as error:
        raise ModelLoadError(f"{path.name}: added_tokens_decoder is not a table of tokens ({error})") from error


def _token_text(entry: object) -> str | None:
    """The text of a token as the configuration files spell it: plain, or an object with `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _generation_eos_ids(folder: Path, eos_id: int | None) -> list[int]:
    """End-of-sequence ids besides the tokenizer's own.

    A list in generation_config.json is deliberate and taken whole. A single id is taken unless it is one of those
    that old Falcon files name wrongly. Without either, a tokenizer that knows no end relies on config.json.
    """
    for name in ("generation_config.json", "config.json"):
        found = read_json_object(folder / name).get("eos_token_id")
        if isinstance(found, list) and all(type(id_) is int for id_ in found):
            return found
        if type(found) is int and (eos_id is None or found not in MISTAKEN_EOS_IDS) and name != "config.json":
            return [found]
        if type(found) is int and eos_id is None:
            return [found]
    return []
