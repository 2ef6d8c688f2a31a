"""A model that says what a test wants to hear: for the tests of generation, chat and whatever runs a model."""

import torch
from transformers import LlamaConfig

from nanochat_hf.tokenizer import special_ids


class ScriptedModel:
    """A stand-in for a model: the next token is a function of the row's whole history, read back from the cache.

    As the history lives in the cache's keys, a row that got another row's cache would go wrong at once.
    """

    device, dtype, training = torch.device("cpu"), torch.float32, False

    def __init__(self, vocab_size, next_token, context_tokens):
        self.config = LlamaConfig(num_hidden_layers=1, vocab_size=vocab_size, max_position_embeddings=context_tokens)
        self.next_token = next_token
        self.batch_sizes = []
        self.num_tokens_read = []  # per call

    def eval(self):
        self.training = False
        return self

    def train(self, mode):
        self.training = mode

    def __call__(self, input_ids, attention_mask, position_ids, past_key_values, **kwargs):
        self.batch_sizes.append(len(input_ids))
        self.num_tokens_read.append(input_ids.shape[1])
        ids = input_ids[:, None, :, None].double()
        history = past_key_values.update(ids, ids, 0)[0][:, 0, :, 0].long()
        logits = torch.zeros(len(input_ids), 1, self.config.vocab_size)
        for i, row in enumerate(history):
            kept = row if attention_mask is None else row[attention_mask[i].bool()]
            assert position_ids[i, -1] == len(kept) - 1
            logits[i, 0, self.next_token(kept.tolist())] = 50.0
        return type("Output", (), {"logits": logits})


def scripted(tokenizer, script_of, context_tokens=2048):
    """A model that answers with `script_of(prompt ids)`, a list of ids; tool outputs it reads and never writes."""
    special = {token.strip("<|>"): i for token, i in special_ids(tokenizer).items()}

    def next_token(history):
        start = len(history) - history[::-1].index(special["assistant_start"])
        position, inside = 0, False
        for token in history[start:]:
            inside = inside or token == special["output_start"]
            position += not inside
            inside = inside and token != special["output_end"]
        return script_of(history[:start])[position]

    return ScriptedModel(len(tokenizer), next_token, context_tokens)


def echo(tokenizer, **kwargs):
    """Repeats the message, `long ...` sixty times; a message of digits and operators is calculated instead."""
    special = special_ids(tokenizer)

    def script_of(prompt):
        start = len(prompt) - prompt[::-1].index(special["<|user_start|>"])
        message = prompt[start : prompt.index(special["<|user_end|>"], start)]
        text = tokenizer.decode(message)
        if set(text) <= set("0123456789+*"):
            call = [special["<|python_start|>"], *message, special["<|python_end|>"]]
            return [*b"It is ", *call, *b".", special["<|assistant_end|>"]]
        return [*message * (60 if text.startswith("long") else 1), special["<|assistant_end|>"]]

    return scripted(tokenizer, script_of, **kwargs)
