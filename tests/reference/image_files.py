"""Makes the small files of tests/images; run through `image.py --images`."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin


def picture(width=40, height=30):
    """A slope in each channel and a corner mark, so that every turn and flip shows."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 3 % 256], -1).astype(np.uint8)
    rgb[:8, :12] = (250, 30, 20)
    return rgb


def alpha(width=40, height=30):
    y, x = np.mgrid[0:height, 0:width]
    return ((x * 7 + y * 5) % 256).astype(np.uint8)


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png16(rows, color_type, extra=b""):
    """A 16-bit PNG from [height, width, channels] u16, which Pillow cannot write in all color types."""
    height, width = rows.shape[:2]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + extra
        + png_chunk(b"IDAT", zlib.compress(raw))
        + png_chunk(b"IEND", b"")
    )


def words(channels, width=40, height=30):
    index = np.arange(width * height * channels, dtype=np.uint32)
    return (
        ((index * 2654435761 >> 9) % 65536 // np.where(index % 5 == 0, 300, 1))
        .astype(np.uint16)
        .reshape(height, width, channels)
    )


def pnm(magic, header, body):
    return magic + b"\n" + header + b"\n" + body


def make(folder: Path):
    from skimage import data

    folder.mkdir(exist_ok=True)
    rgb, cover = picture(), alpha()
    image, mask = Image.fromarray(rgb), Image.fromarray(cover)

    def save(name, source, **options):
        source.save(folder / name, **options)

    def put(name, content):
        (folder / name).write_bytes(content)

    for turn in range(1, 9):
        save(f"exif-rotated-{turn}.jpg", image, exif=exif(turn), quality=90)
    save("exif-rotated-6.png", image, exif=exif(6))
    save("exif-rotated-5.webp", image, exif=exif(5), lossless=True)
    save("exif-rotated-8.tiff", image, exif=exif(8))
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="3"/></x:xmpmeta>')
    save("xmp-rotated-3.png", image, pnginfo=xmp)

    save("1x1.png", Image.fromarray(rgb[:1, :1]))
    save("rgb.png", image)
    save("rgb-transparent-color.png", image, transparency=(250, 30, 20))
    save("alpha.png", Image.fromarray(np.dstack([rgb, cover])))
    save("grey.png", image.convert("L"))
    save("grey-alpha.png", Image.merge("LA", (image.convert("L"), mask)))
    save("bilevel.png", image.convert("1"))
    palette = image.quantize(16)
    save("palette.png", palette)
    save("palette-transparent.png", palette, transparency=bytes(range(0, 256, 16)))
    save("palette-4-colors.png", image.quantize(4), bits=2)
    put("16-bit-grey.png", png16(words(1), 0))
    put("16-bit-grey-transparent-color.png", png16(words(1), 0, png_chunk(b"tRNS", struct.pack(">H", 218))))
    put("16-bit-grey-alpha.png", png16(words(2), 4))
    put("16-bit-rgb.png", png16(words(3), 2))
    put("16-bit-rgb-transparent-color.png", png16(words(3), 2, png_chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))))
    put("16-bit-alpha.png", png16(words(4), 6))

    save("cmyk.jpg", image.convert("CMYK"), quality=90)
    save("grey.jpg", image.convert("L"), quality=90)
    save("progressive.jpg", image, quality=90, progressive=True)
    save("subsampled.jpg", image, quality=80, subsampling="4:2:0")

    second = Image.fromarray(rgb[:, ::-1])
    save("animated.gif", palette, save_all=True, append_images=[second.quantize(16)], duration=50)
    save("grey.gif", image.convert("L"))
    save("transparent.gif", palette, transparency=3)
    frame = palette.crop((0, 0, 20, 15))
    body = io.BytesIO()
    frame.save(body, "GIF", transparency=5, interlace=False)
    put("frame-smaller-than-screen.gif", placed(body.getvalue(), 40, 30, 7, 9))
    body = io.BytesIO()
    frame.save(body, "GIF", interlace=True)
    put("frame-larger-than-screen.gif", placed(body.getvalue(), 10, 10, 3, 2))

    save("lossless.webp", image, lossless=True)
    save("lossless-alpha.webp", Image.fromarray(np.dstack([rgb, cover])), lossless=True, exact=True)
    save("lossy.webp", image, quality=80)
    save("lossy-alpha.webp", Image.fromarray(np.dstack([rgb, cover | 128])), quality=80)
    save("animated.webp", image, save_all=True, append_images=[second], lossless=True, duration=50)

    save("rgb.bmp", image)
    save("alpha.bmp", Image.fromarray(np.dstack([rgb, cover])))
    save("palette.bmp", palette)
    save("bilevel.bmp", image.convert("1"))
    save("rgb.tiff", image)
    save("lzw.tiff", image, compression="tiff_lzw")
    save("grey.tiff", image.convert("L"))
    save("bilevel.tiff", image.convert("1"))
    save("alpha.tiff", Image.fromarray(np.dstack([rgb, cover])))
    save("16-bit-grey.tiff", Image.fromarray(words(1)[:, :, 0]))
    save("cmyk.tiff", image.convert("CMYK"))
    save("palette.tiff", palette)

    size = b"40 30"
    save("rgb.ppm", image)
    save("grey.pgm", image.convert("L"))
    save("bilevel.pbm", image.convert("1"))
    put("16-bit-rgb.ppm", pnm(b"P6", size + b"\n65535", words(3).astype(">u2").tobytes()))
    put("16-bit-grey.pgm", pnm(b"P5", size + b"\n65535", words(1).astype(">u2").tobytes()))
    put("maxval-100.pgm", pnm(b"P5", size + b"\n100", bytes(n * 7 % 101 for n in range(1200))))
    put("maxval-100.ppm", pnm(b"P6", size + b"\n100", bytes(n * 7 % 101 for n in range(3600))))
    put("maxval-1000.pgm", pnm(b"P5", size + b"\n1000", (words(1) % 1001).astype(">u2").tobytes()))
    put("plain.ppm", pnm(b"P3", size + b"\n255", b" ".join(b"%d" % v for v in rgb.reshape(-1))))

    photo = Image.fromarray(data.astronaut()).crop((96, 0, 352, 256)).resize((160, 160))
    save("photo.jpg", photo, quality=88)

    for name, keep in [
        ("photo.jpg", 0.6),
        ("rgb.png", 0.6),
        ("progressive.jpg", 0.7),
        ("lossless.webp", 0.6),
        ("lossy.webp", 0.6),
        ("animated.gif", 0.2),
        ("rgb.bmp", 0.6),
        ("rgb.tiff", 0.3),
        ("rgb.ppm", 0.6),
    ]:
        content = (folder / name).read_bytes()
        stem = {
            "photo.jpg": "truncated.jpg",
            "progressive.jpg": "truncated-progressive.jpg",
            "lossy.webp": "truncated-lossy.webp",
        }
        put(stem.get(name, "truncated." + name.split(".")[1]), content[: int(len(content) * keep)])
    content = (folder / "photo.jpg").read_bytes()
    assert content.endswith(b"\xff\xd9")
    put("truncated-two-bytes.jpg", content[:-2])
    put("truncated-header.png", (folder / "rgb.png").read_bytes()[:20])

    # What Pillow's own decoder makes of files that ours may differ in, to bound the difference.
    (folder / "decoded").mkdir(exist_ok=True)
    for path in [*folder.glob("*.jpg"), *folder.glob("lossy*.webp"), *folder.glob("maxval-100.*")]:
        try:
            rgb = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except OSError:
            continue
        rgb.save(folder / "decoded" / f"{path.name}.png", optimize=True)


def placed(gif, width, height, left, top):
    """Moves a GIF's only frame onto a screen of another size."""
    gif = bytearray(gif)
    gif[6:10] = struct.pack("<HH", width, height)
    at = 13 + (3 << (gif[10] & 7) + 1 if gif[10] & 128 else 0)
    while gif[at] == 0x21:
        at += 2
        while gif[at]:
            at += gif[at] + 1
        at += 1
    gif[at + 1 : at + 5] = struct.pack("<HH", left, top)
    return bytes(gif)
