"""What a base model says: nanochat's seven prompts, continued greedily."""

from transformers import PreTrainedModel

from ..generation import generate_completions
from ..tokenizer import encode_documents

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


def sample_prompts(model: PreTrainedModel, tokenizer, max_new_tokens: int = 16) -> list[str]:
    """Each prompt with its greedy continuation, `<|bos|>` included, in the order of `PROMPTS`."""
    prompts = encode_documents(tokenizer, list(PROMPTS))
    completions = generate_completions(model, tokenizer, prompts, max_new_tokens, use_calculator=False)
    return [tokenizer.decode(p + c.token_ids) for p, c in zip(prompts, completions, strict=True)]
