"""Crops, colours and faces: what varies does so within its bounds, and by the given generator
alone."""

import random

import numpy as np
import pytest
from PIL import Image

from images.augmentation import color_augmented, face_in_name, face_window, load_sample
from images.buckets import Placement
from images.dataset_settings import SubsetSettings
from images.folders import ImageRecord


def coordinates(width=40, height=30):
    """A picture whose red and green channels say x and y, so that a crop can be read off its
    pixels."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)


def record(tmp_path, name="a.png", array=None, mask=None, **settings):
    array = coordinates() if array is None else array
    Image.fromarray(array).save(tmp_path / name)
    mask_path = None
    if mask is not None:
        mask_path = tmp_path / "mask.png"
        Image.fromarray(mask).save(mask_path)
        settings["conditioning_data_dir"] = str(tmp_path)
    size = array.shape[1], array.shape[0]
    return ImageRecord(tmp_path / name, "", 1, SubsetSettings(**settings), mask_path, size)


WHOLE = Placement((16, 24), (40, 30))


def test_centre_crop_without_chance(tmp_path):
    sample = load_sample(record(tmp_path, random_crop=True), WHOLE)
    assert sample.crop_left_top_px == (12, 3) and sample.mask is None
    np.testing.assert_array_equal(sample.pixels, coordinates()[3:27, 12:28])


def test_random_crop_reaches_every_corner_and_reports_it(tmp_path):
    item = record(tmp_path, random_crop=True)
    seen = set()
    for seed in range(400):
        sample = load_sample(item, WHOLE, random.Random(seed))
        left, top = sample.crop_left_top_px
        assert sample.pixels.shape == (24, 16, 3) and sample.pixels[0, 0].tolist() == [left, top, 0]
        seen.add((left, top))
    assert {x for x, _ in seen} == set(range(25)) and {y for _, y in seen} == set(range(7))


def test_scaled_before_the_cut(tmp_path):
    sample = load_sample(record(tmp_path), Placement((16, 16), (21, 16)))
    assert sample.pixels.shape == (16, 16, 3) and sample.crop_left_top_px == (2, 0)
    assert abs(int(sample.pixels[8, 0, 0]) - 2.5 * 40 / 21) <= 1  # x of the original at column 2 of the scaled one


def test_alpha_as_mask_and_ones_without_alpha(tmp_path):
    rgba = np.dstack([coordinates(), np.where(coordinates()[:, :, 0] < 20, 0, 255).astype(np.uint8)])
    sample = load_sample(record(tmp_path, array=rgba, alpha_mask=True), WHOLE)
    assert sample.mask.shape == (24, 16) and sample.mask[:, :8].max() == 0 and sample.mask[:, 8:].min() == 255
    assert (sample.pixels[:, :8] == 255).all()  # transparent is white
    assert (load_sample(record(tmp_path, "b.png", alpha_mask=True), WHOLE).mask == 255).all()
    assert load_sample(record(tmp_path, "c.png", array=rgba), WHOLE).mask is None


def test_mask_picture_is_cut_like_its_image(tmp_path):
    mask = np.repeat((coordinates()[:, :, :1] * 6), 3, axis=2)
    item = record(tmp_path, mask=mask, random_crop=True)
    for seed in range(5):
        sample = load_sample(item, WHOLE, random.Random(seed))
        np.testing.assert_array_equal(sample.mask, sample.pixels[:, :, 0] * 6)


def test_color_aug_changes_about_a_third_and_only_a_little():
    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    results = [color_augmented(picture, random.Random(seed)) for seed in range(600)]
    changed = [result for result in results if not np.array_equal(result, picture)]
    assert 150 < len(changed) < 250
    assert max(np.abs(result.astype(int) - picture).mean() for result in changed) < 25
    grey = np.full((4, 4, 3), 100, np.uint8)
    for seed in range(50):  # neither a hue shift nor gamma colours a grey picture
        result = color_augmented(grey, random.Random(seed))
        assert (result == result[0, 0, 0]).all() and abs(int(result[0, 0, 0]) - 100) <= 6
    np.testing.assert_array_equal(
        color_augmented(picture, random.Random(5)), color_augmented(picture, random.Random(5))
    )


@pytest.mark.parametrize(
    "name, face",
    [
        ("cat_120_80_64_60.png", (120, 80, 64, 60)),
        ("a_b_1_2_3_4.png", (1, 2, 3, 4)),
        ("cat.png", None),
        ("1_2_3_4.png", None),
        ("cat_1_2_x_4.png", None),
        ("cat_1_2_0_4.png", None),
    ],
)
def test_face_in_name(tmp_path, name, face):
    assert face_in_name(tmp_path / name) == face


def test_face_window_has_the_bucket_shape_and_stays_inside():
    rng = random.Random(0)
    for _ in range(500):
        width, height = rng.randint(100, 900), rng.randint(100, 900)
        face = rng.randint(0, width), rng.randint(0, height), rng.randint(5, 90), rng.randint(5, 90)
        left, top, box_width, box_height = face_window((width, height), face, rng.uniform(1, 4), (64, 96))
        assert 0 <= left and left + box_width <= width and 0 <= top and top + box_height <= height
        assert abs(box_width / box_height - 64 / 96) < 0.03
        assert box_width >= min(64, int(width), int(height * 64 / 96)) - 1


def test_face_crop_contains_the_face_and_varies(tmp_path):
    array = np.zeros((200, 300, 3), np.uint8)
    array[90:110, 190:210] = 255  # the face, 20 pixels
    item = record(tmp_path, "p_200_100_20_20.png", array, face_crop_aug_range=(2.0, 4.0))
    placement = Placement((32, 32), (48, 32))
    shares = []
    for seed in range(30):
        sample = load_sample(item, placement, random.Random(seed))
        assert sample.pixels.shape == (32, 32, 3)
        shares.append(sample.pixels.mean() / 255)
    # The window's side is 2 to 4 faces, so the face fills a quarter to a sixteenth of it.
    assert 1 / 18 < min(shares) < 0.1 and 0.2 < max(shares) < 0.27
    assert load_sample(item, placement).pixels.mean() / 255 < 0.05  # without chance: the whole picture
