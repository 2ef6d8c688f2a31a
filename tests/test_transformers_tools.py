"""Tools built on transformers take our models: PEFT, pipelines, `transformers serve` and `chat`, continuous batching.

The server is the real one, on loopback, in a process that never imports this package: it opens the folder's own code.
Continuous batching keeps keys and values in pages and has no place for smear's state: it runs for 2025-10 models, and
2026-07 models say so and name the way out.
"""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, pipeline
from transformers.generation import ContinuousBatchingConfig

from nanochat_hf.checkpoint import save_model
from nanochat_hf.tokenizer import load_tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def folder(tiny_model, tiny_tokenizer, tmp_path):
    (tmp_path / "model").mkdir()
    save_model(tiny_model, tiny_tokenizer, tmp_path / "model")
    return tmp_path / "model"


def answer_of(folder: Path, num_tokens: int) -> str:
    """The greedy answer to QUESTION, by the model's own `generate`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    output = model.generate(prompt, max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)


# -- PEFT ------------------------------------------------------------------------------------------------------------


def test_lora_on_all_linear_layers_trains_saves_reloads_and_merges(any_model, tmp_path):
    any_model.save_pretrained(tmp_path / "base")
    ids = torch.randint(300, (2, 30))
    model = get_peft_model(any_model, LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    gates = {"ve_gate", "smear_gate"} if any_model.config.use_smear else set()
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"} | gates
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(again(input_ids=ids).logits, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, atol=2e-5, rtol=0)
        merged.save_pretrained(tmp_path / "merged")
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(opened(ids).logits, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_lora_on_the_head_counts_in_the_chunked_loss(any_model):
    """The chunked loss reads the head's weight without calling it; with an adapter there it makes whole logits."""
    ids = torch.randint(300, (2, 30))
    config = LoraConfig(target_modules=["lm_head"], r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(any_model, config)
    torch.testing.assert_close(
        model(input_ids=ids, labels=ids, skip_logits=True).loss, model(input_ids=ids, labels=ids).loss
    )


# -- pipelines -------------------------------------------------------------------------------------------------------


def test_text_generation_pipeline_takes_messages(folder):
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    reply = generate(QUESTION, max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert reply[:-1] == QUESTION and reply[-1] == {"role": "assistant", "content": answer_of(folder, 12)}
    batch = generate([QUESTION, [*reply, *QUESTION]], max_new_tokens=12, do_sample=False, batch_size=2)
    assert batch[0][0]["generated_text"] == reply and len(batch[1][0]["generated_text"]) == 4
    assert generate("The capital", max_new_tokens=5, do_sample=False)[0]["generated_text"].startswith("The capital")


# -- transformers serve and chat -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def server(folder, tmp_path):
    """Base URL of `transformers serve` on a model folder, and the environment its processes run in."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONPATH", None)
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path)
    try:
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", environment
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_served_model_answers_the_openai_client_and_transformers_chat(server, folder, tmp_path):
    openai = pytest.importorskip("openai")
    url, environment = server
    expected, num_tokens = answer_of(folder, 12), 12
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
    arguments = {"model": str(folder), "messages": QUESTION, "max_tokens": num_tokens, "temperature": 0}
    whole = client.chat.completions.create(**arguments)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason in ("length", "stop")
    assert whole.usage.completion_tokens <= num_tokens
    pieces = [chunk for chunk in client.chat.completions.create(**arguments, stream=True) if chunk.choices]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    # A streamer holds half a character back, decoding at once shows it as U+FFFD.
    assert streamed.rstrip("\ufffd") == expected.rstrip("\ufffd") and len(pieces) > 2
    assert client.completions.create(model=str(folder), prompt="The capital", max_tokens=5).choices[0].text
    command = [str(Path(sys.executable).with_name("transformers")), "chat", str(folder), url]
    command += ["max_new_tokens=12", "do_sample=False"]
    said = f"{QUESTION[0]['content']}\nn\n!exit\n!exit\n"
    # The chat talks through the Hub's client, which in offline mode would not even call loopback.
    environment |= {"HF_HUB_OFFLINE": "0", "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        command, input=said, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    words = re.findall("[A-Za-z]{3,}", expected)
    assert words and all(word in done.stdout for word in words), done.stdout


# -- continuous batching ---------------------------------------------------------------------------------------------


def test_continuous_batching_without_smear(any_model):
    """Several requests share pages of a small bounded cache, and give what each gives alone."""
    prompts = [torch.randint(300, (n,)).tolist() for n in (3, 17, 40, 9)]
    any_model.generation_config.update(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    config = ContinuousBatchingConfig(num_blocks=8, block_size=32, max_batch_tokens=64)
    if any_model.config.use_smear:
        with pytest.raises(ValueError, match="smear.*use generate.. on left-padded batches"):
            any_model.generate_batch(prompts, continuous_batching_config=config)
        return
    alone = [any_model.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]
    results = any_model.generate_batch(
        prompts, generation_config=any_model.generation_config, continuous_batching_config=config
    )
    found = sorted(results.values(), key=lambda result: int(result.request_id.rsplit("_", 1)[-1]))
    assert [result.generated_tokens for result in found] == alone
