"""nanochat's tokenizer files: equal ids on everything, and nothing but a tiktoken encoding gets in."""

import io
import itertools
import json
import os
import pickle
import random
import tempfile

import pytest
import torch
from golden_models import golden_file

from nanochat_hf.chat_format import conversation_spans
from nanochat_hf.interop_tokenizer import from_tiktoken_pickle, load_token_bytes, merges_from_ranks
from nanochat_hf.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    encode_conversation,
    encode_documents,
    encode_prompt,
    encode_text,
    token_byte_lengths,
)


@pytest.fixture(scope="module")
def imported(golden):
    return from_tiktoken_pickle(golden_file(golden, "tokenizer/tokenizer.pkl"))


def golden_cases(golden, name):
    lines = golden_file(golden, f"tokenizer/{name}").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def tiktoken_encoding(path):
    """What nanochat itself uses; the golden files are our own, so they may be unpickled."""
    pytest.importorskip("tiktoken")
    return pickle.loads(path.read_bytes())


def test_ids_of_texts_equal_golden(golden, imported):
    cases = golden_cases(golden, "encode_cases.jsonl")
    for case in cases:
        assert encode_text(imported, case["text"]) == case["ids"], case["text"]
    batch = encode_documents(imported, [case["text"] for case in cases])
    assert batch == [[imported.bos_token_id, *case["ids"]] for case in cases]
    called = imported([case["text"] for case in cases], split_special_tokens=True)
    assert called["input_ids"] == batch


def template_differs(messages) -> bool:
    """Whether a conversation has what the template encodes otherwise by design (see chat_format.py)."""
    spans = conversation_spans(messages)
    lookalike = any(token in span.text for span in spans if not span.special for token in SPECIAL_TOKENS)
    return lookalike or any(not (a.special or b.special) for a, b in itertools.pairwise(spans))


def test_conversations_equal_golden(golden, imported):
    for case in golden_cases(golden, "render_cases.jsonl"):
        messages = case["conversation"]["messages"]
        assert encode_conversation(imported, messages) == (case["ids"], case["mask"])
        assert encode_prompt(imported, messages[:-1]) == case["completion_prompt_ids"]
        if template_differs(messages):
            continue
        encoded = imported.apply_chat_template(messages, return_assistant_tokens_mask=True)
        assert (encoded["input_ids"], encoded["assistant_masks"]) == (case["ids"], case["mask"])
        prompt = imported.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        assert prompt == case["completion_prompt_ids"]


@pytest.mark.parametrize(
    "question, answer",
    [
        ("what is <|bos|>?", "a token"),
        ("Hi", [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo there"}]),
    ],
)
def test_where_the_template_differs_is_known(imported, question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert template_differs(messages)
    assert imported.apply_chat_template(messages)["input_ids"] != encode_conversation(imported, messages)[0]


@pytest.mark.parametrize("folder", ["tokenizer", "core_eval"])
def test_byte_lengths_equal_golden(golden, folder):
    tokenizer = from_tiktoken_pickle(golden_file(golden, f"{folder}/tokenizer.pkl"))
    lengths = load_token_bytes(golden_file(golden, f"{folder}/token_bytes.pt"))
    assert torch.equal(token_byte_lengths(tokenizer), lengths)


def test_prompts_of_the_chat_evaluation_equal_golden(golden):
    tokenizer = from_tiktoken_pickle(golden_file(golden, "core_eval/tokenizer.pkl"))
    expected = json.loads(golden_file(golden, "core_eval/chat_expected.json").read_text())
    special = set(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    prompts = [ids for ids in _id_lists(expected) if len(ids) > 10 and ids[0] == tokenizer.bos_token_id]
    assert prompts
    for ids in prompts:  # decoding and encoding what stands between special tokens gives the same ids again
        for is_special, run in itertools.groupby(ids, special.__contains__):
            run = list(run)
            assert is_special or encode_text(tokenizer, tokenizer.decode(run)) == run


def _id_lists(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        if value and all(type(item) is int for item in value):
            yield value
        else:
            for item in value:
                yield from _id_lists(item)


@pytest.mark.parametrize("folder", ["tokenizer", "core_eval"])
def test_random_unicode_equals_tiktoken(golden, folder):
    path = golden_file(golden, f"{folder}/tokenizer.pkl")
    tokenizer, reference = from_tiktoken_pickle(path), tiktoken_encoding(path)
    rng = random.Random(7)
    pools = ["'sStTlLvVeErRſ’ aA", " \t\r\n\v\f\x1c\x85\u00a0\u2003\u2028\ufeffx", "0123456789½²Ⅷ٣४ x", "<|bos_end>"]

    def character():
        if rng.random() < 0.7:
            return rng.choice(rng.choice(pools))
        code = rng.randrange(0x11_0000 if rng.random() < 0.5 else 0x3000)
        return chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"

    texts = ["".join(character() for _ in range(rng.randrange(40))) for _ in range(3000)]
    ours = [ids[1:] for ids in encode_documents(tokenizer, texts)]
    assert ours == reference.encode_ordinary_batch(texts)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["tokenizer", "core_eval"])
def test_five_megabytes_of_real_text_equal_tiktoken(golden, shared_data, folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = golden_file(golden, f"{folder}/tokenizer.pkl")
    tokenizer, reference = from_tiktoken_pickle(path), tiktoken_encoding(path)
    texts = []
    for file in sorted(shared_data.rglob("*.parquet")):
        texts += parquet.read_table(file)["text"].to_pylist()[:100]
    for file in sorted(shared_data.rglob("*.jsonl")):
        with open(file, encoding="utf-8") as lines:
            raw = "".join(itertools.islice(lines, 60))
        texts += [raw, json.dumps([json.loads(line) for line in raw.splitlines()], ensure_ascii=False, indent=1)]
    assert sum(len(text.encode()) for text in texts) > 5e6
    ours = [ids[1:] for ids in encode_documents(tokenizer, texts)]
    assert ours == reference.encode_ordinary_batch(texts)


def test_lone_surrogates_equal_tiktoken(golden, imported):
    reference = tiktoken_encoding(golden_file(golden, "tokenizer/tokenizer.pkl"))
    for text in ("a\ud800b", "\udc00", "\ud83d\ude00 pair"):
        assert encode_text(imported, text) == reference.encode_ordinary(text)


# --- files that are not what they should be ---


class Encoding:
    """Pickles as tiktoken.core.Encoding does, with any state."""

    def __init__(self, state):
        self.state = state

    def __getstate__(self):
        return self.state


Encoding.__module__, Encoding.__qualname__ = "tiktoken.core", "Encoding"


def state(**changes) -> dict:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    special = {token: 258 + i for i, token in enumerate(SPECIAL_TOKENS)}
    good = {"name": "rustbpe", "pat_str": SPLIT_PATTERN, "mergeable_ranks": ranks, "special_tokens": special}
    return good | changes


def pickled(value, protocol=4) -> bytes:
    """Pickle without looking up whether tiktoken's class is this very one."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            if obj is Encoding:
                self.write(b"ctiktoken.core\nEncoding\n")
                self.memoize(obj)
            else:
                super().save_global(obj, name)

        dispatch = pickle._Pickler.dispatch | {type: save_global}

    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_plain_encoding_is_read_from_every_binary_protocol(tmp_path, protocol):
    (tmp_path / "tokenizer.pkl").write_bytes(pickled(Encoding(state()), protocol))
    tokenizer = from_tiktoken_pickle(tmp_path)  # the folder does as well as the file
    assert encode_text(tokenizer, "the") == [257] and len(tokenizer) == 267


def test_longer_digit_runs_in_the_pattern_are_kept(tmp_path):
    pattern = SPLIT_PATTERN.replace(r"\p{N}{1,2}", r"\p{N}{1,3}")
    ranks = state()["mergeable_ranks"] | {b"12": 258, b"123": 259}
    special = {token: 260 + i for i, token in enumerate(SPECIAL_TOKENS)}
    changed = state(pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    (tmp_path / "tokenizer.pkl").write_bytes(pickled(Encoding(changed)))
    assert encode_text(from_tiktoken_pickle(tmp_path), "1234") == [259, ord("4")]


PROOF = os.path.join(tempfile.gettempdir(), f"code_has_run_{os.getpid()}")


class RunsCode:
    def __reduce__(self):
        return os.system, (f"touch {PROOF}",)


HOSTILE = {
    "runs a command": (pickle.dumps(RunsCode()), "refused.*REDUCE"),
    "command inside": (pickled(Encoding(state(name=RunsCode()))), "refused.*REDUCE"),
    "another class": (pickle.dumps(pickle.PickleError), "only tiktoken.core.Encoding"),
    "by old instruction": (b"(S'echo hi'\nios\nsystem\n.", "MARK|STRING|INST"),
    "by name": (pickled(Encoding("gpt2")), "pickled by name only"),
    "plain dict": (pickle.dumps(state()), "no tiktoken encoding"),
    "class, not instance": (b"\x80\x04ctiktoken.core\nEncoding\n.", "no tiktoken encoding"),
    "memory slots": (b"\x80\x04}r\xff\xff\xff\x7f.", "memory slots"),
    "empty": (b"", "damaged pickle|pickle exhausted"),
    "noise": (bytes(range(256)), "refused|damaged|exhausted|at position"),
    "text": (b"hello", "refused|damaged|exhausted|at position"),
    "nested": (b"\x80\x04" + b"}\x8c\x01x" * 100_000 + b"}" + b"s" * 100_000 + b".", "no tiktoken encoding"),
    "gap in ranks": (pickled(Encoding(state(mergeable_ranks={b"a": 1}))), "without a gap"),
    "bytes out of order": (
        pickled(Encoding(state(mergeable_ranks={bytes([255 - byte]): byte for byte in range(256)}))),
        "bytes 0..255 in order",
    ),
    "unreachable token": (
        pickled(Encoding(state(mergeable_ranks=state()["mergeable_ranks"] | {b"xyz": 258}))),
        "cannot be reached",
    ),
    "endless token": (
        pickled(Encoding(state(mergeable_ranks=state()["mergeable_ranks"] | {b"x" * 100_000: 258}))),
        "100,000 bytes long",
    ),
    "many long tokens": (
        pickled(
            Encoding(
                state(mergeable_ranks=state()["mergeable_ranks"] | {b"x" * 999 + b"%d" % i: i for i in range(258, 999)})
            )
        ),
        "1,002 bytes long",
    ),
    "ranks no ints": (pickled(Encoding(state(mergeable_ranks={b"a": "b"}))), "must map bytes to int"),
    "ranks missing": (pickled(Encoding(state(mergeable_ranks="x"))), "mergeable_ranks is missing"),
    "other special tokens": (pickled(Encoding(state(special_tokens={"<|endoftext|>": 258}))), "special tokens must be"),
    "other pattern": (pickled(Encoding(state(pat_str="(a+)+$"))), "split pattern must be nanochat's"),
}


@pytest.mark.parametrize("content, message", HOSTILE.values(), ids=HOSTILE)
def test_anything_but_an_encoding_is_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)tokenizer.pkl is not a nanochat tokenizer: .*({message})"):
        from_tiktoken_pickle(path)
    assert not os.path.exists(PROOF)


def test_truncated_anywhere_is_refused(tmp_path):
    path, content = tmp_path / "tokenizer.pkl", pickled(Encoding(state()))
    for length in range(0, len(content), 17):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is not a nanochat tokenizer"):
            from_tiktoken_pickle(path)


def test_missing_and_huge_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no file"):
        from_tiktoken_pickle(tmp_path)
    monkeypatch.setattr("nanochat_hf.interop_tokenizer.MAX_FILE_BYTES", 10)
    (tmp_path / "tokenizer.pkl").write_bytes(pickled(Encoding(state())))
    with pytest.raises(ValueError, match="more than any tokenizer needs"):
        from_tiktoken_pickle(tmp_path)


@pytest.mark.parametrize(
    "content",
    [RunsCode(), {"a": torch.zeros(3)}, torch.zeros(3, 3).long(), torch.zeros(3)],
    ids=["code", "dictionary", "table", "fractions"],
)
def test_token_bytes_must_be_one_integer_a_token(tmp_path, content):
    torch.save(content, tmp_path / "token_bytes.pt")
    with pytest.raises(ValueError, match="token_bytes.pt"):
        load_token_bytes(tmp_path)
    assert not os.path.exists(PROOF)


def test_merges_are_rebuilt_from_ranks():
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in (b"an", b"ana", b"ban", b"banana"):  # banana = ban + ana: the pair is not the first split that fits
        ranks[token] = len(ranks)
    assert merges_from_ranks(ranks) == [("a", "n"), ("an", "a"), ("b", "an"), ("ban", "ana")]
