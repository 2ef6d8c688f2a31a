"""The tokenizer: layout of the vocabulary, training, exact encoding, byte lengths, the folder on disk, the stage."""

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanochat_hf.configs import TokenizerConfig
from nanochat_hf.tokenizer import (
    BYTE_CHARACTERS,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    encode_conversation,
    encode_documents,
    encode_text,
    load_tokenizer,
    token_byte_lengths,
    train_bpe,
)
from nanochat_hf.tokenizer_training import CappedDocuments, train_tokenizer

DOCUMENTS = [
    "The old mill by the river grinds the corn of the whole valley, and the miller sings while the river runs.",
    "In 1984 there were 365 days; in 2024 there were 366. They're all gone now, aren't they? We'll see.",
    "def total(values):\n    return sum(value for value in values if value)\n\n\nprint(total([1, 22, 333]))\n",
    "Die Mühle am Fluß, naïve cafés, 水車と川, мельница у реки — und so weiter…",
] * 3
VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(DOCUMENTS, VOCAB_SIZE)


def to_bytes(token: str) -> bytes:
    return bytes(BYTE_CHARACTERS.index(character) for character in token)


def merges_of(tokenizer) -> list[tuple[bytes, bytes]]:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return [(to_bytes(left), to_bytes(right)) for left, right in model["merges"]]


def test_ids_are_bytes_then_merges_then_special_tokens(tokenizer):
    names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    assert sorted(names) == list(range(VOCAB_SIZE))
    assert len(tokenizer) == tokenizer.vocab_size == VOCAB_SIZE
    assert [to_bytes(names[i]) for i in range(256)] == [bytes([i]) for i in range(256)]
    merged = [left + right for left, right in merges_of(tokenizer)]
    assert [to_bytes(names[i]) for i in range(256, VOCAB_SIZE - 9)] == merged
    assert tuple(names[i] for i in range(VOCAB_SIZE - 9, VOCAB_SIZE)) == SPECIAL_TOKENS


def test_each_merge_is_the_most_frequent_pair_left(tokenizer):
    words = Counter(word for document in DOCUMENTS for word in regex.findall(SPLIT_PATTERN, document))
    words = [([bytes([b]) for b in word.encode()], count) for word, count in words.items()]
    for left, right in merges_of(tokenizer):
        pairs = Counter()
        for parts, num in words:
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += num
        assert pairs[left, right] == max(pairs.values())
        for parts, _ in words:
            apply_merge(parts, left, right)


def apply_merge(parts: list[bytes], left: bytes, right: bytes) -> None:
    i = 0
    while i < len(parts) - 1:
        if (parts[i], parts[i + 1]) == (left, right):
            parts[i : i + 2] = [left + right]
        i += 1


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.text(max_size=60))
@example("")
@example("\x00\x01\x7f\u0085\u2028 control\r\n\r\n \t")
@example("".join(SPECIAL_TOKENS))
@example(" 1 22 333 4444 I'VE they'LL 'ſ don’t")
def test_encoding_is_plain_bpe_and_loses_nothing(tokenizer, text):
    expected = []
    ranks = {token: rank for rank, token in enumerate([bytes([b]) for b in range(256)])}
    for left, right in merges_of(tokenizer):
        ranks[left + right] = len(ranks)
    for word in regex.findall(SPLIT_PATTERN, text):
        parts = [bytes([b]) for b in word.encode()]
        for left, right in merges_of(tokenizer):
            apply_merge(parts, left, right)
        expected += [ranks[part] for part in parts]
    ids = encode_text(tokenizer, text)
    assert ids == expected
    assert tokenizer.decode(ids) == text
    assert encode_documents(tokenizer, [text, "x"]) == [[tokenizer.bos_token_id, *ids], [tokenizer.bos_token_id, 120]]
    assert int(token_byte_lengths(tokenizer)[ids].sum()) == len(text.encode())


def test_typed_special_tokens_stay_text_only_in_our_functions(tokenizer):
    typed = "".join(SPECIAL_TOKENS)
    special = set(range(VOCAB_SIZE - 9, VOCAB_SIZE))
    assert not special & set(encode_text(tokenizer, typed))
    assert not special & set(encode_documents(tokenizer, [typed])[0][1:])
    ids, _ = encode_conversation(tokenizer, [{"role": "user", "content": typed}])
    assert [i for i in ids if i in special] == tokenizer.convert_tokens_to_ids(
        ["<|bos|>", "<|user_start|>", "<|user_end|>"]
    )
    assert tokenizer(typed, add_special_tokens=False)["input_ids"] == sorted(special)  # what transformers users expect
    assert not special & set(encode_text(tokenizer, typed))  # the call above changed nothing for us


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert encode_text(tokenizer, "a\ud800b") == encode_text(tokenizer, "a\ufffdb")
    assert encode_documents(tokenizer, ["ok", "a\ud800b"])[1][1:] == encode_text(tokenizer, "a\ufffdb")


def test_truncation_and_padding_set_by_another_call_do_not_leak(tokenizer):
    expected = encode_text(tokenizer, DOCUMENTS[0])
    tokenizer(DOCUMENTS[:2], truncation=True, max_length=5, padding="max_length")
    assert encode_text(tokenizer, DOCUMENTS[0]) == expected


def test_training_is_deterministic_and_reads_a_stream_once(tokenizer):
    again = train_bpe((document for document in DOCUMENTS), VOCAB_SIZE)
    assert merges_of(again) == merges_of(tokenizer)


def test_smallest_vocabulary_is_bytes_and_special_tokens():
    tokenizer = train_bpe(["anything"], 265)
    assert encode_text(tokenizer, "né") == list("né".encode()) and tokenizer.bos_token_id == 256


@pytest.mark.parametrize(
    "documents, vocab_size, message", [(DOCUMENTS, 264, "need 265"), (["abc"], 300, "at most 267"), ([], 270, "265")]
)
def test_impossible_vocabulary_sizes_are_refused_with_the_fix(documents, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_bpe(documents, vocab_size)


def test_byte_lengths_are_of_raw_bytes(tokenizer):
    lengths = token_byte_lengths(tokenizer)
    assert lengths.dtype == torch.long and lengths.shape == (VOCAB_SIZE,)
    assert lengths[:256].tolist() == [1] * 256  # byte 0xC3 alone decodes to a three-byte replacement character
    assert lengths[256:-9].tolist() == [len(left + right) for left, right in merges_of(tokenizer)]
    assert lengths[-9:].tolist() == [0] * 9


def test_byte_lengths_of_sentencepiece_vocabularies():
    vocab = {"<s>": 0, "<0xC3>": 1, "\u2581the": 2, "é": 3}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    foreign = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert token_byte_lengths(foreign).tolist() == [0, 1, 4, 2]
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        token_byte_lengths(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))


def test_saved_folder_opens_without_our_code(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    program = (
        "import sys; sys.modules['nanochat_hf'] = None\n"  # an import of our package would raise
        "from transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "chat = [{'role': 'user', 'content': 'Hi 水'}, {'role': 'assistant', 'content': 'the river'}]\n"
        "print(t('the mill')['input_ids'], t.apply_chat_template(chat, return_assistant_tokens_mask=True))"
    )
    out = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    chat = [{"role": "user", "content": "Hi 水"}, {"role": "assistant", "content": "the river"}]
    ids, mask = encode_conversation(tokenizer, chat)
    plain = [tokenizer.bos_token_id, *encode_text(tokenizer, "the mill")]
    expected = {"input_ids": ids, "attention_mask": [1] * len(ids), "assistant_masks": mask}
    assert out.stdout.strip() == f"{plain} {expected}"


def test_reloaded_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for reloaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert reloaded.get_vocab() == tokenizer.get_vocab()
        assert reloaded.chat_template == tokenizer.chat_template
        # generate() guesses a mask from the pad token only where pad differs from eos: <|bos|> must never be masked
        assert reloaded.pad_token == reloaded.eos_token == "<|assistant_end|>" and reloaded.bos_token == "<|bos|>"
        assert set(reloaded.all_special_tokens) == set(SPECIAL_TOKENS) and reloaded.padding_side == "left"
        text = "  spaces , kept . ' s <|bos|>"
        assert reloaded.decode(reloaded(text)["input_ids"]) == "<|bos|>" + text
        assert reloaded.decode(reloaded(text)["input_ids"], skip_special_tokens=True) == text.removesuffix("<|bos|>")
        assert encode_text(reloaded, text) == encode_text(tokenizer, text)


def test_wrong_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
        load_tokenizer(tmp_path / "missing")
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(BYTE_CHARACTERS)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape("lacks <|bos|>, <|user_start|>")):
        load_tokenizer(tmp_path)


def test_documents_are_capped_and_counted():
    capped = CappedDocuments(["aaaaaa", "bb", "cccc", "d"], max_chars=9, max_document_chars=4)
    assert list(capped) == ["aaaa", "bb", "ccc"]
    assert (capped.num_documents, capped.num_chars) == (3, 9)


@pytest.fixture
def config(tmp_path):
    rows = [json.dumps({"text": f"{document} number {i}"}) for i, document in enumerate(DOCUMENTS * 4)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    return TokenizerConfig(dataset=str(tmp_path / "text.jsonl"), run_dir=str(tmp_path / "run"), vocab_size=VOCAB_SIZE)


def test_stage_writes_the_folder_and_the_record(config, tmp_path, capsys):
    trained = train_tokenizer(config)
    record = json.loads((tmp_path / "run/eval/tokenizer.json").read_text())
    assert record["settings"]["vocab_size"] == record["results"]["vocab_size"] == VOCAB_SIZE
    assert record["settings"]["max_document_chars"] == 10_000 and record["results"]["num_special_tokens"] == 9
    lengths = token_byte_lengths(trained)[:-9].double()
    assert record["results"]["token_bytes_mean"] == pytest.approx(lengths.mean().item())
    rows = {row["text"]: row for row in record["results"]["evaluation"]["rows"]}
    assert list(rows) == "news korean code math science numbers unicode train validation".split()
    assert record["results"]["bytes_per_token"] == rows["validation"]["bytes"] / rows["validation"]["tokens"]
    assert load_tokenizer(tmp_path / "run/tokenizer").get_vocab() == trained.get_vocab()
    assert "| korean |" in capsys.readouterr().out
    train_tokenizer(config)
    assert "already trained" in capsys.readouterr().out
    config.vocab_size = 280
    with pytest.raises(ValueError, match="belongs to another recipe"):
        train_tokenizer(config)


def test_stage_leaves_no_half_folder(config, tmp_path, monkeypatch):
    def full_disk(self, folder):
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", full_disk)
        with pytest.raises(OSError, match="No space left"):
            train_tokenizer(config)
    assert not (tmp_path / "run/tokenizer").exists() and not (tmp_path / "run/eval/tokenizer.json").exists()
    assert len(train_tokenizer(config)) == VOCAB_SIZE


def test_stage_takes_an_existing_tokenizer(config, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "existing")
    config.start_from = str(tmp_path / "existing")
    with pytest.raises(ValueError, match=f"has {len(tokenizer):,} tokens, vocab_size=301"):
        train_tokenizer(dataclasses.replace(config, vocab_size=301))
    config.vocab_size = len(tokenizer)
    assert train_tokenizer(config).get_vocab() == tokenizer.get_vocab()
    record = json.loads((tmp_path / "run/eval/tokenizer.json").read_text())
    assert record["settings"]["start_from"] == config.start_from and record["results"]["vocab_size"] == len(tokenizer)


def test_stage_looks_at_the_validation_text_before_it_trains(config, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    pq.write_table(pa.table({"text": DOCUMENTS}), folder / "0.parquet")
    pq.write_table(pa.table({"txt": DOCUMENTS}), folder / "1.parquet")
    config.dataset = str(folder)
    with pytest.raises(ValueError, match="1.parquet.*text"):
        train_tokenizer(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field, value", [("vocab_size", 100), ("max_chars", 0), ("max_document_chars", -1)])
def test_stage_refuses_settings_out_of_range_before_it_writes(config, tmp_path, field, value):
    setattr(config, field, value)
    with pytest.raises(ValueError, match=field):
        train_tokenizer(config)
    assert not (tmp_path / "run").exists()
