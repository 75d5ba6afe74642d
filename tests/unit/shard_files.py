"""Small images and tar files for the tests of the image sources."""

import io
import tarfile

from PIL import Image


def png(value, size=(3, 2)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def value_of(image):
    red, green, blue = image.getpixel((0, 0))
    assert blue == 7
    return red + 256 * green


def make_tar(path, members, mode="w", format=tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def labelled(numbers):
    return [pair for n in numbers for pair in ((f"s{n:04d}.png", png(n)), (f"s{n:04d}.cls", str(n % 3).encode()))]
