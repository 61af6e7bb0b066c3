"""Pictures of every kind become the right 8-bit RGB; resizing picks its filter by the direction."""

import cv2
import numpy as np
import pytest
from PIL import Image

from images.loading import load_mask, load_rgb, open_image, resize


def save(path, image, **options):
    image.save(path, **options)
    return path


def gradient(height=20, width=30):
    return np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)


def test_exif_orientation_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    array = gradient()
    path = save(tmp_path / "a.png", Image.fromarray(array), exif=exif)
    rgb, alpha = load_rgb(path)
    assert alpha is None and open_image(path).size == (20, 30)
    np.testing.assert_array_equal(rgb, np.rot90(array, k=-1))


def test_transparent_becomes_white_and_alpha_is_kept(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = [200, 0, 0, 255]
    rgba[:, 4:] = [0, 0, 0, 0]
    rgba[0, 0] = [0, 0, 0, 128]
    rgb, alpha = load_rgb(save(tmp_path / "a.png", Image.fromarray(rgba)))
    assert rgb[4, 1].tolist() == [200, 0, 0] and rgb[4, 6].tolist() == [255, 255, 255]
    assert abs(int(rgb[0, 0, 0]) - 127) <= 1
    np.testing.assert_array_equal(alpha, rgba[:, :, 3])


def test_palette_transparency_and_grey_alpha(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    rgb, alpha = load_rgb(save(tmp_path / "p.png", palette, transparency=0))
    assert rgb[0, 0].tolist() == [255] * 3 and rgb[1, 1].tolist() == [10, 20, 30] and alpha[0, 0] == 0
    rgb, alpha = load_rgb(save(tmp_path / "la.png", Image.new("LA", (4, 4), (50, 0))))
    assert (rgb == 255).all() and (alpha == 0).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    rgb, _ = load_rgb(save(tmp_path / f"a.{suffix}", Image.fromarray(levels)))
    assert rgb[0, :, 0].tolist() == [0, 1, 128, 255]


def test_sixteen_bit_colour(tmp_path):
    levels = np.zeros((4, 4, 3), np.uint16)
    levels[..., 0], levels[..., 2] = 65535, 32896  # OpenCV writes blue first
    cv2.imwrite(str(tmp_path / "a.png"), levels)
    rgb, _ = load_rgb(tmp_path / "a.png")
    assert rgb.dtype == np.uint8 and rgb[0, 0].tolist() == [128, 0, 255]


def test_float_and_wide_integers(tmp_path):
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert load_rgb(save(tmp_path / "f.tif", unit))[0][0, :, 0].tolist() == [0, 128, 255]
    wide = Image.fromarray(np.array([[0, 65535]], np.int32))
    assert load_rgb(save(tmp_path / "i.tif", wide))[0][0, :, 0].tolist() == [0, 255]


def test_cmyk_one_bit_and_animation(tmp_path):
    cmyk = save(tmp_path / "c.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95)
    assert np.abs(load_rgb(cmyk)[0][8, 8].astype(int) - [255, 0, 0]).max() <= 4
    assert (load_rgb(save(tmp_path / "b.png", Image.new("1", (4, 4), 1)))[0] == 255).all()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    animation = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert load_rgb(animation)[0][0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_truncated_files_are_named(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"torn.{suffix}", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"torn.{suffix} cannot be read"):
        load_rgb(path)


def test_files_that_are_no_pictures(tmp_path):
    for name, content in [("text.png", b"hello"), ("empty.jpg", b""), ("page.webp", b"<html></html>")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read: it is no picture"):
            load_rgb(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="gone.png does not exist"):
        load_rgb(tmp_path / "gone.png")


def test_resize_picks_area_for_smaller_and_lanczos_for_larger():
    array = gradient(40, 60)
    np.testing.assert_array_equal(
        resize(array, (30, 20), None), cv2.resize(array, (30, 20), interpolation=cv2.INTER_AREA)
    )
    larger = Image.fromarray(array).resize((90, 80), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(resize(array, (90, 80), None), np.array(larger))
    nearest = resize(array, (120, 80), "nearest")
    assert set(map(tuple, nearest.reshape(-1, 3))) <= set(map(tuple, array.reshape(-1, 3)))
    assert resize(array, (60, 40), None) is array


@pytest.mark.parametrize("name", ["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"])
def test_every_named_interpolation_keeps_flat_colours(name):
    flat = np.full((10, 12, 3), 77, np.uint8)
    assert (resize(flat, (33, 7), name) == 77).all()
    assert resize(flat[:, :, 0].copy(), (33, 7), name).shape == (7, 33)


def test_mask_is_the_red_channel_at_the_size_of_the_image(tmp_path):
    mask = np.zeros((10, 10, 3), np.uint8)
    mask[:, 5:, 0], mask[:, :, 1] = 255, 99
    loaded = load_mask(save(tmp_path / "m.png", Image.fromarray(mask)), (20, 20))
    assert loaded.shape == (20, 20) and loaded[:, :8].max() == 0 and loaded[:, 12:].min() == 255
