"""Rows: equal to nanochat's and to a plain scan, nothing twice, every dropped token counted, resumed to the row."""

import io
import itertools
import json
import random
import subprocess
import sys
import threading
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from golden_models import golden_file
from torch.utils.data import DataLoader

from nanochat_hf.data import packing
from nanochat_hf.data.batches import BatchesAhead
from nanochat_hf.data.corpus import load_corpus
from nanochat_hf.data.packing import PackedDataset

BOS = 0
TOKENIZER = SimpleNamespace(bos_token_id=BOS)


@pytest.fixture
def spelled(monkeypatch):
    """Documents are written as their token ids, "0 17 4"; the tokenizer reads them."""

    def encode_documents(tokenizer, texts):
        return [[int(token) for token in text.split()] for text in texts]

    monkeypatch.setattr(packing, "encode_documents", encode_documents)


@pytest.fixture
def corpus_of(tmp_path, spelled):
    """A function: documents as lists of ids -> a corpus of them."""

    def make(documents, rank=0, world_size=1, epochs=None):
        for name, part in (("a", documents), ("b", [[BOS]])):
            texts = [" ".join(map(str, document)) for document in part]
            pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet", row_group_size=64)
        return load_corpus(str(tmp_path), "train", rank, world_size, epochs)

    return make


def random_documents(num: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Documents of very unequal length, each token (but bos) in one place only."""
    rng = random.Random(seed)
    new = itertools.count(1)
    lengths = [min(longest, 1 + int(rng.expovariate(8 / longest))) for _ in range(num)]
    return [[BOS, *itertools.islice(new, length - 1)] for length in lengths]


def whole_rows(dataset, num: int | None = None) -> list[list[int]]:
    rows = []
    for item in itertools.islice(dataset, num):
        inputs, targets = item["input_ids"], item["shift_labels"]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (dataset.sequence_length,)
        assert torch.equal(inputs[1:], targets[:-1])
        rows.append([*inputs.tolist(), int(targets[-1])])
    return rows


def scan_rows(documents, row_tokens: int, buffer_documents: int, refill_documents: int):
    """Best fit in its plainest form: look at every document of the buffer, each time. Endless."""
    stream, buffer = itertools.cycle(documents), []
    while True:
        row = []
        while len(row) < row_tokens:
            while len(buffer) < buffer_documents:
                buffer += itertools.islice(stream, refill_documents)
            room = row_tokens - len(row)
            fitting = [i for i in range(len(buffer)) if len(buffer[i]) <= room]
            if fitting:
                chosen = max(fitting, key=lambda i: (len(buffer[i]), -i))
            else:
                chosen = min(range(len(buffer)), key=lambda i: (len(buffer[i]), i))
            row += buffer.pop(chosen)[:room]
        yield row


def test_equals_nanochat(golden, corpus_of):
    expected = json.loads(golden_file(golden, "packing.json").read_text())
    dataset = PackedDataset(
        corpus_of(expected["docs"]),
        TOKENIZER,
        expected["sequence_len"],
        buffer_documents=expected["buffer_size"],
        refill_documents=expected["refill_batch"],
    )
    batches = DataLoader(dataset, batch_size=expected["batch_size"])
    for batch, wanted in zip(batches, expected["batches"], strict=False):
        assert batch["input_ids"].tolist() == wanted["inputs"]
        assert batch["shift_labels"].tolist() == wanted["targets"]


@pytest.mark.parametrize("longest", [20, 60, 400])
@pytest.mark.parametrize(("buffer_documents", "refill_documents"), [(1, 1), (37, 16), (200, 128)])
def test_equals_a_plain_scan_of_the_buffer(corpus_of, longest, buffer_documents, refill_documents):
    documents = random_documents(300, longest)
    dataset = PackedDataset(corpus_of(documents), TOKENIZER, 64, buffer_documents, refill_documents)
    wanted = scan_rows(documents, 65, buffer_documents, refill_documents)
    assert whole_rows(dataset, 200) == list(itertools.islice(wanted, 200))


def pieces_of(row: list[int], bos: int = BOS) -> list[list[int]]:
    starts = [i for i, token in enumerate(row) if token == bos]
    return [row[a:b] for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]


def test_documents_at_most_once_only_the_last_cropped_and_counted(corpus_of):
    documents = random_documents(1_000, 150)
    dataset = PackedDataset(corpus_of(documents, epochs=1), TOKENIZER, 64, 100, 32)
    rows = whole_rows(dataset)
    by_start = {document[1]: document for document in documents if len(document) > 1}
    cropped_tokens = num_pieces = 0
    for row in rows:
        assert len(row) == 65 and row[0] == BOS
        *middle, last = pieces_of(row)
        num_pieces += len(middle) + 1
        for piece in middle:
            assert len(piece) == 1 or by_start.pop(piece[1]) == piece  # whole, and for the first time
        if len(last) > 1:
            document = by_start.pop(last[1])
            assert document[: len(last)] == last
            cropped_tokens += len(document) - len(last)
    num_tokens = sum(map(len, documents))
    assert (dataset.num_rows, dataset.num_documents, dataset.epoch) == (len(rows), num_pieces, 1)
    unfinished = dataset.num_dropped_tokens - cropped_tokens
    assert 0 <= unfinished < 65
    assert 65 * len(rows) + dataset.num_dropped_tokens == num_tokens  # every token is accounted for


def test_flat_stream_loses_nothing(corpus_of):
    documents = random_documents(200, 150)
    stream = sum(documents, [])
    dataset = PackedDataset(corpus_of(documents, epochs=1), TOKENIZER, 64, refill_documents=16, packing="flat")
    rows = whole_rows(dataset)
    assert sum((row[:-1] for row in rows), []) == stream[: 64 * len(rows)]
    assert all(row[-1] == after[0] for row, after in itertools.pairwise(rows))
    assert dataset.num_documents == stream[: 64 * len(rows)].count(BOS)
    assert dataset.num_dropped_tokens == len(stream) - 64 * len(rows) - 1 < 64
    endless = PackedDataset(corpus_of(documents), TOKENIZER, 64, refill_documents=16, packing="flat")
    assert sum((row[:-1] for row in whole_rows(endless, 2 * len(rows))), []) == (stream * 3)[: 128 * len(rows)]
    assert endless.num_dropped_tokens == 0


@pytest.mark.parametrize("packing", ["best_fit", "flat"])
def test_resumes_to_the_row(corpus_of, packing):
    documents = random_documents(300, 150)

    def opened():
        dataset = PackedDataset(corpus_of(documents), TOKENIZER, 64, 40, 16, packing)
        return dataset, iter(DataLoader(dataset, batch_size=2))

    def saved(state):
        file = io.BytesIO()
        torch.save(state, file)
        assert file.tell() < 60_000
        file.seek(0)
        return torch.load(file, weights_only=True)

    dataset, batches = opened()
    states, rows = [saved(dataset.state_dict())], []
    for _ in range(150):
        rows.append(next(batches)["input_ids"].tolist())
        states.append(saved(dataset.state_dict()))
    assert dataset.epoch >= 1
    for num_batches in (0, 1, 2, 33, 77, 130):
        resumed = opened()[0]
        resumed.load_state_dict(states[num_batches])
        batches = iter(DataLoader(resumed, batch_size=2))
        assert [next(batches)["input_ids"].tolist() for _ in range(20)] == rows[num_batches : num_batches + 20]
        final, wanted = resumed.state_dict(), states[num_batches + 20]
        for name in ("tokens", "lengths"):
            assert torch.equal(final.pop(name), (wanted := dict(wanted)).pop(name))
        assert final == {name: value for name, value in wanted.items() if name not in ("tokens", "lengths")}


@pytest.mark.parametrize("packing", ["best_fit", "flat"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_stateful_dataloader_resumes(corpus_of, packing, num_workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    documents = random_documents(300, 100)

    def opened():
        dataset = PackedDataset(corpus_of(documents), TOKENIZER, 64, 40, 16, packing)
        return StatefulDataLoader(dataset, batch_size=2, num_workers=num_workers)

    loader = opened()
    reader = iter(loader)
    rows = [next(reader)["input_ids"].tolist() for _ in range(7)]
    state = loader.state_dict()
    rows += [next(reader)["input_ids"].tolist() for _ in range(7)]
    resumed = opened()
    resumed.load_state_dict(state)
    reader = iter(resumed)
    assert [next(reader)["input_ids"].tolist() for _ in range(7)] == rows[7:]


def test_processes_and_workers_see_different_documents(corpus_of):
    documents = random_documents(400, 40)
    seen = []
    for rank in range(2):
        dataset = PackedDataset(corpus_of(documents, rank, 2, epochs=1), TOKENIZER, 16, 20, 8)
        for batch in DataLoader(dataset, batch_size=None, num_workers=2 * rank):
            seen += [token for token in batch["input_ids"].tolist() if token != BOS]
    assert len(seen) == len(set(seen)) > 0.5 * sum(map(len, documents))


def test_each_iteration_of_a_validation_corpus_gives_the_same_rows_and_repeats_when_short(corpus_of):
    documents = random_documents(50, 40)
    dataset = PackedDataset(corpus_of(documents), TOKENIZER, 16, 10, 4)
    unfinished = iter(dataset)  # does not disturb the others
    next(unfinished)
    first, second = whole_rows(dataset, 100), whole_rows(dataset, 100)
    assert first == second
    assert dataset.epoch >= 1 and 100 * 17 > sum(map(len, documents))


def test_work_done_ahead_is_not_in_the_state(corpus_of):
    dataset = PackedDataset(corpus_of(random_documents(500, 30)), TOKENIZER, 16, 10, 4)
    next(iter(dataset))
    state = dataset.state_dict()
    assert dataset.num_documents + len(state["lengths"]) == state["corpus"]["num_documents"] <= 16


def test_the_thread_ends_with_the_iteration(corpus_of):
    before = threading.enumerate()
    rows = iter(PackedDataset(corpus_of(random_documents(500, 30)), TOKENIZER, 16, 10, 4))
    next(rows)
    threads = [t for t in threading.enumerate() if t.name.startswith("tokenise-ahead") and t not in before]
    assert threads
    del rows
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_a_process_that_exits_in_the_middle_exits_quietly(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{i} {i}"}}\n' for i in range(100)))
    code = f"""
from nanochat_hf.data import packing
from nanochat_hf.data.corpus import load_corpus
packing.encode_documents = lambda tokenizer, texts: [[0, *map(int, text.split())] for text in texts]
dataset = packing.PackedDataset(load_corpus({str(tmp_path / "text.jsonl")!r}, epochs=None), None, 8, 10, 4)
rows = iter(dataset)
next(rows)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_giant_document_is_kept_no_longer_than_a_row(corpus_of):
    documents = [[BOS, *range(1, 10)], [BOS, *range(10, 10**5)], [BOS] * 5] * 2
    dataset = PackedDataset(corpus_of(documents, epochs=1), TOKENIZER, 64, 4, 2)
    reader = iter(dataset)
    next(reader)
    assert len(dataset.state_dict()["tokens"]) <= 4 * 65
    rest = whole_rows(dataset)
    assert 65 * len(rest) + dataset.num_dropped_tokens == sum(map(len, documents))


def test_errors_of_the_corpus_come_through(corpus_of, tmp_path):
    corpus = corpus_of(random_documents(100, 30))
    (tmp_path / "a.parquet").write_bytes(b"gone")
    with pytest.raises(ValueError, match="cannot read shard a.parquet"):
        next(iter(PackedDataset(corpus, TOKENIZER, 16, 10, 4)))


def test_other_settings_are_refused(corpus_of):
    corpus = corpus_of(random_documents(100, 30))
    state = PackedDataset(corpus, TOKENIZER, 16, 10, 4).state_dict()
    for settings in ({"sequence_length": 17}, {"packing": "flat"}, {"refill_documents": 5}):
        arguments = {"sequence_length": 16, "buffer_documents": 10, "refill_documents": 4, **settings}
        name, value = next(iter(settings.items()))
        with pytest.raises(ValueError, match=f"cannot resume.*now {name}={value!r}"):
            PackedDataset(corpus, TOKENIZER, **arguments).load_state_dict(state)
    with pytest.raises(ValueError, match="packing='best': give one of best_fit, flat"):
        PackedDataset(corpus, TOKENIZER, 16, packing="best")
    with pytest.raises(ValueError, match="must be at least 1"):
        PackedDataset(corpus, TOKENIZER, 0)


def test_real_tokenizer(tiny_tokenizer):
    dataset = PackedDataset(load_corpus("embedded", "validation"), tiny_tokenizer, 128, 50, 32)
    rows = whole_rows(dataset, 5)
    assert all(row[0] == tiny_tokenizer.bos_token_id for row in rows)
    text = tiny_tokenizer.decode(pieces_of(rows[0], tiny_tokenizer.bos_token_id)[0][1:])
    assert any(document.startswith(text) for document in load_corpus("embedded", "validation"))


@pytest.mark.parametrize("packing", ["best_fit", "flat"])
def test_batches_made_ahead_resume_to_the_row(corpus_of, packing, tmp_path):
    def dataset():
        return PackedDataset(corpus_of(random_documents(300, 150)), TOKENIZER, 32, 50, 16, packing)

    whole = [batch["input_ids"] for batch in BatchesAhead(dataset(), 3, torch.device("cpu"), num_batches=12)]
    assert len(whole) == 12
    batches = BatchesAhead(dataset(), 3, torch.device("cpu"), num_batches=12)
    first = [next(batches)["input_ids"] for _ in range(5)]
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    next(batches)  # going on changes nothing in the state
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = dataset()
    resumed.load_state_dict(state["dataset"])
    rest = BatchesAhead(resumed, 3, torch.device("cpu"), num_batches=7, waiting=state["waiting"])
    for batch, wanted in zip([*first, *(batch["input_ids"] for batch in rest)], whole, strict=True):
        assert torch.equal(batch, wanted)
    assert resumed.num_rows == 36, "nothing is made beyond the last batch"


def test_batches_ahead_hand_errors_on(corpus_of, tmp_path):
    dataset = PackedDataset(corpus_of(random_documents(300, 150)), TOKENIZER, 32, 50, 16)
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet"):
        next(BatchesAhead(dataset, 3, torch.device("cpu"), num_batches=2))
