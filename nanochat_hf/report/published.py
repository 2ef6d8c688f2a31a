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

# stage -> (seconds, tokens, peak memory in MiB); None where the report does not say. A step is 524,288 tokens.
COST = {
    "tokenizer": (56.8138, None, None),
    "base": (170.39 * 60, 11_219_763_200, 75_422.02),
    "mid": (None, 765 * 524_288, None),
    "total": (3 * 3600 + 38 * 60, None, None),
}
