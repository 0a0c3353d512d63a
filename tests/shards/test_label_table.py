"""Tables of labels: how they are read, and what is wrong with one."""

from pathlib import Path

import pytest

from disttrain.errors import DataError, DisttrainError, UnsafeError, UsageError
from disttrain.shards.imagefolder import pack_folder
from disttrain.shards.label_table import read_table
from disttrain.shards.pack import Options
from kit.toy import encode, images

FILES = ("a/1.png", "a/2.png", "b/3.png", "b/4.jpg", "5.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, image in zip(FILES, images(len(FILES)), strict=True):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, "JPEG" if name.endswith("jpg") else "PNG"))
    return tmp_path / "photos"


def table(folder: Path, text: str) -> Path:
    path = folder.parent / "labels.csv"
    path.write_text(text)
    return path


def labels(folder: Path, text: str, *, multi_label: bool = True, val_fraction: float | None = None) -> dict:
    """Returns split -> name of each file -> names of its labels."""
    listing = read_table(table(folder, text), folder, val_fraction, multi_label)
    return {
        split: {
            str(Path(path).relative_to(folder)): {listing.classes[one] for one in label}
            if isinstance(label, tuple)
            else listing.classes[label]
            for path, label in files
        }
        for split, files in listing.files.items()
    }


EXPECTED = {
    "train": {"a/1.png": {"cat", "dog"}, "a/2.png": set(), "b/3.png": {"dog"}},
    "val": {"b/4.jpg": {"cat"}},
}


@pytest.mark.parametrize(
    "text",
    [
        "file,split,labels\na/1.png,train,cat dog\na/2.png,train,\nb/3.png,train,dog\nb/4.jpg,val,cat\n",
        "\ufefffile,labels,Split\r\na/1.png,dog|cat,train\r\na/2.png,,train\r\nb/3,dog,train\r\nb/4,cat,test\r\n",
        'f,l,split\na/1.png,"cat, dog",train\na/2.png,,train\nb/3.png,dog,train\nb/4.jpg,"cat",val\n',
        "f,l,split\na/1.png,cat,train\na/1.png,dog,train\na/2.png,,train\nb/3.png,dog,train\nb/4.jpg,cat,val\n",
        "f,cat,dog,split\na/1.png,1,1,train\na/2.png,0,0,train\nb/3.png,0,1.0,train\nb/4.jpg,1,0,val\n",
    ],
    ids=["spaces", "bars", "commas", "rows", "columns"],
)
def test_the_forms_of_a_table(folder: Path, text: str) -> None:
    assert labels(folder, text) == EXPECTED


def test_without_a_column_the_first_folder_is_the_split(folder: Path) -> None:
    (folder / "a").rename(folder / "train")
    (folder / "b").rename(folder / "test")
    found = labels(folder, "file,label\ntrain/1.png,10\ntrain/2.png,9\ntest/3.png,10\n", multi_label=False)
    assert found == {"train": {"train/1.png": "10", "train/2.png": "9"}, "val": {"test/3.png": "10"}}


def test_numbers_are_in_the_order_of_their_values(folder: Path) -> None:
    text = "file,label\na/1.png,10\na/2.png,9\nb/3.png,2 10\n"
    assert read_table(table(folder, text), folder, 0.5, True).classes == ("2", "9", "10")


def test_images_that_the_table_does_not_name_are_counted(folder: Path) -> None:
    listing = read_table(table(folder, "file,label\na/1.png,x\na/2.png,y\n"), folder, 0.5, True)
    (note,) = listing.notes
    assert note.startswith("left out: 3 x image that the table does not name: such as ")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", DataError, "names no files; expected a first line such as file,labels"),
        ("file,split\na/1.png,train\n", DataError, "has no column with labels"),
        ("file,cat,cat\na/1.png,1,0\n", DataError, "two columns are named 'cat'"),
        ("file,label\na/1.png\n", DataError, r"line 2: expected 2 cells"),
        ('file,label\n"a/1.png,x\n', DataError, "cannot be read as CSV"),
        ("file,label\nc/9.png,x\n", DataError, r"line 2: there is no file .*c/9\.png"),
        ("file,label\n../labels.csv,x\n", UnsafeError, r"line 2: \.\./labels\.csv leaves"),
        ("file,label\n/etc/passwd,x\n", UnsafeError, "line 2: /etc/passwd leaves"),
        ("file,cat,dog\na/1.png,1,-1\n", DataError, r"line 2: '-1' in the column dog; expected 1"),
        ("file,label,split\na/1.png,x,extra\n", DataError, "line 2: the split is 'extra'; expected train or"),
        (
            "file,label,split\na/1.png,x,train\na/1.png,y,val\n",
            DataError,
            "line 3: a/1.png is in another spl",
        ),
        ("file,label\na/1.png,x\na/1,y\n", DataError, "line 3: a/1 is the file of line 2; remove one"),
        ("file,label\na/1.png,\n", DataError, "no file has a label"),
        ('file,label\na/1.png,"x|a\ny"\n', DataError, r"'a\\ny' cannot be the name of a label"),
        ("file,label,split\na/1.png,x,val\n", DataError, "no file is in the train split"),
        ("file,label,split\na/1.png,x,train\na/2.png,x,val\n", UsageError, "leave out --val-fraction"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(
    folder: Path, text: str, error: type[DisttrainError], message: str
) -> None:
    with pytest.raises(error, match=rf"labels\.csv.*{message}"):
        read_table(table(folder, text), folder, 0.5, True)


def test_a_table_without_a_val_split_needs_a_fraction(folder: Path) -> None:
    with pytest.raises(DataError, match="add a column split with train and val, or use --val-fraction"):
        labels(folder, "file,label\na/1.png,x\n")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("cat;dog", "a/1.png has 2 labels; use --multi-label, or give it one"),
        ("", "has no label; give it one"),
    ],
)
def test_without_multi_label_a_file_has_one_label(folder: Path, cell: str, message: str) -> None:
    text = f"file,label,split\na/1.png,{cell},train\nb/3.png,dog,val\n"
    with pytest.raises(DataError, match=rf"line 2: .*{message}"):
        labels(folder, text, multi_label=False)


def test_one_label_may_have_spaces_and_commas_in_its_name(folder: Path) -> None:
    names = ("golden retriever,train", '"shepherd, german",train', "pug,val")
    text = "file,label,split\n" + "".join(
        f"{file},{name}\n" for file, name in zip(FILES, names, strict=False)
    )
    assert read_table(table(folder, text), folder, None, False).classes == (
        "golden retriever",
        "pug",
        "shepherd, german",
    )


def test_links_out_of_the_folder_need_permission(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes((folder / "5.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    path = table(folder, "file,label\nlink.png,x\n5.png,y\n")
    with pytest.raises(UnsafeError, match=r"line 2: the link .*link\.png leaves .*--follow-links"):
        read_table(path, folder, 0.5, True)
    assert len(read_table(path, folder, 0.5, True, follow_links=True).files["train"]) == 2


def test_class_folders_are_no_multi_label_data(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"--multi-label: a class folder is one label; .*--labels FILE"):
        pack_folder(folder, "set", None, Options(), val_fraction=0.5, multi_label=True)


def test_a_table_may_stand_for_class_folders(folder: Path) -> None:
    path = table(folder, "file,label,split\na/1.png,cat,train\na/2.png,dog,train\nb/3.png,dog,val\n")
    index = pack_folder(folder, "set", str(folder.parent), Options(), labels=path)
    assert (index.version, index.multi_label, index.classes) == (1, False, ("cat", "dog"))
    assert [split.class_counts for split in index.splits.values()] == [(1, 1), (0, 1)]
