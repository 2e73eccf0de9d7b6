"""The served bundles: opened and verified at the start, and checked for changes while the service runs.

This module does not import torch: it reads bundle.json, the model card and hashes. The generator loads the weights.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dermis.bundle import DESCRIPTOR, Bundle, open_bundle, read_signature
from dermis.bundle.installed import how_to_get_bundles, resolve_bundle
from dermis.dataset.store import storage_error
from dermis.errors import BundleError, DermisError, RequestError, SignatureError, StorageError
from dermis.provenance.signing import TrustedSigners, check_installed, read_signers, verify_records
from dermis.resources import lacks_resources
from services.errors import BundleAwayError, LoadPostponedError
from services.settings import Settings, SettingsError

logger = logging.getLogger("dermis.service")

# A changed file is noticed at the next request after this many seconds.
_CHECK_SECONDS = 5.0

# Errors of one bundle; the other bundles are served.
_UNUSABLE = (DermisError, OSError, ValueError, RuntimeError, MemoryError)

_Fingerprint = tuple[tuple[str, int, int], ...]


@dataclass
class _Watched:
    bundle: Bundle
    fingerprint: _Fingerprint | None
    problem: str | None = None
    passing: bool = False
    """Whether the problem can pass without a repair."""


@dataclass(frozen=True)
class ModelState:
    """A bundle as the metrics show it.

    Attributes:
        name: Its name; of one that cannot be opened the last part of its location.
        digest: Its digest; empty if it cannot be opened.
        resolution: Its resolution in pixels; empty if it cannot be opened.
        served: Whether it is served.
    """

    name: str
    digest: str
    resolution: str
    served: bool


def locate(locations: Sequence[str]) -> list[str]:
    """The locations of bundles.

    The name of an installed bundle is replaced by its folder, and a local folder that is not a bundle by the bundles in it,
    sorted by name.
    """
    bundles: list[str] = []
    for location in map(str, map(resolve_bundle, locations)):
        folder = Path(location)
        if "://" in location or (folder / DESCRIPTOR).exists() or not folder.is_dir():
            bundles.append(location)
        else:
            inside = [str(path.parent) for path in sorted(folder.glob(f"*/{DESCRIPTOR}"))]
            bundles += inside or [location]
    return bundles


def check_any_bundle(locations: Sequence[str]) -> None:
    """Check that a service has at least one bundle. URLs are not read; they count as bundles.

    Raises:
        SettingsError: No location contains a bundle.
    """
    located = locate(locations)
    if not any("://" in location or (Path(location) / DESCRIPTOR).exists() for location in located):
        raise SettingsError(f"DERMIS_BUNDLES: there is no bundle at {', '.join(located)}; {how_to_get_bundles()}")


def signers_of(settings: Settings) -> TrustedSigners | None:
    """The trusted signers of the settings; None if any bundle may be served.

    Raises:
        SettingsError: A file of them cannot be used, or the package that verifies signatures is not installed.
    """
    if not settings.trusted_signers:
        return None
    try:
        check_installed()
        return read_signers(settings.trusted_signers)
    except SignatureError as error:
        raise SettingsError(f"DERMIS_TRUSTED_SIGNERS: {error}") from None


def check_signer(bundle: Bundle, signers: TrustedSigners | None) -> None:
    """Check that a trusted signer signed an opened bundle. Nothing but its signature is read.

    What is served must be loaded from this object: the files at its location can be replaced at any time.

    Args:
        bundle: The bundle.
        signers: The trusted signers; None if any bundle may be served.

    Raises:
        SignatureError: The bundle is not signed, or not by a trusted signer, or was changed after it was signed.
        BundleError: The signature cannot be read.
    """
    if signers is None:
        return
    signature, records = read_signature(bundle)
    if signature is None:
        raise SignatureError(
            f"{bundle.location}: is not signed, and DERMIS_TRUSTED_SIGNERS accepts signed bundles only; "
            "sign it: dermis bundle sign"
        )
    verify_records(signature, records, signers, bundle.location)


def passing_error(error: Exception, location: str) -> StorageError | LoadPostponedError | None:
    """What to raise if a bundle could not be opened or loaded for a reason that can pass; None if a restart cannot help.

    Such reasons are remote storage or a network file system that cannot be reached, a full disk, too many open files, and too
    little memory of the machine or of a GPU. A process that has started without a bundle refuses all calls for it, and fails
    jobs, until someone restarts it. So the process ends instead, and its supervisor starts it again, after pauses that grow to
    half a minute.

    Args:
        error: Why the bundle could not be opened or loaded.
        location: Where the bundle is.
    """
    cause: BaseException = error
    while isinstance(cause, DermisError) and cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause) or type(cause).__name__
    if lacks_resources(cause):
        return LoadPostponedError(f"{location}: cannot be loaded at the moment ({text})")
    if not isinstance(cause, Exception):
        return None
    # Drivers of remote storage have exceptions of their own, and every error of reading is the cause of a BundleError.
    storage = storage_error(cause, location, remote="://" in location and cause is not error)
    if storage is not None and storage.kind != "storage":
        return storage
    if isinstance(cause, OSError) and cause.errno == errno.EIO:  # of a network file system
        return StorageError(f"{location}: cannot be read at the moment ({text})", kind="storage-unavailable")
    return None


def without_place(error: Exception, location: str) -> str:
    """The text of an error for callers, without the location of the bundle, which only the log contains."""
    return str(error).replace(location.rstrip("/"), Path(location).name)


class ServedModels:
    """The served bundles by name. A bundle that cannot be opened is not served; `check` returns the reason.

    The methods whose name ends with `_for` are for requests of a tenant: bundles of other tenants do not exist for them.

    Args:
        locations: Where the bundles are.
        default: Name of the model for requests that name none.
        tenants: The tenants that may use a bundle, by its name. Bundles that are not in it are for all tenants.
        signers: The signers of which one must have signed each bundle; None if any bundle may be served.

    Raises:
        SettingsError: `tenants` names a bundle that is not served. Written wrongly, a name would not limit its bundle.
        StorageError, LoadPostponedError: A bundle cannot be opened for a reason that can pass (`passing_error`).
    """

    def __init__(
        self,
        locations: Sequence[str],
        default: str = "demo",
        tenants: Mapping[str, Sequence[str]] | None = None,
        signers: TrustedSigners | None = None,
    ) -> None:
        self._tenants, self._signers = tenants or {}, signers
        self._watched: dict[str, _Watched] = {}
        self._broken: dict[str, str] = {}
        self._lock = threading.Lock()
        self._checked = time.monotonic()
        for location in locate(locations):
            try:
                fingerprint = _fingerprint(location)
                bundle = open_bundle(location)
                check_signer(bundle, signers)
            except _UNUSABLE as error:
                passing = passing_error(error, location)
                if passing is not None:
                    raise passing from error
                self._broken[location] = f"{without_place(error, location)}; repair it and restart the service"
                continue
            if bundle.name in self._watched:
                folder = Path(location).name
                self._broken[location] = (
                    f"{folder}: another bundle is also called {bundle.name!r}; serve only one of them"
                )
                continue
            self._watched[bundle.name] = _Watched(bundle, fingerprint)
        self.default = default if default in self._watched else next(iter(self._watched), default)
        unknown = [name for name in self._tenants if name not in self._watched]
        if unknown and not self._broken:  # the name of a bundle that cannot be opened is not known
            raise SettingsError(
                f"DERMIS_MODEL_TENANTS: no bundle is called {unknown[0]!r}; this service has {', '.join(self._watched)}"
            )

    @property
    def bundles(self) -> list[Bundle]:
        """Every bundle that was opened at the start, the default first, even if its files have changed since."""
        bundles = [watched.bundle for watched in self._watched.values()]
        return sorted(bundles, key=lambda bundle: bundle.name != self.default)

    def find(self, name: str) -> Bundle:
        """The bundle called `name`.

        Raises:
            RequestError: If there is none (unknown-model).
            BundleError: If it could not be opened.
        """
        if name in self._watched:
            return self._watched[name].bundle
        for location, problem in self._broken.items():
            if Path(location).name == name or not self._watched:
                raise BundleError(problem)
        known = ", ".join(self._watched)
        raise RequestError("model", f"unknown model; this service has {known}", kind="unknown-model")

    @property
    def limited(self) -> bool:
        """Whether some bundles are not for all tenants."""
        return bool(self._tenants)

    def bundles_for(self, tenant: str) -> list[Bundle]:
        """The bundles that a tenant may use, its default first."""
        allowed = [bundle for bundle in self.bundles if self._may_use(tenant, bundle.name)]
        default = self.default_for(tenant)
        return sorted(allowed, key=lambda bundle: bundle.name != default)

    def default_for(self, tenant: str) -> str:
        """Name of the model for requests of a tenant that name none: the default, or the first one that it may use."""
        allowed = (name for name in (self.default, *self._watched) if self._may_use(tenant, name))
        return next(allowed, self.default)

    def serving_for(self, tenant: str, name: str | None) -> Bundle:
        """The bundle called `name`, if a tenant may use it and its files have not changed.

        Args:
            tenant: The tenant.
            name: Name of the bundle; None or empty for the default of the tenant.

        Raises:
            RequestError: If there is no bundle of this name, or it is not for this tenant (unknown-model).
            BundleError: If it cannot be served.
        """
        name = name or self.default_for(tenant)
        if not self._tenants or (name in self._watched and self._may_use(tenant, name)):
            return self.serving(name)
        # The name of a bundle that cannot be opened is not known, so it may be one that is for others only.
        for location, problem in self._broken.items():
            if Path(location).name == name and tenant in self._tenants.get(name, ()):
                raise BundleError(problem)
        known = ", ".join(bundle.name for bundle in self.bundles_for(tenant)) or "no model for this tenant"
        raise RequestError("model", f"unknown model; this service has {known}", kind="unknown-model")

    def _may_use(self, tenant: str, name: str) -> bool:
        return name not in self._tenants or tenant in self._tenants[name]

    def serving(self, name: str, digest: str | None = None) -> Bundle:
        """The bundle called `name`, if its files have not changed since the start.

        Args:
            name: Name of the bundle.
            digest: The digest that the bundle must have; None for any.

        Raises:
            RequestError: If there is no bundle of this name.
            BundleAwayError: If its files cannot be read at the moment.
            BundleError: If its files have changed or it has another digest.
        """
        bundle = self.find(name)
        if digest is not None and digest != bundle.digest:
            raise BundleError(
                f"model {name}: the job was created for digest {digest[:12]}, but this service has {bundle.digest[:12]}; "
                "serve the earlier bundle again, or create a new job"
            )
        problem = self.check().get(name)
        if problem is not None:
            raise (BundleAwayError if self._watched[name].passing else BundleError)(problem)
        return bundle

    def check(self) -> dict[str, str]:
        """Problems by name of the bundle, or by location if it could not be opened. The files are checked every few seconds."""
        with self._lock:
            if time.monotonic() - self._checked >= _CHECK_SECONDS:
                for name, watched in self._watched.items():
                    before = watched.problem
                    _check_again(name, watched, self._signers)
                    if watched.problem not in (None, before):
                        logger.error("model not served", extra={"model": name, "problem": watched.problem})
                    elif before is not None and watched.problem is None:
                        logger.info("model served again", extra={"model": name})
                self._checked = time.monotonic()
            problems = {name: watched.problem for name, watched in self._watched.items() if watched.problem is not None}
            return self._broken | problems

    def states(self) -> list[ModelState]:
        """Every bundle that should be served, and whether it is."""
        problems = self.check()
        opened = [
            ModelState(name, watched.bundle.digest, str(watched.bundle.generator.img_resolution), name not in problems)
            for name, watched in self._watched.items()
        ]
        names = dict.fromkeys(Path(location).name for location in self._broken)
        return opened + [ModelState(name, "", "", served=False) for name in names]


def _check_again(name: str, watched: _Watched, signers: TrustedSigners | None) -> None:
    fingerprint: _Fingerprint | None = None
    try:
        fingerprint = _fingerprint(watched.bundle.location)
        if fingerprint == watched.fingerprint and watched.problem is None:
            return
        bundle = open_bundle(watched.bundle.location)
        check_signer(bundle, signers)
    except _UNUSABLE as error:
        location = watched.bundle.location
        # The folder is also empty while it is copied anew, or where a share is not mounted. It may come back during a check.
        watched.passing = (
            passing_error(error, location) is not None
            or not _has_files(location)
            or _has_changed(location, fingerprint)
        )
        state = "cannot be read at the moment" if watched.passing else "is not what the service loaded"
        watched.problem = f"model {name} {state}: {without_place(error, location)}"
        return
    watched.passing = False
    watched.fingerprint = fingerprint
    if bundle.digest == watched.bundle.digest:
        watched.problem = None
    else:
        watched.problem = f"model {name}: its bundle was replaced; restart the service to serve the new one"


def _has_files(location: str) -> bool:
    """Whether a local folder has anything in it. Errors of reading it count as files."""
    try:
        return "://" in location or any(True for _ in Path(location).iterdir())
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR)


def _has_changed(location: str, fingerprint: _Fingerprint | None) -> bool:
    """Whether the files of a local bundle are no longer those of a fingerprint, or cannot be listed."""
    try:
        return _fingerprint(location) != fingerprint
    except OSError:
        return True


def _fingerprint(location: str) -> _Fingerprint | None:
    """Names, sizes and times of the files of a local bundle. None for remote storage, which is read at the start only."""
    if "://" in location:
        return None
    root = Path(location)
    paths = [path for path in root.rglob("*") if path.is_file()] if root.is_dir() else []
    return tuple(
        (path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns)
        for path in sorted(paths)
        for stat in (path.stat(),)
    )
