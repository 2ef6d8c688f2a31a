"""The arrows of the house: imports go down only, rooms of the top floor never import one another, files stay small."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanochat_hf"

# Floor by floor from the ground up: a file imports from lower floors, or from its own; a new file needs a place here.
FLOORS = [
    "configs configs_post_training scaling recipe stage hardware",
    "model chat_format chat_templates tokenizer tokenizer_texts interop_tokenizer",
    "calculator sampling kv_cache onednn decode_step decode_graph decode_compiled rewards optim_shards optim_state "
    "muon optim fsdp attention fp8 training_step data generation checkpoint evaluation tokenizer_evaluation",
    "code_reward trl_callbacks trl_stage rollouts",
    "tokenizer_training pretrain sft dpo grpo chat report hub interop benchmark",
]
TOP = len(FLOORS) - 1
# Files that share a room of the top floor with the file that the room is named after.
ROOMMATES = {
    "streaming": "chat",
    "chat_service": "chat",
    "terminal": "chat",
    "space": "chat",
    "pretrain_plan": "pretrain",
    "pretrain_model": "pretrain",
    "sweep": "pretrain",
    "pretrain_estimate": "pretrain",
    "pretrain_checkpoint": "pretrain",
    "interop_checkpoint": "interop",
    "interop_verify": "interop",
}

FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
FLOOR_OF |= dict.fromkeys(ROOMMATES, TOP)

HUB_COPY_IMPORTS = {"torch", "transformers", "huggingface_hub"}  # huggingface_hub: transformers' own dependency
LONG_FILES = {"nanochat_hf/model/modeling_nanochat_hf.py": 500}
MAX_LINES, MAX_SCRIPT_LINES = 300, 25


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth of nesting; relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts
    package = package[:-1]  # an __init__.py lies in the package it is
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "nanochat_hf" else {module}
    return found


def rooms_imported(path: Path) -> set[str]:
    """Names on the floors that a file imports from; what `nanochat_hf` itself exports is the model."""
    names = {module.split(".")[1] for module in imported_modules(path) if module.startswith("nanochat_hf.")}
    return {name if name in FLOOR_OF or (PACKAGE / f"{name}.py").exists() else "model" for name in names}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


PACKAGE_FILES = [path for path in python_files(PACKAGE) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_go_down(path):
    room = room_of(path)
    assert room in FLOOR_OF, f"{room} has no floor: give it one in {Path(__file__).name}"
    assert not any(module.split(".")[0] == "scripts" for module in imported_modules(path)), "scripts are entry points"
    for other in rooms_imported(path) - {room}:
        assert other in FLOOR_OF, f"{other} has no floor: give it one in {Path(__file__).name}"
        assert FLOOR_OF[other] <= FLOOR_OF[room], f"{room} imports {other}, which lies above it"
        if FLOOR_OF[room] == TOP == FLOOR_OF[other]:
            assert ROOMMATES.get(room, room) == ROOMMATES.get(other, other), f"{room} and {other} are both first level"


def test_no_two_rooms_import_each_other():
    edges = {}
    for path in PACKAGE_FILES:
        edges.setdefault(room_of(path), set()).update(rooms_imported(path) - {room_of(path)})
    done, path = set(), []

    def visit(room):
        assert room not in path, f"a circle of imports: {' -> '.join([*path, room])}"
        if room not in done:
            path.append(room)
            for other in sorted(edges.get(room, ())):
                visit(other)
            path.pop()
            done.add(room)

    for room in sorted(edges):
        visit(room)


@pytest.mark.parametrize("path", python_files(PACKAGE / "model"), ids=lambda path: path.name)
def test_the_hub_copy_needs_nothing_of_ours(path):
    for module in imported_modules(path):
        top = module.split(".")[0]
        sibling = module.startswith("nanochat_hf.model")
        assert sibling or top in HUB_COPY_IMPORTS or top in sys.stdlib_module_names, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", python_files(ROOT / "scripts"), ids=lambda path: path.name)
def test_scripts_parse_and_call_one_function(path):
    assert len(path.read_text().splitlines()) <= MAX_SCRIPT_LINES
    assert not any(module.split(".")[0] == "scripts" for module in imported_modules(path))
    others = {other.stem for other in python_files(ROOT / "scripts")}
    assert not imported_modules(path) & others, "a script imports a script"


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable(path):
    limit = LONG_FILES.get(str(path.relative_to(ROOT)), MAX_LINES)
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= limit, f"{num_lines} lines, {limit} at most: a responsibility should move out"
    assert ast.get_docstring(ast.parse(path.read_text())) or not path.read_text().strip(), "what is this file for?"
    assert path.stem not in ("utils", "common", "helpers", "manager", "misc")


def test_importing_the_package_stays_light():
    """Auto registration needs transformers; the training stack must not come along."""
    import subprocess

    code = "import sys, nanochat_hf; print([m for m in ('trl', 'datasets', 'lm_eval', 'gradio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
    assert not done.stderr.strip()
