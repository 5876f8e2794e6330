"""The tokenizer in a GGUF: from another GGUF of the model, or of a vocabulary of words. Real ones are never rebuilt."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from tokenizers import Tokenizer

from gtqlora.errors import ModelError, RunError
from gtqlora.exports.gguf.reading import BOOL, FLOAT32, INT32, STRING, UINT32, Gguf, Scalar, Value, read_gguf
from gtqlora.exports.job import EditedModel
from gtqlora.families.files import FAST_TOKENIZER, has, read_json, small_files
from gtqlora.families.llama_cpp import Layout
from gtqlora.families.tokenizers import chat_template

_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3
_TOKENS = "tokenizer.ggml.tokens"
_WORD = "▁"
"""What SentencePiece writes for the space before a word."""


def tokenizer(edited: EditedModel, layout: Layout, donor: str | None) -> dict[str, Value]:
    """Return the tokenizer's metadata.

    Args:
        donor: a GGUF of the same model.

    Raises:
        RunError: there is no donor, and the tokenizer is not one of words; the message says what to do.
        ModelError: the donor has another vocabulary.
    """
    folder, vocabulary = small_files(edited.model), layout.config.vocab_size
    if donor is not None:
        given = read_gguf(Path(donor).expanduser())
        _check_donor(given, folder, vocabulary)
        return {key: value for key, value in given.metadata.items() if key.startswith("tokenizer.")}
    found = read_json(folder / FAST_TOKENIZER) if has(folder, FAST_TOKENIZER) else {}
    model, words = found.get("model"), _is_words(found)
    if not words or not isinstance(model, dict):
        raise RunError(
            f"{edited.model}: its tokenizer is not written anew for llama.cpp; give --tokenizer with a GGUF of the "
            "same model to take it from, or convert with llama.cpp's own converter and export with --onto that file"
        )
    return _of_words(folder, cast("dict[str, object]", model), layout)


def _is_words(found: dict[str, object]) -> bool:
    """Return whether a tokenizer.json splits at spaces and looks each word up."""
    model, splitter = found.get("model"), found.get("pre_tokenizer")
    return (
        isinstance(model, dict)
        and model.get("type") == "WordLevel"
        and isinstance(splitter, dict)
        and splitter.get("type") == "WhitespaceSplit"
        and found.get("normalizer") is None
    )


def _of_words(folder: Path, model: dict[str, object], layout: Layout) -> dict[str, Value]:
    """Return a unigram vocabulary with one piece a word, which tokenizes words that it has just as a list of them."""
    library = Tokenizer.from_file(str(folder / FAST_TOKENIZER))
    ids, special = library.get_vocab(with_added_tokens=True), set(library.get_added_tokens_decoder())
    if sorted(ids.values()) != list(range(layout.config.vocab_size)):
        raise ModelError(f"{folder / FAST_TOKENIZER}: its words are not numbered as the embedding's rows are")
    unknown = ids.get(str(model.get("unk_token")))
    words = sorted(ids, key=ids.__getitem__)
    kinds = [_UNKNOWN if n == unknown else _CONTROL if n in special else _NORMAL for n in range(len(words))]
    pieces: list[Scalar] = [word if n in special else _WORD + word for n, word in enumerate(words)]
    found = {
        "tokenizer.ggml.model": Value(STRING, "t5"),
        "tokenizer.ggml.pre": Value(STRING, "default"),
        _TOKENS: Value(STRING, pieces),
        "tokenizer.ggml.scores": Value(FLOAT32, [0.0] * len(words)),
        "tokenizer.ggml.token_type": Value(INT32, list(kinds)),
        "tokenizer.ggml.add_bos_token": Value(BOOL, False),
        "tokenizer.ggml.add_eos_token": Value(BOOL, False),
        "tokenizer.ggml.add_space_prefix": Value(BOOL, True),
        "tokenizer.ggml.remove_extra_whitespaces": Value(BOOL, True),
    }
    # A GGUF names one end of an answer.
    eos = layout.config.eos_token_id
    first = eos[0] if isinstance(eos, list | tuple) else eos
    numbers = {"eos": first, "padding": layout.config.pad_token_id, "unknown": unknown}
    for name, number in numbers.items():
        if isinstance(number, int):
            found[f"tokenizer.ggml.{name}_token_id"] = Value(UINT32, number)
    if (template := chat_template(folder)) is not None:
        found["tokenizer.chat_template"] = Value(STRING, template)
    return found


def _check_donor(donor: Gguf, folder: Path, vocabulary: int) -> None:
    """Check that each of the donor's tokens is the model's of that number."""
    tokens = donor.get(_TOKENS)
    if not isinstance(tokens, list) or len(tokens) != vocabulary:
        has_tokens = len(tokens) if isinstance(tokens, list) else "no"
        raise ModelError(
            f"{donor.files[0]}: has {has_tokens} tokens, the model's embedding {vocabulary} rows; give a GGUF of it"
        )
    if not has(folder, FAST_TOKENIZER):
        raise ModelError(f"{folder}: no {FAST_TOKENIZER} to hold the tokens of {donor.files[0].name} against")
    # Bounded and parsed here first: the Rust library panics over what is no JSON.
    read_json(folder / FAST_TOKENIZER)
    ids = Tokenizer.from_file(str(folder / FAST_TOKENIZER)).get_vocab(with_added_tokens=True)
    # SentencePiece vocabularies are written with their own space, the others as they are.
    for text, number in ids.items():
        if not number < vocabulary or tokens[number] not in (text, _WORD + text):
            raise ModelError(
                f"{donor.files[0]}: its token {number} is not the model's ({text!r}); give a GGUF of the same model"
            )
