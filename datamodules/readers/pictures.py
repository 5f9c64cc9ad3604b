"""Pictures of any mode, size and bit depth as arrays of one form: 8 bits, one mode, square."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from datamodules.readers.base import BadSample, Record, merge_records, name_bad_sample

MIN_EDGE = 4
"""Pixels of the shorter edge. A smaller picture is a placeholder, as web servers send them, and a BadSample."""
MAX_16_BIT = 65535
"""The largest value of a 16-bit picture."""
MODES = ("RGB", "L")
FITS = ("crop", "pad", "stretch")

Encoded = Path | bytes | Callable[[], Image.Image] | None
"""A picture before it is decoded: its file, its content, or a function that returns it; None for an empty cell."""


@dataclass(frozen=True)
class PictureForm:
    """The form that all pictures of a data set are brought into.

    Args:
        size: edge of the square images in pixels; None leaves each picture its own size.
        mode: RGB, or L for grey.
        fit: how a picture becomes a square: `crop` cuts the longer edge at both ends, `pad` puts black beside the
            shorter edge, `stretch` changes the proportions.
        pixel_range: values of stored pixels that become black and white; values outside are clipped. None takes 0 to
            255 of 8 bits and 0 to 65535 of 16 bits.
        box: (left, top, right, bottom) in pixels, to which each picture is cropped first; None for the whole picture.

    Raises ValueError, naming the field, for a value that is not possible.
    """

    size: int | None
    mode: str = "RGB"
    fit: str = "crop"
    pixel_range: Sequence[float] | None = None
    box: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"data.size={self.size} is out of range; choose 1 pixel or more")
        if self.mode not in MODES:
            raise ValueError(f"data.mode={self.mode!r} is unknown; choose one of: {', '.join(MODES)}")
        if self.fit not in FITS:
            raise ValueError(f"data.fit={self.fit!r} is unknown; choose one of: {', '.join(FITS)}")
        check_pixel_range(self.pixel_range)

    def decode(self, pictures: Iterable[tuple[str, Encoded]]) -> Record:
        """Decode pictures into this form: "image", "original_size" and "crop".

        `pictures` are (name, picture) with the name for messages. Raises BadSample where a picture cannot be decoded,
        is smaller than `box`, has an edge below MIN_EDGE, or has values of an unknown range.
        """
        records = []
        for name, content in pictures:
            try:
                with open_picture(content) as image:
                    records.append(self.resize(self.convert(image)))
            except UnidentifiedImageError as error:  # its own message holds an address in memory
                raise BadSample(f"{name} cannot be used: no known format of pictures") from error
            except Exception as error:  # decoders raise almost any type for damaged files
                raise name_bad_sample(name, error) from error
        return merge_records(records)

    def convert(self, image: Image.Image) -> Image.Image:
        """Return a picture in `mode`, upright as its EXIF says, in 8 bits, on white where it is transparent.

        Raises BadSample for values of an unknown range, and for a picture smaller than `box` or MIN_EDGE.
        """
        if self.pixel_range is not None and image.mode == "RGB" and has_16_bits(image):
            raise BadSample("its 16-bit colours are read in 8 bits, to which data.pixel_range does not apply")
        ImageOps.exif_transpose(image, in_place=True)
        is_deep = image.mode == "F" or image.mode.startswith("I")  # PIL would clip these to 8 bits
        if is_deep:
            image = Image.fromarray(self.scale(np.asarray(image)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(self.mode)
        if self.pixel_range is not None and not is_deep:
            image = Image.fromarray(self.scale(np.asarray(image)))
        if self.box is not None:
            if image.width < self.box[2] or image.height < self.box[3]:
                raise BadSample(f"its {image.width}x{image.height} pixels do not hold the box {tuple(self.box)}")
            image = image.crop((self.box[0], self.box[1], self.box[2], self.box[3]))
        if min(image.size) < MIN_EDGE:
            raise BadSample(f"it has {image.width}x{image.height} pixels; the least is {MIN_EDGE}x{MIN_EDGE}")
        return image

    def scale(self, values: np.ndarray) -> np.ndarray:
        """Return stored values as uint8: those of `pixel_range`, or else of 16 bits, become 0 to 255.

        Raises BadSample for values that are not finite, and without `pixel_range` for floating-point numbers and values
        outside of 16 bits.
        """
        lowest, highest = values.min(), values.max()
        if not (np.isfinite(lowest) and np.isfinite(highest)):
            raise BadSample("it has values that are not finite numbers")
        if self.pixel_range is not None:
            return scale_values(values, *self.pixel_range)
        if values.dtype.kind == "f" or lowest < 0 or highest > MAX_16_BIT:
            kind = "floating-point pixels" if values.dtype.kind == "f" else "pixels beyond 16 bits"
            raise BadSample(
                f"its {kind}, here from {lowest:g} to {highest:g}, have no known range; choose data.pixel_range, the "
                "values that become black and white, such as [0, 1]"
            )
        return scale_values(values, 0, MAX_16_BIT)

    def resize(self, image: Image.Image) -> Record:
        """Return the record of one picture, made a square of `size` as `fit` says, by Lanczos' filter."""
        width, height, size = *image.size, self.size
        crop, pixels = (0, 0), np.asarray(image)
        if size is not None and self.fit == "crop":
            edge = min(image.size)
            left, top = (width - edge) // 2, (height - edge) // 2
            crop = (top * size // edge, left * size // edge)
            if image.size != (size, size):
                image = image.crop((left, top, left + edge, top + edge))
                pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
        elif size is not None and image.size != (size, size):
            inside = (size, size)
            if self.fit == "pad":
                inside = (max(1, round(width * size / max(image.size))), max(1, round(height * size / max(image.size))))
            canvas = Image.new(image.mode, (size, size))
            corner = ((size - inside[0]) // 2, (size - inside[1]) // 2)
            canvas.paste(image.resize(inside, Image.Resampling.LANCZOS), corner)
            pixels = np.asarray(canvas)
        return {
            "image": pixels.reshape(1, *pixels.shape[:2], -1),
            "original_size": np.array([(height, width)], np.int64),
            "crop": np.array([crop], np.int64),
        }


def has_16_bits(image: Image.Image) -> bool:
    """Return whether the file of a picture, not yet decoded, has 16 bits per channel, of which PIL keeps 8 of RGB."""
    return any(str(tile[3]).endswith(";16B") for tile in getattr(image, "tile", ()))


def open_picture(content: Encoded) -> Image.Image:
    """Return a picture, opened and not yet decoded. Raises BadSample for None and for an empty content."""
    if not content:
        raise BadSample("it has no content")
    if callable(content):
        return content()
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)


def scale_values(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return values as uint8: `low` and below become 0, `high` and above 255."""
    values = values.astype(np.float64).clip(low, high) - low
    return (values / ((high - low) / 255)).round().astype(np.uint8)


def check_pixel_range(pixel_range: Sequence[float] | None) -> None:
    """Raise ValueError unless a range is None or two finite numbers in ascending order."""
    if pixel_range is None:
        return
    if len(pixel_range) != 2 or not all(map(math.isfinite, pixel_range)) or pixel_range[0] >= pixel_range[1]:
        raise ValueError(
            f"data.pixel_range={list(pixel_range)} is no range; choose two numbers in ascending order, such as "
            "[0, 4095]"
        )
