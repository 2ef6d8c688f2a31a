"""Reading a recipe: one YAML file plus command-line flags become dataclass instances, checked before any work starts.

TRL's parser does the merging (`--config file.yaml --flag value`, the command line wins). What is added here is the
check: an unknown key names its nearest valid neighbour, a wrong type names what is expected. Scripts are

    if __name__ == "__main__":
        run_command(main)
"""

import dataclasses
import difflib
import importlib
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from safetensors import SafetensorError


class RecipeError(ValueError):
    """A recipe or a flag is wrong; the message names what was given and the fix."""


def parse_recipe(*dataclass_types: type, argv: Sequence[str] | None = None) -> tuple:
    """Parse `--config FILE.yaml` and flags into one instance per dataclass, in order, then the explicit settings.

    Args:
        dataclass_types: the dataclasses whose fields are the valid keys.
        argv: command line without the program name; `sys.argv[1:]` by default.

    Returns:
        `(instance, ..., settings)`; `settings` is a dict of only what the YAML and the command line said.

    Raises:
        RecipeError: unknown key or flag (with the nearest valid one), wrong type, missing or malformed file.
    """
    from trl import TrlParser

    argv = [part for a in (sys.argv[1:] if argv is None else argv) for part in _split_config_flag(a)]
    fields = {f.name: f for t in dataclass_types for f in dataclasses.fields(t) if f.init}
    hints = {name: hint for t in dataclass_types for name, hint in typing.get_type_hints(t).items()}
    source = "command line"
    said: dict = {}
    if "--config" in argv:
        index = argv.index("--config")
        if index + 1 >= len(argv):
            raise RecipeError("--config needs a file: --config recipes/tiny/pretrain.yaml")
        source = argv[index + 1]
        said = read_yaml(source)
        for key, value in said.items():
            if key != "env":
                _check_key(key, fields, source)
                _check_type(key, value, hints[key], source)
    for flag in (a for a in argv if a.startswith("--") and a not in ("--config", "--help")):
        _check_key(flag[2:].split("=")[0].replace("-", "_"), fields, "the command line", prefix="--")

    parser = TrlParser(dataclass_types, description=sys.modules["__main__"].__doc__)
    try:
        instances = parser.parse_args_and_config(argv)
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        unused = str(error).partition("not used by the HfArgumentParser: ")[2]
        message = f"nothing takes {unused}: a setting is given as --name value" if unused else f"{source}: {error}"
        raise RecipeError(message) from error
    flags = {a[2:].split("=")[0].replace("-", "_") for a in argv if a.startswith("--")} - {"config"}
    settings = {}
    for instance in instances:
        for field in dataclasses.fields(instance):
            if field.name in said or field.name in flags:
                settings[field.name] = getattr(instance, field.name)
    return (*instances, settings)


def read_yaml(path: str | Path) -> dict:
    """Read a YAML mapping; a missing file or anything but a mapping is a `RecipeError`."""
    if not Path(path).is_file():
        raise RecipeError(f"no recipe file at {path}; recipes lie in recipes/<name>/<stage>.yaml")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold a mapping `key: value`, found {type(content).__name__}")
    return content


def run_command(main: Callable[[], object]) -> None:
    """Run a script's main; bad input (a `ValueError`), trouble with the disk and interruption become one line on stderr
    and an exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # run.sh starts the launcher deaf to Ctrl-C
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk makes of saving weights
        print(f"error: {error}\nWhat was saved before is whole: mend this and run the command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        sys.exit(130)


def nearest(name: str, choices: typing.Iterable[str]) -> str:
    """The choice spelled most like `name`, for error messages; one that begins with it before all others."""
    choices = sorted(choices)
    longer = [choice for choice in choices if name and choice.lower().startswith(name.lower())]
    return (difflib.get_close_matches(name, longer or choices, n=1, cutoff=0.0) or [""])[0]


def load_function(path: str, what: str) -> Callable:
    """The function at an import path such as `nanochat_hf.rewards.exact_answer`; `what` it is, for messages.

    Raises:
        ValueError: no such module or function.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{what} {path!r}: cannot import {module_name!r} ({error})") from error
    if not callable(getattr(module, name, None)):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"{what} {path!r}: {module_name} has no function {name!r}; did you mean {nearest(name, functions)}?"
        )
    return getattr(module, name)


def _split_config_flag(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _check_key(key: str, fields: dict, source: str, prefix: str = "") -> None:
    name = key[3:] if prefix and key.startswith("no_") and key[3:] in fields else key  # argparse's --no_flag
    if name not in fields:
        raise RecipeError(f"{source}: unknown setting `{prefix}{key}`; did you mean `{prefix}{nearest(key, fields)}`?")


def _check_type(key: str, value: object, hint: object, source: str) -> None:
    if not _matches(value, hint):
        shown = str(hint).replace("typing.", "") if typing.get_origin(hint) else getattr(hint, "__name__", hint)
        raise RecipeError(f"{source}: `{key}` must be {shown}, got {value!r} ({type(value).__name__})")


def _matches(value: object, hint: object) -> bool:
    """Whether a YAML value fits a type hint; hints with no YAML counterpart accept anything."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, arm) for arm in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is type(None):
        return value is None
    if hint is float:
        # YAML 1.1 reads 1e-3 (no dot) as a string; argparse converts it.
        return not isinstance(value, bool) and (isinstance(value, (int, float)) or _is_number(value))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, list, dict):
        return isinstance(value, hint)
    if origin in (list, tuple):
        item = next((arm for arm in typing.get_args(hint) if arm is not Ellipsis), object)
        return isinstance(value, (list, tuple)) and all(_matches(entry, item) for entry in value)
    if origin is dict:
        key_hint, value_hint = typing.get_args(hint)
        return isinstance(value, dict) and all(
            _matches(k, key_hint) and _matches(v, value_hint) for k, v in value.items()
        )
    return True


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True
