"""The demo: its pictures and captions, its model, its plots, and the whole of it in a few steps."""

import argparse
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from croc_kernels.recipes import demo_data
from croc_kernels.recipes.command import run
from croc_kernels.recipes.demo_data import describe, find_pictures, make_records, write_demo_data
from croc_kernels.recipes.demo_model import train_tokenizer
from croc_kernels.recipes.pictures import plot_losses, plot_pictures, pool_colours
from croc_kernels.recipes.pretrain import first_and_last
from croc_kernels.recipes.probe import Probe
from croc_kernels.recipes.records import check_record

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the demo must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_describe_keeps_the_picture_and_drops_the_licence() -> None:
    docstring = """Greek coins from Pompeii.

    This image shows several coins
    outlined against a gray background [1]_.

    This image was downloaded from a museum. No known copyright restrictions.

    Returns
    -------
    coins : array
        Coins image.
    """
    assert describe(docstring) == (
        "Greek coins from Pompeii.",
        "This image shows several coins outlined against a gray background.",
    )


@pytest.mark.usefixtures("_no_network")
def test_pictures_are_there_and_described() -> None:
    pictures = {picture.name: picture for picture in find_pictures()}
    assert len(pictures) >= 20
    assert {"chelsea", "astronaut", "rocket", "china", "flower", "grace_hopper"} <= set(pictures)
    assert pictures["chelsea"].brief == "Chelsea the cat."
    for picture in pictures.values():
        assert picture.path.is_file()
        assert picture.sentences
        assert "copyright" not in picture.detailed.lower()


def test_missing_library_names_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setattr(demo_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'no skimage; .* pip install "croc-kernels\[demo\]"'):
        find_pictures()


def test_records_have_every_kind_of_sample(tmp_path: Path) -> None:
    data_file, images = write_demo_data(tmp_path)
    made = [check_record(record) for record in json.loads(data_file.read_text())]
    assert {len(record.images) for record in made} == {0, 1, 2}
    assert {len(record.turns) for record in made} == {2, 4}
    for record in made:
        for name in record.images:
            with Image.open(images / name) as picture:
                assert picture.mode == "RGB"
                assert max(picture.size) <= demo_data.LONGEST_SIDE


def test_records_without_pictures_are_text_only() -> None:
    assert all("image" not in record for record in make_records([]))


def test_tokenizer_reads_back_what_it_wrote() -> None:
    tokenizer = train_tokenizer(["The pixel spacing is 0.107 µm.", "A cat."])
    text = "A µm cat <image> and what it never saw: ü€."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 1
    assert tokenizer.decode(ids[1:]) == text


def history(steps: int) -> list[dict]:
    return [
        {"step": s, "loss": 1.0, "caption_loss": 9.0 - s, "reconstruction_loss": 1.0 / s}
        for s in range(1, steps + 1)
    ]


def test_first_and_last_are_means_of_up_to_five() -> None:
    losses = first_and_last([*history(20), {"train_loss": 3.0, "step": 20}])
    assert losses["caption_loss"] == pytest.approx((6.0, -9.0))
    assert first_and_last(history(1))["caption_loss"] == (8.0, 8.0)
    assert first_and_last(history(3))["caption_loss"] == (8.0, 6.0)
    assert first_and_last([]) == {}


def make_probe(seed: int) -> Probe:
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(16, generator=generator) < 0.75
    index = torch.where(masked, torch.arange(16), -1)
    pixels = torch.rand(32, 32, 3, generator=generator)
    return Probe(pixels, masked, index, torch.rand(16, generator=generator), 0.5)


def assert_picture(path: Path, width: int) -> None:
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.size[0] == width
        assert len(np.unique(np.asarray(picture))) > 10


@pytest.mark.parametrize("steps", [0, 1, 3, 200])
def test_plot_losses_writes_a_picture(steps: int, tmp_path: Path) -> None:
    plot_losses(history(steps), tmp_path / "losses.png")
    assert_picture(tmp_path / "losses.png", 1300)


def test_plot_pictures_writes_a_picture(tmp_path: Path) -> None:
    before, after = [make_probe(0), make_probe(1)], [make_probe(0), make_probe(1)]
    pool = torch.randn(16, 8)
    plot_pictures(["a", "b"], before, after, pool, tmp_path / "pictures.png")
    assert_picture(tmp_path / "pictures.png", 1690)


def test_pool_colours_give_near_rows_near_colours() -> None:
    along = torch.linspace(-1, 1, 9)[torch.randperm(9)]
    colours = pool_colours(along[:, None] * torch.tensor([[3.0, 4.0]]))
    ranks = torch.from_numpy(colours)[along.argsort()]
    assert sorted(ranks.tolist()) in (ranks.tolist(), ranks.tolist()[::-1])
    assert (ranks.min(), ranks.max()) == (0.0, 1.0)


@pytest.mark.usefixtures("_no_network")
def test_demo_from_data_to_caption(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = {
        "demo": True, "output": str(tmp_path), "max_steps": 8, "save_steps": 4, "use_cpu": True,
        "per_device_train_batch_size": 4, "disable_tqdm": True,
    }  # fmt: skip
    assert run(argparse.Namespace(**options)) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("caption loss", "reconstruction loss"):
        (line,) = (line for line in lines if line.startswith(name))
        first, last = (float(part.split()[-1]) for part in line.split(","))
        assert last < first
    assert any(line.startswith("rocket.png, 'What is this?': ") for line in lines)
    told = "in the data: 'Launch photo of DSCOVR on Falcon 9 by SpaceX.'; before tuning: "
    assert any(line.startswith(told) for line in lines)
    assert any(line.startswith("tuning without masks, caption loss: first ") for line in lines)
    assert (tmp_path / "tuned" / "model.safetensors").is_file()
    assert any("no sample was left out or cut" in line for line in lines)
    assert_picture(tmp_path / "losses.png", 1300)
    assert_picture(tmp_path / "pictures.png", 1690)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert not list(tmp_path.rglob("pytorch_model*.bin"))
    # Once finished, --resume has nothing left to train and ends in the same way.
    assert run(argparse.Namespace(**options, resume="last")) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[-6:] == lines[-6:]
    assert not (tmp_path / "checkpoint-9").exists()
    # Without --resume, nothing is written over.
    assert run(argparse.Namespace(**options)) == 2
    assert "output must hold no checkpoint" in capsys.readouterr().err
