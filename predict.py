"""Read handwritten digits from pictures and photos with a trained network.

    python predict.py picture.jpg folder ...       one line a picture: its digits, left to right, line by line
    python predict.py --json - <picture.jpg        the same with boxes and probabilities, as JSON
    python predict.py --seen seen.png photo.jpg    and draw what was found in it, and what the network saw

How a picture is read stands in reader/.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from reader import Reading, read_picture
from reader.read import DOUBTFUL
from script import REFERENCE, Failure, Net, load_net, run_command, save

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_READ = 150_000_000  # pixels
OWN = {"Software": "predict.py --seen"}  # by which a PNG says that it may be overwritten


def is_own(path: Path) -> bool:
    """Whether a file is a picture that --seen drew."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return OWN.items() <= picture.info.items()
    except Exception:  # Pillow's decoders raise nearly anything
        return False


def picture_files(paths: list[str]) -> Iterator[str]:
    """These paths, with the pictures in a folder instead of the folder, without those that --seen drew."""
    endings = [ending for ending, name in Image.registered_extensions().items() if name in FORMATS]
    endings += [".heic", ".heif"]  # phones' pictures, to be refused with a reason
    for path in paths:
        inside = []
        with contextlib.suppress(OSError):  # no folder, or one that may not be read: pages() says so
            inside = [file for file in sorted(Path(path).iterdir()) if file.suffix.lower() in endings]
            # macOS writes ._x.jpg beside x.jpg; a named pipe would wait for ever.
            inside = [file for file in inside if not (file.name.startswith("._") or file.is_fifo() or is_own(file))]
        yield from map(str, inside or [path])


def pages(path: str, one: bool) -> Iterator[tuple[str, Image.Image | str]]:
    """The pages of a picture file, or of standard input, with their names, or why it cannot be opened.

    one: a file of several pages is refused.
    """
    data = b""
    try:
        if os.path.isdir(path):
            os.listdir(path)  # or why it may not be read
            raise Failure("it is a folder without pictures")
        if path != "-":
            data = Path(path).read_bytes()
        elif sys.stdin and not sys.stdin.isatty():
            data = sys.stdin.buffer.read()
        if not data:
            raise Failure("nothing comes from standard input" if path == "-" else "it is empty")
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        last = getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1
        if one and last > 1:
            raise Failure(f"it has {last} pages, and --seen draws one")
        for number in range(last):
            picture.seek(number)
            if picture.width * picture.height > MOST_READ:
                raise Failure(f"it is too large: more than {MOST_READ:,} pixels")
            yield path if last == 1 else f"{path} page {number + 1}", loaded(picture, data)
    except Image.UnidentifiedImageError:
        kind = "is HEIC, AVIF or a film" if data[4:8] == b"ftyp" else "is not a picture"
        yield path, f"it {kind}; save it as JPEG"
    except Exception as error:  # Pillow's decoders raise nearly anything for a broken file
        yield path, getattr(error, "strerror", None) or str(error) or type(error).__name__


def loaded(picture: Image.Image, data: bytes) -> Image.Image:
    """The picture in a file of this content, with its pixels. A JPEG that only lacks its end is complete."""
    try:
        picture.load()
    except OSError:
        if picture.format != "JPEG":
            raise
        picture = Image.open(io.BytesIO(data + b"\xff\xd9"))
        if picture.convert("L").crop((picture.width - 8, picture.height - 8, *picture.size)).getextrema() == (128, 128):
            raise  # what is missing is grey
    return picture


def line_of(reading: Reading) -> str:
    """What is read, as text: a single digit with the runner-up, or lines of them, with ? where one is not sure."""
    if len(reading.digits) == 1:
        (p, q), (first, second) = (part.tolist() for part in reading.digits[0].probabilities.topk(2))
        return f"{first} ({100 * p:.1f}%), then {second} ({100 * q:.1f}%)"
    texts = [" ".join(f"{digit.value}{'?' * (digit.probability < DOUBTFUL)}" for digit in row) for row in reading.rows]
    return " / ".join(texts)


def object_of(name: str, reading: Reading) -> str:
    """What is read, as a JSON object."""
    read = [
        {"line": n, "box": reading.box(digit.mark), "digit": digit.value, "probability": round(digit.probability, 4)}
        for n, row in enumerate(reading.rows, 1)
        for digit in row
    ]
    problem = {"error": reading.problem} if reading.problem else {}
    left_out = [reading.box(mark) for mark in reading.left_out]
    return json.dumps({"file": name, "digits": read, "left_out": left_out, **problem})


def predict(paths: list[str], net: Net, as_json: bool, seen: Path | None) -> int:
    """Print what each picture's digits are, and draw the picture to seen. Returns the exit status: 1 if any failed."""
    warnings.simplefilter("ignore")  # Pillow's, of damage that does not hinder
    Image.MAX_IMAGE_PIXELS = None  # pages() has its own limit
    status = 0
    for name, picture in itertools.chain.from_iterable(pages(file, bool(seen)) for file in picture_files(paths)):
        reading = Reading(problem=picture) if isinstance(picture, str) else read_picture(picture, net)
        if as_json:
            print(object_of(name, reading))
        elif reading.digits:
            print(f"{name}: {line_of(reading)}")
        if reading.problem:
            print(f"predict.py: error: cannot read {name}: {reading.problem}", file=sys.stderr)
            status = 1
        elif reading.left_out:
            print(f"predict.py: {name}: marks left out: {len(reading.left_out)}", file=sys.stderr)
        if seen and reading.sheet is not None:
            import pictures  # here, as matplotlib takes as long to import as a picture to be read

            save(seen, pictures.png(pictures.seen(reading), OWN))
    return status


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 success, 1 failure, 130 Ctrl-C."""
    parser = argparse.ArgumentParser("predict.py", usage=argparse.SUPPRESS, description=__doc__.splitlines()[0])
    text = "picture files of any size and mode, folders of them, or - for standard input"
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help=text)
    parser.add_argument("--weights", type=Path, default=REFERENCE, metavar="FILE", help="default: the reference run's")
    parser.add_argument("--json", action="store_true", help="print a JSON object a picture, with boxes, in a line")
    text = "draw one picture, what was found in it and what the network saw, as a new PNG or one drawn before"
    parser.add_argument("--seen", type=Path, metavar="FILE.png", help=text)
    args = parser.parse_args(argv)
    if args.seen and (len(args.pictures) != 1 or os.path.isdir(args.pictures[0])):
        parser.error("--seen goes with one picture")
    if args.seen and (args.seen.suffix != ".png" or (os.path.exists(args.seen) and not is_own(args.seen))):
        parser.error(f"--seen {args.seen}: not a new file that ends in .png, nor one that --seen drew")
    return run_command("predict.py", lambda: predict(args.pictures, load_net(args.weights), args.json, args.seen))


if __name__ == "__main__":
    sys.exit(main())
