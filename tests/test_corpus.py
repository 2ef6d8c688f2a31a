"""A corpus: every document once and in order, whatever the processes; resumed to the document; bad data named."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader, IterableDataset

from nanochat_hf.data import hub_files
from nanochat_hf.data.corpus import load_corpus


def write_shards(folder: Path, *shards: list, rows_per_group: int = 7, column: str = "text") -> Path:
    folder.mkdir(exist_ok=True)
    for number, texts in enumerate(shards):
        table = pa.table({column: pa.array(texts), "id": list(range(len(texts)))})
        pq.write_table(table, folder / f"shard_{number:05d}.parquet", row_group_size=rows_per_group, compression="zstd")
    return folder


def texts(shard: int, num: int) -> list[str]:
    return [f"shard {shard} document {i}" for i in range(num)]


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_shards(tmp_path / "text", texts(0, 30), texts(1, 17), texts(2, 1), texts(3, 23), texts(4, 9))


TRAIN = texts(0, 30) + texts(1, 17) + texts(2, 1) + texts(3, 23)


def test_last_shard_is_validation_and_order_is_kept(folder):
    assert list(load_corpus(str(folder), "train")) == TRAIN
    assert list(load_corpus(str(folder), "validation")) == texts(4, 9)
    assert list(load_corpus(str(folder), "train", num_shards=2)) == TRAIN[:47]
    assert list(load_corpus(str(folder), "train", epochs=2)) == TRAIN + TRAIN


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_processes_share_without_overlap_or_loss(folder, world_size):
    shares = [list(load_corpus(str(folder), "train", rank, world_size)) for rank in range(world_size)]
    assert sorted(sum(shares, [])) == sorted(TRAIN)
    assert max(map(len, shares)) - min(map(len, shares)) <= 4  # one a shard


class Documents(IterableDataset):
    def __init__(self, corpus):
        self.corpus = corpus

    def __iter__(self):
        return iter(self.corpus)


def test_workers_share_without_overlap_or_loss(folder):
    both = []
    for rank in range(2):
        loader = DataLoader(Documents(load_corpus(str(folder), "train", rank, 2)), batch_size=None, num_workers=2)
        both += list(loader)
    assert sorted(both) == sorted(TRAIN)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "embedded"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_resumes_to_the_document(folder, tmp_path, kind, world_size):
    source = {"parquet": str(folder), "jsonl": str(tmp_path / "text.jsonl"), "embedded": "embedded"}[kind]
    lines = [json.dumps({"text": text}) for text in TRAIN]
    (tmp_path / "text.jsonl").write_text("\n".join(lines[:5]) + "\n\n" + "\n".join(lines[5:]))

    def opened():
        return load_corpus(source, "train", rank=world_size - 1, world_size=world_size, epochs=None)

    corpus = opened()
    documents, reader = [], iter(corpus)
    states = [corpus.state_dict()]
    for _ in range(160):
        documents.append(next(reader))
        states.append(json.loads(json.dumps(corpus.state_dict())))
    for num_read in (0, 1, 29, 30, 31, 46, 47, 48, 70, 71, 72, 150):
        resumed = opened()
        resumed.load_state_dict(states[num_read])
        assert resumed.state_dict() == states[num_read]
        reader = iter(resumed)
        assert [next(reader) for _ in range(10)] == documents[num_read : num_read + 10]
        assert resumed.state_dict() == states[num_read + 10]


def test_resuming_reads_no_earlier_row_group(folder, monkeypatch):
    corpus = load_corpus(str(folder), "train")
    corpus.load_state_dict(corpus.state_dict() | {"row": 25})
    groups = []
    iter_batches = pq.ParquetFile.iter_batches

    def watched(self, size, row_groups, *args, **kwargs):
        groups.extend(row_groups)
        return iter_batches(self, size, row_groups, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    assert next(iter(corpus)) == "shard 0 document 25"
    assert groups == [3]


def test_a_new_iteration_starts_over(folder):
    corpus = load_corpus(str(folder), "validation")
    assert list(corpus) == list(corpus) == texts(4, 9)
    assert (corpus.epoch, corpus.num_documents) == (1, 9)


def test_resuming_elsewhere_is_refused(folder):
    state = load_corpus(str(folder), "train", 0, 2).state_dict()
    with pytest.raises(ValueError, match="process 0 of 2, this is process 1 of 3"):
        load_corpus(str(folder), "train", 1, 3).load_state_dict(state)
    with pytest.raises(ValueError, match="not those of the checkpoint"):
        load_corpus(str(folder), "train", 0, 2, num_shards=1).load_state_dict(state)
    write_shards(folder, texts(9, 30))
    with pytest.raises(ValueError, match="not those of the checkpoint"):
        load_corpus(str(folder), "train", 0, 2).load_state_dict(state)


def test_one_file_keeps_its_last_rows_for_validation(tmp_path):
    documents = texts(0, 100)
    write_shards(tmp_path / "one", documents)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": d, "id": 1}) + "\n\n" for d in documents))
    for source in (tmp_path / "one", tmp_path / "one" / "shard_00000.parquet", tmp_path / "text.jsonl"):
        assert list(load_corpus(str(source), "train")) == documents[:95]
        assert list(load_corpus(str(source), "validation")) == documents[95:]
        shares = [list(load_corpus(str(source), "validation", rank, 3)) for rank in range(3)]
        assert sorted(sum(shares, [])) == documents[95:]


def test_empty_documents_are_left_out_and_counted(tmp_path):
    folder = write_shards(tmp_path / "text", ["a", "", None, " \n\t", "b"], ["c"])
    corpus = load_corpus(str(folder), "train")
    assert list(corpus) == ["a", "b"]
    assert (corpus.num_documents, corpus.num_empty_documents) == (2, 3)


def test_a_ten_megabyte_document_comes_whole(tmp_path):
    giant = "é word " * (10 * 2**20 // 8)
    folder = write_shards(tmp_path / "text", ["a", giant, "b"], ["c"])
    assert list(load_corpus(str(folder), "train")) == ["a", giant, "b"]


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "whole \\ud83d\\ude00 half \\ud83d end"}\n{"text": "b"}\n')
    assert list(load_corpus(str(path), "train")) == ["whole 😀 half \ufffd end"]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:  # the footer is whole, the data of the last row groups are not
        path.write_bytes(content[:600] + bytes(len(content) // 2 - 600) + content[len(content) // 2 :])


def test_a_truncated_shard_stops_before_any_work(folder):
    damage(folder / "shard_00001.parquet", "truncated")
    with pytest.raises(ValueError, match="cannot read shard shard_00001.parquet.*fetch it again.*on_bad_shard"):
        load_corpus(str(folder), "train")


@pytest.mark.parametrize("how", ["truncated", "damaged"])
def test_a_bad_shard_is_skipped_and_counted_when_asked(tmp_path, how, caplog):
    long = [[f"{s} {i} " + f"{hash((s, i))}" * 20 for i in range(200)] for s in range(3)]
    folder = write_shards(tmp_path / "text", *long, texts(9, 3), rows_per_group=20)
    damage(folder / "shard_00001.parquet", how)
    corpus = load_corpus(str(folder), "train", on_bad_shard="skip", epochs=2)
    with caplog.at_level(logging.WARNING):
        documents = list(corpus)
    assert corpus.num_skipped_shards == 2  # one an epoch
    assert caplog.text.count("skipped: cannot read shard shard_00001.parquet") == 2
    one_epoch = documents[: len(documents) // 2]
    assert documents == one_epoch * 2
    assert [d for d in one_epoch if not d.startswith("1 ")] == long[0] + long[2]
    before_damage = [d for d in one_epoch if d.startswith("1 ")]
    assert before_damage == long[1][: len(before_damage)] and len(before_damage) < 200
    if how == "damaged":  # seen only when reached
        with pytest.raises(ValueError, match="cannot read shard shard_00001.parquet from row"):
            list(load_corpus(str(folder), "train"))


def test_all_shards_bad_is_an_error_even_when_skipping(folder):
    for path in folder.iterdir():
        damage(path, "truncated")
    with pytest.raises(ValueError, match="cannot read shard"):
        load_corpus(str(folder), "train", on_bad_shard="skip")


def refused(match: str, dataset: object, split: str = "train", **options) -> None:
    with pytest.raises(ValueError, match=match):
        load_corpus(str(dataset), split, **options)


def test_missing_text_column_names_those_there(tmp_path):
    refused(r"no column `text`, only \['body', 'id'\]", write_shards(tmp_path / "a", ["x"], ["y"], column="body"))
    refused("holds int64, it must hold strings", write_shards(tmp_path / "b", [1, 2], [3]))
    (tmp_path / "c.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    refused(r"line 1 has keys \['body'\].*`text`", tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n{"text": "cut of')
    assert list(load_corpus(str(tmp_path / "d.jsonl"), "train")) == ["x", "y"]
    refused("line 3 is not JSON", tmp_path / "d.jsonl", "validation")


def test_too_few_documents(tmp_path):
    refused("the train split of .* is empty", write_shards(tmp_path / "a", [""][:0], ["y"]))
    assert list(load_corpus(str(write_shards(tmp_path / "a", [""][:0], ["x"], ["y"])), "train")) == ["x"]
    refused("the validation split of .* is empty", write_shards(tmp_path / "h", ["x"], [""][:0]), "validation")
    refused("holds 1 document; at least two", write_shards(tmp_path / "b", ["x"]))
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n')
    refused("holds 1 document; at least two", tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").write_text("")
    refused("holds 0 documents; at least two", tmp_path / "d.jsonl")
    (tmp_path / "e").mkdir()
    refused("holds no .parquet file .found: nothing", tmp_path / "e")
    blank = load_corpus(str(write_shards(tmp_path / "f", ["", " "], ["y"])), "train", epochs=None)
    with pytest.raises(ValueError, match="no document for process 0 of 1 .2 empty"):
        next(iter(blank))
    alone = load_corpus(str(write_shards(tmp_path / "g", ["x"], ["y"])), "train", 1, 2, epochs=None)
    with pytest.raises(ValueError, match="no document for process 1 of 2.*use fewer processes"):
        next(iter(alone))


def test_wrong_names_get_the_nearest(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    refused("there is no texts.*did you mean 'text'", "texts")
    refused("did you mean 'embedded'", "embeded")
    refused(r"there is no txet/a/b.*has no 'txet'; did you mean 'text'", "./txet/a/b")
    refused("has no 'shard_0001.parquet'; did you mean 'shard_0000", folder / "shard_0001.parquet")
    Path("notes.txt").write_text("x")
    refused("notes.txt is neither .parquet nor .jsonl", "notes.txt")
    refused("'val' is not one of .* did you mean 'validation'", folder, "val")
    refused("has 4 training shards.*give 1 to 4", folder, num_shards=5)
    refused("num_shards=1 chooses among parquet shards", "embedded", num_shards=1)
    refused("give 'error' or 'skip'", folder, on_bad_shard="ignore")
    refused("rank 2 of 2", folder, rank=2, world_size=2)


def test_offline_hub_id_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("the Hub cannot be asked for a dataset 'someone/text'.*offline, name a local folder", "someone/text")


@pytest.fixture
def hub(folder, monkeypatch):
    """huggingface_hub with one repository, `someone/text`: the test folder below `data/`, and another file."""
    calls = SimpleNamespace(fetched=[], slept=[], failures=0, commit="c0ffee")

    def dataset_info(self, repo, files_metadata):
        if repo != "someone/text":
            response = SimpleNamespace(headers={}, request=None, status_code=404)
            raise huggingface_hub.errors.RepositoryNotFoundError("404", response=response)
        names = ["README.md", "data/note.txt", *(f"data/{p.name}" for p in sorted(folder.iterdir())), "other/a.parquet"]
        return SimpleNamespace(
            sha=calls.commit, siblings=[SimpleNamespace(rfilename=n, blob_id=n) for n in reversed(names)]
        )

    def hf_hub_download(repo, name, repo_type, revision):
        assert (repo, repo_type, revision) == ("someone/text", "dataset", calls.commit)
        if calls.failures:
            calls.failures -= 1
            raise ConnectionError("reset by peer")
        calls.fetched.append(name)
        return str(folder / Path(name).name)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_files.time, "sleep", calls.slept.append)
    return calls


def test_hub_dataset_is_read_like_a_folder(hub):
    validation = load_corpus("someone/text/data", "validation")
    assert list(validation) == texts(4, 9)
    assert set(hub.fetched) == {"data/shard_00004.parquet"}
    hub.fetched.clear()
    assert list(load_corpus("someone/text/data", "train", num_shards=2)) == TRAIN[:47]
    assert set(hub.fetched) == {"data/shard_00000.parquet", "data/shard_00001.parquet"}
    assert list(load_corpus("someone/text", "train")) == TRAIN + texts(4, 9)  # then `other/a.parquet` is the last


def test_hub_position_outlives_a_commit_that_leaves_the_files(hub):
    corpus = load_corpus("someone/text/data", "train")
    assert next(iter(corpus)) == TRAIN[0]
    hub.commit = "deadbeef"
    resumed = load_corpus("someone/text/data", "train")
    resumed.load_state_dict(corpus.state_dict())
    assert next(iter(resumed)) == TRAIN[1]


def test_hub_reads_are_tried_again(hub, caplog, monkeypatch):
    hub.failures = 2
    assert list(load_corpus("someone/text/data", "validation")) == texts(4, 9)
    assert hub.slept == [1, 2] and caplog.text.count("trying again") == 2
    hub.failures = 1_000
    refused("cannot read shard someone/text/data/shard_00000.parquet.*reset by peer", "someone/text/data")
    hub.failures = 12  # the six tries of the check before any work, then the six of the first shard's turn
    corpus = load_corpus("someone/text/data", "train", num_shards=2, on_bad_shard="skip")
    monkeypatch.setattr(corpus, "_prefetch", lambda index: None)
    assert (list(corpus), corpus.num_skipped_shards) == (texts(1, 17), 1)


def test_hub_mistakes(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused("the Hub has no public dataset 'someone/txt'", "someone/txt")
    refused("no .parquet file in nothing: they lie in data, other", "someone/text/nothing")


def test_real_folder(shared_data):
    train = load_corpus(str(shared_data / "pretrain"), "train")
    validation = load_corpus(str(shared_data / "pretrain"), "validation")
    assert (sum(1 for _ in train), sum(1 for _ in validation)) == (14_326, 768)
