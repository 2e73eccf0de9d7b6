"""The certificate of the service for signing images (C2PA)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dermis.errors import SignatureError
from services.settings import Settings, SettingsError

if TYPE_CHECKING:
    from dermis.provenance.c2pa import ImageSigner

NO_CERTIFICATE = "this service has no certificate for it (DERMIS_C2PA_CERTIFICATE); omit provenance.c2pa"


def image_signer_of(settings: Settings) -> ImageSigner | None:
    """The signer of the settings; None if images are not signed.

    Raises:
        SettingsError: The certificate cannot be used, or the package that signs is not installed.
    """
    if settings.c2pa_certificate is None or settings.c2pa_key is None:
        return None
    from dermis.provenance.c2pa import ImageSigner

    try:
        return ImageSigner(settings.c2pa_certificate, settings.c2pa_key)
    except SignatureError as error:
        raise SettingsError(f"DERMIS_C2PA_CERTIFICATE: {error}") from None
