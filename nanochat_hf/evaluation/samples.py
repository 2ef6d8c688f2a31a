"""What a model says: a base model to nanochat's seven prompts, a chat model to questions; greedily."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation import generate_completions
from ..tokenizer import encode_documents, encode_prompt

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


def answer_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str], max_new_tokens: int = 64
) -> list[dict]:
    """`{question, answer}` of each question: greedy, the calculator at work, its spans shown."""
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    completions = generate_completions(model, tokenizer, prompts, max_new_tokens)
    texts = [tokenizer.decode(completion.token_ids).removesuffix("<|assistant_end|>") for completion in completions]
    return [{"question": question, "answer": text} for question, text in zip(questions, texts, strict=True)]
