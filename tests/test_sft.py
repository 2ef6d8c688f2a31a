"""Midtraining and SFT: exact targets, packing, rows shorter than conversations, our optimizer, resuming, the record."""

import json
import math

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from nanochat_hf.checkpoint import save_model
from nanochat_hf.configs_post_training import SFTStageConfig
from nanochat_hf.data.conversation_rows import encode_mixture, pack_rows, padded_batches
from nanochat_hf.sft import StageSFTTrainer, mixture_sources, run_sft
from nanochat_hf.stage import Stage
from nanochat_hf.tokenizer import encode_conversation

SHORT = [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "Yes, of course."}]
TOOL = [
    {"role": "user", "content": "What is 2+3?"},
    {
        "role": "assistant",
        "content": [
            {"type": "python", "text": "2+3"},
            {"type": "python_output", "text": "5"},
            {"type": "text", "text": "5\n#### 5"},
        ],
    },
]


@pytest.fixture
def run_dir(tmp_path, tiny_model, tiny_tokenizer):
    (tmp_path / "base").mkdir()
    save_model(tiny_model, tiny_tokenizer, tmp_path / "base")
    return tmp_path


ARGUMENTS = dict(
    max_length=128, packing=True, packing_strategy="bfd", assistant_only_loss=True, max_steps=4, logging_steps=1,
    per_device_train_batch_size=2, max_grad_norm=0.0, weight_decay=0.0, save_strategy="no", use_cpu=True,
    bf16=False, activation_checkpointing=False, disable_tqdm=True,
)  # fmt: skip


def arguments(**changes) -> SFTConfig:
    return SFTConfig(**ARGUMENTS | changes)


def stage_config(run_dir, mixture=({"source": "arithmetic", "rows": 60},), **changes) -> SFTStageConfig:
    settings = dict(run_dir=str(run_dir), stage="sft", start_from="base", mixture=list(mixture), lr_fraction=0.1)
    return SFTStageConfig(**settings | changes)


def record(run_dir, stage="sft") -> dict:
    return json.loads((run_dir / "eval" / f"{stage}.json").read_text())


def losses_of(run_dir, stage) -> dict[int, float]:
    lines = (run_dir / "logs" / f"{stage}.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def mixture_of(*conversations) -> datasets.Dataset:
    features = datasets.Features({"messages": datasets.Json(), "source": datasets.Value("string")})
    columns = {"messages": list(conversations), "source": ["test"] * len(conversations)}
    return datasets.Dataset.from_dict(columns, features=features)


def long_conversations(path, num_rows, question_words, answer_words):
    lines = []
    for i in range(num_rows):
        question = {"role": "user", "content": f"Question {i}: " + "why is it so " * question_words}
        answer = {"role": "assistant", "content": f"Answer {i}: " + "that is how it is " * answer_words}
        lines.append(json.dumps({"messages": [question, answer, question, answer]}))
    path.write_text("\n".join(lines))


def test_targets_are_those_of_the_exact_encoding(tiny_tokenizer):
    encoded, counts = encode_mixture(mixture_of(SHORT, TOOL), tiny_tokenizer, 512, "truncate")
    for row, messages in zip(encoded, (SHORT, TOOL), strict=True):
        ids, mask = encode_conversation(tiny_tokenizer, messages)
        assert row["input_ids"] == ids
        assert row["labels"] == [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
    assert counts["rows"] == {"test": 2}
    assert counts["tokens"] == {"test": sum(map(len, encoded["input_ids"]))}


def test_overlong_conversations_are_cut_or_dropped_and_counted(tiny_tokenizer):
    question = {"role": "user", "content": "why " * 200}
    long_answer = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "on and " * 200}]
    long_question = [question, {"role": "assistant", "content": "Because."}]
    mixture = mixture_of(SHORT, long_answer, long_question)

    kept, counts = encode_mixture(mixture, tiny_tokenizer, 64, "truncate")
    assert [counts[key] for key in ("truncated", "dropped_overlong", "dropped_without_target")] == [1, 0, 1]
    assert len(kept) == 2 and max(map(len, kept["input_ids"])) == 64

    kept, counts = encode_mixture(mixture, tiny_tokenizer, 64, "drop")
    assert [counts[key] for key in ("truncated", "dropped_overlong", "dropped_without_target")] == [0, 2, 0]
    assert len(kept) == 1

    with pytest.raises(ValueError, match="no conversation is left of 1.*raise max_length"):
        encode_mixture(mixture_of(long_question), tiny_tokenizer, 64, "truncate")


def test_a_bad_conversation_is_named(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"row 1 of the mixture \(source test\)"):
        encode_mixture(mixture_of(SHORT, [SHORT[1]]), tiny_tokenizer, 64, "truncate")


def test_packing_keeps_every_token_and_every_row_has_a_target(tiny_tokenizer):
    encoded, _ = encode_mixture(mixture_of(*[SHORT, TOOL] * 20), tiny_tokenizer, 64, "truncate")
    tokens = sum(map(len, encoded["input_ids"]))

    wrapped = pack_rows(encoded, 64, "wrapped", assistant_only=False)
    assert wrapped.column_names == ["input_ids"]
    stream = [token for row in encoded["input_ids"] for token in row]
    assert [token for row in wrapped["input_ids"] for token in row] == stream
    assert all(len(ids) == 64 for ids in wrapped["input_ids"][:-1])

    packed = pack_rows(encoded, 64, "bfd", assistant_only=True)
    assert sum(map(len, packed["input_ids"])) == tokens
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 64 for row in packed)
    assert all(any(label != -100 for label in row["labels"][1:]) for row in packed)


@pytest.fixture
def trainer(run_dir, tiny_model, tiny_tokenizer):
    """A trainer on packed rows of two kinds of conversation."""
    encoded, _ = encode_mixture(mixture_of(*[SHORT, TOOL] * 8), tiny_tokenizer, 128, "truncate")
    rows = pack_rows(encoded, 128, "bfd", assistant_only=True)
    args = arguments(output_dir=str(run_dir / "out"), dataset_kwargs={"skip_prepare_dataset": True})
    args.assistant_only_loss = False
    config = stage_config(run_dir, lr_fraction=0.5, warmdown_fraction=0.5, learning_rates={"smear": 0.04})
    trainer = StageSFTTrainer(config, model=tiny_model, args=args, train_dataset=rows, processing_class=tiny_tokenizer)
    trainer.encoded = encoded
    return trainer


def test_packed_conversations_do_not_see_each_other(trainer, tiny_tokenizer):
    """The loss of packed rows is that of the conversations one by one."""
    model, total, count = trainer.model, 0.0, 0
    for row in trainer.encoded:
        labels = torch.tensor([row["labels"]])
        total += model(torch.tensor([row["input_ids"]]), labels=labels, num_items_in_batch=1).loss.item()
        count += (labels[:, 1:] != -100).sum().item()
    packed = num_targets = 0
    for batch in trainer.get_eval_dataloader(trainer.train_dataset):
        assert "attention_mask" not in batch and (batch["position_ids"] == 0).sum() > 1
        packed += trainer.compute_loss(model, dict(batch), num_items_in_batch=1).item()
        num_targets += (batch["labels"] != -100).sum().item()
    assert num_targets == count
    assert packed / count == pytest.approx(total / count, rel=1e-4)


def test_the_loss_is_trls(trainer):
    """Our faster loss against SFTTrainer's own, value and gradient."""
    batch = next(iter(trainer.get_train_dataloader()))
    results = []
    for compute_loss in (StageSFTTrainer.compute_loss, SFTTrainer.compute_loss):
        trainer.model.zero_grad()
        loss = compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=torch.tensor(7))
        loss.backward()
        results.append([loss, *[p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_our_optimizer_and_schedule_drive_the_steps(trainer):
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert optimizer.num_orthogonalized > 0
    assert groups["matrix"]["initial_lr"] == pytest.approx(0.02 * 0.5)
    assert groups["smear"]["initial_lr"] == pytest.approx(0.04 * 0.5)
    assert groups["matrix"]["weight_decay"] == 0.0
    rates = [line["learning_rate"] / groups["lm_head"]["initial_lr"] for line in trainer.state.log_history[:4]]
    by_name = trainer.lr_scheduler.lr_lambdas[0]
    assert rates == pytest.approx([by_name(step) for step in range(4)])
    assert rates == pytest.approx([1, 1, 1, 0.5])


def test_short_rows_and_long_conversations_train_without_nan(run_dir):
    """nanochat's most reported bug: conversations of 2,000 tokens, rows of 128."""
    long_conversations(run_dir / "answers.jsonl", 30, question_words=2, answer_words=200)
    long_conversations(run_dir / "questions.jsonl", 30, question_words=300, answer_words=100)
    mixture = [
        {"source": "messages", "dataset": str(run_dir / "answers.jsonl")},
        {"source": "messages", "dataset": str(run_dir / "questions.jsonl")},
        {"source": "identity", "rows": 20},
    ]
    run_sft(stage_config(run_dir, mixture), arguments(), {})
    results = record(run_dir)["results"]
    counts = results["train_mixture"]
    assert counts["truncated"] >= 25 and counts["dropped_without_target"] >= 25
    assert math.isfinite(results["train_loss"]) and math.isfinite(results["val_loss"])
    losses = losses_of(run_dir, "sft")
    assert list(losses) == [1, 2, 3, 4] and all(map(math.isfinite, losses.values()))


def test_a_run_shorter_than_its_logging_interval_has_a_curve(run_dir):
    run_sft(stage_config(run_dir), arguments(max_steps=2, logging_steps=5), {})
    assert list(losses_of(run_dir, "sft")) == [2]
    assert record(run_dir)["results"]["train_loss"] == losses_of(run_dir, "sft")[2]


def test_a_loss_that_is_no_number_stops_the_stage(run_dir, tiny_model, tiny_tokenizer):
    with torch.no_grad():
        tiny_model.lm_head.weight[0] = float("nan")
    save_model(tiny_model, tiny_tokenizer, run_dir / "base")
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        run_sft(stage_config(run_dir), arguments(), {})
    assert not (run_dir / "sft").exists()


def test_midtraining_then_sft_end_to_end(run_dir, tiny_tokenizer, capsys):
    """Both stages: bits per byte fall, the folders open anywhere, the record holds what the report reads."""
    mixture = [{"source": "arithmetic", "rows": 120}, {"source": "identity", "rows": 40}]
    middle = arguments(packing_strategy="wrapped", assistant_only_loss=False, max_steps=8)
    config = stage_config(run_dir, mixture, stage="mid", lr_fraction=0.5, eval_every_steps=4)
    run_sft(config, middle, {"stage": "mid"})
    run_sft(stage_config(run_dir, mixture, start_from="mid"), arguments(max_steps=8), {"stage": "sft"})
    mid, sft = record(run_dir, "mid")["results"], record(run_dir, "sft")["results"]

    assert mid["val_bpb"] == mid["val_bpb_all"] < mid["before"]["val_bpb"]
    assert sft["val_bpb"] == sft["val_bpb_assistant"] < sft["before"]["val_bpb"]
    assert sft["before"]["val_bpb_all"] == pytest.approx(mid["val_bpb_all"], rel=1e-3)
    assert mid["tokens"] == 8 * 2 * 128  # wrapped rows are full
    curve = [json.loads(line) for line in (run_dir / "logs" / "mid.jsonl").read_text().splitlines()]
    validations = {line["step"]: line["val_bpb"] for line in curve if "val_bpb" in line}
    assert list(validations) == [0, 4, 8] and validations[0] == mid["before"]["val_bpb"]
    assert validations[8] == mid["val_bpb"] and mid["min_val_bpb"] == min(validations.values())
    assert mid["num_steps"] == 8 and mid["tokens_per_second"] > 0
    assert sft["train_mixture"]["rows"] == {"arithmetic": 120, "identity": 40}
    assert "arithmetic" in capsys.readouterr().out

    model = AutoModelForCausalLM.from_pretrained(run_dir / "sft")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "sft")
    end = tiny_tokenizer.convert_tokens_to_ids("<|assistant_end|>")
    assert model.generation_config.eos_token_id == [end, tiny_tokenizer.bos_token_id]
    assert (
        tokenizer.chat_template
        and not list(run_dir.glob("**/*.partial"))
        and not (run_dir / "checkpoints/sft").exists()
    )

    run_sft(stage_config(run_dir, mixture), arguments(), {"stage": "sft"})
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(ValueError, match="belongs to another recipe"):
        run_sft(stage_config(run_dir, mixture), arguments(), {"stage": "other"})


def test_an_interrupted_stage_resumes_to_the_same_weights(run_dir, monkeypatch, capsys):
    def run(stage):
        run_sft(stage_config(run_dir, stage=stage), arguments(save_strategy="steps", save_steps=2), {})
        return AutoModelForCausalLM.from_pretrained(run_dir / stage).state_dict()

    straight = run("mid")

    log = Stage.log

    def power_cut(stage, **figures):
        log(stage, **figures)
        if figures["step"] == 3 and "loss" in figures:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "log", power_cut)
        with pytest.raises(KeyboardInterrupt):
            run("sft")
    assert not (run_dir / "sft").exists()
    assert [path.name for path in run_dir.glob("checkpoints/sft/checkpoint-*")] == ["checkpoint-2"]
    resumed = run("sft")
    assert "resuming from" in capsys.readouterr().out
    assert losses_of(run_dir, "sft") == pytest.approx(losses_of(run_dir, "mid"), rel=1e-5)
    for name, weight in straight.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-6)


def test_padded_batches_score_each_target_once(tiny_tokenizer):
    encoded, _ = encode_mixture(mixture_of(SHORT, TOOL, SHORT), tiny_tokenizer, 64, "truncate")
    for assistant_only in (True, False):
        targets = 0
        for batch in padded_batches(encoded, 0, assistant_only, "cpu", batch_size=2):
            ids, labels, mask = batch["input_ids"], batch["shift_labels"], batch["attention_mask"]
            targets += (labels != -100).sum().item()
            rows, columns = torch.nonzero(labels != -100, as_tuple=True)
            assert (ids[rows, columns + 1] == labels[rows, columns]).all() and mask[rows, columns + 1].all()
        columns = encoded["labels"] if assistant_only else encoded["input_ids"]
        assert targets == sum(label != -100 for row in columns for label in row[1:])


def test_real_data_becomes_more_sources(shared_data):
    config = SFTStageConfig(
        mixture=[{"source": "identity"}], chat_data=str(shared_data / "chat"), eval_data=str(shared_data / "eval"),
        data_rows=7,
    )  # fmt: skip
    sources = mixture_sources(config)
    assert [source["source"] for source in sources] == ["identity", "messages", "gsm8k", "arc", "arc"]
    assert all(source["max_rows"] == 7 for source in sources[1:])


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"start_from": "mid"}, {}, "run the mid stage first"),
        ({"start_from": "bas"}, {}, "no stage .* did you mean base"),
        ({"start_from": "owner/no-such-model"}, {}, "owner/no-such-model"),
        ({"mixture": []}, {}, "mixture is empty"),
        ({"mixture": [{"source": "arithmetics", "rows": 5}]}, {}, "did you mean 'arithmetic'"),
        ({}, {"learning_rate": 1e-3}, "`learning_rate` has no effect.*lr_fraction"),
    ],
)
def test_bad_input_names_the_fix(run_dir, changes, settings, message):
    with pytest.raises(ValueError, match=message):
        run_sft(stage_config(run_dir, **changes), arguments(), settings)
    assert not (run_dir / "sft").exists()


def test_a_folder_that_is_no_model_is_refused(run_dir):
    (run_dir / "eval").mkdir()
    with pytest.raises(ValueError, match="not a model folder"):
        run_sft(stage_config(run_dir, start_from=str(run_dir / "eval")), arguments(), {})
