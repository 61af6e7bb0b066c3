"""resize_images.py on pictures of every kind; originals and earlier results are safe."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from prepare import resize_images

pytest.importorskip("imagehash", reason="ImageHash is not installed (requirements-extras.txt)")
SCRIPT = Path(resize_images.__file__)


def noise(width, height, seed=0, channels=3):
    """Coarse noise: it keeps its difference hash when it is scaled."""
    coarse = np.random.default_rng(seed).integers(0, 255, (9, 9, channels), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def run(source, target, *flags):
    return resize_images.main([str(source), str(target), *map(str, flags)])


def photos(tmp_path, **pictures):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, image in pictures.items():
        image.save(folder / f"{name}.png")
    return folder


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_centre_crop_to_one_resolution(tmp_path):
    source = photos(tmp_path, wide=noise(200, 100), tall=noise(90, 300, 1), small=noise(20, 20, 2))
    assert run(source, tmp_path / "out", "--size", "64,48") == 0
    assert {path.name: size_of(path) for path in (tmp_path / "out").iterdir()} == {
        "wide.png": (64, 48), "tall.png": (64, 48), "small.png": (64, 48)
    }  # fmt: skip
    expected = np.asarray(
        Image.open(source / "wide.png").crop((33, 0, 166, 100)).resize((64, 48), Image.Resampling.BOX)
    )
    difference = np.abs(np.asarray(Image.open(tmp_path / "out" / "wide.png")).astype(int) - expected)
    assert difference.mean() < 2


def test_report_names_what_was_enlarged(tmp_path, capsys):
    source = photos(tmp_path, small=noise(20, 20), large=noise(200, 200, 1))
    run(source, tmp_path / "out", "--size", "64")
    out = capsys.readouterr().out
    assert "wrote 2 of 2 pictures" in out and "64x64: 2" in out
    assert "1 enlarged" in out and "small.png" in out and "large.png" not in out


def test_buckets_keep_shapes(tmp_path):
    source = photos(tmp_path, wide=noise(400, 200), tall=noise(200, 400, 1), square=noise(300, 300, 2))
    limits = ["--min_bucket_reso", 32, "--max_bucket_reso", 128, "--bucket_reso_steps", 8]
    assert run(source, tmp_path / "out", "--size", 64, "--buckets", *limits) == 0
    sizes = {path.stem: size_of(path) for path in (tmp_path / "out").iterdir()}
    assert sizes == {"wide": (88, 40), "tall": (40, 88), "square": (64, 64)}


def test_no_upscale_keeps_small_pictures(tmp_path):
    source = photos(tmp_path, small=noise(50, 42))
    limits = ["--min_bucket_reso", 32, "--max_bucket_reso", 128, "--bucket_reso_steps", 8, "--bucket_no_upscale"]
    assert run(source, tmp_path / "out", "--size", 64, "--buckets", *limits) == 0
    assert size_of(tmp_path / "out" / "small.png") == (48, 40)


def test_orientation_transparency_cmyk_and_sixteen_bits(tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:32] = 255
    Image.fromarray(halves).save(source / "turned.jpg", exif=exif, quality=95)
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(source / "clear.png")
    Image.new("CMYK", (64, 64), (255, 0, 0, 0)).save(source / "print.jpg", quality=95)
    Image.fromarray(np.full((64, 64), 32896, np.uint16)).save(source / "deep.png")
    assert run(source, tmp_path / "out", "--size", 64, "--duplicate_bits", -1) == 0
    loaded = {path.stem: np.asarray(Image.open(path)).astype(int) for path in (tmp_path / "out").iterdir()}
    assert all(array.shape == (64, 64, 3) for array in loaded.values())
    assert loaded["turned"][:28].max() < 10 and loaded["turned"][36:].min() > 245
    assert (loaded["clear"] == 255).all() and (loaded["deep"] == 128).all()
    assert np.abs(loaded["print"][32, 32] - [0, 255, 255]).max() < 6


def test_keep_alpha(tmp_path):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, 32:, 3] = 255
    source = photos(tmp_path, half=Image.fromarray(rgba), opaque=noise(64, 64))
    assert run(source, tmp_path / "out", "--size", 32, "--keep_alpha") == 0
    alpha = np.asarray(Image.open(tmp_path / "out" / "half.png"))[:, :, 3]
    assert alpha[:, :16].max() == 0 and alpha[:, 16:].min() == 255
    assert Image.open(tmp_path / "out" / "opaque.png").mode == "RGB"


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed (requirements-extras.txt)")
    source = tmp_path / "photos"
    source.mkdir()
    try:
        pillow_heif.from_pillow(noise(100, 80)).save(source / "phone.HEIC", quality=90)
    except RuntimeError as error:
        pytest.skip(f"this build of pillow-heif cannot write HEIC: {error}")
    assert run(source, tmp_path / "out", "--size", 64) == 0
    result = np.asarray(Image.open(tmp_path / "out" / "phone.png")).astype(int)
    expected = np.asarray(noise(100, 80).crop((10, 0, 90, 80)).resize((64, 64))).astype(int)
    assert np.abs(result - expected).mean() < 8


def test_heic_without_its_package_says_what_to_install(tmp_path, capsys, monkeypatch):
    source = photos(tmp_path, a=noise(64, 64))
    (source / "b.heic").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert run(source, tmp_path / "out") == 2
    assert "pip install pillow-heif" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_colour_profiles_become_srgb(tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.new("RGB", (64, 64), (10, 200, 30)).save(source / "odd.png", icc_profile=profile)  # fits no RGB picture
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (64, 64), (10, 200, 30)).save(source / "plain.png", icc_profile=srgb)
    assert run(source, tmp_path / "out", "--size", 64) == 0
    for name in ("odd", "plain"):
        colour = np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))[0, 0].astype(int)
        assert np.abs(colour - [10, 200, 30]).max() <= 1


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    source = photos(tmp_path, a=noise(64, 64), b=noise(64, 64, 1))
    (source / "a.txt").write_text("new caption")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_bytes(b"mine")
    (out / "a.txt").write_text("my caption")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert run(source, out, "--size", 32) == 0
    assert (out / "a.png").read_bytes() == b"mine" and size_of(out / "b.png") == (32, 32)
    assert "1 were there already" in capsys.readouterr().out
    assert run(source, out, "--size", 32, "--overwrite") == 0
    assert size_of(out / "a.png") == (32, 32) and (out / "a.txt").read_text() == "new caption"
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_dry_run_writes_nothing(tmp_path, capsys):
    source = photos(tmp_path, a=noise(64, 64))
    assert run(source, tmp_path / "out", "--size", 32, "--dry_run") == 0
    assert "would write 1 of 1" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_captions_come_along(tmp_path):
    source = photos(tmp_path, a=noise(64, 64))
    (source / "a.txt").write_text("one")
    (source / "a.caption").write_text("two")
    run(source, tmp_path / "out", "--size", 32)
    assert (tmp_path / "out" / "a.txt").read_text() == "one" and (tmp_path / "out" / "a.caption").read_text() == "two"


def test_same_names_and_subfolders(tmp_path):
    source = photos(tmp_path, a=noise(64, 64))
    noise(64, 64, 1).save(source / "a.jpg")
    (source / "more").mkdir()
    noise(64, 64, 2).save(source / "more" / "a.png")
    assert run(source, tmp_path / "out", "--size", 32) == 0
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")) == [
        "a.png",
        "a_png.png",
    ]
    assert run(source, source / "out", "--size", 32, "--recursive") == 0
    assert len(list((source / "out").rglob("*.png"))) == 3 and (source / "out" / "more" / "a.png").is_file()
    assert run(source, source / "out", "--size", 32, "--recursive", "--overwrite") == 0
    assert len(list((source / "out").rglob("*.png"))) == 3  # its own results are no input


def test_near_duplicates_are_reported_or_left_out(tmp_path, capsys):
    recoloured = Image.merge("RGB", noise(200, 200).split()[::-1])
    plain = {"d": Image.new("RGB", (80, 80), "red"), "e": Image.new("RGB", (80, 80), "blue"), "f": recoloured}
    source = photos(tmp_path, a=noise(200, 200), b=noise(200, 200).resize((150, 150)), c=noise(200, 200, 5), **plain)
    assert run(source, tmp_path / "out", "--size", 64) == 0
    out = capsys.readouterr().out
    assert "1 near-duplicates" in out and "b.png resembles" in out and "c.png" not in out
    assert "such as 10_out" in out and len(list((tmp_path / "out").iterdir())) == 6
    assert run(source, tmp_path / "fewer", "--size", 64, "--skip_duplicates") == 0
    assert sorted(path.name for path in (tmp_path / "fewer").iterdir()) == [f"{name}.png" for name in "acdef"]


def test_damaged_pictures_are_named_and_the_rest_is_done(tmp_path, capsys):
    source = photos(tmp_path, good=noise(64, 64))
    (source / "bad.jpg").write_bytes(b"nothing")
    assert run(source, tmp_path / "out", "--size", 32) == 2
    error = capsys.readouterr().err
    assert "1 damaged and left out" in error and "bad.jpg" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.png"]


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_other_formats(tmp_path, suffix):
    source = photos(tmp_path, a=noise(64, 64))
    assert run(source, tmp_path / "out", "--size", 32, "--format", suffix) == 0
    with Image.open(tmp_path / "out" / f"a.{suffix}") as image:
        assert image.size == (32, 32) and image.format == {"jpg": "JPEG", "webp": "WEBP"}[suffix]


def test_all_bad_arguments_in_one_message(tmp_path, capsys):
    source = photos(tmp_path, a=noise(64, 64))
    assert run(source, source, "--size", 100, "--keep_alpha", "--format", "jpg", "--duplicate_bits", 99) == 2
    error = capsys.readouterr().err
    for words in ("another one than the input", "multiple of 8", "--keep_alpha needs", "--duplicate_bits 99"):
        assert words in error
    assert error.count("\n") == 1
    assert run(tmp_path / "none", tmp_path / "out") == 2
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", tmp_path / "out") == 2
    assert "no pictures in" in capsys.readouterr().err


def test_runs_as_a_script_with_smart_crop(tmp_path):
    pytest.importorskip("smartcrop", reason="requirements-extras.txt is not installed")
    source = photos(tmp_path, a=noise(200, 100))
    words = [sys.executable, str(SCRIPT), str(source), str(tmp_path / "out"), "--size", "64", "--crop", "smart"]
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert size_of(tmp_path / "out" / "a.png") == (64, 64)
