"""Every recipe's YAML goes through the dataclasses of the script that run.sh gives it to; mistakes name their fix."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import yaml

from nanochat_hf import NanoChatHFForCausalLM
from nanochat_hf.data.conversations import check_source
from nanochat_hf.pretrain_plan import accumulation_steps, model_config, scaling_plan
from nanochat_hf.recipe import RecipeError, load_function, parse_recipe
from nanochat_hf.trl_stage import lora_config

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").iterdir() if path.is_dir())
LINE = re.compile(r"scripts/(\w+)\.py --config \$recipe/(\w+)\.yaml")


def script_of(recipe: Path) -> dict[str, str]:
    """YAML stem -> script stem, as run.sh says."""
    return {stem: script for script, stem in LINE.findall((recipe / "run.sh").read_text())}


def dataclasses_of(script: str) -> list[type]:
    """What the script hands to `parse_recipe`."""
    path = ROOT / "scripts" / f"{script}.py"
    names = runpy.run_path(str(path), run_name="not_main")
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if getattr(call.func, "id", None) == "parse_recipe"]
    return [names[argument.id] for argument in call.args]


CASES = [(recipe, stem, script) for recipe in RECIPES for stem, script in script_of(recipe).items()]
each_yaml = pytest.mark.parametrize(("recipe", "stem", "script"), CASES, ids=[f"{c[0].name}/{c[1]}" for c in CASES])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_has_all_its_files(recipe):
    stems = {path.stem for path in recipe.glob("*.yaml")}
    assert stems == set(script_of(recipe)), "run.sh and the YAML files name different stages"
    assert (recipe / "README.md").is_file()


@each_yaml
def test_yaml_parses(recipe, stem, script, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = recipe / f"{stem}.yaml"
    said = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key not in ("env", "run_dir")}
    flags = {"run_dir": "elsewhere"}
    if script in ("sft", "dpo", "grpo"):  # transformers refuses a GPU's bf16 on a machine without one
        flags["use_cpu"] = "true"
    argv = ["--config", str(path), *(word for key, value in flags.items() for word in (f"--{key}", value))]
    *instances, settings = parse_recipe(*dataclasses_of(script), argv=argv)
    assert settings.keys() == said.keys() | flags.keys()
    assert instances[0].run_dir == "elsewhere"
    for key, value in said.items():
        (instance,) = [instance for instance in instances if hasattr(instance, key)][:1]
        given = getattr(instance, key)
        assert given == (type(given)(value) if isinstance(given, (int, float)) else value), key


@each_yaml
def test_what_a_yaml_asks_for_can_be_built(recipe, stem, script):
    flags = ["--use_cpu", "true"] if script in ("sft", "dpo", "grpo") else []
    config = parse_recipe(*dataclasses_of(script), argv=["--config", str(recipe / f"{stem}.yaml"), *flags])[0]
    if script == "pretrain":
        plan = scaling_plan(config, config.vocab_size or 4096)
        assert accumulation_steps(plan, config, num_processes=1) >= 1 and plan.num_steps >= 1
        with torch.device("meta"):
            NanoChatHFForCausalLM(model_config(plan, config, MagicMock(bos_token_id=0, eos_token_id=1, pad_token_id=1)))
    for position, source in enumerate(getattr(config, "mixture", [])):
        check_source(position, source)
    for reward in getattr(config, "rewards", []):
        load_function(reward, "reward")
    if getattr(config, "peft", None):
        assert lora_config(config).target_modules


@each_yaml
def test_a_mistyped_key_names_its_neighbour(recipe, stem, script, tmp_path):
    said = yaml.safe_load((recipe / f"{stem}.yaml").read_text())
    key = next(key for key in said if key not in ("env", "run_dir"))
    said[key + "x"] = said.pop(key)
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(RecipeError, match=rf"unknown setting `{key}x`; did you mean `{key}`\?"):
        parse_recipe(*dataclasses_of(script), argv=["--config", str(tmp_path / "bad.yaml")])
    with pytest.raises(RecipeError, match=rf"`--{key}x`; did you mean `--{key}`\?"):
        parse_recipe(*dataclasses_of(script), argv=["--config", str(recipe / f"{stem}.yaml"), f"--{key}x", "1"])


@each_yaml
def test_a_value_of_the_wrong_type_is_refused(recipe, stem, script, tmp_path):
    said = yaml.safe_load((recipe / f"{stem}.yaml").read_text())
    key = next(key for key, value in said.items() if isinstance(value, (int, list)))
    said[key] = {"not": "this"}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(RecipeError, match=f"`{key}` must be"):
        parse_recipe(*dataclasses_of(script), argv=["--config", str(tmp_path / "bad.yaml")])


def test_a_script_ends_with_one_line_on_bad_input():
    command = [sys.executable, "scripts/report.py", "--run_dirr", "runs/tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: the command line: unknown setting `--run_dirr`; did you mean `--run_dir`?"


def test_a_training_script_starts_from_its_own_folder(tmp_path):
    """Beside it lies scripts/evaluate.py, which must not hide the library `evaluate` that the training loop needs."""
    flags = ["--config", "recipes/tiny/pretrain.yaml", "--run_dir", str(tmp_path), "--vocab_size", "4096", "--plan"]
    done = subprocess.run([sys.executable, "scripts/pretrain.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Pretraining plan: depth 3")


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_the_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.mixed_precision == "no", "precision is the recipe's choice"
    flags = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= flags
    wrapped = config.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap")
    from nanochat_hf import NanoChatHFModel

    assert wrapped is None or wrapped in NanoChatHFModel._no_split_modules


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*/grpo*.yaml")), ids=lambda path: path.parent.name)
def test_rl_is_nanochats(path):
    """What test_grpo.py shows of these settings holds for every recipe: r - mean, no KL, no clip, token by token."""
    said = yaml.safe_load(path.read_text())
    settings = {"temperature": 1.0, "top_k": 50, "beta": 0.0, "num_iterations": 1, "scale_rewards": "none"}
    settings |= {"loss_type": "bnpo", "max_grad_norm": 0.0, "weight_decay": 0.0, "lr_fraction": 0.05}
    assert settings.items() <= said.items()
