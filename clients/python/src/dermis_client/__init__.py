"""Client of the dermis service, which generates synthetic dermoscopy: datasets, or a few images in one call.

Example:
    ```python
    from dermis_client import DermisClient

    with DermisClient("http://127.0.0.1:3000") as client:
        dataset = client.datasets.create(classes={"malignant": 500, "benign": 500}, seed=7)
        dataset = dataset.wait(progress=True)
        dataset.download("lesions", extract=True)
    ```
"""

from dermis_client._client import AsyncDermisClient, DermisClient
from dermis_client._downloads import Download, DownloadProgress
from dermis_client._version import __version__
from dermis_client.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    DatasetCancelled,
    DatasetFailed,
    DermisError,
    DownloadError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    ProjectionFailed,
    RateLimitError,
    ServerError,
    TooLargeError,
    UnprocessableEntityError,
    UnsupportedMediaTypeError,
    WaitTimeoutError,
)
from dermis_client.folders import VerifyReport, extract_images, verify
from dermis_client.images import GeneratedImage, ImagesResult
from dermis_client.latent import (
    AuthenticityResult,
    Direction,
    EditedImage,
    EditsResult,
    ProjectedImage,
    Projection,
    Verdict,
)
from dermis_client.models import (
    Classification,
    ClassificationsResult,
    DatasetFile,
    DatasetRecord,
    DatasetRequest,
    ExceededQuota,
    FieldError,
    HeatMap,
    Manifest,
    Model,
    ModelClassifier,
    ModelRef,
    Problem,
    Progress,
    QuotaUsage,
    Usage,
)
from dermis_client.report import (
    DatasetReport,
    ReportAudit,
    ReportNumber,
    ReportOrigin,
    ReportQuestion,
    ReportRequest,
    ReportRule,
    ReportSection,
)
from dermis_client.resources.dataset_records import AsyncDataset, Dataset, DatasetEvent

__all__ = [
    "APIConnectionError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncDataset",
    "AsyncDermisClient",
    "AuthenticationError",
    "AuthenticityResult",
    "BadRequestError",
    "Classification",
    "ClassificationsResult",
    "ConflictError",
    "Dataset",
    "DatasetCancelled",
    "DatasetEvent",
    "DatasetFailed",
    "DatasetFile",
    "DatasetRecord",
    "DatasetReport",
    "DatasetRequest",
    "DermisClient",
    "DermisError",
    "Direction",
    "Download",
    "DownloadError",
    "DownloadProgress",
    "EditedImage",
    "EditsResult",
    "ExceededQuota",
    "FieldError",
    "GeneratedImage",
    "HeatMap",
    "ImagesResult",
    "IntegrityError",
    "InvalidRequestError",
    "Manifest",
    "Model",
    "ModelClassifier",
    "ModelRef",
    "NotFoundError",
    "PermissionDeniedError",
    "Problem",
    "Progress",
    "ProjectedImage",
    "Projection",
    "ProjectionFailed",
    "QuotaUsage",
    "RateLimitError",
    "ReportAudit",
    "ReportNumber",
    "ReportOrigin",
    "ReportQuestion",
    "ReportRequest",
    "ReportRule",
    "ReportSection",
    "ServerError",
    "TooLargeError",
    "UnprocessableEntityError",
    "UnsupportedMediaTypeError",
    "Usage",
    "Verdict",
    "VerifyReport",
    "WaitTimeoutError",
    "__version__",
    "extract_images",
    "verify",
]
