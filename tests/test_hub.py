"""Publishing to a Hub on loopback, and loading it back where this package cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import LoopbackHub
from transformers import AutoTokenizer

from nanochat_hf import NanoChatHFForCausalLM
from nanochat_hf.checkpoint import save_model
from nanochat_hf.configs import PublishConfig
from nanochat_hf.hub import check, publish, published
from nanochat_hf.hub.card import model_card, public_name

ROOT = Path(__file__).parents[1]

LOAD_BACK = """
import sys
sys.modules["nanochat_hf"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
messages = [{"role": "user", "content": "Hi"}]
for branch in ("main", "sft"):
    kwargs = {"trust_remote_code": True, "revision": branch}
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **kwargs)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **kwargs).eval()
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = inputs["input_ids"]
    torch.save({"ids": ids, "logits": model(input_ids=ids).logits.detach()}, f"{branch}.pt")
"""

PUBLISH = """
import sys
import nanochat_hf.hub as hub
from nanochat_hf.configs import PublishConfig
hub.check.math.log = lambda value: 1e9  # the models are untrained
hub.publish(PublishConfig(run=sys.argv[1], repo_id="me/tiny", space=True))
"""


@pytest.fixture
def run_dir(tmp_path, tiny_model, tiny_tokenizer):
    """A run with an sft model, its report and records."""
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    (run / "sft").mkdir()
    save_model(tiny_model, tiny_tokenizer, run / "sft")
    settings = {"mixture": [{"source": "arithmetic"}, {"source": "messages", "dataset": "/home/me/talk.jsonl"}]}
    (run / "eval" / "sft.json").write_text(json.dumps({"settings": settings, "results": {}}))
    metrics = {
        "base": {"val_bpb": 1.5, "num_parameters": 12345},
        "chatcore": {
            "chatcore": 0.25,
            "chatcore_stderr": 0.02,
            "chatcore_mini_arithmetic": 0.5,
            "num_items": {"chatcore_mini_arithmetic": 40},
            "stage": "sft",
            "seconds": 3.5,
        },
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "report.md").write_text(f"# report of {run}\n\n| mixture | /home/me/talk.jsonl |\n")
    (run / "plots").mkdir()
    (run / "plots" / "loss.png").write_bytes(b"png")
    return run


@pytest.fixture
def hub(tmp_path):
    """A Hub on loopback; `hub.run(code, *arguments)` runs Python that talks to it, in another process."""
    with LoopbackHub() as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}

        def run(code, *arguments):
            command = [sys.executable, "-c", code, *map(str, arguments)]
            done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "hf_x" not in done.stdout + done.stderr

        hub.run = run
        yield hub


def better_than_guessing(monkeypatch):
    """The fixtures' models are untrained; this part of the check has a test of its own."""
    monkeypatch.setattr("nanochat_hf.hub.check.math.log", lambda value: 1e9)


def test_dry_run_sends_nothing_and_lists_everything(run_dir, monkeypatch, capsys):
    better_than_guessing(monkeypatch)
    (run_dir / "sft" / "README.md").write_text("mine")
    publish(PublishConfig(run=str(run_dir), repo_id="me/tiny", space=True, dry_run=True))
    printed = capsys.readouterr().out
    for name in (
        "README.md",
        "report.md",
        "model.safetensors",
        "modeling_nanochat_hf.py",
        "tokenizer.json",
        "branch sft",
        "app.py",
    ):
        assert name in printed
    assert "me/tiny (private)" in printed
    assert (run_dir / "sft" / "README.md").read_text() == "mine"


def test_published_models_load_without_this_package(run_dir, hub, tmp_path, tiny_model, tiny_tokenizer):
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight.mul_(2)
    (run_dir / "rl").mkdir()
    save_model(tiny_model, tiny_tokenizer, run_dir / "rl")
    hub.run(PUBLISH, run_dir)
    repo = hub.repos["me/tiny"]
    assert repo["private"] is True and set(repo["branches"]) == {"main", "sft", "rl"}
    main = repo["branches"]["main"]
    assert main.keys() == repo["branches"]["rl"].keys()
    assert main["report.md"].decode() == "# report of run\n\n| mixture | talk.jsonl |\n"
    assert "![loss](plots/loss.png)" in main["README.md"].decode() and "plots/loss.png" in main
    space = hub.repos["spaces/me/tiny"]
    assert space["private"] is True
    assert {"app.py", "README.md", "requirements.txt", "nanochat_hf/chat.py"} <= space["branches"]["main"].keys()
    assert space["variables"] == [{"key": "MODEL_ID", "value": "me/tiny"}]
    hub.run(LOAD_BACK, "me/tiny")
    for branch, stage in (("main", "rl"), ("sft", "sft")):
        theirs = torch.load(tmp_path / f"{branch}.pt")
        with torch.no_grad():
            ours = NanoChatHFForCausalLM.from_pretrained(run_dir / stage).eval()(input_ids=theirs["ids"]).logits
        assert torch.equal(theirs["logits"], ours)


@pytest.fixture
def send(run_dir, hub, monkeypatch):
    """Publishes the run to the Hub on loopback in this process, unchecked."""
    monkeypatch.setattr("nanochat_hf.hub.check_folder", lambda folder: "not checked")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    return lambda: publish(PublishConfig(run=str(run_dir), repo_id="me/tiny"))


def num_puts(hub):
    return sum(method == "PUT" for method, _ in hub.requests)


def test_an_upload_that_broke_off_goes_on_where_it_was(run_dir, hub, send, tiny_model, tiny_tokenizer):
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight.mul_(2)
    (run_dir / "rl").mkdir()
    save_model(tiny_model, tiny_tokenizer, run_dir / "rl")
    hub.num_objects_taken = 2  # of three: two models and a plot
    with pytest.raises(ValueError, match="what was sent is kept"):
        send()
    hub.num_objects_taken, before = None, num_puts(hub)
    send()
    assert num_puts(hub) == before + 1
    assert set(hub.repos["me/tiny"]["branches"]) == {"main", "sft", "rl"}
    for files in hub.repos["me/tiny"]["branches"].values():
        files["model-00002-of-00002.safetensors"] = b"of an earlier, larger model"
        files["notes.md"] = b"somebody's own"
    send()
    assert num_puts(hub) == before + 1, "weights were sent twice"
    for files in hub.repos["me/tiny"]["branches"].values():
        assert "notes.md" in files and "model-00002-of-00002.safetensors" not in files


def test_nothing_goes_to_a_public_repository_unasked(hub, send):
    hub.repos["me/tiny"] = {"private": False, "branches": {"main": {}}}
    with pytest.raises(ValueError, match="me/tiny is there already and public: say --public"):
        send()
    assert hub.repos["me/tiny"]["branches"] == {"main": {}}


def test_a_stage_publishes_when_it_has_finished(monkeypatch):
    calls = []
    monkeypatch.setattr("nanochat_hf.hub.publish", calls.append)
    asked = {"push_to_hub": True, "hub_model_id": "me/tiny"}
    for settings in ({}, {"push_to_hub": False, "hub_model_id": "me/tiny"}, asked | {"plan": True}):
        with published("runs/x", settings):
            pass
    assert calls == []
    for wrong in ({"push_to_hub": True}, asked | {"hub_model_id": "tiny"}):
        with pytest.raises(ValueError, match="needs hub_model_id; it='.*' must be OWNER/NAME"):
            with published("runs/x", wrong):
                calls.append("the stage ran")
    with pytest.raises(OSError), published("runs/x", asked):
        raise OSError("the stage failed")
    assert calls == []
    with published("runs/x", asked):
        assert calls == []
    with published("runs/x", asked | {"hub_private_repo": False}):
        pass
    monkeypatch.setenv("RANK", "1")
    with published("runs/x", asked):
        pass
    assert [(call.run, call.repo_id, call.public) for call in calls] == [
        ("runs/x", "me/tiny", False), ("runs/x", "me/tiny", True)
    ]  # fmt: skip


def test_the_card_states_scores_data_and_no_paths(run_dir, tiny_model):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    card = model_card(run_dir, "rl", ["sft", "rl"], "me/tiny", metrics)
    assert (
        "- chatcore_mini_arithmetic: 0.5000 (accuracy, 40 items; model after `sft`)" in card
        and "1.5000 bits per byte" in card
    )
    assert (
        "- chatcore_mini: 0.2500 ± 0.0200 (mean centered accuracy, 40 items; model after `sft`)" in card
        and "chatcore:" not in card
    )
    with pytest.raises(ValueError, match="build the report again"):
        model_card(run_dir, "rl", ["rl"], "me/tiny", {"core": {"core": 0.1}})
    real = {"core": {"core": 0.1, "core_copa": 0.2, "num_items": {"core_copa": 9}}}
    assert "- core: 0.1000 (mean centered accuracy, 9 items; model after `base`)" in model_card(
        run_dir, "rl", ["rl"], "me/tiny", real
    )
    assert "- sft: arithmetic, talk.jsonl" in card and "/home/me" not in card
    assert "lm_eval --model hf" in card and "SFTTrainer(" in card and "No GGUF" in card and "push_to_hub" not in card
    assert "license: mit" in card and "library_name: transformers" in card
    assert "3.5" not in card.split("## Use")[0]
    assert "model-index" not in card, "the scores are the sft model's"
    card = model_card(run_dir, "sft", ["sft", "rl"], "me/tiny", metrics)
    assert "model-index" in card and 'from_pretrained("me/tiny", revision="sft", trust' in card
    assert f"layers: {tiny_model.config.num_hidden_layers}; " in card and "parameters: 12,345" in card
    assert public_name("HuggingFaceTB/smol-smoltalk") == "HuggingFaceTB/smol-smoltalk"
    assert "This run was not evaluated." in model_card(run_dir, "rl", ["rl"], "me/tiny", {})


def test_a_secret_stops_everything(run_dir, monkeypatch):
    better_than_guessing(monkeypatch)
    (run_dir / "report.md").write_text("token: hf_" + "a" * 30)
    with pytest.raises(ValueError, match="report.md holds an access token"):
        publish(PublishConfig(run=str(run_dir), repo_id="me/tiny", dry_run=True))
    monkeypatch.setenv("HF_TOKEN", "another-form-of-token")
    (run_dir / "report.md").write_text("another-form-of-token")
    with pytest.raises(ValueError, match="report.md holds an access token"):
        publish(PublishConfig(run=str(run_dir), repo_id="me/tiny", dry_run=True))


def test_a_chat_model_need_not_know_prose(run_dir, monkeypatch):
    real, asked = check.cross_entropy, []

    def knows_answers_only(logits, targets):
        asked.append(targets.tolist())
        return real(logits, targets) * 0 + (12.0 if len(asked) == 1 else 1.0)

    monkeypatch.setattr(check, "cross_entropy", knows_answers_only)
    assert "12.00 nats a token on plain English, 1.00 on an answer" in check.check_folder(run_dir / "sft")
    text, answer = (AutoTokenizer.from_pretrained(run_dir / "sft").decode(ids) for ids in asked)
    assert (text, answer) == (check.TEXT, "Hello! How can I help you?<|assistant_end|>")


def test_a_folder_that_others_cannot_use_is_refused(run_dir, monkeypatch, tiny_model, tiny_tokenizer):
    call = PublishConfig(run=str(run_dir), repo_id="me/tiny", dry_run=True)
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight.mul_(100)  # far worse than guessing, as with a foreign tokenizer
    save_model(tiny_model, tiny_tokenizer, run_dir / "sft")
    with pytest.raises(ValueError, match="worse than guessing"):
        publish(call)
    better_than_guessing(monkeypatch)
    code = run_dir / "sft" / "modeling_nanochat_hf.py"
    text = code.read_text()
    assert "torch.tanh(logits" in text
    code.write_text(text.replace("torch.tanh(logits", "torch.sin(logits"))
    with pytest.raises(ValueError, match="logits that differ by"):
        publish(call)
    code.unlink()
    with pytest.raises(ValueError, match="does not open without this package"):
        publish(call)


@pytest.mark.parametrize(
    ("run", "repo_id", "message"),
    [
        ("nowhere", "me/tiny", "run a recipe first"),
        (None, "tiny", "must be OWNER/NAME"),
        (None, "", "must be OWNER/NAME"),
        (None, "me/a--b", "repo_id='me/a--b': Cannot have"),
    ],
)
def test_bad_arguments(run_dir, run, repo_id, message):
    with pytest.raises(ValueError, match=message):
        publish(PublishConfig(run=run or str(run_dir), repo_id=repo_id, dry_run=True))


def test_no_network_is_one_clear_line(run_dir, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    script = (
        "import nanochat_hf.hub as hub; from nanochat_hf.configs import PublishConfig\n"
        "try: hub.upload({}, None, PublishConfig(repo_id='me/tiny'))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("no connection to the Hub"), done.stderr
