"""SFT beyond the first recipe: LoRA, plain AdamW, 2026-07's packing and optimizer state, templates, kills, samples."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sft import ARGUMENTS, SHORT, TOOL, arguments, losses_of, mixture_of, record, run_dir, stage_config  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanochat_hf.checkpoint import save_model
from nanochat_hf.data.conversation_rows import best_fit_groups, encode_mixture, join_rows, pack_rows
from nanochat_hf.optim import build_optimizer
from nanochat_hf.optim_state import load_optimizer_state, save_optimizer_state
from nanochat_hf.sft import run_sft
from nanochat_hf.tokenizer import encode_conversation

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "fc1"], "modules_to_save": ["lm_head"]}
TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}{{ '<|' + message.role + '_start|>' }}"
    "{% generation %}{% if message.role == 'assistant' %}{{ message.content + '<|assistant_end|>' }}{% endif %}"
    "{% endgeneration %}{% if message.role == 'user' %}{{ message.content + '<|user_end|>' }}{% endif %}{% endfor %}"
)


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


# LoRA and plain AdamW.


def test_a_lora_adapter_is_merged_into_a_plain_model_folder(run_dir):  # noqa: F811
    from peft import PeftModel

    config = stage_config(run_dir, optimizer="adamw", peft=LORA)
    run_sft(config, arguments(learning_rate=5e-3, lr_scheduler_type="constant"), {})
    before, merged = weights(run_dir / "base"), weights(run_dir / "sft")
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert before.keys() == merged.keys()
    assert changed == {
        name for name in before if name.split(".")[-2] in ("q_proj", "v_proj", "fc1", "lm_head")
    }  # nothing else has moved
    losses = losses_of(run_dir, "sft")
    assert losses[4] < losses[1]

    base = AutoModelForCausalLM.from_pretrained(run_dir / "base")
    adapted = PeftModel.from_pretrained(base, run_dir / "sft" / "adapter").eval()
    settings = json.loads((run_dir / "sft/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "base" and not (run_dir / "sft/adapter/README.md").exists()
    ids = torch.arange(40)[None]
    plain = AutoModelForCausalLM.from_pretrained(run_dir / "sft").eval()
    torch.testing.assert_close(adapted(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"rank": 8}, "LoraConfig has no setting `rank`; did you mean `"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"modules_to_save: \[lm_head\]"),
    ],
)
def test_lora_settings_that_would_not_work(run_dir, peft, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        run_sft(stage_config(run_dir, peft=peft, optimizer="adamw"), arguments(), {})


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"optimizer": "adamw"}, {"lr_fraction": 0.1}, "`lr_fraction` has no effect with `optimizer: adamw`"),
        ({}, {"learning_rate": 0.1}, "`learning_rate` has no effect with `optimizer: muon`"),
        ({"best_fit_packing": True}, {}, "set `packing: false` beside it"),
        ({"keep_optimizer_state": True, "start_from": "mid"}, {}, "needs `start_from: base`"),
        ({"keep_optimizer_state": True}, {}, "pretrain with keep_optimizer_state: true"),
        ({"chat_template": "no/such.jinja"}, {}, "no file no/such.jinja"),
    ],
)
def test_settings_that_contradict_each_other(run_dir, changes, settings, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        run_sft(stage_config(run_dir, **changes), arguments(), settings)
    assert not (run_dir / "sft").exists()


# 2026-07: best-fit packing without cropping, the optimizer's state carried on.


def best_fit_by_hand(lengths, row_tokens, buffer_size=100):
    """A plain scan of the buffer, as the reference describes it."""
    waiting, buffer, rows = list(enumerate(lengths)), [], []
    while waiting or buffer:
        room, row = row_tokens, []
        while True:
            while waiting and len(buffer) < buffer_size:
                buffer.append(waiting.pop(0))
            fitting = [pair for pair in buffer if pair[1] <= room]
            if not fitting:
                break
            best = max(fitting, key=lambda pair: pair[1])  # of equals the first
            buffer.remove(best)
            row.append(best[0])
            room -= best[1]
        rows.append(row)
    return rows


def test_best_fit_takes_the_longest_that_fits():
    lengths = np.random.default_rng(0).integers(3, 129, 700).tolist()
    groups = best_fit_groups(lengths, 128)
    assert groups == best_fit_by_hand(lengths, 128)
    assert sorted(index for group in groups for index in group) == list(range(700))  # nothing cropped, nothing lost
    assert best_fit_groups([], 128) == []


def test_joined_rows_hold_whole_conversations(tiny_tokenizer):
    encoded, _ = encode_mixture(mixture_of(*[SHORT, TOOL] * 30), tiny_tokenizer, 128, "truncate")
    groups = best_fit_groups(map(len, encoded["input_ids"]), 128)
    rows = pack_rows(encoded, 128, "best_fit", assistant_only=True)
    for name in ("input_ids", "labels"):
        assert rows[name][:] == [sum((encoded[i][name] for i in group), []) for group in groups]
    assert max(map(len, rows["input_ids"])) <= 128
    again = join_rows(encoded.select([2, 0, 1]).select_columns(["input_ids"]), [[1], [0, 2]])
    assert again["input_ids"][:] == [encoded[0]["input_ids"], encoded[2]["input_ids"] + encoded[1]["input_ids"]]


def test_one_stage_on_best_fit_rows(run_dir):  # noqa: F811
    """Padded rows: the loss counts the assistant's tokens only, and conversations of a row see each other."""
    run_sft(stage_config(run_dir, best_fit_packing=True), arguments(packing=False, max_steps=3, max_length=256), {})
    results = record(run_dir)["results"]
    assert results["num_packed_rows"] < results["num_rows"]
    assert results["val_bpb"] < results["before"]["val_bpb"]


def step_once(model, optimizer):
    ids = torch.arange(60).view(1, 60)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_optimizers_state_is_carried_on(run_dir, tiny_model):  # noqa: F811
    optimizer = build_optimizer(tiny_model, dtype=torch.float32)
    step_once(tiny_model, optimizer)
    (run_dir / "checkpoints/base").mkdir(parents=True)
    save_optimizer_state(optimizer, tiny_model, run_dir / "checkpoints/base", rank=0)
    fresh = build_optimizer(tiny_model, dtype=torch.float32)
    load_optimizer_state(fresh, tiny_model, run_dir / "checkpoints/base")
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            assert torch.equal(fresh.state[parameter][key], value), key

    run_sft(stage_config(run_dir, stage="mid"), arguments(max_steps=1), {})
    run_sft(stage_config(run_dir, keep_optimizer_state=True), arguments(max_steps=1), {})
    with_moments, without = weights(run_dir / "sft"), weights(run_dir / "mid")
    assert any(not torch.equal(with_moments[name], without[name]) for name in without)


def test_parts_of_several_processes_become_one_state(tmp_path, tiny_model):
    """Slices of an embedding, matrices with one owner each, copies of small parameters."""
    optimizer = build_optimizer(tiny_model, dtype=torch.float32)
    step_once(tiny_model, optimizer)
    whole = {name: dict(optimizer.state[p]) for name, p in tiny_model.named_parameters() if optimizer.state.get(p)}
    matrices = [name for name, state in whole.items() if "momentum" in state]
    parts = [{}, {}]
    for name, state in whole.items():
        if name in matrices:
            parts[matrices.index(name) % 2][name] = state
        elif state["exp_avg"].numel() < 4096:
            parts[0][name] = parts[1][name] = state
        else:
            for rank in (0, 1):
                parts[rank][name] = {
                    key: value if value.ndim == 0 else value.flatten().chunk(2)[rank] for key, value in state.items()
                }
    for rank in (0, 1):
        torch.save(parts[rank], tmp_path / f"optimizer-{rank:03d}.pt")
    fresh = build_optimizer(tiny_model, dtype=torch.float32)
    load_optimizer_state(fresh, tiny_model, tmp_path)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            assert torch.equal(fresh.state[parameter][key], value), key
    torch.save(parts[0], tmp_path / "optimizer-001.pt")  # a process's part is missing
    with pytest.raises(ValueError, match="another model's: `.*` is in one of them only"):
        load_optimizer_state(fresh, tiny_model, tmp_path)


# Templates.


def test_a_template_of_ones_own_is_trained_on_and_kept(run_dir, tiny_tokenizer):  # noqa: F811
    (run_dir / "mine.jinja").write_text(TEMPLATE)
    config = stage_config(run_dir, [{"source": "identity"}], chat_template=str(run_dir / "mine.jinja"))
    run_sft(config, arguments(max_steps=2), {})
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "sft")
    assert tokenizer.chat_template == TEMPLATE

    from nanochat_hf.chat_templates import encode_with_template

    assert encode_with_template(tokenizer, SHORT) == encode_conversation(tiny_tokenizer, SHORT)  # it is the same format


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE.replace("<|bos|>", "<|begin|>"), r"uses <\|begin\|>, which the tokenizer does not have .*<\|bos\|>"),
        (TEMPLATE.replace("message.role + '_start", "message.role + '_begin"), r"uses <\|user_begin\|>"),
        (
            TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
            "which tokens are the assistant's",
        ),
        ("{% for message in messages %}", "does not render"),
    ],
)
def test_templates_that_would_go_wrong_silently(run_dir, template, message):  # noqa: F811
    (run_dir / "mine.jinja").write_text(template)
    with pytest.raises(ValueError, match=message):
        run_sft(stage_config(run_dir, chat_template=str(run_dir / "mine.jinja")), arguments(), {})


# Kills, and what is seen on the way.


def test_a_killed_stage_resumes_from_its_last_whole_checkpoint(run_dir, capsys):  # noqa: F811
    """SIGKILL in the middle of the second checkpoint: weights and curve come out as if nothing had happened."""
    args = dict(save_strategy="steps", save_steps=2, max_steps=6)
    run_sft(stage_config(run_dir, stage="mid"), arguments(**args), {})
    config = stage_config(run_dir, eval_every_steps=1)
    (run_dir / "config.json").write_text(json.dumps(asdict(config)))
    (run_dir / "arguments.json").write_text(json.dumps(ARGUMENTS | args | {"output_dir": str(run_dir / "out")}))
    command = [sys.executable, str(Path(__file__).with_name("killed_sft.py"))]
    command += [str(run_dir / "config.json"), str(run_dir / "arguments.json"), "2"]
    killed = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = sorted(path.name for path in run_dir.glob("checkpoints/sft/checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-4"] and not (run_dir / "sft").exists()
    before = json.loads((run_dir / "logs/sft.jsonl").read_text().splitlines()[0])

    run_sft(config, arguments(**args), {})
    told = capsys.readouterr()
    assert "checkpoint-4 is not whole" in told.err and "checkpoint-2" in told.out.split("resuming from")[1]
    assert losses_of(run_dir, "sft") == pytest.approx(losses_of(run_dir, "mid"), rel=1e-5)
    straight, resumed = weights(run_dir / "mid"), weights(run_dir / "sft")
    for name, weight in straight.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-6)
    assert record(run_dir)["results"]["before"]["val_bpb"] == before["val_bpb"]  # of the session that was killed


def test_chats_and_chatcore_are_logged_while_training(run_dir):  # noqa: F811
    config = stage_config(
        run_dir, eval_every_steps=2, chatcore_every_steps=2, chatcore_rows=2, sample_questions=["Who are you?"]
    )
    run_sft(config, arguments(), {})
    curve = [json.loads(line) for line in (run_dir / "logs/sft.jsonl").read_text().splitlines()]
    chats = {line["step"]: line["chats"] for line in curve if "chats" in line}
    assert list(chats) == [2, 4] and all(chat[0]["question"] == "Who are you?" for chat in chats.values())
    scores = {line["step"]: line for line in curve if "chatcore" in line}
    assert list(scores) == [2, 4]
    assert set(scores[4]["tasks"]) == {
        "chatcore_mini_multiple_choice", "chatcore_mini_arithmetic", "chatcore_mini_letter_counting"
    }  # fmt: skip
    assert record(run_dir)["results"]["chatcore"] == scores[4]["chatcore"]
    validations = [line for line in curve if "val_bpb" in line]
    assert [line["step"] for line in validations] == [0, 2, 4]
    assert all(line["val_bpb"] == line["val_bpb_assistant"] > 0 for line in validations)


def test_a_tokenizer_without_the_chat_tokens_is_refused(run_dir, tiny_model):  # noqa: F811
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    save_model(tiny_model, None, run_dir / "base")
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])))
    plain.save_pretrained(run_dir / "base")
    with pytest.raises(ValueError, match=r"lacks <\|bos\|>, .*conversations need the nine tokens"):
        run_sft(stage_config(run_dir), arguments(), {})


def test_accumulation_follows_from_a_steps_rows():
    from trl import GRPOConfig

    from nanochat_hf.trl_stage import set_accumulation

    args = arguments(per_device_train_batch_size=4)
    set_accumulation(32, args, {})
    assert args.gradient_accumulation_steps == 8
    rl = GRPOConfig(num_generations=4, per_device_train_batch_size=4, use_cpu=True, bf16=False)
    set_accumulation(16, rl, {})
    assert (rl.gradient_accumulation_steps, rl.steps_per_generation, rl.generation_batch_size) == (4, 4, 16)
    with pytest.raises(ValueError, match="total_batch_rows=30 is no multiple of 4"):
        set_accumulation(30, args, {})
    with pytest.raises(ValueError, match="leave one of them out"):
        set_accumulation(32, args, {"gradient_accumulation_steps": 2})


def test_muon_is_for_models_it_knows(run_dir, tiny_model, tiny_tokenizer):  # noqa: F811
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(run_dir / "llama")
    tiny_tokenizer.save_pretrained(run_dir / "llama")
    with pytest.raises(ValueError, match="not those of llama; set `optimizer: adamw`"):
        run_sft(stage_config(run_dir, start_from=str(run_dir / "llama")), arguments(), {})
