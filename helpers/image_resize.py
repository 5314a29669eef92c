"""Image sizes that respect a cap: fewer image tokens and less memory, on the patch grid, never enlarged."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

MAX_ASPECT = 200  # what Qwen's smart_resize refuses


@dataclass(frozen=True)
class ImageSize:
    """A cap on images, in pixels. Call it with an image, or ask :meth:`target` for the size alone.

    Args:
        max_side: longest side.
        max_pixels: width times height.
        exact: (width, height) that every image gets: scaled down to fit, then centred on grey. Excludes the caps.
        multiple: both sides land on multiples of this (patch size times merge size), rounded down, so that a cap
            holds. Only a side below one multiple grows to it, since a model sees nothing smaller.

    Naive equivalent: ``image.thumbnail((max_side, max_side))``, which knows no grid, no pixel count and no EXIF.

    Raises: ValueError for caps that no image can meet, or an image longer than 200 times its width.
    """

    max_side: int | None = None
    max_pixels: int | None = None
    exact: tuple[int, int] | None = None
    multiple: int = 1

    def __post_init__(self):
        if self.exact is not None:
            if self.max_side is not None or self.max_pixels is not None:
                raise ValueError("give either exact or caps (max_side, max_pixels), not both")
            if len(self.exact) != 2 or any(side < 1 or side % self.multiple for side in self.exact):
                raise ValueError(
                    f"exact={self.exact} must be (width, height), both multiples of the patch grid of {self.multiple}"
                )
        if self.max_side is not None and self.max_side < self.multiple:
            raise ValueError(f"max_side={self.max_side} is below one patch of {self.multiple}; raise it")
        if self.max_pixels is not None and self.max_pixels < self.multiple**2:
            raise ValueError(f"max_pixels={self.max_pixels} is below one patch of {self.multiple}²; raise it")

    @classmethod
    def for_processor(
        cls,
        processor: Any,
        config: Any = None,
        *,
        max_side: int | None = None,
        max_pixels: int | None = None,
        exact: tuple[int, int] | None = None,
    ) -> ImageSize:
        """The caps given, on the grid of ``processor``; without any, the processor's own limits, then ``config``'s.

        Args:
            processor: a processor or image processor of transformers.
            config: the model's config; its ``vision_config.image_size`` counts where the processor has no limit.

        A processor that brings every image to one size itself (CLIP, SigLIP) gets no cap: it would only blur.
        """
        image_processor = getattr(processor, "image_processor", processor)
        multiple = image_grid(processor)
        one_size = multiple == 1 and not hasattr(image_processor, "max_image_tiles")
        if max_side is None and max_pixels is None and exact is None and not one_size:
            max_side, max_pixels = _own_limits(image_processor)
            if max_side is None and max_pixels is None:
                max_side = _config_side(config)
        return cls(max_side, max_pixels, exact, multiple)

    def target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that an image of this size gets."""
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"an image of {width} x {height} is longer than {MAX_ASPECT} times its width; crop it")
        if self.exact is not None:
            return self.exact
        scale = 1.0
        if self.max_side is not None:
            scale = min(scale, self.max_side / max(width, height))
        if self.max_pixels is not None:
            scale = min(scale, math.sqrt(self.max_pixels / (width * height)))
        short, long = (max(self._floor(side * scale), self.multiple) for side in sorted((width, height)))
        long = min(long, MAX_ASPECT * short)  # rounding the short side down can pass the aspect that was fine above
        if self.max_pixels is not None:
            long = min(long, self._floor(self.max_pixels / short))  # where the short side was raised to one patch
        return (long, short) if width > height else (short, long)

    def __call__(self, image: Any) -> Image.Image:
        """The image as RGB, upright by its EXIF orientation, at :meth:`target`'s size; the input is left as it is.

        Args:
            image: a PIL image, a path, or ``datasets``' ``{"bytes": ..., "path": ...}``.
        """
        image = open_image(image)
        size = self.target(*image.size)
        if self.exact is None:
            return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
        fitted = ImageOps.contain(image, size, Image.Resampling.BICUBIC) if _exceeds(image.size, size) else image
        canvas = Image.new("RGB", size, (128, 128, 128))
        canvas.paste(fitted, ((size[0] - fitted.width) // 2, (size[1] - fitted.height) // 2))
        return canvas

    def _floor(self, side: float) -> int:
        # The epsilon keeps 1000 * (512 / 1000) at 512.
        return int((side + 1e-6) // self.multiple) * self.multiple


def open_image(image: Any) -> Image.Image:
    """A PIL image, a path, or ``datasets``' undecoded image as an upright RGB image (a new one, or an equal one)."""
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
    if isinstance(image, str | Path | io.BytesIO):
        image = Image.open(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"{type(image).__name__} is no image; give a PIL image, a path or datasets' image")
    return ImageOps.exif_transpose(image).convert("RGB")


def image_grid(processor: Any) -> int:
    """Pixels of one image token's side: patch size times merge size; 1 where the model cuts tiles or crops itself."""
    image_processor = getattr(processor, "image_processor", processor)
    patch = getattr(image_processor, "patch_size", None)
    if patch is None:
        return 1
    side = patch if isinstance(patch, int) else patch["height"]
    merge = getattr(image_processor, "merge_size", None) or getattr(processor, "spatial_merge_size", None) or 1
    return side * merge


def _exceeds(size: tuple[int, int], bound: tuple[int, int]) -> bool:
    return size[0] > bound[0] or size[1] > bound[1]


def _own_limits(image_processor: Any) -> tuple[int | None, int | None]:
    """(max_side, max_pixels) of an image processor."""
    size = getattr(image_processor, "size", None) or {}
    longest, height, width = (
        size.get(key) if isinstance(size, dict) else getattr(size, key, None)
        for key in ("longest_edge", "height", "width")
    )
    if longest and hasattr(image_processor, "merge_size"):  # Qwen calls numbers of pixels edges
        return None, longest
    if longest:
        return longest, None
    if height and width:  # of a tile
        return max(height, width) * image_processor.max_image_tiles, None
    return None, None


def _config_side(config: Any) -> int | None:
    side = getattr(getattr(config, "vision_config", None), "image_size", None)
    return max(side) if isinstance(side, list | tuple) else side
