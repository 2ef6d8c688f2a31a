"""Publishing a run: a model repository on the Hub with code, tokenizer, card and report; each stage is a branch.

Before anything is sent, every folder is opened in a process that does not know this package and must give the same
tokens and logits as here: a tokenizer and a model out of step, or a code file left behind, would be noticed only by
others. Repositories are private unless `public` is said. Running it again sends only what is missing.

    python scripts/publish.py --run runs/tiny --repo_id me/tiny-chat --dry_run
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..configs import PublishConfig
from ..stage import STAGES, is_first_process
from .card import model_card, public_name
from .check import check_folder

MODEL_STAGES = tuple(stage for stage in STAGES if stage != "tokenizer")
SECRET = re.compile(rb"\bhf_[A-Za-z0-9]{20,}\b")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def publish(config: PublishConfig) -> None:
    """Check a run's models and upload them: the last stage to `main`, every stage to a branch of its name.

    Raises:
        ValueError: a run without a model, a malformed `repo_id`, a folder that fails its check, a secret in a file, or
            a Hub that refuses (no token, no right to write, no network).
    """
    run_dir = Path(config.run)
    stages = [stage for stage in MODEL_STAGES if (run_dir / stage / "config.json").is_file()]
    if not stages:
        raise ValueError(
            f"run={config.run}: none of {', '.join(MODEL_STAGES)} in it is a model folder; give the folder of a whole "
            f"run (runs/tiny), or run a recipe first"
        )
    check_repo_id(config.repo_id, "repo_id")
    with tempfile.TemporaryDirectory() as temporary:
        folders = {stage: gather(run_dir, stage, stages, config.repo_id, Path(temporary) / stage) for stage in stages}
        for stage, folder in folders.items():
            refuse_secrets(folder)
            print(f"{stage}: same tokens and logits without this package ({check_folder(folder)})", flush=True)
        branches = {"main": folders[stages[-1]], **folders}
        space = gather_space(Path(temporary) / "space") if config.space else None
        if space is not None:
            refuse_secrets(space)
        if config.dry_run:
            print(listing(branches, space, config))
            return
        upload(branches, space, config)


@contextmanager
def published(run_dir: str, settings: dict) -> Iterator[None]:
    """Around a stage: publishes the run when it has finished, if its recipe says `push_to_hub: true`.

    Args:
        settings: what recipe and command line said; `hub_private_repo: false` makes a new repository public.

    Raises:
        ValueError: no or a malformed `hub_model_id`, before the stage begins; whatever `publish` raises, after it.
    """
    if not settings.get("push_to_hub") or settings.get("plan"):
        yield
        return
    repo_id = settings.get("hub_model_id") or ""
    check_repo_id(repo_id, "push_to_hub: true needs hub_model_id; it")
    yield
    if is_first_process():
        publish(PublishConfig(run=run_dir, repo_id=repo_id, public=settings.get("hub_private_repo") is False))


def check_repo_id(repo_id: str, name: str) -> None:
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"{name}={repo_id!r} must be OWNER/NAME, for example me/tiny-chat")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{name}={repo_id!r}: {error}") from error


def gather(run_dir: Path, stage: str, stages: list[str], repo_id: str, target: Path) -> Path:
    """A stage's model folder with the card, the report and its plots beside it, as it will lie on the Hub."""
    shutil.copytree(run_dir / stage, target, copy_function=link_or_copy)
    for name in ("report.md", "metrics.json"):
        if (run_dir / name).is_file():
            (target / name).unlink(missing_ok=True)  # or a link would be written through
            (target / name).write_text(without_paths((run_dir / name).read_text(), run_dir), encoding="utf-8")
    if (run_dir / "plots").is_dir():
        shutil.copytree(run_dir / "plots", target / "plots")
    metrics_path = run_dir / "metrics.json"
    metrics = json.loads(metrics_path.read_text()) if metrics_path.is_file() else {}
    (target / "README.md").unlink(missing_ok=True)
    (target / "README.md").write_text(model_card(run_dir, stage, stages, repo_id, metrics), encoding="utf-8")
    return target


def without_paths(text: str, run_dir: Path) -> str:
    """A report without the folders of the machine that made it: of each path in a stage's settings the name stays."""
    paths = {str(run_dir.absolute())}

    def collect(value) -> None:
        if isinstance(value, str) and value.startswith(("/", "~", "../")):
            paths.add(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(item)

    collect(str(run_dir))
    for record in (run_dir / "eval").glob("*.json"):
        collect(json.loads(record.read_text()).get("settings"))
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, public_name(path))
    return text


def gather_space(target: Path) -> Path:
    """The Space: its folder, and the package files its modules.txt names, so that it runs without this package."""
    package = Path(__file__).resolve().parents[1]
    shutil.copytree(package / "space", target, ignore=shutil.ignore_patterns("__pycache__", "__init__.py"))
    for name in (target / "modules.txt").read_text().split():
        (target / "nanochat_hf" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / name, target / "nanochat_hf" / name)
    return target


def link_or_copy(source: str, target: str) -> None:
    """Weights are large and only read: link where the file system lets us."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def refuse_secrets(folder: Path) -> None:
    """No access token may leave in a text file: neither one that looks so, nor the one in use."""
    own = os.environ.get("HF_TOKEN", "").encode()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in (".safetensors", ".png"):
            content = path.read_bytes()
            if SECRET.search(content) or (len(own) >= 8 and own in content):
                raise ValueError(f"{path.relative_to(folder)} holds an access token; remove it, and revoke the token")


def listing(branches: dict[str, Path], space: Path | None, config: PublishConfig) -> str:
    """What an upload would send, file by file."""
    lines = [f"would go to {config.repo_id} ({'public' if config.public else 'private'}):"]
    targets = {f"branch {branch}": folder for branch, folder in branches.items()}
    if space is not None:
        targets["Space of the same name"] = space
    for name, folder in targets.items():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        size = sum(path.stat().st_size for path in files)
        lines.append(f"  {name}: {len(files)} files, {size / 1e6:,.1f} MB")
        if name in ("branch main", "Space of the same name"):
            lines += [f"    {path.relative_to(folder)}  {path.stat().st_size:,} bytes" for path in files]
    return "\n".join(lines)


def upload(branches: dict[str, Path], space: Path | None, config: PublishConfig) -> None:
    """Create the repository and its branches, and send each folder as one commit; then the Space, if there is one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(config.repo_id, private=not config.public, exist_ok=True)
        if not config.public and not api.repo_info(config.repo_id).private:
            raise ValueError(f"{config.repo_id} is there already and public: say --public, or choose another name")
        for branch, folder in branches.items():
            if branch != "main":
                api.create_branch(config.repo_id, branch=branch, exist_ok=True)
            message = f"Upload the model of stage {branch}" if branch != "main" else "Upload the final model"
            api.upload_folder(
                repo_id=config.repo_id, folder_path=folder, revision=branch, commit_message=message,
                delete_patterns="model*.safetensors*",  # of an earlier run, cut otherwise
            )  # fmt: skip
            print(f"sent {branch} to {config.repo_id}", flush=True)
        if space is not None:
            variables = [{"key": "MODEL_ID", "value": config.repo_id}]
            kwargs = {"repo_id": config.repo_id, "repo_type": "space"}
            api.create_repo(
                **kwargs, private=not config.public, exist_ok=True, space_sdk="gradio", space_variables=variables
            )
            api.upload_folder(**kwargs, folder_path=space, commit_message="Upload the chat")
            print(f"sent the Space {config.repo_id}", flush=True)
            if not config.public:
                print("the Space needs a secret HF_TOKEN that may read the private model (Settings, Secrets)")
    except LocalTokenNotFoundError as error:
        raise ValueError("no Hub token on this machine: run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hints = {401: "the token is not valid: `hf auth login`", 403: "the token may not write there"}
        raise ValueError(
            f"the Hub refused {config.repo_id}: {hints.get(status, status)}. What was sent is kept"
        ) from error
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"no connection to the Hub ({type(error).__name__}); run the same command again later"
        ) from error
    except RuntimeError as error:  # what upload_folder makes of a transfer that broke off
        raise ValueError(f"{error} Run the same command again: what was sent is kept") from error
    print(f"https://huggingface.co/{config.repo_id}")
