"""What the READMEs show exists: commands, flags, paths, and a tree that is the repository's."""

import re
import shlex
from pathlib import Path

import pytest
from test_recipes import dataclasses_of

ROOT = Path(__file__).parents[1]
READMES = [
    ROOT / "README.md",
    ROOT / "accelerate_configs" / "README.md",
    *sorted((ROOT / "recipes").glob("*/README.md")),
    ROOT / "recipes/teach_a_skill.md",
]
PROMISED = ("runs/", "../shared/", "my_", "me/")  # what a run makes, or the reader has
NO_FLAGS = ("scripts/convert.py", "scripts/benchmark.py", "scripts/compare.py")  # a subcommand or paths first


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """The words of every shell command shown, continuation lines joined, comments left out."""
    text = "\n".join(code_blocks(path, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


COMMANDS = [(path, words) for path in READMES for words in commands(path)]


@pytest.mark.parametrize(("path", "words"), COMMANDS, ids=[" ".join(words[:3]) for _, words in COMMANDS])
def test_commands_name_files_and_flags_that_exist(path, words):
    for word in words:
        is_path = "/" in word and not word.startswith(("-", "http", ".venv", *PROMISED)) and "=" not in word
        if is_path and not re.fullmatch(r"[\w-]+/[\w.-]+-shuffle", word):  # a Hub data set
            assert (ROOT / word).exists(), f"{path.name} names {word}"
    scripts = [word for word in words if re.fullmatch(r"scripts/\w+\.py", word)]
    # --model_args is lm-eval's own command line, --plan a switch.
    if scripts and "--model_args" not in words and scripts[0] not in NO_FLAGS:
        fields = {name for type_ in dataclasses_of(Path(scripts[0]).stem) for name in type_.__dataclass_fields__}
        given = {word[2:] for word in words[words.index(scripts[0]) :] if word.startswith("--")} - {"config", "plan"}
        assert given <= fields, f"{scripts[0]} has no {given - fields}"
    if words[-1:] and any(word.endswith("run.sh") for word in words):
        flags = {word for word in words if word.startswith("--")}
        assert all(f"\n  {flag} " in (ROOT / "scripts" / "line.sh").read_text() for flag in flags)


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_the_text_exist(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    named = re.findall(r"`((?:nanochat_hf|scripts|tests|recipes|accelerate_configs)/[\w./-]*)`", text)
    named += [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    for name in named:
        assert (ROOT / name).exists() or (path.parent / name).exists(), name


def test_the_tree_is_the_repositorys():
    (tree,) = code_blocks(ROOT / "README.md", "text")
    parents: list[str] = []
    shown = set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split(", "):
            parents[depth:] = [name.rstrip("/")]
            path = "/".join(parents)
            assert (ROOT / path).exists(), f"the tree shows {path}"
            assert (ROOT / path).is_dir() == name.endswith("/"), path
            shown.add(path)
    package = {
        f"nanochat_hf/{path.name}"
        for path in (ROOT / "nanochat_hf").iterdir()
        if path.name != "__init__.py"
        and (path.suffix == ".py" or (path / "__init__.py").exists() or path.name == "space")
    }
    assert package <= shown, f"not in the tree: {sorted(package - shown)}"
    assert {f"recipes/{path.name}" for path in (ROOT / "recipes").iterdir() if path.is_dir()} <= shown


def test_the_readme_can_be_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_python_examples_compile():
    for path in READMES:
        for block in code_blocks(path, "python"):
            compile(block, str(path), "exec")


def test_the_skill_of_the_guide_can_be_taught(tmp_path, monkeypatch):
    """The guide's own code and YAML: problems are made, disjoint by split, and scored."""
    import sys

    import yaml

    from nanochat_hf.data.conversations import build_mixture
    from nanochat_hf.grpo import build_problems
    from nanochat_hf.recipe import load_function
    from nanochat_hf.rewards import exact_answer

    guide = ROOT / "recipes" / "teach_a_skill.md"
    (tmp_path / "letters.py").write_text("\n\n".join(code_blocks(guide, "python")))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "letters", raising=False)
    (recipe,) = code_blocks(guide, "yaml")
    sources = yaml.safe_load(recipe)["mixture"]
    assert build_mixture(sources)["source"].count("letters.letter_rows") == 800
    train, test = (build_mixture(sources[:1], split) for split in ("train", "test"))
    problems = build_problems(train)
    assert not {row[0]["content"] for row in problems["prompt"]} & {row[0]["content"] for row in test["messages"]}
    told = f'<|python_start|>("a").count("a")<|python_end|>\n#### {problems[0]["answer"]}'
    assert exact_answer([told], answer=[problems[0]["answer"]]) == [1.0]
    assert load_function("letters.used_count", "reward")(completions=[told, "#### 1"]) == [1.0, 0.0]
