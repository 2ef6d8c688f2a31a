"""Recipes and flags: merging, and an error that names the fix for everything that does not fit."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
from safetensors import SafetensorError

from nanochat_hf.recipe import RecipeError, parse_recipe, run_command


@dataclass
class Example:
    depth: int = 20
    rate: float = 0.1
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    sources: list[dict] = field(default_factory=list)
    compile: bool = False
    rates: dict[str, float] | None = None
    sizes: list[int] | None = None


def write(tmp_path, text):
    path = tmp_path / "example.yaml"
    path.write_text(text)
    return str(path)


def test_command_line_wins_over_yaml_over_default(tmp_path):
    path = write(tmp_path, "depth: 4\nrate: 2\nsources: [{source: x}]\n")
    example, settings = parse_recipe(Example, argv=["--config", path, "--depth", "6"])
    assert dataclasses.astuple(example) == (6, 2, None, "a", [{"source": "x"}], False, None, None)
    assert settings == {"depth": 6, "rate": 2, "sources": [{"source": "x"}]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dept: 4", "unknown setting `dept`; did you mean `depth`"),
        ("depth: four", "`depth` must be int, got 'four'"),
        ("depth: true", "`depth` must be int, got True"),
        ("rates: {matrix: fast}", "`rates` must be dict\\[str, float\\] | None, got {'matrix': 'fast'}"),
        ("rates: 0.1", "`rates` must be dict"),
        ("sizes: [1, two]", "`sizes` must be list\\[int\\] | None, got \\[1, 'two'\\]"),
        ("rate: fast", "`rate` must be float"),
        ("kind: c", "`kind` must be .*'a', 'b'"),
        ("compile: 1", "`compile` must be bool"),
        ("sources: x", "`sources` must be list"),
        ("- depth", "must hold a mapping"),
        ("depth: [", "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(Example, argv=["--config", write(tmp_path, text)])


def test_scientific_notation_without_a_dot(tmp_path):
    """YAML 1.1 reads 1e-3 as a string; it is a number to everyone else."""
    assert parse_recipe(Example, argv=["--config", write(tmp_path, "rate: 1e-3")])[0].rate == 1e-3


def test_help_begins_with_what_the_script_says_of_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "Train it: python train.py --config FILE")
    with pytest.raises(SystemExit):
        parse_recipe(Example, argv=["--help"])
    assert "Train it: python train.py --config FILE" in capsys.readouterr().out


def test_bad_flags(tmp_path):
    with pytest.raises(RecipeError, match="unknown setting `--dpth`; did you mean `--depth`"):
        parse_recipe(Example, argv=["--dpth", "3"])
    with pytest.raises(RecipeError, match="unknown setting `--DEP`; did you mean `--depth`"):
        parse_recipe(Example, argv=["--DEP", "3"])
    with pytest.raises(RecipeError, match=r"nothing takes \['3'\]: a setting is given as --name value"):
        parse_recipe(Example, argv=["3"])
    with pytest.raises(RecipeError, match="no recipe file"):
        parse_recipe(Example, argv=["--config", str(tmp_path / "absent.yaml")])
    with pytest.raises(RecipeError, match="--config needs a file"):
        parse_recipe(Example, argv=["--config"])


def test_config_may_be_joined_to_its_file(tmp_path):
    path = write(tmp_path, "depth: 4\n")
    assert parse_recipe(Example, argv=[f"--config={path}", "--rate=2"])[0].depth == 4


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_no_traceback(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    assert "No space left on device\nWhat was saved before is whole" in capsys.readouterr().err


def test_run_command_prints_one_line(capsys):
    def main():
        raise ValueError("give a number")

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: give a number\n"


def test_a_reader_that_has_read_enough_is_no_error():
    script = (
        "from nanochat_hf.recipe import run_command\nrun_command(lambda: [print(i, flush=True) for i in range(99999)])"
    )
    command = f'"{sys.executable}" -c "$0" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command, script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n141\n", "")
