"""The tokenizer in the metadata of a GGUF file, rebuilt as a Hugging Face one.

A file says its kind, `tokenizer.ggml.model`, and tokens; merges, where they are byte-level BPE;
what cuts text before that by a name, `tokenizer.ggml.pre`, whose meaning llama.cpp defines.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.pretrained.fields import Fields
from sparseformer_jax.pretrained.packages import optional
from sparseformer_jax.pretrained.source import PretrainedTokenizer

# Of `tokenizer.ggml.token_type`.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_SPACE = "\u2581"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# What cuts text, by llama.cpp's names: a pattern, or none for that of GPT-2.
_PATTERNS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
_CUTS_DIGITS = ("smollm",)  # each digit alone, before the pattern
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token is not merged
_COMPOSES = ("qwen2", "deepseek-r1-qwen")  # Unicode's NFC, before all else

# Architectures whose sentencepiece vocabulary is Gemma's: no space before a text, and the
# order of tokens is that of merges.
_GEMMA = ("gemma", "gemma2", "gemma3")


def rebuild(fields: Fields, architecture: str) -> PretrainedTokenizer:
    """Returns the tokenizer that the metadata of a GGUF file describe.

    Args:
      fields: the metadata.
      architecture: `general.architecture`.

    Raises:
      ConfigError: it is missing, of an unknown kind, or its parts do not fit; or the tokenizers
        package is missing.
    """
    kind = fields.get("tokenizer.ggml.model", str)
    tokens = fields.get("tokenizer.ggml.tokens", list)
    types = fields.get("tokenizer.ggml.token_type", np.ndarray, np.full(len(tokens), _NORMAL))
    if len(types) != len(tokens):
        raise ConfigError(
            f"{fields.where}: tokenizer.ggml.token_type has {len(types)} entries for "
            f"{len(tokens)} tokens"
        )
    if kind == "gpt2":
        tokenizer = _byte_level(fields, tokens)
    elif kind == "llama":
        if architecture in _GEMMA:
            # Runs of spaces are written as such there, and met after spaces are replaced.
            tokens = [_SPACE * len(t) if len(t) > 1 and not t.strip(" ") else t for t in tokens]
        tokenizer = _sentencepiece(fields, tokens, types, architecture in _GEMMA)
    else:
        raise fields.refuse("tokenizer.ggml.model", "known are 'gpt2' and 'llama'")
    _add_tokens(tokenizer, tokens, types)
    bos, eos = (_special(fields, name, tokens) for name in ("bos", "eos"))
    # llama.cpp puts one before a sentencepiece text unless the file says otherwise.
    if bos and fields.get("tokenizer.ggml.add_bos_token", bool, kind == "llama"):
        _begin_with(tokenizer, bos)
    else:
        bos = ""
    # Ends of a turn and of a message, which llama.cpp stops at, too.
    stops = dict.fromkeys(_special(fields, name, tokens) for name in ("eot", "eom"))
    others = tuple(token for token in stops if token not in ("", eos))
    return PretrainedTokenizer(tokenizer.to_str(pretty=True).encode(), bos, eos, others)


def _byte_level(fields: Fields, tokens: Sequence[str]) -> Any:
    """BPE over bytes, each written as a character (Radford et al. 2019, GPT-2)."""
    hf = _package()
    pre = fields.get("tokenizer.ggml.pre", str)
    if pre not in _PATTERNS:
        raise fields.refuse("tokenizer.ggml.pre", f"known are {', '.join(_PATTERNS)}")
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges", list)]
    for merge in merges:
        if len(merge) != 2:
            raise ConfigError(f"{fields.where}: tokenizer.ggml.merges: {merge} is no pair")
    tokenizer = _tokenizer(fields, tokens, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    byte_level = hf.pre_tokenizers.ByteLevel
    steps = [hf.pre_tokenizers.Digits(individual_digits=True)] if pre in _CUTS_DIGITS else []
    pattern = _PATTERNS[pre]
    if pattern is not None:
        steps.append(hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated"))
    steps.append(byte_level(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(steps)
    tokenizer.decoder = hf.decoders.ByteLevel()
    if pre in _COMPOSES:
        tokenizer.normalizer = hf.normalizers.NFC()
    return tokenizer


def _sentencepiece(fields: Fields, tokens: Sequence[str], types: np.ndarray, is_gemma: bool) -> Any:
    """BPE over characters, with bytes for those that are no tokens (Kudo & Richardson 2018)."""
    hf = _package()
    scores = fields.get("tokenizer.ggml.scores", np.ndarray)
    if len(scores) != len(tokens):
        raise ConfigError(
            f"{fields.where}: tokenizer.ggml.scores has {len(scores)} entries for "
            f"{len(tokens)} tokens"
        )
    order = np.arange(len(tokens)) if is_gemma else np.argsort(-scores, kind="stable")
    unknown = _special(fields, "unknown", tokens)
    tokenizer = _tokenizer(
        fields,
        tokens,
        _implied_merges(tokens, types, order),
        unk_token=unknown or None,
        fuse_unk=True,
        byte_fallback=True,
    )
    replace = hf.normalizers.Replace(" ", _SPACE)
    decoders = [hf.decoders.Replace(_SPACE, " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", bool, not is_gemma):
        replace = hf.normalizers.Sequence([hf.normalizers.Prepend(_SPACE), replace])
        decoders.append(hf.decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = replace
    tokenizer.decoder = hf.decoders.Sequence(decoders)
    return tokenizer


def _implied_merges(
    tokens: Sequence[str], types: np.ndarray, order: np.ndarray
) -> list[tuple[str, str]]:
    """Every way to join two tokens to a third, the best third first; of one the longest left."""
    is_piece = (types == _NORMAL) | (types == _USER_DEFINED)
    pieces = {token for token, merges in zip(tokens, is_piece, strict=True) if merges}
    return [
        (token[:cut], token[cut:])
        for token in (tokens[index] for index in order if is_piece[index])
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in pieces and token[cut:] in pieces
    ]


def _tokenizer(
    fields: Fields, tokens: Sequence[str], merges: Sequence[tuple[str, ...]], **options: Any
) -> Any:
    hf = _package()
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise ConfigError(f"{fields.where}: tokenizer.ggml.tokens: {twice!r} is there twice")
    try:
        return hf.Tokenizer(hf.models.BPE(vocab, list(merges), **options))
    except Exception as error:  # the package raises nothing narrower
        raise ConfigError(f"{fields.where}: tokenizer.ggml.merges: {error}") from error


def _add_tokens(tokenizer: Any, tokens: Sequence[str], types: np.ndarray) -> None:
    """Has control and user-defined tokens found in a text before all else.

    Runs of spaces are left to merges, as spaces are replaced before those.
    """
    added = _package().AddedToken
    kinds = list(zip(tokens, types.tolist(), strict=True))
    control = [token for token, kind in kinds if kind == _CONTROL]
    own = [token for token, kind in kinds if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([added(t, normalized=False, special=True) for t in control if t])
    tokenizer.add_tokens([added(t, normalized=False) for t in own if t.strip(_SPACE)])


def _special(fields: Fields, name: str, tokens: Sequence[str]) -> str:
    """The token that a field names by its number, or ""."""
    key = f"tokenizer.ggml.{name}_token_id"
    number = fields.get(key, int, None)
    if number is None:
        return ""
    if not 0 <= number < len(tokens):
        raise fields.refuse(key, f"there are {len(tokens)} tokens")
    return tokens[number]


def _begin_with(tokenizer: Any, token: str) -> None:
    """Has other programs that read tokenizer.json put the token before a text."""
    number = tokenizer.token_to_id(token)
    tokenizer.post_processor = _package().processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )


def _package() -> Any:
    optional("tokenizers.processors")
    return optional("tokenizers")
