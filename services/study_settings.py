"""The settings of reader studies, a part of `services.settings.Settings`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode

from services.quotas import EVERYONE
from services.tenants import is_tenant


class StudySettings(BaseSettings):
    """Settings of reader studies."""

    max_studies: int = Field(
        20, ge=0, le=1000, description="Maximum number of reader studies of one tenant; 0 disables them."
    )
    max_study_images: int = Field(
        400, ge=2, le=2000, description="Maximum number of images in one reader study; half of them are real."
    )
    study_keep_days: float = Field(
        180.0,
        gt=0.0,
        le=3650.0,
        description="Days after its creation at which a reader study is deleted with its images and answers.",
    )
    study_real_images: Annotated[dict[str, Path], NoDecode] = Field(
        {},
        description="Folders of real images that reader studies may show, by tenant: `tenant=folder,tenant=folder`, `*` for "
        "all others. Each has one folder for each class of the model. Whoever has the link of a study sees some of the images.",
    )

    @field_validator("study_real_images", mode="before")
    @classmethod
    def _read_folders(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        folders: dict[str, Any] = {}
        for part in filter(None, (each.strip() for each in value.split(","))):
            tenant, equals, folder = (each.strip() for each in part.partition("="))
            if not equals or not folder or tenant in folders:
                raise ValueError(f"{part[:100]!r}: write each tenant once, as tenant=folder,tenant=folder")
            if tenant != EVERYONE and not is_tenant(tenant):
                raise ValueError(
                    f"{tenant[:100]!r} is not the name of a tenant: use lower-case letters, digits and hyphens, or *"
                )
            folders[tenant] = folder
        return folders

    def study_folder_of(self, tenant: str) -> Path | None:
        """The folder of real images that studies of a tenant may show; None if there is none."""
        return self.study_real_images.get(tenant, self.study_real_images.get(EVERYONE))
