"""Small folders of pictures with captions, and the records that training makes of them."""

from types import SimpleNamespace

from PIL import Image

from images.folders import read_records
from images.selection import load_datasets


def make_images(folder, names, captions=None, extension=".txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / name)
    for name, caption in (captions or {}).items():
        (folder / name).with_suffix(extension).write_text(caption, encoding="utf-8")
    return folder


def arguments(**values):
    return SimpleNamespace(**{"resolution": "64", **values})


def all_records(args):
    return [record for dataset in load_datasets(args) for subset in dataset.subsets for record in read_records(subset)]
