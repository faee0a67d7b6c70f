"""The tokenizer that a GGUF file describes, built from its tokens, merges, scores and names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from hipserve.errors import ArgumentError

CONTROL, USER_DEFINED = 3, 4
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")
"""Control tokens that end an answer whatever the metadata name, as in llama.cpp."""
NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, str] = {"llama3": _WORDS % "{1,3}", "qwen2": _WORDS % "", "digits": r"\p{N}"}
PRE = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), "llama3"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), "qwen2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), "digits"),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), ""),
}
"""How text is split before it is merged, by the name that the file gives it."""


def make_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A transformers tokenizer of the file's metadata.

    Raises:
        ArgumentError: a kind of tokenizer that would be guessed at.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ArgumentError("model", "a GGUF tokenizer of kind gpt2 or llama", repr(kind))
    tokenizer = _bytes(fields) if kind == "gpt2" else _pieces(fields)
    tokens, types = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type", ())
    for wanted, add in (
        (CONTROL, tokenizer.add_special_tokens),
        (USER_DEFINED, tokenizer.add_tokens),
    ):
        found = [token for token, type_ in zip(tokens, types, strict=False) if type_ == wanted]
        add([AddedToken(token, normalized=False, special=wanted == CONTROL) for token in found])
    names = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in NAMES.items()
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    if fields.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos_token" in names:
        tokenizer.post_processor = _with_bos(tokenizer, names["bos_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **names,
    )


def end_ids(fields: dict[str, Any]) -> list[int]:
    """Every token that ends an answer."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type", ())
    ids = {fields[key] for key in fields if key in _END_KEYS}
    ids |= {i for i, type_ in enumerate(types) if type_ == CONTROL and tokens[i] in ENDS}
    return sorted(ids)


_END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def _bytes(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE (GPT-2, Llama 3, Qwen): merges are listed."""
    name = fields.get("tokenizer.ggml.pre")
    if name not in PRE:
        expected = f"a GGUF pre-tokenizer of {', '.join(PRE)}"
        raise ArgumentError("model", expected, repr(name), "use its safetensors checkpoint")
    split = PRE[name]
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=split == "llama3"))
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    whole = split in ("llama3", "qwen2")
    steps: list[Any] = [pre_tokenizers.Split(Regex(_SPLITS[split]), "isolated")] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pieces(fields: dict[str, Any]) -> Tokenizer:
    """SentencePiece's BPE (Llama 2, Mistral, Gemma): merges follow from the scores of pieces."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    ranked = sorted(_halves(vocabulary), key=lambda m: (-scores[m[0]], m[1:]))
    pairs = [(tokens[left], tokens[right]) for _, left, right in ranked]
    unknown = tokens[fields["tokenizer.ggml.unknown_token_id"]]
    tokenizer = Tokenizer(
        BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    spaces: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] * prefix)])
    return tokenizer


def _halves(vocabulary: dict[str, int]) -> Iterator[tuple[int, int, int]]:
    """Each token that two others make: its id and theirs."""
    for token, i in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                yield i, left, right


def _with_bos(tokenizer: Tokenizer, token: str) -> processors.TemplateProcessing:
    special = [(token, tokenizer.token_to_id(token))]
    return processors.TemplateProcessing(f"{token} $A", f"{token} $A {token} $B", special)
