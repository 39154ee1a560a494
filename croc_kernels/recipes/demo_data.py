"""The pictures that scikit-image, scikit-learn and matplotlib ship, as a LLaVA-format JSON and an
image folder.

Only files inside the installed wheels are read: nothing is downloaded. The captions are what the
libraries' own docstrings say about their pictures; for those without a description, a sentence of
ours.
"""

import importlib.util
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# Decoding a picture should cost less than the step on it.
LONGEST_SIDE = 256

# File in skimage/data -> function in skimage.data whose docstring describes it.
_SKIMAGE = {
    "astronaut.png": "astronaut",
    "brick.png": "brick",
    "camera.png": "camera",
    "cell.png": "cell",
    "chelsea.png": "chelsea",
    "chessboard_GRAY.png": "checkerboard",
    "clock_motion.png": "clock",
    "coffee.png": "coffee",
    "coins.png": "coins",
    "color.png": "colorwheel",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "horse.png": "horse",
    "hubble_deep_field.jpg": "hubble_deep_field",
    "ihc.png": "immunohistochemistry",
    "moon.png": "moon",
    "motorcycle_left.png": "stereo_motorcycle",
    "motorcycle_right.png": "stereo_motorcycle",
    "page.png": "page",
    "phantom.png": "shepp_logan_phantom",
    "retina.jpg": "retina",
    "rocket.jpg": "rocket",
    "text.png": "text",
}
_SKLEARN = {
    "china.jpg": "A pagoda above a lake in China. Its red and green storeys stand between trees.",
    "flower.jpg": "An orange dahlia in bloom. The round flower stands before dark green leaves.",
}
_MATPLOTLIB = {
    "grace_hopper.jpg": "Grace Hopper, the computer scientist. She wears the uniform of the "
    "United States Navy and stands before a flag.",
    "Minduka_Present_Blue_Pack.png": "A blue present. The box is tied with a silver ribbon.",
}
_PAIRS = (
    ("motorcycle_left", "motorcycle_right"),
    ("brick", "gravel"),
    ("china", "flower"),
    ("chelsea", "astronaut"),
)
# Sentences about licences, downloads and web pages describe the file, not the picture.
_NOT_THE_PICTURE = re.compile(
    r"copyright|licen[sc]|CC0|download|public domain|https?:|courtesy|benchmark|sampled|modify|"
    r"\b(of|in|see)\.$",
    re.I,
)


@dataclass(frozen=True)
class Picture:
    """A picture on disk and what is known about it: the first sentence is the brief caption."""

    name: str
    path: Path
    sentences: tuple[str, ...]

    @property
    def brief(self) -> str:
        """One sentence."""
        return self.sentences[0]

    @property
    def detailed(self) -> str:
        """At most four sentences, so that lengths differ but stay small."""
        return " ".join(self.sentences[:4])


def describe(docstring: str) -> tuple[str, ...]:
    """The sentences of a numpy-style docstring that describe a picture, without sections and
    licence notes.
    """
    text = re.split(r"\n[A-Z]\w+\n-{3,}\n", inspect.cleandoc(docstring))[0].split("::")[0]
    text = re.sub(r"\s*\[\d+\]_|``?|\*", "", text)
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    sentences = [s for p in paragraphs for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", p)]
    kept = [
        s if s.endswith(".") else s + "." for s in sentences if s and not _NOT_THE_PICTURE.search(s)
    ]
    return tuple(kept)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(
            f"demo: it must have the pictures of scikit-image and scikit-learn, got no {name}; "
            'install them with: pip install "croc-kernels[demo]"'
        )
    return Path(spec.origin).parent


def find_pictures() -> list[Picture]:
    """All pictures, in a fixed order.

    Raises:
        RuntimeError: scikit-image, scikit-learn or matplotlib is missing, with the command that
            installs them.
    """
    from skimage import data as skimage_data

    pictures = []
    for file, function in _SKIMAGE.items():
        path = _package("skimage") / "data" / file
        sentences = describe(inspect.getdoc(getattr(skimage_data, function)) or function)
        pictures.append(Picture(path.stem, path, sentences))
    ours = {_package("sklearn") / "datasets" / "images": _SKLEARN}
    ours[_package("matplotlib") / "mpl-data" / "sample_data"] = _MATPLOTLIB
    for folder, captions in ours.items():
        for file, caption in captions.items():
            sentences = tuple(re.split(r"(?<=[.])\s+(?=[A-Z])", caption))
            pictures.append(Picture(Path(file).stem, folder / file, sentences))
    # Other releases of these packages may ship fewer pictures; the demo takes what is there.
    return [picture for picture in pictures if picture.path.is_file()]


def _turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def make_records(pictures: list[Picture]) -> list[dict]:
    """Brief and detailed captions of every picture, pairs of pictures, two turns on one, and text
    without any.
    """
    by_name = {picture.name: picture for picture in pictures}
    records: list[dict] = []

    def add(images: list[str], turns: list[dict]) -> None:
        record: dict = {"id": str(len(records)), "conversations": turns}
        if images:
            files = [f"{name}.png" for name in images]
            record["image"] = files[0] if len(files) == 1 else files
        records.append(record)

    for picture in pictures:
        add([picture.name], _turns("<image>\nDescribe the picture.", picture.detailed))
        add([picture.name], _turns("<image>\nWhat is this?", picture.brief))
    for first, second in _PAIRS:
        if first in by_name and second in by_name:
            answer = f"First: {by_name[first].brief} Second: {by_name[second].brief}"
            add([first, second], _turns("<image>\n<image>\nWhat do the two pictures show?", answer))
    for picture in pictures[:3]:
        turns = _turns("<image>\nWhat is this?", picture.brief)
        add([picture.name], turns + _turns("Say more.", picture.detailed))
    tokens = "A visual token is what the projector makes of one patch of a picture."
    add([], _turns("What is a visual token?", tokens))
    pool = "The pool holds learnable rows. They take the places of the masked visual tokens."
    add([], _turns("What is the pool?", pool))
    return records


def write_demo_data(folder: Path) -> tuple[Path, Path]:
    """Write ``data.json`` and ``images/`` below ``folder``; return their paths."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    pictures = find_pictures()
    for picture in pictures:
        with Image.open(picture.path) as image:
            rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        small = Image.alpha_composite(white, rgba).convert("RGB")
        small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        small.save(images / f"{picture.name}.png")
    data_file = folder / "data.json"
    data_file.write_text(json.dumps(make_records(pictures), indent=1))
    return data_file, images
