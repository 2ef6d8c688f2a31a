"""A chat template of the user's own instead of nanochat's format: checked against the tokenizer, then trained on.

What such a model has learned is spoken by whatever calls `apply_chat_template` (transformers, lm-eval, servers). Our
own chat, RL and ChatCORE go by nanochat's format (`chat_format.py`) and are for models trained on that.
"""

import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")
_EXAMPLE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give the tokenizer the template of a .jinja file.

    Raises:
        ValueError: no such file; a template that cannot render two messages; one that names a special token the
            tokenizer has not (it would be split into bytes, silently); one that does not mark the assistant's tokens.
    """
    if not Path(path).is_file():
        raise ValueError(f"chat_template: no file {path}")
    template = Path(path).read_text(encoding="utf-8")
    try:
        rendered = tokenizer.apply_chat_template(_EXAMPLE, chat_template=template, tokenize=False)
    except Exception as error:  # jinja2's own, and whatever the template raises
        raise ValueError(f"chat_template {path} does not render a question and its answer: {error}") from error
    named = dict.fromkeys(_SPECIAL.findall(template) + _SPECIAL.findall(rendered))
    known = {**tokenizer.get_added_vocab(), **{token: 0 for token in tokenizer.all_special_tokens}}
    if missing := [token for token in named if token not in known]:
        raise ValueError(
            f"chat_template {path} uses {', '.join(missing)}, which the tokenizer does not have as special tokens; use "
            f"those it has ({', '.join(known)}), or train a tokenizer with them"
        )
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise ValueError(
            f"chat_template {path} does not say which tokens are the assistant's: put {{% generation %}} and "
            f"{{% endgeneration %}} around its turns"
        )
    tokenizer.chat_template = template


def encode_with_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Ids and mask (1 = the assistant's) of a conversation by the tokenizer's own chat template."""
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    return encoded["input_ids"], encoded["assistant_masks"]
