"""Encode frames as a video: GIF by Pillow, MP4 by ffmpeg."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import numpy as np

from dermis.errors import DermisError, install_command
from dermis.image_metadata import ImageOrigin, mp4_with_xmp
from dermis.imaging import Images, animation

VideoFormat = Literal["gif", "mp4"]
MEDIA_TYPES = {"gif": "image/gif", "mp4": "video/mp4"}


def encode_video(frames: Images, kind: VideoFormat, *, frame_ms: int = 100, origin: ImageOrigin | None = None) -> bytes:
    """Encode frames as MP4 (H.264) or as an endless GIF of 256 colours.

    Args:
        frames: uint8 [N, H, W, 3].
        kind: The format.
        frame_ms: Duration of a frame in milliseconds.
        origin: What the file says of its frames.

    Raises:
        ValueError: There is no frame.
        DermisError: imageio-ffmpeg, which MP4 needs, is not installed.
    """
    if len(frames) == 0:
        raise ValueError("a video needs at least one frame")
    if kind == "gif":
        return animation(frames, frame_ms, origin)
    data = _mp4(frames, 1000 / frame_ms)
    return data if origin is None else mp4_with_xmp(data, origin)


def _mp4(frames: Images, fps: float) -> bytes:
    try:
        from imageio_ffmpeg import write_frames
    except ImportError as error:
        raise DermisError(f"MP4 needs ffmpeg ({error}); {install_command('video')}, or use .gif") from error
    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # H.264 needs even sides
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        writer = write_frames(
            str(path),
            (even.shape[2], even.shape[1]),
            fps=fps,
            macro_block_size=1,
            quality=8,
            output_params=["-movflags", "+faststart", "-map_metadata", "-1"],
        )
        writer.send(None)
        for frame in even:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        return path.read_bytes()
