"""All settings of the service in one class, read from `DERMIS_*` environment variables and from a file `.env`."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import NoDecode, SettingsConfigDict

from dermis.bundle.installed import installed_bundles
from dermis.errors import DermisError
from services.access_settings import AccessSettings, split_commas
from services.quotas import Quota, quota_of, read_quotas
from services.study_settings import StudySettings
from services.tenants import read_model_tenants

_DATABASE_DRIVERS = ("postgresql", "postgres", "postgresql+psycopg", "sqlite", "sqlite+pysqlite")

REPOSITORY = Path(__file__).resolve().parents[1]


def default_bundles() -> tuple[str, ...]:
    """Return the default of DERMIS_BUNDLES: all bundles that can be opened by name."""
    return tuple(map(str, installed_bundles().values())) or (str(Path("bundles").absolute()),)


class SettingsError(DermisError):
    """An environment variable has a value that the service cannot use."""


class Settings(AccessSettings, StudySettings):
    """Settings of the gateway, the inference services and the jobs."""

    model_config = SettingsConfigDict(env_prefix="DERMIS_", env_file=".env", extra="ignore", frozen=True)

    # Models and processes
    bundles: Annotated[tuple[str, ...], NoDecode] = Field(
        default_factory=default_bundles,
        description="Bundles to serve, separated by commas: folders, folders of bundles, fsspec URLs, or names of installed "
        "bundles. Default: the folder `bundles` of the repository, else the installed bundles.",
    )
    trusted_signers: Annotated[tuple[Path, ...], NoDecode] = Field(
        (),
        description="PEM files of public keys and of authorities' certificates, separated by commas. With them, only bundles "
        "that one of these signers signed (`dermis bundle sign`) are served. Needs the extra `provenance`.",
    )
    c2pa_certificate: Path | None = Field(
        None,
        description="PEM file with a certificate for signing images (C2PA) and those of intermediate authorities. With it and "
        "DERMIS_C2PA_KEY every image has a signed manifest unless a request refuses it. Needs the extra `provenance`.",
    )
    c2pa_key: Path | None = Field(None, description="PEM file with the private key of DERMIS_C2PA_CERTIFICATE.")
    default_model: str = Field(
        "demo", description="Model for requests that name none. If it is not served, the first model is used."
    )
    model_tenants: Annotated[dict[str, tuple[str, ...]], NoDecode] = Field(
        {},
        description="Bundles that only some tenants may use: `bundle=tenant,tenant,bundle=tenant`. Others are for all.",
    )
    role: Literal["all", "gateway", "worker"] = Field(
        "all",
        description="What these processes do: `all`; `gateway`, answer requests and leave datasets and projections to workers "
        "on the same database; `worker`, make datasets and projections, and answer only probes and /metrics.",
    )
    inference: bool = Field(
        True,
        description="Whether a gateway has a generator, a classifier and so on of its own. Without them /v1/images, /v1/edits, "
        "/v1/classifications, /v1/authenticity, /v1/embeddings and heat maps are answered 503.",
    )
    device: str = Field(
        "auto",
        # Whether the machine has the device is seen when a model is loaded: this process does without torch.
        pattern=r"^(auto|cpu|mps|(cuda|xpu)(:[0-9]+)?)$",
        description="Device of the generator, classifier, index, explainer and projector: `auto`, `cpu`, `cuda`, `cuda:1`, "
        "`mps` (Apple), `xpu` or `xpu:1` (Intel). On mps and xpu classifier and index use the CPU.",
    )
    backend: Literal["auto", "openvino", "torch"] = Field(
        "auto",
        description="Implementation that runs the generator: `openvino`, `torch`, or `auto`, the fastest one that works on the "
        "machine.",
    )
    generator_workers: int = Field(
        1, ge=1, le=64, description="Number of generator processes. On a CPU each uses an equal share of the cores."
    )
    classifier_workers: int = Field(
        1, ge=1, le=64, description="Number of classifier processes. On a CPU each uses an equal share of the cores."
    )
    authenticity_workers: int = Field(
        1,
        ge=1,
        le=64,
        description="Number of processes that compare images with training images; each uses an equal share of the cores.",
    )
    explainer_workers: int = Field(
        1,
        ge=1,
        le=64,
        description="Number of explainer processes; each makes one heat map at a time on an equal share of the cores.",
    )
    max_batch_size: int = Field(
        64,
        ge=2,
        le=256,
        description="Maximum number of images of several requests in one batch of a model. On a CPU, "
        "batches are limited to about a quarter of a second.",
    )

    # Storage
    data_dir: Path = Field(
        Path(".dermis"), description="Folder of the database, temporary files and, by default, datasets."
    )
    storage_url: str | None = Field(
        None,
        description="Folder or fsspec URL of the datasets, such as s3://bucket/prefix. Default: `datasets` in the data folder.",
    )
    download_url_seconds: int = Field(
        0,
        ge=0,
        le=604_800,
        description="With storage at s3://, time for which a signed URL of the storage is valid, to which downloads are "
        "redirected (307) instead of passing through the gateway; 0 for never. Clients must be able to reach the storage.",
    )
    database_url: str | None = Field(
        None, description="SQLAlchemy URL of the jobs database, for PostgreSQL. Default: SQLite in the data folder."
    )

    # Jobs and time limits
    shard_concurrency: int = Field(
        3,
        ge=1,
        le=64,
        description="Number of shards that one worker generates at the same time; 3 keep the generator busy.",
    )
    queue_poll_seconds: float = Field(
        0.5,
        ge=0.1,
        le=60.0,
        description="Time between two polls of each queue of a PostgreSQL; choose the same for all workers. In this time a "
        "worker begins at most `DERMIS_SHARD_CONCURRENCY` shards of a tenant. With longer times idle workers load the database "
        "less.",
    )
    min_free_bytes: int = Field(
        8 << 20,
        ge=0,
        description="Free bytes of the storage below which datasets and studies fail, so that the database stays writable.",
    )
    lease_seconds: float = Field(
        30.0,
        ge=1.0,
        le=3600.0,
        description="Time without a renewed lease after which a worker counts as dead and others take over its jobs.",
    )
    executor_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{1,100}$",
        description="Name of this replica in the jobs database. Default: the host name and a slot number. Each running process "
        "needs another name, which is not checked: do not set it in a Deployment with several pods.",
    )
    image_timeout_seconds: float = Field(
        120.0,
        ge=1.0,
        le=270.0,
        description="Maximum time that a call waits for the generator (/v1/images) or the classifier.",
    )
    heat_map_timeout_seconds: float = Field(
        100.0,
        ge=1.0,
        le=270.0,
        description="Maximum time for the heat maps of one call, including the time in the queue.",
    )
    upload_timeout_seconds: float = Field(
        60.0, ge=1.0, le=3600.0, description="Maximum time in which uploaded images must arrive."
    )
    upload_decoders: int = Field(
        2,
        ge=1,
        le=64,
        description="Number of processes that decode uploaded images; each needs up to 12 bytes a pixel.",
    )
    upload_decode_seconds: float = Field(
        20.0,
        ge=0.1,
        le=600.0,
        description="Maximum time for decoding one uploaded image; after it, the decoding process is killed.",
    )

    projection_distance: Literal["lite0", "vgg16"] = Field(
        "lite0", description="Distance that projections minimise. The weights of vgg16 (LPIPS) are downloaded once."
    )
    projection_keep_seconds: float = Field(
        86_400.0, ge=60.0, description="Time after its end at which a projection is deleted with its files."
    )

    # Webhooks
    max_webhooks: int = Field(
        0, ge=0, le=1000, description="Maximum number of webhooks of one tenant; 0 disables webhooks."
    )
    webhook_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Host names, addresses and networks, separated by commas, to which webhooks may be sent although they are "
        "not public, and with plain http.",
    )

    # Limits
    max_samples_per_dataset: int = Field(100_000, ge=1, description="Maximum number of images in one dataset.")
    max_shards_per_dataset: int = Field(2_000, ge=1, description="Maximum number of shards in one dataset.")
    max_active_datasets: int = Field(
        32, ge=1, description="Maximum number of queued and running datasets of one tenant."
    )
    max_images: int = Field(64, ge=1, le=1024, description="Maximum number of images in one call.")
    max_waiting_image_calls: int = Field(
        32, ge=1, description="Maximum number of calls for images at one time: /v1/images, edits, comparisons, the map."
    )
    max_image_wait_seconds: float = Field(
        5.0,
        gt=0,
        le=3600,
        description="Maximum time that a call for images may wait for those requested before, estimated from the measured "
        "rate of the model. A call that would wait longer is answered 503 at once, if its tenant has another call for images "
        "in progress. In an overload the maximum is at most twice the time of a fast call, and applies to most calls of "
        "tenants that have no other call.",
    )
    max_body_bytes: int = Field(1 << 20, ge=1024, description="Maximum size of a request body in bytes.")
    max_upload_bytes: int = Field(
        32 << 20, ge=1024, description="Maximum size of an upload in bytes: all images of a call together."
    )
    max_upload_images: int = Field(32, ge=1, le=1024, description="Maximum number of images in one upload.")
    max_upload_pixels: int = Field(
        40_000_000, ge=4096, description="Maximum number of pixels of one uploaded image, as its header states."
    )
    max_upload_calls: int = Field(
        8, ge=1, description="Maximum number of calls with uploads at one time; each keeps its upload in memory."
    )
    authenticity_uploads: bool = Field(
        False,
        description="Whether /v1/authenticity compares uploaded images with the training images, and /v1/embeddings places "
        "them. If so, everyone who can send requests can find out whether an image is a training image.",
    )
    training_map: Literal["none", "counts", "positions"] = Field(
        "counts",
        description="What GET /v1/embeddings shows of the training images: `none`; `counts`, numbers of at least 20 images in "
        "cubes; `positions`, also where each one is, to callers with the scope authenticity:uploads. Whoever has an image can "
        "then find out whether it is one of them.",
    )
    max_compared_per_minute: int = Field(
        600,
        ge=0,
        description="Maximum number of uploads of one tenant compared with the training images in a minute; 0 for none.",
    )
    authenticity_repeat_seconds: float = Field(
        86_400.0,
        ge=0.0,
        le=604_800.0,
        description="Time for which the answer on an uploaded image is repeated for changed copies of it; 0 for never. Many "
        "answers on copies of one image would show more reliably whether it is a training image.",
    )
    authenticity_distance_step: float = Field(
        0.01,
        ge=0.01,
        le=1.0,
        description="Distances of uploaded images are rounded to multiples of this number.",
    )
    max_projection_images: int = Field(
        32, ge=0, le=1024, description="Maximum number of images in one projection; 0 disables projections."
    )
    max_projection_steps: int = Field(
        1000, ge=1, le=10_000, description="Maximum number of optimisation steps of one image."
    )
    max_active_projections: int = Field(
        8, ge=1, description="Maximum number of queued and running projections of one tenant."
    )
    max_heat_map_images: int = Field(
        4, ge=0, le=64, description="Maximum number of images in a call with heat maps; 0 disables heat maps."
    )
    max_heat_map_calls: int = Field(
        2, ge=1, description="Maximum number of calls with heat maps at one time; they take seconds an image."
    )
    max_event_streams: int = Field(64, ge=1, description="Maximum number of open event streams.")
    max_downloads: int = Field(
        64,
        ge=1,
        le=1000,
        description="Maximum number of files of datasets and projections that are sent at one time; each keeps about 8 MiB in "
        "memory if the storage is remote. Downloads redirected to the storage do not count.",
    )
    max_connections: int = Field(
        1000,
        ge=16,
        le=30_000,
        description="Maximum number of open connections; lower if the limit of open files is low. A new connection can replace "
        "an idle one, or one whose client has not read its response for 5 s.",
    )
    max_header_bytes: int = Field(
        65_536, ge=4096, le=1 << 20, description="Maximum size of the request line and the headers in bytes."
    )
    header_timeout_seconds: float = Field(
        15.0, ge=1.0, le=3600.0, description="Maximum time in which the headers of a request must arrive."
    )
    keep_alive_seconds: int = Field(
        120,
        ge=1,
        le=3600,
        description="Time after which a connection without a request is closed. Choose it longer than that of proxies in "
        "front: a request that arrives while its connection is being closed is lost.",
    )
    body_timeout_seconds: float = Field(
        15.0,
        ge=1.0,
        le=3600.0,
        description="Maximum time to wait for a request body, plus one second for each KiB that has arrived; and time after "
        "which a client that does not read its response is disconnected.",
    )

    quotas: Annotated[dict[str, Quota], NoDecode] = Field(
        {},
        description="Quotas of tenants as a JSON object, `*` for every quota that a tenant's own entry does not name: "
        '`{"*": {"images_per_day": 1000}, "radiology": {"stored_bytes": "50GB"}}`. See [Quotas](quotas.md).',
    )

    shutdown_seconds: int = Field(
        60, ge=1, le=3600, description="Maximum time from SIGTERM or Ctrl-C to the end of all processes of the service."
    )
    stop_pause_seconds: float = Field(
        1.0,
        ge=0.0,
        le=600.0,
        description="Time after SIGTERM in which /readyz fails and requests are accepted; part of DERMIS_SHUTDOWN_SECONDS, and "
        "at most a quarter of it: raise that too.",
    )

    # Log
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Least severe level logged: DEBUG, INFO, WARNING or ERROR."
    )
    log_format: Literal["text", "json"] = Field(
        "text",
        description="Format of the log: `text`, or `json` for objects, one a line ([Observability](observability.md)).",
    )

    @field_validator("bundles", "trusted_signers", "webhook_hosts", mode="before")
    @classmethod
    def _split_lists(cls, value: Any) -> Any:
        return split_commas(value)

    @field_validator("model_tenants", mode="before")
    @classmethod
    def _split_model_tenants(cls, value: Any) -> Any:
        return read_model_tenants(value) if isinstance(value, str) else value

    @field_validator("quotas", mode="before")
    @classmethod
    def _read_quotas(cls, value: Any) -> Any:
        return read_quotas(value)

    @model_validator(mode="after")
    def _worker_has_inference(self) -> Self:
        if not self.inference and self.role != "gateway":
            raise ValueError("DERMIS_INFERENCE=false needs DERMIS_ROLE=gateway")
        return self

    @field_validator("database_url")
    @classmethod
    def _is_known_database(cls, value: str | None) -> str | None:
        if value is not None:
            import sqlalchemy as sa

            # Messages do not repeat the URL, which may contain a password.
            try:
                driver = sa.make_url(value).drivername
            except (sa.exc.ArgumentError, ValueError):
                driver = ""
            if driver not in _DATABASE_DRIVERS:
                raise ValueError("write postgresql://USER:PERCENT-ENCODED-PASSWORD@HOST:PORT/NAME or sqlite:///FILE")
        return value

    @model_validator(mode="after")
    def _database_is_shared(self) -> Self:
        if self.role != "all" and (self.database_url is None or self.storage_url is None):
            raise ValueError(
                f"DERMIS_ROLE={self.role} needs DERMIS_DATABASE_URL and DERMIS_STORAGE_URL, common to all replicas"
            )
        return self

    @model_validator(mode="after")
    def _storage_signs(self) -> Self:
        if self.download_url_seconds and not (self.storage_url or "").startswith("s3://"):
            raise ValueError("DERMIS_DOWNLOAD_URL_SECONDS needs storage at s3://; set DERMIS_STORAGE_URL or 0 seconds")
        return self

    @field_validator("bundles")
    @classmethod
    def _at_least_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one bundle")
        return value

    @model_validator(mode="after")
    def _certificate_has_key(self) -> Self:
        for name in ("TLS", "C2PA"):
            if (getattr(self, f"{name.lower()}_certificate") is None) != (getattr(self, f"{name.lower()}_key") is None):
                raise ValueError(f"set both DERMIS_{name}_CERTIFICATE and DERMIS_{name}_KEY, or neither")
        return self

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @property
    def jobs_url(self) -> str:
        """SQLAlchemy URL of the jobs database."""
        if self.database_url is None:
            return f"sqlite:///{(self.data_dir.absolute() / 'jobs.sqlite').as_posix()}"
        # psycopg 3 is installed; for postgres:// SQLAlchemy would use psycopg2.
        return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", self.database_url)

    def quota_of(self, tenant: str) -> Quota:
        """The quotas of a tenant."""
        return quota_of(self.quotas, tenant)

    @property
    def compares_uploads(self) -> bool:
        """Whether uploaded images are compared with the training images."""
        return self.authenticity_uploads and self.max_compared_per_minute > 0

    @property
    def storage(self) -> str:
        """Root of the datasets and projections: an fsspec URL or an absolute folder."""
        if self.storage_url is not None:
            return self.storage_url
        return str(self.data_dir.absolute() / "datasets")


def read_settings(**values: Any) -> Settings:
    """Read the settings from the environment.

    Args:
        **values: Settings that replace those of the environment.

    Raises:
        SettingsError: A value is not valid; the message names its variable.
    """
    try:
        return Settings(**values)
    except ValidationError as error:
        lines = [f"{_variable(e['loc'])}{e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise SettingsError("; ".join(lines)) from None


def _variable(location: tuple[int | str, ...]) -> str:
    """The beginning of a message about a setting; nothing if it is about several."""
    return f"DERMIS_{'_'.join(map(str, location)).upper()}: " if location else ""


@lru_cache(maxsize=1)
def settings_of_process() -> Settings:
    """The settings of this process, read once."""
    return read_settings()


def settings_table() -> str:
    """The settings as the Markdown table of docs/settings.md."""
    lines = ["| variable | default | range | meaning |", "| --- | --- | --- | --- |"]
    for name, field in sorted(Settings.model_fields.items(), key=lambda item: item[0] in StudySettings.model_fields):
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = "" if name == "bundles" or default in (None, "", {}) else f"`{default}`"
        lines.append(f"| `DERMIS_{name.upper()}` | {shown} | {_range_of(field)} | {field.description} |")
    return "\n".join(lines)


def _range_of(field: FieldInfo) -> str:
    """The numbers that a setting can have, such as `1 to 64`; empty if it has no limits."""
    limits = {
        name: f"{getattr(each, name):,}".removesuffix(".0")
        for each in field.metadata
        for name in ("ge", "gt", "le")
        if hasattr(each, name)
    }
    least = f"above {limits['gt']}" if "gt" in limits else limits.get("ge")
    most = limits.get("le")
    if least is None or most is None:
        return f"at least {least}" if least else f"at most {most}" if most else ""
    return f"{least} to {most}"
