"""A checked folder on the hub: private unless asked otherwise, into a repository of its own, in one commit.

Files go up one after another, and the commit that shows them comes last: who looks meanwhile sees an empty repository.
What is up already is not sent again, so an interrupted upload goes on where it was. The token is huggingface_hub's own
business (`hf auth login`, or HF_TOKEN).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    OfflineModeIsEnabled,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from gtqlora.errors import ConfigError, RunError
from gtqlora.progress import track

_OF_THE_HUB = (".gitattributes", ".gitignore")
"""What the hub itself puts into a new repository."""
_MEANS = {
    401: "the token is not valid; log in with `hf auth login`",
    403: "the token may not write there; use one that may, or another OWNER",
    404: "there is no such repository for this token",
    409: "somebody changed it meanwhile; run the same command again",
    412: "somebody changed it meanwhile; run the same command again",
    429: "too many requests; wait and run the same command again",
}
_ADDRESS = re.compile(r"https?://\S+")
_AGAIN = "run the same command again, and what is up already is not sent again"


def check_name(repo: str) -> None:
    """Check the name of a repository.

    Raises:
        ConfigError: it is not OWNER/NAME as the hub takes it.
    """
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise ConfigError(f"--repo {repo!a}: must be OWNER/NAME in letters, digits, '-', '_' and '.'") from error


def push(files: Mapping[str, Path], repo: str, *, private: bool, message: str) -> str:
    """Put files into a new repository, or go on with an interrupted upload; return the commit.

    Args:
        files: by their names in the repository.

    Raises:
        RunError: no token, no permission or no network; or the repository holds something else, or is seen by others
            than asked; a file was changed while it was sent.
    """
    if get_token() is None:
        raise RunError("no token of the hub here; log in with `hf auth login`, or set HF_TOKEN")
    api, wanted = HfApi(library_name="gtqlora"), {name: _states(file) for name, file in files.items()}
    with _told(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        head = _checked_head(api, repo, files, private)
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file)) for name, file in files.items()]
        for each in track(added, "upload files", len(added)):
            api.preupload_lfs_files(repo, [each], free_memory=False)
        for name, file in files.items():
            if _states(file) != wanted[name]:
                raise RunError(f"{file}: was changed while it was sent; nothing was published")
        done = api.create_commit(repo, added, commit_message=message, parent_commit=head)
        left = sorted(files.keys() - _same(api, repo, files, done.oid))
    if left:
        raise RunError(f"{repo}: {left[0]} is not there as it was sent; delete the repository and send it again")
    return done.oid


def _states(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _checked_head(api: HfApi, repo: str, files: Mapping[str, Path], private: bool) -> str | None:
    """Return the repository's last commit; it is as private as asked, and holds nothing but these files."""
    info = api.model_info(repo)
    if info.private is not private:
        now, other = ("private", "--private") if info.private else ("public", "--public")
        raise RunError(f"{repo}: is there already, and {now}; say {other}, or choose another name")
    there = {file.path for file in _tree(api, repo, info.sha)} - set(_OF_THE_HUB)
    if odd := sorted(there - _same(api, repo, files, info.sha)):
        raise RunError(f"{repo}: holds something else already ({odd[0]}); choose another name, or delete it there")
    return info.sha


def _tree(api: HfApi, repo: str, commit: str | None) -> list[RepoFile]:
    return [each for each in api.list_repo_tree(repo, recursive=True, revision=commit) if isinstance(each, RepoFile)]


def _same(api: HfApi, repo: str, files: Mapping[str, Path], commit: str | None) -> set[str]:
    """Return which files are there with these very contents."""
    there = {file.path: file for file in _tree(api, repo, commit)}
    return {name for name, file in files.items() if name in there and _is_same(file, there[name])}


def _is_same(file: Path, remote: RepoFile) -> bool:
    """Tell whether contents are the same: by sha256 of a large file, and by git's own hash of a small one."""
    if file.stat().st_size != remote.size:
        return False
    with file.open("rb") as stream:
        if remote.lfs is not None:
            return hashlib.file_digest(stream, "sha256").hexdigest() == remote.lfs.sha256
        data = stream.read()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest() == remote.blob_id


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Turn what the hub or the network says into one line."""
    try:
        yield
    except (HTTPError, OfflineModeIsEnabled, ValueError, RuntimeError) as error:
        raise RunError(f"{repo}: {_sentence(error)}") from error


def _sentence(error: BaseException) -> str:
    """Say what went wrong; addresses stay out of it, as some carry a signature."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to publish"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"the hub says {status}: {_MEANS.get(status) or f'{_first_line(error.server_message)}; {_AGAIN}'}"
    if isinstance(error, HTTPError):
        return f"the hub cannot be reached ({type(error).__name__}); {_AGAIN}"
    # of an upload that failed, the library tells the reason as a cause
    cause = error.__cause__
    return f"{_first_line(str(error))}; {_AGAIN}" if cause is None else _sentence(cause)


def _first_line(text: str | None) -> str:
    line = _ADDRESS.sub("...", ((text or "").strip() or "no reason given").splitlines()[0])[:200]
    return "".join(character for character in line if character.isprintable())
