"""The Hugging Face hub: folders and commits of models and data sets, rights, uploads; errors as sentences.

Only huggingface_hub's public interface is used, so address, token, cache and offline mode are its own:
HF_ENDPOINT, HF_TOKEN or `hf auth login`, HF_HOME, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, get_token, is_offline_mode, metadata_load, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm
from yaml import YAMLError

from vlm_sapo.plugins import locate

Kind = Literal["model", "dataset"]
MODEL_FILES = [
    *("*.safetensors", "*.index.json", "pytorch_model*", "adapter_config.json", "adapter/*"),
    *("chat_template*", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*"),
    *("merges.txt", "*preprocessor_config.json", "processor_config.json", "generation_config.json"),
]
"""What describes a model, its processor and its adapter."""
FILE_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz", ".py", ".yaml", ".yml")
"""Of names that are meant for files."""
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
TOKEN = re.compile(r"hf_\w+")
FAILURES = (*HfHubHTTPError.__bases__, RuntimeError, ValueError)
"""What an access may raise: HTTPError of the HTTP library that huggingface_hub uses, OSError, and others of
the transfer of large files."""
DESCRIPTION_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*")
WEIGHT_FILES = ("*.safetensors",)
MARKS = {"model": ["config.json"], "dataset": ["README.md", ".gitattributes"]}
"""Small files that are read to find a commit, and whether files may be read."""
LOGIN = "set HF_TOKEN, or run `hf auth login`"
PUSH_LATER = "a finished run can be pushed at any time, with `vlm-sapo push`"


class SilentBar(tqdm):
    """A progress bar that is not shown, for small files and processes beside the first."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options | {"disable": True})


def is_hub_id(name: str) -> bool:
    """Whether a name is meant for the hub: `owner/name`, without a data file's ending, and no file or folder
    here."""
    named = HUB_ID.fullmatch(name) is not None and not name.lower().endswith(FILE_ENDINGS)
    return named and not locate(name).exists()


def local_model(
    path: str, revision: str | None = None, *, weights: bool = True, field: str = "model.path"
) -> str:
    """The folder of a model: a local one as it is, or a hub id's files of this revision, downloaded if they
    are not in the cache; without `weights` only its descriptions. Raises ValueError naming `field`."""
    if not is_hub_id(path):
        check_no_revision(path, revision, field=field)
        return str(locate(path))
    files = [*DESCRIPTION_FILES, *(WEIGHT_FILES if weights else ())]
    silent = not weights or os.environ.get("LOCAL_RANK", "0") != "0"
    with explaining(field, path, revision):
        return snapshot_download(
            path, revision=revision, allow_patterns=files, tqdm_class=SilentBar if silent else None
        )


def check_no_revision(name: str, revision: str | None, *, field: str) -> None:
    """Raises ValueError if a revision was set for something that is not on the hub."""
    if revision is not None:
        setting = "--revision" if field.startswith("--") else f"{field.rpartition('.')[0]}.revision"
        raise ValueError(
            f"{setting} ({revision}) is for a hub id, and {field} ({name}) is none; leave it out: what is "
            "local has no revisions"
        )


def commit_of(name: str, revision: str | None, kind: Kind, *, field: str) -> str | None:
    """The commit that a revision (by default the main branch) of a hub id stands for now; offline the one in
    the cache. None offline for a data set that only the cache of `datasets` may have, which knows none.
    Raises ValueError naming `field`."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    with explaining(field, name, revision):
        try:
            folder = snapshot_download(
                name, repo_type=kind, revision=revision, allow_patterns=MARKS[kind], tqdm_class=SilentBar
            )
        except LocalEntryNotFoundError:
            if kind == "dataset" and is_offline_mode():
                return None
            raise
    return Path(folder).name


def repo_of_snapshot(path: str) -> str | None:
    """The hub id whose files a folder of the cache holds; None for any other folder."""
    parts = Path(path).parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/", 1)
    return None


def describe_base(path: str, revision: str | None) -> dict[str, str]:
    """What a base model's card says that holds for a model trained from it: `license`, `license_name`,
    `license_link` and, of a local model, `base_model`, as far as they are there."""
    card = Path(local_model(path, revision, weights=False)) / "README.md"
    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, YAMLError):  # written by hand, and none of this run's business
        return {}
    repo = path if is_hub_id(path) else repo_of_snapshot(path)
    keys = ("license", "license_name", "license_link", *(() if repo else ("base_model",)))
    base = {key: metadata[key] for key in keys if isinstance(metadata.get(key), str)}
    if repo and "://" not in base.get("license_link", "://"):  # a file of that repository
        base["license_link"] = (
            f"https://huggingface.co/{repo}/blob/{revision or 'main'}/{base['license_link']}"
        )
    return base


def prepare_push(repo: str, *, private: bool | None, field: str) -> str:
    """Makes sure that a push will be possible: creates the repository if it doesn't exist, and asks whether
    its content may be changed. Returns a sentence on what is there already, or an empty text. Raises
    ValueError naming `field`."""
    if is_offline_mode():
        raise ValueError(
            f"{field} ({repo}) needs the hub, and HF_HUB_OFFLINE is set; unset it, now or later: {PUSH_LATER}"
        )
    if get_token() is None:
        raise ValueError(f"{field} ({repo}) needs a token, and there is none; {LOGIN}")
    api = HfApi()
    with writing(field, repo):
        api.whoami()
        api.create_repo(repo, private=private, exist_ok=True)
        api.auth_check(repo, write=True)
        public = private and not api.repo_info(repo).private
        files = [name for name in api.list_repo_files(repo) if name != ".gitattributes"]
    if public:
        raise ValueError(
            f"{field} ({repo}) exists and is public, and a private one is asked for; make it private on its "
            "page on the hub, or push to another one"
        )
    if not files:
        return ""
    return (
        f"{repo} exists and has {len(files)} files ({', '.join(files[:3])}{', ...' if files[3:] else ''}); a "
        "push replaces its model and card, and its history keeps what was there"
    )


def push(folder: Path, repo: str, *, field: str) -> str:
    """Uploads a model's folder; returns the address of the repository. A model's files there that the folder
    doesn't have are removed, so that nobody loads a mixture of two models; other files stay. Raises
    ValueError naming `field`."""
    with writing(field, repo):
        commit = HfApi().upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Model and card, by vlm-sapo push",
            delete_patterns=MODEL_FILES,
        )
    return str(commit.repo_url)


@contextmanager
def writing(field: str, repo: str) -> Iterator[None]:
    """Raises ValueError with one sentence where the block can't write to a repository."""
    try:
        yield
    except FAILURES as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status == 401:
            raise ValueError(
                f"{field} ({repo}) needs a valid token, and the hub refuses this one; {LOGIN} with a token "
                "that may write"
            ) from error
        remedy = {
            403: "use a token that may write there, or make room if the quota is full",
            402: "make room there, or get a larger quota",
            413: "make room there, or get a larger quota",
        }.get(status, f"try again; {PUSH_LATER}")
        raise ValueError(f"{field} ({repo}) can't be written to ({reason(error)}); {remedy}") from error


@contextmanager
def explaining(field: str, name: str, revision: str | None = None) -> Iterator[None]:
    """Raises ValueError with one sentence where the block can't read a hub id."""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{field} ({name}) is gated; accept its terms on its page on the hub, and {LOGIN} with a token "
            "of that account"
        ) from error
    except RevisionNotFoundError as error:
        setting = "--revision" if field.startswith("--") else f"{field.rpartition('.')[0]}.revision"
        raise ValueError(
            f"{setting} ({revision}) must be a branch, tag or commit of {name}; it has no such revision"
        ) from error
    except RepositoryNotFoundError as error:
        remedy = f"if it is private, {LOGIN}" if get_token() is None else "or the token may not read it"
        raise ValueError(
            f"{field} ({name}) must be a folder here or a hub id; there is no such repository, {remedy}"
        ) from error
    except FAILURES as error:
        if is_offline_mode():
            raise ValueError(
                f"{field} ({name}) is no folder here, and as a hub id it is not in the cache while "
                f"HF_HUB_OFFLINE is set; download it once with `hf download {name}`, or unset HF_HUB_OFFLINE"
            ) from error
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            raise ValueError(
                f"{field} ({name}) can't be read: the hub refuses the token; {LOGIN} with a valid one"
            ) from error
        raise ValueError(
            f"{field} ({name}) is no folder here and can't be read from the hub at {HfApi().endpoint} "
            f"({reason(error)}); check the name and the network"
        ) from error


def reason(error: BaseException) -> str:
    """What the hub or the network said, in one line and without tokens."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    said = cause.server_message if isinstance(cause, HfHubHTTPError) else None
    lines = [line.strip() for line in (said or str(cause) or type(cause).__name__).splitlines()]
    return TOKEN.sub("hf_***", "; ".join(line for line in lines if line)[:300]).rstrip(".")
