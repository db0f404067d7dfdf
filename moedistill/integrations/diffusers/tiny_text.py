"""A tokenizer for miniatures of text encoders: made here, without a vocabulary file."""

from collections.abc import Sequence
from typing import Any


def tiny_tokenizer(
    *, begin: int = 0, end: bool = True, length: int = 512, words: Sequence[str] = ()
) -> tuple[Any, dict[str, int]]:
    """A fast tokenizer of single characters, and what a text encoder's config must know of it.

    Args:
        begin: how many tokens for the beginning stand in front of a text.
        end: whether one for its end stands behind it.
        length: the longest text in tokens.
        words: tokens besides the characters, such as those of a chat template: whole words, between spaces. A template
            itself is the tokenizer's `chat_template`; applying one adds no `begin` tokens.

    Returns:
        The tokenizer, and `vocab_size` with the ids of `pad_token_id`, `bos_token_id` and `eos_token_id`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(33, 127)]
    tokens = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", *words, *characters, *(f"##{one}" for one in characters)]
    numbers = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    form = "[BOS] " * begin + "$A" + " [EOS]" * end
    ends = [(name, numbers[name]) for name in ("[BOS]", "[EOS]")]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=ends)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "bos", "eos")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **special)
    ids = {f"{name}_token_id": numbers[f"[{name.upper()}]"] for name in ("pad", "bos", "eos")}
    return fast, {"vocab_size": len(numbers), **ids}


def tiny_t5(cls: Any, config_cls: Any, width: int) -> dict[str, Any]:
    """A T5-like text encoder of one layer, `[B, tokens, width]`, with its tokenizer, by a pipeline's usual names."""
    tokenizer, numbers = tiny_tokenizer()
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = config_cls(**sizes, vocab_size=numbers["vocab_size"], feed_forward_proj="gated-gelu")
    return {"text_encoder": cls(config).eval(), "tokenizer": tokenizer}
