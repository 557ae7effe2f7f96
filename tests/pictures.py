"""Small pictures that tests write to disk."""

from PIL import Image


def dotted(color: tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> Image.Image:
    """A picture of one color but for a white corner: pictures of a single color are refused."""
    image = Image.new("RGB", size, color)
    image.putpixel((size[0] - 1, size[1] - 1), (255, 255, 255))
    return image
