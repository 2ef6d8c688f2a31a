"""Five sample questions, answered by the last model of a run: what its figures feel like. Record `samples`."""

from ..generation import generate_completions
from ..stage import Stage
from ..tokenizer import encode_prompt, load_tokenizer
from .run_records import RunRecords

MAX_NEW_TOKENS = 128
CHAT_STAGES = ("rl", "sft", "mid")


def answer_samples(records: RunRecords, questions: list[str]) -> None:
    """Answer each question greedily, calculator in use, with the last chat model; what is up to date is kept.

    Args:
        records: the run; the new record is added to it.
        questions: one conversation each.
    """
    stage_name = next((name for name in CHAT_STAGES if (records.run_dir / name / "config.json").is_file()), None)
    if stage_name is None:
        return
    settings = {"stage": stage_name, "questions": questions}
    old = records.records.get("samples", {})
    made = records.records.get(stage_name, {}).get("finished", 0.0)
    if old.get("settings") == settings and old.get("started", 0.0) >= made:
        return
    (records.run_dir / "eval" / "samples.json").unlink(missing_ok=True)
    from transformers import AutoModelForCausalLM

    with Stage(records.run_dir, "samples", settings) as stage:
        model = AutoModelForCausalLM.from_pretrained(records.run_dir / stage_name).eval()
        tokenizer = load_tokenizer(records.run_dir / stage_name)
        prompts = [encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in questions]
        completions = generate_completions(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)
        stage.results["stage"] = stage_name
        stage.results["answers"] = [
            {"question": question, "answer": spoken(tokenizer, completion.token_ids), "finished": completion.finished}
            for question, completion in zip(questions, completions, strict=True)
        ]
    records.reload()


def spoken(tokenizer, token_ids: list[int]) -> str:
    """An answer as text, tool calls visible in their markers, the end of the turn left out."""
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    return text.removesuffix("<|assistant_end|>").removesuffix("<|bos|>")
