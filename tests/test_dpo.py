"""DPO: pairs from rows of several shapes, exact ids, tool output not judged, margins that grow, bad rows named."""

import json

import pytest
import torch
from trl import DPOConfig

from nanochat_hf.checkpoint import save_model
from nanochat_hf.configs_post_training import DPOStageConfig
from nanochat_hf.data.preferences import build_pairs, encode_pairs, pair_from_row
from nanochat_hf.dpo import PairCollator, run_dpo
from nanochat_hf.tokenizer import encode_conversation, encode_prompt, special_ids

QUESTION = {"role": "user", "content": "What is 2+3?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("It is 5.", "No idea at all."))
CALL = [{"type": "python", "text": "2+3"}, {"type": "python_output", "text": "5"}, {"type": "text", "text": "5"}]


@pytest.fixture
def run_dir(tmp_path, tiny_model, tiny_tokenizer):
    (tmp_path / "sft").mkdir()
    save_model(tiny_model, tiny_tokenizer, tmp_path / "sft")
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"Surely {i}, my friend.", "rejected": f"nonsense {i % 7} zzz"}
        for i in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def arguments(**changes) -> DPOConfig:
    settings = dict(
        max_length=128, beta=0.1, max_steps=12, logging_steps=1, per_device_train_batch_size=8, max_grad_norm=0.0,
        per_device_eval_batch_size=8, learning_rate=3e-3, weight_decay=0.0, save_strategy="no", use_cpu=True,
        bf16=False, activation_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    return DPOConfig(**settings | changes)


def stage_config(run_dir, **changes) -> DPOStageConfig:
    settings = dict(run_dir=str(run_dir), optimizer="adamw", preferences=[{"dataset": str(run_dir / "pairs.jsonl")}])
    return DPOStageConfig(**settings | changes)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is 2+3?", "chosen": "It is 5.", "rejected": "No idea at all."},
        {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "What is 2+3?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD], "prompt": None},
    ],
)
def test_rows_of_each_shape_are_the_same_pair(row):
    assert pair_from_row(row) == {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "Q", "chosen": "a"},
            "no `rejected`; a row has prompt, chosen and rejected, this one chosen, p",
        ),
        ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "are the same answer"),
        ({"prompt": "Q", "chosen": " ", "rejected": "a"}, "chosen: message 1 .assistant. is empty"),
        ({"prompt": [GOOD], "chosen": "a", "rejected": "b"}, "chosen: message 0 must be of the user"),
        ({"chosen": [QUESTION, GOOD], "rejected": [{**QUESTION, "content": "x"}, BAD]}, "differ before their last"),
        ({"chosen": "a", "rejected": "b"}, "must be of the user"),
    ],
)
def test_bad_pairs_are_named_or_counted(tmp_path, row, message):
    good = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=f"pairs.jsonl:2: .*{message}"):
        build_pairs([{"dataset": str(path)}])
    pairs, counts = build_pairs([{"dataset": str(path)}], on_bad_row="skip")
    assert len(pairs) == 1 and counts == {"rows": {str(path): 1}, "skipped": 1}


def test_bad_sources():
    with pytest.raises(ValueError, match="no sources are given"):
        build_pairs([])
    with pytest.raises(ValueError, match="unknown key 'data', did you mean 'dataset'"):
        build_pairs([{"data": "x"}])
    with pytest.raises(ValueError, match="must say `dataset:`"):
        build_pairs([{"rows": 3}])


def test_ids_are_those_of_sft_and_tool_output_is_not_judged(tiny_tokenizer, tmp_path):
    row = {"prompt": [QUESTION], "chosen": [{"role": "assistant", "content": CALL}], "rejected": [BAD]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    pairs, _ = build_pairs([{"dataset": str(tmp_path / "pairs.jsonl")}])
    encoded, dropped = encode_pairs(pairs, tiny_tokenizer, 128)
    assert dropped == 0
    ids, mask = encode_conversation(tiny_tokenizer, [QUESTION, {"role": "assistant", "content": CALL}])
    assert encoded[0]["prompt_ids"] == encode_prompt(tiny_tokenizer, [QUESTION])
    assert encoded[0]["prompt_ids"] + encoded[0]["chosen_ids"] == ids
    special = special_ids(tiny_tokenizer)
    collator = PairCollator((special["<|output_start|>"], special["<|output_end|>"]), pad_token_id=0)
    batch = collator([encoded[0], encoded[0]])
    assert batch["completion_mask"][0, : len(ids)].tolist() == mask
    judged = batch["completion_mask"][2]
    assert judged.sum() == len(encoded[0]["rejected_ids"])
    with pytest.raises(ValueError, match="no preference pair of 1 fits max_length=8"):
        encode_pairs(pairs, tiny_tokenizer, 8)


@pytest.mark.parametrize("peft", [None, {"r": 4, "target_modules": ["q_proj", "v_proj", "fc1", "fc2"]}])
def test_margins_grow(run_dir, peft, capsys):
    """On pairs that were never trained on, too: the first answers of 12 steps of 8 pairs each."""
    run_dpo(stage_config(run_dir, peft=peft), arguments(), {"stage": "dpo"})
    curve = [json.loads(line) for line in (run_dir / "logs/dpo.jsonl").read_text().splitlines()]
    margins = [line["rewards/margins"] for line in curve if "loss" in line]
    assert abs(margins[0]) < 0.01  # model and reference begin equal
    assert margins[-1] > 0.05 and margins[-1] > margins[5]
    results = json.loads((run_dir / "eval/dpo.json").read_text())["results"]
    assert results["margin"] > 0.05 and results["accuracy"] > 0.9
    assert results["num_pairs"] == 57 and results["validation_counts"]["rows"] == {str(run_dir / "pairs.jsonl"): 3}
    assert "57 pairs" in capsys.readouterr().out
    assert (run_dir / "dpo/config.json").is_file() and (run_dir / "dpo/tokenizer.json").is_file()


def test_our_optimizer_moves_margins_too(run_dir):
    config = stage_config(run_dir, optimizer="muon", lr_fraction=0.05)
    run_dpo(config, arguments(max_steps=6), {})
    results = json.loads((run_dir / "eval/dpo.json").read_text())["results"]
    assert results["margin"] > 0.02


def test_a_base_model_is_refused(run_dir, tiny_model, tiny_tokenizer):
    """One that has never seen a turn end finds its token less likely than a guess."""
    with torch.no_grad():
        end = tiny_tokenizer.convert_tokens_to_ids("<|assistant_end|>")
        hidden = tiny_model.model(torch.arange(50)[None]).last_hidden_state.mean((0, 1))
        tiny_model.lm_head.weight[end] = -hidden
    (run_dir / "base").mkdir()
    save_model(tiny_model, tiny_tokenizer, run_dir / "base")
    with pytest.raises(ValueError, match="start_from=base is a base model, and this stage needs a chat model"):
        run_dpo(stage_config(run_dir, start_from="base"), arguments(), {})
