"""Every dataclass this project owns: one field, one setting, with its unit and meaning.

Defaults live here and nowhere else; what follows from `depth` is derived in `scaling.py`; choices are made in the
YAML files under `recipes/`. A field set to None means "derive it".
"""

from dataclasses import dataclass, field


@dataclass
class CorpusConfig:
    """Where text comes from."""

    dataset: str = field(
        default="embedded",
        metadata={
            "help": "embedded (docs and source of the Python installation), a Hub dataset id, a folder of parquet "
            "shards with a `text` column (last shard = validation) or a .jsonl file"
        },
    )
    run_dir: str = field(default="runs/tiny", metadata={"help": "folder of the whole run; stages are its sub-folders"})
