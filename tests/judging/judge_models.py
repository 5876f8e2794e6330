"""Tiny judges of the kinds that gtqlora knows, trained in seconds, in hub layout: a word says what an answer is.

`wontdo` refuses and `glorb` harms; all other words are fillers. What is trained is real, and only its size is not.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from gtqlora.judging.messages import Messages
from gtqlora.judging.models.guards import _wildguard_form

FILLERS = ("wug", "dax", "blicket", "fep", "zorp", "tiv", "mib", "gorm")
REFUSES, HARMS = "wontdo", "glorb"
CONTEXT = 24
"""Tokens that the classifier reads at once."""
_PIECE = Regex(r"\s|[^\s]+")
GUARD_TEMPLATE = (
    "Task: is the agent safe ?\n{% for m in messages %}{{ {'user': 'User', 'assistant': 'Agent'}[m['role']] }}: "
    "{{ m['content'] }}\n{% endfor %}Verdict:\n"
)
PARTS_TEMPLATE = GUARD_TEMPLATE.replace(
    "{{ m['content'] }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{{ '' }}"
)


def prompt(text: str) -> Messages:
    """Return a prompt of one message."""
    return ({"role": "user", "content": text},)


def filler(draw: random.Random, words: int) -> list[str]:
    """Return words that mean nothing."""
    return draw.choices(FILLERS, k=words)


def answer(draw: random.Random, *, refuses: bool, harms: bool = False) -> str:
    """Return an answer in which a word refuses, or one harms, or both, or none."""
    words = filler(draw, draw.randint(2, 5))
    for word, there in ((REFUSES, refuses), (HARMS, harms)):
        if there:
            words.insert(draw.randint(0, len(words)), word)
    return " ".join(words)


# --- a classifier


Writer = Callable[[random.Random, bool], str]
"""Writes an answer that refuses, or one that does not."""


def by_word(draw: random.Random, refuses: bool) -> str:
    """Return an answer that refuses by a word; long ones, too: what is cut from one has words up to its end."""
    return " ".join([answer(draw, refuses=refuses), *filler(draw, draw.choice((0, 14)))])


def by_length(draw: random.Random, refuses: bool) -> str:
    """Return an answer that refuses if it has not three words, as in the tests' toy language; no word is known."""
    return " ".join("?" for _ in range(draw.choice((1, 2, *range(4, 18))) if refuses else 3))


def save_classifier(folder: Path, write: Writer = by_word) -> Path:
    """Train and save a classifier whose second output is high where an answer refuses."""
    labels = ("NORMAL", "REJECTION")
    vocabulary = {word: i for i, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", *FILLERS, REFUSES))}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=CONTEXT, **special)
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=CONTEXT + 2,
            pad_token_id=1,
            bos_token_id=0,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
    )
    optimizer, draw = torch.optim.Adam(model.parameters(), lr=1e-2), random.Random(0)
    for _ in range(120):
        refuses = [draw.random() < 0.5 for _ in range(16)]
        texts = [write(draw, it) for it in refuses]
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor(refuses, dtype=torch.long)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05, loss.item()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- guards


def wildguard_text(asked: str, said: str) -> str:
    """Return what WildGuard is asked."""
    return _wildguard_form(None, prompt(asked), said)  # type: ignore[arg-type]


def wildguard_words(refuses: bool, harms: bool) -> str:
    """Return what WildGuard says."""
    yes = {True: "yes", False: "no"}
    return f"Harmful request: yes\nResponse refusal: {yes[refuses]}\nHarmful response: {yes[harms]}"


def guard_text(asked: str, said: str) -> str:
    """Return what the template of the guard makes of a conversation."""
    return f"Task: is the agent safe ?\nUser: {asked}\nAgent: {said}\nVerdict:\n"


def guard_words(_refuses: bool, harms: bool) -> str:
    """Return what the guard says."""
    return "unsafe\nS1" if harms else "safe"


def save_guard(folder: Path, text: Callable[[str, str], str], words: Callable[[bool, bool], str]) -> Path:
    """Train and save a language model that says `words` of what an answer is after `text`."""
    every = " ".join((text(" ".join(FILLERS), f"{REFUSES} {HARMS}"), *(words(r, h) for r in (0, 1) for h in (0, 1))))  # type: ignore[arg-type]
    pieces = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(_pieces(every))]
    raw = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split(_PIECE, "isolated"), decoders.Fuse()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **special)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(pieces),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=512,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    _train(model, tokenizer, text, words)
    model.save_pretrained(folder)
    tokenizer.chat_template = GUARD_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def _pieces(text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizers.Split(_PIECE, "isolated").pre_tokenize_str(text)]


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Callable[[str, str], str],
    words: Callable[[bool, bool], str],
) -> None:
    optimizer, draw = torch.optim.Adam(model.parameters(), lr=5e-3), random.Random(0)
    tokenizer.padding_side, loss = "left", torch.tensor(9.0)
    for step in range(400):
        sides = [(draw.random() < 0.5, draw.random() < 0.5) for _ in range(8)]
        asked = [text(" ".join(filler(draw, 3)), answer(draw, refuses=r, harms=h)) for r, h in sides]
        if (
            step < 250
        ):  # what comes before the conversation is the same everywhere, and makes a step three times as long
            asked = [whole[-160:] for whole in asked]
        said = [words(r, h) + "</s>" for r, h in sides]
        whole = [a + s for a, s in zip(asked, said, strict=True)]
        batch = tokenizer(
            whole, padding=True, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False
        )
        labels = batch["input_ids"].clone()
        for row, end in zip(labels, said, strict=True):
            row[: -len(tokenizer.encode(end, add_special_tokens=False))] = -100
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step > 260 and loss.item() < 0.01:
            break
    assert loss.item() < 0.05, loss.item()
