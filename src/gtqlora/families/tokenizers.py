"""The tokenizer of an untrusted model folder, its chat template, and its settings for generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from gtqlora.errors import ModelError
from gtqlora.families import files
from gtqlora.families.config_checks import check_token_ids

_PROCESSORS = "chat_template.json"
_MAX_TEMPLATE = 2**20


@contextmanager
def at_fault(where: str, what: str) -> Iterator[None]:
    """Turn whatever other libraries raise over a malformed file into one line."""
    try:
        yield
    except ModelError:
        raise
    # The Rust library raises bare Exception, and panics below it; transformers raises what its parsing leads to.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{where}: {what} ({files.first_line(error)})") from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: str, vocabulary: int) -> None:
    """Check that there are tokens to pad and to end with, and that the model's embedding has them.

    Raises:
        ModelError: the message names the token.
    """
    for kind in ("pad_token", "eos_token"):
        token, number = getattr(tokenizer, kind), getattr(tokenizer, f"{kind}_id")
        if token is not None and (not isinstance(number, int) or not 0 <= number < vocabulary):
            raise ModelError(
                f"{model}: the tokenizer's {kind} {token!r} has the id {number}, but the model's embedding has "
                f"{vocabulary} rows; name a token in tokenizer_config.json that it has, or resize the embedding"
            )
    if tokenizer.pad_token is None:
        raise ModelError(f"{model}: the tokenizer has neither a pad_token nor an eos_token; name them in its config")


def read_tokenizer(model: str, vocabulary: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer of MODEL, left-padding, with a chat template.

    Raises:
        ModelError: it cannot be loaded, has no chat template, or does not go with a vocabulary of this size.
    """
    folder = files.small_files(model)
    check_files(folder)
    check_generation(model, folder, vocabulary)
    template = chat_template(folder)
    with at_fault(model, "the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if tokenizer.pad_token is None:
            # Padding is masked wherever it is used, so any token does.
            tokenizer.pad_token = tokenizer.eos_token
        # So that the last column of a batch holds every prompt's last token, after which the answer begins.
        tokenizer.padding_side = "left"
    if template is None:
        beside = f" ({_PROCESSORS} is read by processors only)" if files.has(folder, _PROCESSORS) else ""
        raise ModelError(
            f"{model}: the tokenizer has no chat template; put a {files.TEMPLATE} into the model folder{beside}"
        )
    # Ours and not what transformers found: of several places it may have taken another one.
    tokenizer.chat_template = template
    with at_fault(model, "the tokenizer's special tokens cannot be used"):
        check_tokenizer(tokenizer, model, vocabulary)
    return tokenizer


def check_files(folder: Path) -> None:
    """Check that what a tokenizer is read from can be read.

    Raises:
        ModelError: the message names the file.
    """
    for name in files.small_names(folder):
        if name.endswith(".json"):
            files.read_json(folder / name, empty=True)
    # By the Rust library alone, so that what is wrong with this file is said of this file.
    if files.has(folder, files.FAST_TOKENIZER):
        path = folder / files.FAST_TOKENIZER
        with at_fault(str(path), "the tokenizer cannot be loaded"):
            Tokenizer.from_file(str(path))


def chat_template(folder: Path) -> str | None:
    """Return the template that every verb uses: `chat_template.jinja`, else the default one of the tokenizer's config.

    Raises:
        ModelError: there is something in its place that is no template.
    """
    if files.has(folder, files.TEMPLATE):
        where, found = folder / files.TEMPLATE, files.read_text(folder / files.TEMPLATE)
    elif files.has(folder, files.TOKENIZER_CONFIG):
        where = folder / files.TOKENIZER_CONFIG
        found = _default(files.read_json(where, empty=True).get("chat_template"))
    else:
        return None
    if found is not None and (not isinstance(found, str) or not found.strip() or len(found) > _MAX_TEMPLATE):
        raise ModelError(f"{where}: the chat template must be a text, or texts by name with one named default")
    return found


def _default(found: object) -> object:
    """Return the template named default where there are several; something else, which is refused, if there is none."""
    # 0 is no text, so that the caller refuses it; None would say that there is no template at all.
    if isinstance(found, list):
        names = [entry.get("name") for entry in found if isinstance(entry, dict)]
        return found[names.index("default")].get("template", 0) if "default" in names else 0
    return found.get("default", 0) if isinstance(found, dict) else found


def check_generation(model: str, folder: Path, vocabulary: int) -> None:
    """Refuse a generation_config.json that cannot be read, or that ends or pads with tokens that the model lacks.

    Raises:
        ModelError: the message names the key.
    """
    if not files.has(folder, files.GENERATION):
        return
    path = folder / files.GENERATION
    raw = files.read_json(path, empty=True)
    check_token_ids(str(path), raw, vocabulary)
    with at_fault(str(path), "not settings for generation"):
        GenerationConfig.from_dict(raw)
