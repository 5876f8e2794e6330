"""A checked folder on the hub: private unless asked otherwise, into a repository of its own, in one commit.

Files go up one after another, and the commit that shows them comes last: who looks meanwhile sees an empty repository.
What is up already is not sent again, so an interrupted upload goes on where it was. The token is huggingface_hub's own
business (`hf auth login`, or HF_TOKEN).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
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
_SMALL = 2**22
"""Bytes up to which a file is held in memory."""
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


def check_name(repo: str, option: str) -> None:
    """Check the name of a repository that an option of the command gives.

    Raises:
        ConfigError: it is not OWNER/NAME as the hub takes it.
    """
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise ConfigError(f"{option} {repo!a}: must be OWNER/NAME in letters, digits, '-', '_' and '.'") from error


def push(files: Mapping[str, Path], digests: Mapping[str, str], repo: str, *, private: bool, message: str) -> str:
    """Put files into a new repository, or go on with an interrupted upload; return the commit.

    Args:
        files: by their names in the repository.
        digests: sha256 that what is sent has to have, of some of them.

    Raises:
        RunError: no token, no permission or no network; or the repository holds something else, or is seen by others
            than asked; a file was changed while it was sent.
    """
    if get_token() is None:
        raise RunError("no token of the hub here; log in with `hf auth login`, or set HF_TOKEN")
    api, added = HfApi(library_name="gtqlora"), [_addition(name, file) for name, file in files.items()]
    with _told(repo):
        # private from its first moment: nobody sees what is not meant for them, not even for a second
        api.create_repo(repo, private=private, exist_ok=True)
        head = _checked_head(api, repo, added, private)
        for each in track(added, "upload files", len(added)):
            api.preupload_lfs_files(repo, [each], free_memory=False)
            # the hash is of the bytes as they were read for sending, so nothing can come between check and use
            if digests.get(each.path_in_repo, digest := each.upload_info.sha256.hex()) != digest:
                raise RunError(f"{files[each.path_in_repo]}: was changed while it was sent; nothing was published")
        # the one moment at which anything shows; if somebody wrote there meanwhile, it fails
        done = api.create_commit(repo, added, commit_message=message, parent_commit=head)
        left = sorted(files.keys() - _same(api, repo, added, done.oid))
    if left:
        raise RunError(f"{repo}: {left[0]} is not there as it was sent; delete the repository and send it again")
    return done.oid


def _addition(name: str, file: Path) -> CommitOperationAdd:
    """Return a file to send; a small one is read once, since it travels in the commit itself."""
    small = file.stat().st_size <= _SMALL
    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=file.read_bytes() if small else str(file))


def _checked_head(api: HfApi, repo: str, added: Sequence[CommitOperationAdd], private: bool) -> str | None:
    """Return the repository's last commit; it is as private as asked, and holds nothing but these files."""
    info = api.model_info(repo)
    if info.private is not private:
        now, other = ("private", "--private") if info.private else ("public", "--public")
        raise RunError(f"{repo}: is there already, and {now}; say {other}, or choose another name")
    # a loader would read what somebody else put there
    there = _tree(api, repo, info.sha).keys() - set(_OF_THE_HUB)
    if odd := sorted(there - _same(api, repo, added, info.sha)):
        raise RunError(f"{repo}: holds something else already ({odd[0]}); choose another name, or delete it there")
    return info.sha


def _tree(api: HfApi, repo: str, commit: str | None) -> dict[str, RepoFile]:
    every = api.list_repo_tree(repo, recursive=True, revision=commit)
    return {each.path: each for each in every if isinstance(each, RepoFile)}


def _same(api: HfApi, repo: str, added: Sequence[CommitOperationAdd], commit: str | None) -> set[str]:
    """Return names of the files that are there with these very contents."""
    there = _tree(api, repo, commit)
    return {each.path_in_repo for each in added if each.path_in_repo in there and _is_same(each, there)}


def _is_same(added: CommitOperationAdd, there: Mapping[str, RepoFile]) -> bool:
    """Tell whether contents are the same: by sha256 of a large file, and by git's own hash of a small one."""
    remote = there[added.path_in_repo]
    if added.upload_info.size != remote.size:
        return False
    if remote.lfs is not None:
        return added.upload_info.sha256.hex() == remote.lfs.sha256
    with added.as_file() as stream:
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
