"""Image sizes: caps hold, nothing is enlarged, the grid is met, and smart_resize has nothing left to do."""

from __future__ import annotations

import random

import pytest
from PIL import Image
from transformers import LlavaConfig, PixtralVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from helpers import tiny_vision
from helpers.image_resize import ImageSize, image_grid


def random_sizes(count: int, seed: int = 3407):
    draw = random.Random(seed)
    for _ in range(count):
        width = int(2 ** draw.uniform(0, 13))
        yield width, max(1, min(8192, int(width * 2 ** draw.uniform(-7.6, 7.6))))


def test_property_over_thousands_of_sizes():
    draw, grid, seen = random.Random(0), 28, 0
    for width, height in random_sizes(6000):
        if max(width, height) > 200 * min(width, height):
            with pytest.raises(ValueError, match="longer than 200 times"):
                ImageSize(multiple=grid).target(width, height)
            continue
        seen += 1
        side = draw.choice((None, draw.randint(grid, 2048)))
        pixels = draw.choice((None, draw.randint(4 * grid**2, 1024**2)))
        got = ImageSize(max_side=side, max_pixels=pixels, multiple=grid).target(width, height)
        assert all(s % grid == 0 and s >= grid for s in got)
        assert side is None or max(got) <= side
        assert pixels is None or got[0] * got[1] <= pixels
        # Never enlarged, but to the one patch that a model needs to see anything.
        assert all(new <= max(old, grid) for new, old in zip(got, (width, height), strict=True))
        # smart_resize with the same cap agrees that nothing is left to do.
        room = pixels or max(got[0] * got[1], grid**2)
        assert smart_resize(got[1], got[0], grid, min_pixels=1, max_pixels=room) == (got[1], got[0])
        # As large as the caps allow: one more patch on each side would break a cap or enlarge.
        scale = min(1, (side or 1e9) / max(width, height), ((pixels or 1e18) / (width * height)) ** 0.5)
        if min(width, height) * scale >= grid and max(got) < 200 * min(got):
            assert all(old * scale - new < grid for new, old in zip(got, (width, height), strict=True))
    assert seen > 5000


def test_against_smart_resize_under_the_processors_own_limits():
    """Never more pixels than transformers' own rule gives, and at most one patch less per side."""
    processor = tiny_vision.processor("qwen2_vl")
    own = ImageSize.for_processor(processor)
    assert (own.max_side, own.max_pixels, own.multiple) == (None, 112 * 112, 28)
    compared = 0
    for width, height in random_sizes(3000, seed=1):
        if max(width, height) > 200 * min(width, height) or width * height < 56 * 56 or min(width, height) < 28:
            continue
        stock_height, stock_width = smart_resize(height, width, 28, 56 * 56, 112 * 112)
        got = own.target(width, height)
        assert got[0] * got[1] <= 112 * 112
        if stock_width <= width and stock_height <= height:  # where smart_resize enlarges, we do not
            compared += 1
            assert got[0] <= stock_width + 28 and got[1] <= stock_height + 28
            assert stock_width - got[0] <= 28 or got[0] * got[1] > 0.5 * 112 * 112
    assert compared > 500


@pytest.mark.parametrize(
    ("family", "expected"),
    [("qwen2_vl", (None, 112 * 112, 28)), ("pixtral", (64, None, 16)), ("mllama", (112, None, 1)),
     ("llava", (None, None, 1)), ("llava_siglip", (None, None, 1))],
)  # fmt: skip
def test_defaults_are_the_processors_own(family, expected):
    size = ImageSize.for_processor(tiny_vision.processor(family))
    assert (size.max_side, size.max_pixels, size.multiple) == expected
    assert image_grid(tiny_vision.processor(family)) == expected[2]


def test_config_counts_where_the_processor_has_no_limit():
    processor = tiny_vision.processor("pixtral")
    processor.image_processor.size = {}
    config = LlavaConfig(vision_config=PixtralVisionConfig(image_size=320))
    assert ImageSize.for_processor(processor, config).max_side == 320
    assert ImageSize.for_processor(processor, config, max_side=160).max_side == 160


def test_caps_hold_both_ways_and_tall_images_are_capped():
    cap = ImageSize(max_side=512, multiple=28)
    assert cap.target(500, 5000) == (28, 504) and cap.target(5000, 500) == (504, 28)
    assert cap.target(512, 512) == (504, 504)  # floored to the grid: 512 never becomes 532
    assert ImageSize(max_side=512).target(1000, 1000) == (512, 512)


def test_pictures_keep_aspect_orientation_and_the_original():
    image = Image.new("RGB", (400, 100), "red")
    image.paste("blue", (200, 0, 400, 100))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise: what was left is on top
    image.info["exif"] = exif.tobytes()
    before = image.tobytes(), image.size
    shown = ImageSize(max_side=200)(image)
    assert shown.size == (50, 200) and (image.tobytes(), image.size) == before
    assert shown.getpixel((25, 20)) == (255, 0, 0) and shown.getpixel((25, 180)) == (0, 0, 255)
    exact = ImageSize(exact=(96, 64))
    for size in ((400, 100), (30, 20), (100, 400)):
        boxed = exact(Image.new("RGB", size, "red"))
        red = [boxed.getpixel((x, 32)) == (255, 0, 0) for x in range(96)]
        assert boxed.size == (96, 64)
        assert abs(sum(red) - min(1, 96 / size[0], 64 / size[1]) * size[0]) <= 1  # neither stretched nor enlarged
    assert ImageSize(max_side=50)(Image.new("RGBA", (10, 20))).mode == "RGB"


def test_what_cannot_be_met_is_named(tmp_path):
    for arguments, message in (
        ({"max_side": 20, "multiple": 28}, "max_side=20 is below one patch of 28"),
        ({"max_pixels": 500, "multiple": 28}, "max_pixels=500"),
        ({"exact": (30, 28), "multiple": 28}, r"exact=\(30, 28\)"),
        ({"exact": (28, 28), "max_side": 28}, "either exact or caps"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageSize(**arguments)
    path = tmp_path / "a.png"
    Image.new("RGB", (60, 30), "red").save(path)
    for source in (str(path), path, {"path": str(path), "bytes": None}, {"bytes": path.read_bytes(), "path": None}):
        assert ImageSize(max_side=30)(source).size == (30, 15)
