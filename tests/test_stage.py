"""Stage records: written at success only, skipped when finished, refused for another recipe."""

import json

import pytest

from nanochat_hf.stage import Stage


def test_a_finished_stage_is_recorded_and_found_again(tmp_path):
    with Stage(tmp_path, "base", {"depth": 4}) as stage:
        stage.log(step=1, loss=2.0)
        stage.log(step=2, loss=1.0)
        stage.results["val_bpb"] = 1.5
    record = json.loads((tmp_path / "eval" / "base.json").read_text())
    assert record["settings"] == {"depth": 4} and record["results"] == {"val_bpb": 1.5}
    assert 0 <= record["seconds"] == record["finished"] - record["started"] and record["peak_memory_mib"] > 0
    assert [json.loads(line)["loss"] for line in (tmp_path / "logs" / "base.jsonl").open()] == [2.0, 1.0]
    assert not Stage(tmp_path, "base", {"depth": 4}).finished, "its folder is not there"
    (tmp_path / "base").mkdir()
    again = Stage(tmp_path, "base", {"depth": 4})
    assert again.finished and again.results == {"val_bpb": 1.5}


def test_a_failed_stage_leaves_no_record(tmp_path):
    with pytest.raises(RuntimeError), Stage(tmp_path, "base", {}):
        raise RuntimeError("out of disk")
    assert not Stage(tmp_path, "base", {}).finished


def test_seconds_of_a_resumed_stage_add_up(tmp_path):
    with Stage(tmp_path, "base", {}) as stage:
        stage.results["seconds_before_resume"] = 100.0
    assert 100 <= json.loads(stage.path.read_text())["seconds"] < 101


def test_another_recipe_is_refused(tmp_path):
    with Stage(tmp_path, "base", {"depth": 4}):
        pass
    with pytest.raises(ValueError, match="belongs to another recipe.*depth=4, now depth=6.*--fresh"):
        Stage(tmp_path, "base", {"depth": 6})
    with pytest.raises(ValueError, match="belongs to another recipe"):
        Stage(tmp_path, "base", {"depth": 4, "dataset": "x"})


def test_another_recipe_does_not_go_on_from_checkpoints(tmp_path):
    """Before there is a checkpoint nothing is lost, and a recipe may be mended; afterwards it is another one."""
    with pytest.raises(RuntimeError), Stage(tmp_path, "base", {"depth": 4}):
        raise RuntimeError("killed")
    with pytest.raises(RuntimeError), Stage(tmp_path, "base", {"depth": 6}):
        (tmp_path / "checkpoints" / "base" / "step-000002").mkdir(parents=True)
        raise RuntimeError("killed")
    Stage(tmp_path, "base", {"depth": 6, "run_dir": "moved", "push_to_hub": True, "hub_model_id": "me/tiny"})
    with pytest.raises(ValueError, match="another recipe.*depth=6, now depth=4.*delete .*base.settings.json"):
        Stage(tmp_path, "base", {"depth": 4})


def test_a_folder_that_no_stage_wrote_is_not_replaced(tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(ValueError, match="base is there already, and no stage of this run has written it: move"):
        Stage(tmp_path, "base", {"depth": 4})
