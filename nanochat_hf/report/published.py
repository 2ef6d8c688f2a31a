"""What nanochat's published d20 run reached (8xH100, 3 h 38 min, October 2025), to stand beside our figures.

Facts read off its training report (commit 4346536); that run had no RL stage. Keys are our record and metric names.
"""

NAME = "nanochat d20"

CHATCORE_TASKS = ("ARC-Challenge", "ARC-Easy", "GSM8K", "HumanEval", "MMLU")

# metric -> {stage: value}
SUMMARY = {
    "CORE": {"base": 0.1957},
    "ARC-Challenge": {"mid": 0.2952, "sft": 0.3029},
    "ARC-Easy": {"mid": 0.3838, "sft": 0.3969},
    "GSM8K": {"mid": 0.0417, "sft": 0.0531},
    "HumanEval": {"mid": 0.0854, "sft": 0.0854},
    "MMLU": {"mid": 0.3165, "sft": 0.3159},
    "ChatCORE": {"mid": 0.0909, "sft": 0.0985},
    "validation bits per byte": {"base": 0.8119, "mid": 0.3954},
}

# record -> {key of a result: value}
RESULTS = {
    "tokenizer": {
        "vocab_size": 65_536,
        "num_special_tokens": 9,
        "train_seconds": 56.8138,
        "token_bytes_min": 1,
        "token_bytes_max": 32,
        "token_bytes_mean": 6.9197,
        "token_bytes_std": 2.8748,
    },
    "base": {
        "num_parameters": 560_988_160,
        "flops_per_token": 3.491758e9,
        "num_steps": 21_400,
        "tokens": 11_219_763_200,
        "tokens_per_parameter": 20.0,
        "world_size": 8,
        "min_val_bpb": 0.8118,
        "val_bpb": 0.8118,
        "core": 0.2086,  # during training, 500 items a task
        "mfu": 0.4865,
        "total_flops": 3.917670e19,
        "training_seconds": 170.39 * 60,
        "peak_memory_mib": 75_422.02,
    },
    "base_loss": {"train_bpb": 0.8147, "val_bpb": 0.8119},
    "mid": {"num_steps": 765, "world_size": 8, "min_val_bpb": 0.3954},
    "sft": {"num_rows": 20_843, "num_steps": 651, "train_loss": 1.1076, "val_loss": 1.0118},
}

# CORE task -> centered score
CORE = {
    "hellaswag_zeroshot": 0.2622,
    "jeopardy": 0.1238,
    "bigbench_qa_wikidata": 0.5231,
    "arc_easy": 0.5258,
    "arc_challenge": 0.1320,
    "copa": 0.3200,
    "commonsense_qa": 0.1595,
    "piqa": 0.3896,
    "openbook_qa": 0.1280,
    "lambada_openai": 0.3697,
    "hellaswag": 0.2639,
    "winograd": 0.2527,
    "winogrande": 0.0639,
    "bigbench_dyck_languages": 0.1080,
    "agi_eval_lsat_ar": 0.0543,
    "bigbench_cs_algorithms": 0.3742,
    "bigbench_operators": 0.1333,
    "bigbench_repeat_copy_logic": 0.0,
    "squad": 0.2355,
    "coqa": 0.1912,
    "boolq": -0.4816,
    "bigbench_language_identification": 0.1771,
}

# stage -> (seconds, tokens); None where the report does not say. A step is 524,288 tokens.
COST = {
    "tokenizer": (56.8138, None),
    "base": (170.39 * 60, 11_219_763_200),
    "mid": (None, 765 * 524_288),
    "total": (3 * 3600 + 38 * 60, None),
}


def row_name(task: str) -> str:
    """A chat task's name in the published tables: `chatcore_arc_easy` is ARC-Easy; others keep theirs."""
    short = task.removeprefix("chatcore_")
    return next((name for name in CHATCORE_TASKS if name.lower().replace("-", "_") == short), short)
