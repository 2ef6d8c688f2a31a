"""Is a folder what others will load? Same token ids and logits in a process that cannot import this package."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from ..checkpoint import load_model
from ..tokenizer import encode_conversation, encode_prompt, encode_text

TEXT = "The capital of France is Paris.\n\n    def double(x):\n        return 2 * x  # naïve 12345"
MESSAGES = [{"role": "user", "content": "What is 12 + 30? <|assistant_end|>"}]
GREETING = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How can I help you?"}]

# Runs with `nanochat_hf` barred, as on a machine that has only transformers.
STRANGER = """
import json, sys
sys.modules["nanochat_hf"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
request = json.load(sys.stdin)
ids = tokenizer(request["text"], add_special_tokens=False)["input_ids"]
with torch.no_grad():
    logits = model(input_ids=torch.tensor([request["ids"]])).logits
torch.save({"ids": ids, "logits": logits}, output)
"""


def check_folder(folder: Path) -> str:
    """Compare a folder here and in a stranger's process, and its model with its tokenizer.

    Returns:
        One line on what was compared.

    Raises:
        ValueError: a difference, a code file or tokenizer that is missing, or a model worse than guessing.
    """
    model, tokenizer = load_model(folder)
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"{folder.name}: the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}: "
            f"they are not from one run"
        )
    text_ids = encode_text(tokenizer, TEXT)
    ids = [tokenizer.bos_token_id, *text_ids, *encode_prompt(tokenizer, MESSAGES)]
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([ids])).logits
    theirs = ask_stranger(folder, {"text": TEXT, "ids": ids})
    if theirs["ids"] != text_ids:
        raise ValueError(f"{folder.name}: AutoTokenizer gives other ids than this package; save the tokenizer again")
    difference = (theirs["logits"] - logits).abs().max().item()
    if not difference < 1e-4:
        raise ValueError(f"{folder.name}: the folder's own code gives logits that differ by {difference:.2g} from ours")
    text_loss = cross_entropy(logits[0, : len(text_ids)].float(), torch.tensor(text_ids)).item()
    # A small chat model knows answers and has forgotten prose: it has to be better than guessing in one of the two.
    chat_ids, mask = (torch.tensor(x) for x in encode_conversation(tokenizer, GREETING))
    with torch.no_grad():
        chat_logits = model(input_ids=chat_ids[None]).logits[0, :-1].float()
    chat_loss = cross_entropy(chat_logits[mask[1:] == 1], chat_ids[1:][mask[1:] == 1]).item()
    guessing = math.log(model.config.vocab_size)
    if not min(text_loss, chat_loss) < guessing:
        raise ValueError(
            f"{folder.name}: {text_loss:.2f} nats a token on plain English and {chat_loss:.2f} on an answer are worse "
            f"than guessing ({guessing:.2f}): model and tokenizer are out of step, or it is untrained"
        )
    losses = f"{text_loss:.2f} nats a token on plain English, {chat_loss:.2f} on an answer"
    return f"{len(ids)} tokens, largest logit difference {difference:.1g}, {losses}"


def ask_stranger(folder: Path, request: dict) -> dict:
    """Token ids and logits as a process without this package sees them."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "answer.pt"
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{temporary}/modules"}
        command = [sys.executable, "-I", "-c", STRANGER, str(folder), str(output)]
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, env=environment, cwd=temporary
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{folder.name} does not open without this package: {reason}")
        return torch.load(output, weights_only=True)
