"""The parquet files of a dataset on the Hub: listed at one commit, fetched one by one into the local cache when needed.

A read that fails is tried again after 1, 2, 4, 8 and 16 seconds; each retry is announced in one line of the log.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

RETRY_SECONDS = (1, 2, 4, 8, 16)
log = logging.getLogger(__name__)


class HubUnavailable(ValueError):
    """The repository does not exist, or the Hub cannot be reached."""


class HubFile(NamedTuple):
    """One file of a dataset repository at one commit."""

    repo: str
    name: str
    commit: str
    blob: str  # identifies the content, also when a later commit leaves the file as it is

    def fetch(self) -> Path:
        """The path of the local copy, downloaded into the Hub cache at the first call.

        Raises:
            OSError: the download failed, retries included.
        """
        import huggingface_hub

        def download() -> str:
            return huggingface_hub.hf_hub_download(self.repo, self.name, repo_type="dataset", revision=self.commit)

        try:
            return Path(_with_retries(download, f"{self.repo}/{self.name}", RETRY_SECONDS))
        except OSError:
            raise
        except Exception as error:  # the HTTP library's own classes differ from version to version
            raise OSError(f"{type(error).__name__}: {error}") from error


def list_parquet_files(repo: str, folder: str) -> list[HubFile]:
    """The .parquet files of a dataset repository (below `folder`, unless it is empty) at its newest commit, by name.

    Raises:
        HubUnavailable: no such repository, or no answer.
        ValueError: no .parquet file there.
    """
    import huggingface_hub

    try:
        info = _with_retries(
            lambda: huggingface_hub.HfApi().dataset_info(repo, files_metadata=True), repo, RETRY_SECONDS[:3]
        )
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise HubUnavailable(f"the Hub has no public dataset {repo!r}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise HubUnavailable(
            f"the Hub cannot be asked for a dataset {repo!r} ({reason}); offline, name a local folder"
        ) from error
    blobs = {file.rfilename: file.blob_id for file in info.siblings if file.rfilename.endswith(".parquet")}
    names = sorted(blobs)
    chosen = [name for name in names if name.startswith(f"{folder}/" if folder else "")]
    if not chosen:
        folders = sorted({name.rpartition("/")[0] or "its root" for name in names})
        place = f"they lie in {', '.join(folders[:9])}" if names else "it has none at all"
        raise ValueError(f"the Hub dataset {repo} has no .parquet file in {folder or 'it'}: {place}")
    return [HubFile(repo, name, info.sha, blobs[name]) for name in chosen]


def _with_retries(read: Callable, what: str, retry_seconds: tuple[int, ...]):
    """`read()`, tried again after each of `retry_seconds`; what cannot get better is raised at once."""
    from huggingface_hub import constants, errors

    hopeless = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError)
    for seconds in (*retry_seconds, None):
        try:
            return read()
        except hopeless:
            raise
        except Exception as error:
            if seconds is None or constants.HF_HUB_OFFLINE:
                raise
            log.warning("%s: %s: %s; trying again in %d s", what, type(error).__name__, error, seconds)
            time.sleep(seconds)
