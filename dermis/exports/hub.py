"""Uploading a dataset or a bundle to the Hugging Face Hub, or to a server with its API.

The token is that of the environment variable HF_TOKEN. It is sent to the endpoint only, and is in no message.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from dermis.addresses import is_loopback, proxy_variable
from dermis.bundle import DESCRIPTOR, SIGNATURE
from dermis.dataset.manifest import SIGNATURE as DATASET_SIGNATURE
from dermis.dataset.manifest import read_manifest
from dermis.dataset.store import MANIFEST, Store
from dermis.dataset.terms import terms_of
from dermis.dataset.verify import verify
from dermis.errors import DataError, DermisError, RequestError, escape, install_command

if TYPE_CHECKING:
    from dermis.bundle import Bundle

TOKEN, ENDPOINT = "HF_TOKEN", "HF_ENDPOINT"
BUNDLE_FOLDER = "bundle"
"""Folder of a bundle in its repository. A bundle with other files beside its own, such as README.md, cannot be opened."""
_DEFAULT_ENDPOINT = "https://huggingface.co"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_IDENTIFYING = ("authenticity", "copies")
RepositoryType = Literal["dataset", "model"]


@dataclass(frozen=True)
class HubTarget:
    """A repository on a hub.

    Attributes:
        repository: ORG/NAME.
        endpoint: Address of the hub.
        token: The token; it is not in `repr`.
    """

    repository: str
    endpoint: str
    token: str = field(repr=False)


def hub_target(to: str, environment: Mapping[str, str] | None = None) -> HubTarget:
    """Read the target of an upload.

    Args:
        to: hub:ORG/NAME.
        environment: Environment variables; None for those of this process.

    Raises:
        RequestError: The target is not of this form, there is no token, or it would be sent without encryption.
    """
    variables = os.environ if environment is None else environment
    match = re.fullmatch(f"hub:({_NAME}/{_NAME})", to)
    if match is None or ".." in to or "--" in to:
        raise RequestError("--to", "must be of the form hub:ORG/NAME")
    endpoint = (variables.get(ENDPOINT) or _DEFAULT_ENDPOINT).rstrip("/")
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise RequestError(ENDPOINT, "must be an address such as https://huggingface.co, without credentials")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise RequestError(ENDPOINT, "must begin with https://, because the token is sent to it")
    if parts.scheme == "http" and (proxy := proxy_variable(parts.hostname, variables)):
        raise RequestError(
            proxy, f"would send the token through a proxy without encryption; set NO_PROXY={parts.hostname}"
        )
    token = variables.get(TOKEN, "").strip()
    if not token:
        raise RequestError(TOKEN, "is not set; make a token with write access at the hub and put it into this variable")
    return HubTarget(match[1], endpoint, token)


def push_dataset(location: str | Path, target: HubTarget, *, public: bool = False) -> str:
    """Verify a finished dataset in a local folder and upload the files that its manifest lists, as one commit.

    Args:
        location: The folder.
        target: The repository. It is made if it does not exist.
        public: Whether a new repository is public.

    Returns:
        Address of the commit.

    Raises:
        DataError: A file differs from the manifest.
        DermisError: huggingface_hub is missing, or the hub cannot be reached or refuses the upload.
    """
    store = Store(location)
    if store.folder is None:
        raise DataError(f"{location}: is not a local folder; download the dataset first")
    report = verify(location)
    if report.changed or report.missing:
        raise DataError(
            f"{location}: {[*report.changed, *report.missing][0]} differs from {MANIFEST}; repair the dataset first"
        )
    folder = store.folder
    names = [*(file.name for file in read_manifest(store).files), MANIFEST]
    if store.size(DATASET_SIGNATURE) is not None:
        names.append(DATASET_SIGNATURE)
    return _commit(
        {name: folder / name for name in names}, target, "dataset", "Add synthetic dermoscopy dataset", public
    )


def push_bundle(bundle: Bundle, target: HubTarget, *, public: bool = False, include_index: bool = False) -> str:
    """Upload a verified bundle in a local folder to the folder `bundle/` of a repository, with its card as README.md.

    Args:
        bundle: The bundle.
        target: The repository. It is made if it does not exist.
        public: Whether a new repository is public.
        include_index: Whether a bundle may have an index of its training images or a copy detector.

    Returns:
        Address of the commit.

    Raises:
        RequestError: The bundle has parts that tell whether an image is a training image.
        DermisError: huggingface_hub is missing, or the hub cannot be reached or refuses the upload.
    """
    identifying = [part for part in _IDENTIFYING if getattr(bundle, part) is not None]
    if identifying and not include_index:
        raise RequestError(
            "bundle",
            f"{bundle.name} has {' and '.join(identifying)}, which tell whether an image is a training image; remove them from "
            f"a copy with `dermis bundle detach COPY {' '.join(identifying)}`, or give --include-index",
        )
    folder = Store(bundle.location).folder
    if folder is None:
        raise DataError(f"{bundle.location}: is not a local folder; copy the bundle first")
    names = [*bundle.files, DESCRIPTOR, *([SIGNATURE] if (folder / SIGNATURE).is_file() else [])]
    files: dict[str, Path | bytes] = {f"{BUNDLE_FOLDER}/{name}": folder / name for name in names}
    files["README.md"] = bundle_readme(bundle).encode()
    return _commit(files, target, "model", f"Add generator {bundle.name}", public)


def bundle_readme(bundle: Bundle) -> str:
    """Return the card of a bundle for the hub: with front matter, and with links into the folder of the bundle."""
    terms = terms_of(bundle)
    lines = [f"license: {terms.identifier or 'other'}"]
    if terms.identifier is None:
        lines.append(f"license_name: {json.dumps(terms.licence)}")
    lines += [
        "library_name: dermis",
        "pipeline_tag: unconditional-image-generation",
        "tags: [stylegan2-ada, synthetic, dermoscopy, medical]",
    ]
    card = re.sub(r"\]\((?!https?:|#|/)", f"]({BUNDLE_FOLDER}/", bundle.model_card)
    return "---\n" + "\n".join(lines) + f"\n---\n\n{card}"


def _commit(
    files: Mapping[str, Path | bytes], target: HubTarget, kind: RepositoryType, message: str, public: bool
) -> str:
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise DermisError(f"uploading needs huggingface_hub ({error}); {install_command('hub')}") from error
    api = HfApi(endpoint=target.endpoint, token=target.token, library_name="dermis")
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in sorted(files.items())
    ]
    try:
        api.create_repo(target.repository, repo_type=kind, private=not public, exist_ok=True)
        commit = api.create_commit(target.repository, operations, commit_message=message, repo_type=kind)
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = f"; check that {TOKEN} has write access to {target.repository}" if status in (401, 403, 404) else ""
        text = _without(target.token, error.server_message or "no reason given")
        raise DermisError(f"{target.endpoint}: refuses the upload (status {status}: {text}){advice}") from None
    except Exception as error:  # the library has further ones of its own, of its HTTP client and of its storage
        raise DermisError(
            f"{target.endpoint}: the upload failed ({_without(target.token, str(error))}); the same command repeats it"
        ) from None
    return str(commit.commit_url)


def _without(token: str, text: str) -> str:
    return escape(text.replace(token, "***"))[:500]
