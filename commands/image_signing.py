"""Options for signed images (C2PA): the certificate, and whether images are signed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dermis.errors import RequestError

if TYPE_CHECKING:
    from dermis.dataset.request import DatasetRequest
    from dermis.provenance.c2pa import ImageSigner

CertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--c2pa-certificate",
        envvar="DERMIS_C2PA_CERTIFICATE",
        help="PEM file with the certificate for --c2pa and those of intermediate authorities.",
    ),
]
KeyOption = Annotated[
    Path | None,
    typer.Option("--c2pa-key", envvar="DERMIS_C2PA_KEY", help="PEM file with the private key of --c2pa-certificate."),
]
C2paOption = Annotated[
    bool | None,
    typer.Option("--c2pa/--no-c2pa", help="Sign every image (C2PA). Default: yes if there is a certificate."),
]


def request_with_signing(request: DatasetRequest, certificate: Path | None, *, repeated: bool) -> DatasetRequest:
    """Choose whether other processes sign the images of a request: if it asks for that, or there is a certificate here.

    Args:
        request: The request.
        certificate: The certificate of `dermis generate` here.
        repeated: Whether the request is that of a manifest, which has a choice already.
    """
    return request if repeated else request.with_signing(request.signed or certificate is not None, "")


def image_signer(
    request: DatasetRequest, certificate: Path | None, key: Path | None, *, repeated: bool
) -> tuple[DatasetRequest, ImageSigner | None]:
    """Choose whether images are signed, and read the certificate if they are.

    Args:
        request: The request.
        certificate: The certificate.
        key: Its key.
        repeated: Whether the request is that of a manifest, which has a choice already.

    Returns:
        The request with the choice, and the signer; None if images are not signed.

    Raises:
        RequestError: A file is missing for the choice.
        SignatureError: The certificate cannot be used.
    """
    if (certificate is None) != (key is None):
        raise RequestError("--c2pa-certificate", "give both --c2pa-certificate and --c2pa-key, or neither")
    if not repeated:
        request = request.with_signing(certificate is not None, "give --c2pa-certificate and --c2pa-key")
    if not request.signed:
        return request, None
    if certificate is None or key is None:
        raise RequestError("--manifest", "its images are signed: give --c2pa-certificate and --c2pa-key")
    from dermis.provenance.c2pa import ImageSigner

    return request, ImageSigner(certificate, key)
