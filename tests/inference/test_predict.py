"""`disttrain predict`: images as packing makes them, results as evaluation has them, files that are none."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from disttrain.inference.classifier import Classifier, load_model
from disttrain.inference.predict_command import listed
from disttrain.inference.prediction import predict, prepared
from disttrain.inference.prediction_grid import Cell, draw
from disttrain.inference.run import Facts
from disttrain.shards.imagefolder import fitted, pack_folder
from disttrain.shards.images import decode_image
from disttrain.shards.index import load_index
from disttrain.shards.pack import Options
from kit.commands import Run
from kit.marks import nightly
from kit.shards import read_split

HEIC = (  # 16x16 pixels, the left half red, the right half blue
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAA"
    "ACJpbG9jAAAAAERAAAEAAQAAAAABoAABAAAAAAAAAFQAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRt"
    "AAAAAAABAAAA/GlwcnAAAADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMA"
    "AAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQBwXPBiQAAABNjb2xybmNs"
    "eAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAAChjbGFwAAAAEAAAAAEAAAAQAAAAAf///9AAAAAC////0AAAAAIAAAAQcGl4"
    "aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAAXG1kYXQAAABQKAGvBPIag4aAQlCV79SJf/vH9/4HywYdskPvO/v/"
    "rSWx6SGobyP3oGi8srWBVvmmR0ClABUvTuAe1UBbZwgHfcn+xz8aMdfUlEHbqkYcyPA="
)


def facts(height: int, width: int, channels: Any) -> Facts:
    return Facts("cnn_mnist", {}, ("a", "b"), channels, height, width, (0.5,), (0.2,), "data")


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory: pytest.TempPathFactory, digits_root: Path) -> Path:
    """The validation split of the digits as <class>/<key>.png, with a few files that are not to be read."""
    folder = tmp_path_factory.mktemp("files")
    for key, image, label in read_split(load_index("digits", str(digits_root)), "val"):
        path = folder / str(label) / f"{key}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
    (folder / "notes.txt").write_text("no image")
    (folder / "3" / ".hidden.png").write_text("no image")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.png").write_text("no image")
    return folder


def picture(seed: int, size: tuple[int, int] = (23, 31)) -> Image.Image:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def write_every_kind(folder: Path) -> int:
    """Writes a picture of each usual kind; returns their number."""
    folder.mkdir(parents=True)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    deep = (np.arange(23 * 31).reshape(31, 23) * 90).astype(np.uint16)
    palette = picture(5).quantize(16)
    palette.info["transparency"] = 3
    pictures: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "gray.png": (picture(0).convert("L"), {}),
        "gray_alpha.png": (picture(1).convert("LA"), {}),
        "rgb.png": (picture(2), {}),
        "rgba.png": (picture(3).convert("RGBA"), {}),
        "bilevel.png": (picture(4).convert("1"), {}),
        "palette.png": (palette, {"transparency": 3}),
        "deep.png": (Image.fromarray(deep), {}),
        "photo.jpg": (picture(6, (64, 40)), {"quality": 80}),
        "gray.jpg": (picture(7).convert("L"), {}),
        "cmyk.jpg": (picture(8).convert("CMYK"), {}),
        "rotated.jpg": (picture(9, (40, 20)), {"exif": rotated}),
        "rotated.png": (picture(10, (40, 20)), {"exif": rotated}),
        "exact.jpg": (picture(11, (8, 8)), {"quality": 70}),
        "exact.png": (picture(12, (8, 8)), {}),
        "one_pixel.png": (picture(13, (1, 1)), {}),
        "wide.webp": (picture(14, (90, 9)), {}),
        "old.bmp": (picture(15), {}),
        "moving.gif": (picture(16), {"save_all": True, "append_images": [picture(17)]}),
        "scan.tiff": (picture(18), {}),
    }
    for name, (image, options) in pictures.items():
        image.save(folder / name, **options)
    return len(pictures)


# --- Images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_of_any_kind_becomes_what_packing_makes_of_it(tmp_path: Path, channels: int) -> None:
    source, files = tmp_path / "source", tmp_path / "source" / "train" / "a"
    count = write_every_kind(files)
    if channels == 1:  # a data set is gray if every image is
        for path in files.iterdir():
            if not path.name.startswith(("gray", "deep", "bilevel")):
                path.unlink()
        count = len(list(files.iterdir()))
        assert count == 5
    shutil.copytree(source / "train", source / "val")
    index = pack_folder(source, "kinds", str(tmp_path), Options(), size=8)
    assert index.channels == channels
    packed = Counter(decode_image(image, channels).tobytes() for _, image, _ in read_split(index, "val"))
    found = Counter(prepared(path, facts(8, 8, channels)).tobytes() for path in files.iterdir())
    assert found == packed
    assert found.total() == count


def test_images_that_are_not_square_are_fitted_to_the_data_set(tmp_path: Path) -> None:
    picture(0, (60, 60)).save(tmp_path / "square.png")
    pixels = prepared(tmp_path / "square.png", facts(6, 12, 3))
    assert pixels.shape == (6, 12, 3)
    expected = picture(0, (60, 60)).resize((12, 6), Image.Resampling.BICUBIC, (0, 15, 60, 45))
    assert np.array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize("side", [8, 9, 63, 64, 97, 300, 800])
def test_large_pictures_are_resized_like_small_ones(side: int) -> None:
    """Against Pillow's resampling in one go."""
    image = picture(0, (40, 30)).resize((side + 50, side), Image.Resampling.BILINEAR)
    expected = ImageOps.fit(image, (8, 8), Image.Resampling.BICUBIC)
    difference = np.abs(fitted(np.asarray(image), 8, 8).astype(int) - np.asarray(expected).astype(int))
    if side < 64:
        assert not difference.any()
    else:
        assert difference.mean() < 0.5
        assert difference.max() <= 3


def test_pixels_may_be_given_instead_of_files() -> None:
    pixels = np.asarray(picture(0, (8, 8)))
    assert np.array_equal(prepared(pixels, facts(8, 8, 3)), pixels)
    gray = np.asarray(picture(0, (8, 8)).convert("L"))
    assert np.array_equal(prepared(pixels, facts(8, 8, 1))[..., 0], gray)
    assert np.array_equal(prepared(gray, facts(8, 8, 3)), np.stack([gray] * 3, -1))
    for wrong in (pixels.astype(np.float32), pixels[None], pixels[..., :2]):
        with pytest.raises(ValueError, match=r"expected uint8 \[H, W\]"):
            prepared(wrong, facts(8, 8, 3))


# --- Results ----------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_evaluation(
    disttrain: Run, trained_run: Path, digit_files: Path
) -> None:
    done = disttrain("predict", trained_run, digit_files, "--json", "--top", 10)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        f"disttrain: left out: 1 x hidden folder: {digit_files}/.cache",
        f"disttrain: left out: 1 x .txt file: {digit_files}/notes.txt",
        f"disttrain: left out: 1 x hidden file: {digit_files}/3/.hidden.png",
    ]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["image"] for line in lines] == sorted(line["image"] for line in lines)
    evaluation = json.loads(disttrain("eval", trained_run, "--json").stdout)
    pairs = Counter((int(Path(line["image"]).parent.name), int(line["class"])) for line in lines)
    confusion = evaluation["confusion"]
    assert pairs == Counter(
        {(i, j): confusion[i][j] for i in range(10) for j in range(10) if confusion[i][j]}
    )
    loss = 0.0
    for line in lines:
        assert [line["class"], line["probability"]] == [*line["top"][0].values()]
        assert sum(one["probability"] for one in line["top"]) == pytest.approx(1, abs=1e-5)
        shares = {one["class"]: one["probability"] for one in line["top"]}
        assert len(shares) == 10
        loss -= np.log(shares[Path(line["image"]).parent.name])
    assert loss / 359 == pytest.approx(evaluation["loss"], rel=1e-4)


def test_the_table_names_the_likeliest_classes(disttrain: Run, trained_run: Path, digit_files: Path) -> None:
    file = next(iter(sorted((digit_files / "0").iterdir())))
    done = disttrain("predict", trained_run, file, "--top", 2)
    assert (done.returncode, done.stderr) == (0, "")
    header, row = done.stdout.splitlines()
    assert header.split() == ["image", "class", "probability"]
    name, label, share, unit, second, less, _ = row.split()
    assert (name, label, unit) == (str(file), "0", "%")
    assert second != "0"
    assert float(less) < float(share) <= 100


def test_files_that_are_no_images_are_named_and_the_others_go_on(
    disttrain: Run, trained_run: Path, digit_files: Path, tmp_path: Path
) -> None:
    good = sorted((digit_files / "1").iterdir())[:2]
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(good[0].read_bytes()[:60])
    (tmp_path / "evil\x1b[2J\n.png").write_text("")
    os.mkfifo(tmp_path / "pipe.png")
    bad = ["text.png", "cut.png", "missing.png", "pipe.png", "evil\x1b[2J\n.png"]
    done = disttrain("predict", trained_run, bad[0], good[0], *bad[1:], good[1], "--json")
    assert done.returncode == 65
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["image"] for row in rows] == [bad[0], str(good[0]), *bad[1:], str(good[1])]
    assert [row["problem"] is None for row in rows] == [row["class"] is not None for row in rows]
    assert rows[3] == {
        "image": "missing.png",
        "class": None,
        "probability": None,
        "top": [],
        "problem": "No such file or directory",
    }
    lines = done.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines[:-1]] == [*bad[:-1], "evil\\x1b[2J\\n.png"]
    assert lines[2].endswith("missing.png: No such file or directory")
    assert lines[3].endswith("pipe.png: is not a file")
    assert lines[-1] == "disttrain: 5 of 7 files could not be used"


@pytest.mark.parametrize("separator", ["\0", *nightly("\n")])
def test_names_come_from_standard_input(
    trained_run: Path, digit_files: Path, tmp_path: Path, separator: str
) -> None:
    names = [str(path) for path in sorted((digit_files / "2").iterdir())[:3]]
    if separator == "\0":
        odd = tmp_path / "a\nb \u00e4.png"
        shutil.copy(names[0], odd)
        names.append(str(odd))
    done = subprocess.run(
        [sys.executable, "-m", "disttrain", "predict", str(trained_run), "-", "--json"],
        input=separator.join(names) + separator,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["image"] for line in done.stdout.splitlines()] == names


def test_a_bar_is_drawn_on_a_terminal_and_leaves_the_output_alone(
    trained_run: Path, digit_files: Path
) -> None:
    terminal, side = pty.openpty()
    shown: list[bytes] = []
    reader = threading.Thread(target=lambda: shown.extend(iter(lambda: _read(terminal), b"")))
    reader.start()  # a terminal that nobody reads holds up who writes to it
    try:
        done = subprocess.run(
            [*(sys.executable, "-m", "disttrain", "predict"), str(trained_run), str(digit_files), "--json"],
            env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
            stdout=subprocess.PIPE,
            stderr=side,
            text=True,
            timeout=240,
        )
    finally:
        os.close(side)
        reader.join(60)
        os.close(terminal)
    assert done.returncode == 0
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 359
    assert b"359 images" in b"".join(shown)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # nobody has the other side open any more
        return b""


# --- The sheet --------------------------------------------------------------------------------------


def test_the_sheet_shows_images_and_tells_right_from_wrong(
    disttrain: Run, trained_run: Path, digit_files: Path, tmp_path: Path
) -> None:
    done = disttrain("predict", trained_run, digit_files / "8", "--json", "--grid", "sheet.png")
    assert (done.returncode, done.stderr) == (0, "")
    labels = [json.loads(line)["class"] for line in done.stdout.splitlines()]
    with Image.open(tmp_path / "sheet.png") as sheet:
        colors = dict(sheet.getcolors(1 << 20) or [])
    colors = {color: count for count, color in ((c, k) for c, k in colors.items())}
    frame = 4 * 114 * 2  # pixels of a frame, about
    wrong = sum(label != "8" for label in labels)
    assert colors.get((0x1A, 0x7F, 0x37), 0) >= (len(labels) - wrong) * frame * 0.9
    assert (colors.get((0xCF, 0x22, 0x2E), 0) >= frame * 0.9) == (wrong > 0)


def test_a_cell_holds_the_pixels_and_its_text_stays_inside() -> None:
    pixels = np.asarray(picture(3, (8, 8)))
    sheet = np.asarray(draw([Cell(pixels, "w" * 80, 1.0, None), Cell(pixels, "b", 0.5, "w" * 80)]))
    block = sheet[8 : 8 + 112, 8 : 8 + 112]
    assert np.array_equal(block[7::14, 7::14], pixels), "8 pixels of 14 each"
    assert (sheet[:, 120:126] == 255).all(), "between the two"
    assert (sheet[:, -6:] == 255).all()


MISTAKES: dict[str, tuple[int, list[str], str]] = {
    "no run": (2, ["nowhere", "x.png"], "nowhere: is not a run folder"),
    "no images": (65, ["RUN", "empty"], "empty: no image files; give files, or folders with images"),
    "no picture": (2, ["RUN", "x.png", "--grid", "x.doc"], "--grid x.doc: expected a name that ends in"),
    "no folder": (2, ["RUN", "x.png", "--grid", "no/x.png"], "--grid no/x.png: folder no does not exist"),
    "no checkpoint": (66, ["RUN", "x.png", "--checkpoint", "no"], "no: there is no checkpoint; give"),
    "another file": (66, ["text.png", "text.png"], "text.png: is not a file of `disttrain export"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(disttrain: Run, trained_run: Path, tmp_path: Path, mistake: str) -> None:
    code, arguments, message = MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    done = disttrain("predict", *(str(trained_run) if word == "RUN" else word for word in arguments))
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# --- In Python --------------------------------------------------------------------------------------


def test_python_gets_a_prediction_for_each_image(trained_run: Path, digit_files: Path) -> None:
    files = sorted((digit_files / "4").iterdir())[:3]
    model = load_model(trained_run)
    found = predict(model, [*files, digit_files / "missing.png"], top=2)
    assert [one.image for one in found[:3]] == [str(path) for path in files]
    assert [one.problem for one in found] == [None, None, None, "No such file or directory"]
    assert (found[3].label, found[3].probability, found[3].top) == (None, None, ())
    assert all(len(one.top) == 2 for one in found[:3])
    pixels = np.asarray(Image.open(files[0]))
    (same,) = predict(trained_run, pixels)
    assert same.label == found[0].label
    assert same.probability == pytest.approx(found[0].probability, abs=1e-6)
    assert not torch.is_inference_mode_enabled()
    (one,) = predict(model, str(files[0]))
    assert one.top == found[0]._replace(top=one.top).top


def test_an_image_may_be_anything_that_holds_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    picture(6, (64, 40)).save(path, quality=80)
    expected = prepared(path, facts(8, 8, 3))
    data = path.read_bytes()
    with path.open("rb") as file, Image.open(path) as opened:
        for image in (data, bytearray(data), memoryview(data), file, io.BytesIO(data), opened):
            assert np.array_equal(prepared(image, facts(8, 8, 3)), expected), type(image)
    pixels = np.asarray(picture(0, (8, 8)))
    for tensor in (torch.tensor(pixels), torch.tensor(pixels).permute(2, 0, 1)):
        assert np.array_equal(prepared(tensor, facts(8, 8, 3)), pixels)


def test_what_holds_no_image_is_refused_and_no_file_descriptor_is_touched(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with (tmp_path / "a.txt").open() as file:
        number: Any = file.fileno()
        with pytest.raises(ValueError, match="expected a file name, bytes"):
            prepared(number, facts(8, 8, 3))
        os.fstat(number)  # it is still open
        text: Any = file
        with pytest.raises(ValueError, match='open it with "rb"'):
            prepared(text, facts(8, 8, 3))
    for wrong in (b"12", b""):
        with pytest.raises(ValueError, match="not an image"):
            prepared(wrong, facts(8, 8, 3))
    with pytest.raises(ValueError, match=r"got torch.float32 \[3, 8, 8\]; convert pixels of 0..1"):
        prepared(torch.zeros(3, 8, 8), facts(8, 8, 3))


def test_one_image_of_any_kind_is_not_taken_for_several(trained_run: Path, digit_files: Path) -> None:
    path = next(iter(sorted((digit_files / "4").iterdir())))
    model = load_model(trained_run)
    (expected,) = predict(model, path)
    pixels = np.array(Image.open(path))
    for image in (path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path), torch.tensor(pixels)):
        (found,) = predict(model, image)
        assert found.top == expected.top
    assert len(predict(model, torch.tensor(pixels)[None, ..., None].expand(3, -1, -1, -1))) == 3
    (bad,) = predict(model, b"12")
    assert bad.as_json()["class"] is None
    assert "not an image" in bad.as_json()["problem"]


@pytest.mark.nightly
def test_the_named_option_allows_more_pixels(disttrain: Run, trained_run: Path, tmp_path: Path) -> None:
    picture(0, (40, 30)).save(tmp_path / "a.png")
    done = disttrain("predict", trained_run, "a.png", "--max-pixels", 1199)
    assert done.returncode == 65
    assert "a.png: 40x30 pixels are over the limit of 1199; allow more with --max-pixels" in done.stderr
    assert disttrain("predict", trained_run, "a.png", "--max-pixels", 1200).returncode == 0


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "mpo", "avif", "jp2", "heic"])
def test_less_usual_formats_are_decoded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"A.{suffix.upper()}"
    if suffix == "heic":
        pytest.importorskip("pi_heif")
        path.write_bytes(base64.b64decode(HEIC))
    else:
        two = Image.new("RGB", (16, 16), (200, 30, 30))
        two.paste((20, 40, 220), (8, 0, 16, 16))
        kinds = {"avif": "AVIF", "jp2": "JPEG2000", "mpo": "MPO"}
        two.save(path, kinds.get(suffix, "JPEG"), save_all=suffix == "mpo")
    assert listed([str(tmp_path)]) == ([str(path)], [])
    pixels = prepared(path, facts(16, 16, 3)).astype(int)
    assert abs(pixels[8, 2] - (200, 30, 30)).max() < 12
    assert abs(pixels[8, 13] - (20, 40, 220)).max() < 12


def test_many_images_stay_in_order(trained_run: Path, digit_files: Path) -> None:
    files = [path for path in sorted(digit_files.rglob("*.png")) if not path.name.startswith(".")]
    files = [path for path in files if ".cache" not in path.parts]
    model = load_model(trained_run)
    found = predict(model, files)
    assert [one.image for one in found] == [str(path) for path in files]
    images = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in files]))[..., None]
    with torch.inference_mode():
        shares = model(images).softmax(1)
    assert [one.label for one in found] == [model.classes[i] for i in shares.argmax(1).tolist()]
    torch.testing.assert_close(
        torch.tensor([one.probability for one in found]), shares.amax(1), atol=1e-5, rtol=1e-4
    )


def test_a_model_takes_raw_images_only(trained_run: Path) -> None:
    model = load_model(trained_run)
    assert isinstance(model, Classifier)
    assert not model.training
    for images in (torch.zeros(1, 8, 8, 1), torch.zeros(8, 8, 1, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8 images \[B, 8, 8, 1\]"):
            model(images)


# --- Code of the user's own -------------------------------------------------------------------------


@pytest.fixture
def own_run(trained_run: Path, tmp_path: Path) -> Path:
    """A run whose model is in a module beside it, in the folder in which it was trained."""
    home = tmp_path / "where trained"
    run = home / "run"
    shutil.copytree(trained_run, run)
    (home / "own.py").write_text("from disttrain.models.small import CnnMnist as Net\n")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("cnn_mnist", "own:Net"))
    env = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(env | {"directory": str(home)}))
    return run


@pytest.mark.nightly
def test_a_model_that_cannot_be_imported_names_the_folder_of_its_training(
    disttrain: Run, own_run: Path, digit_files: Path, tmp_path: Path
) -> None:
    image, exported = next((digit_files / "3").glob("*.png")), tmp_path / "exported" / "net.safetensors"
    commands = [
        ["predict", own_run, image],
        ["eval", own_run, "--procs", "1"],
        ["export", own_run, "--format", "safetensors", "--output", exported],
    ]
    problem = "model own:Net: cannot import own: ModuleNotFoundError: No module named 'own'"
    home = own_run.parent
    expected = f"the run was trained in {home}; use this folder: PYTHONPATH='{home}' disttrain ..."
    for command in commands:
        done = disttrain(*command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"disttrain: {problem}; {expected}\n"
    done = disttrain(*commands[-1], env={"PYTHONPATH": str(home)})
    assert (done.returncode, done.stderr) == (0, "")
    done = disttrain("predict", exported, image)
    assert done.stderr == f"disttrain: {problem}; put the folder that has own into PYTHONPATH\n"
    (home / "own.py").rename(tmp_path / "own.py.away")
    done = disttrain(*commands[0])
    assert done.stderr == (
        f"disttrain: {problem}; the run was trained in {home}; it has no own on this machine, "
        "so put the folder that has own into PYTHONPATH\n"
    )


@pytest.mark.nightly
def test_stages_that_cannot_be_imported_name_their_folder(disttrain: Run, own_run: Path) -> None:
    config = (own_run / "config.yaml").read_text().replace("own:Net", "cnn_mnist")
    assert "pipeline: null" in config
    (own_run / "config.yaml").write_text(config.replace("pipeline: null", "pipeline: own:pipeline"))
    done = disttrain("eval", own_run, "--procs", "1")
    assert done.returncode == 2
    assert done.stderr.startswith("disttrain: data.pipeline: cannot import own: ModuleNotFoundError")
    assert done.stderr.endswith(f"PYTHONPATH='{own_run.parent}' disttrain ...\n")
