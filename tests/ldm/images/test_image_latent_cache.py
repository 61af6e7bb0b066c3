"""Cached latents equal fresh ones, notice every change, and are there whole or not at all."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from images.batches import build_datasets


class Encoder:
    """Stands in for the VAE: averages 8x8 blocks, and counts the pictures it saw."""

    def __init__(self):
        self.seen = 0

    def __call__(self, pixels):
        assert not torch.is_grad_enabled()
        self.seen += len(pixels)
        return torch.nn.functional.avg_pool2d(torch.cat([pixels, pixels[:, :1]], 1), 8)


def make_folder(root, count=3):
    folder = root / "2_a"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(noise.integers(0, 255, (16, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def build(root, **values):
    settings = {"train_data_dir": str(root), "resolution": "16", "train_batch_size": 2, "seed": 1, **values}
    return build_datasets(SimpleNamespace(**settings))[0]


def cached(root, vae_key="vae", to_disk=True, **values):
    """(batches, number of pictures that had to be encoded)"""
    options = {name: values.pop(name) for name in ("folder", "write") if name in values}
    batches, encoder = build(root, **values), Encoder()
    batches.cache_latents(encoder, vae_key, to_disk=to_disk, batch_size=2, **options)
    return batches, encoder.seen


def assert_equals_uncached(batches, root, epoch=0, **values):
    fresh = build(root, **values)
    for dataset in (batches, fresh):
        dataset.set_epoch(epoch)
    for i in range(len(fresh)):
        expected, batch = fresh[i], batches[i]
        assert batch["images"] is None and batch["latents"].dtype == torch.float32
        with torch.no_grad():
            assert torch.allclose(batch["latents"], Encoder()(expected["images"]), atol=1e-6)
        for name in ("captions", "image_keys"):
            assert batch[name] == expected[name]
        for name in ("loss_weights", "crop_top_lefts", "target_sizes_hw", "original_sizes_hw"):
            assert torch.equal(batch[name], expected[name])


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_cached_batches_equal_uncached_ones(tmp_path, to_disk, flip):
    make_folder(tmp_path)
    batches, encoded = cached(tmp_path, to_disk=to_disk, flip_aug=flip, shuffle_caption=True)
    assert encoded == (6 if flip else 3)
    for epoch in (0, 1):
        assert_equals_uncached(batches, tmp_path, epoch, flip_aug=flip, shuffle_caption=True)
    assert len(list((tmp_path / "2_a").glob("*.npz"))) == (3 if to_disk else 0)


def test_masks_are_cached_with_their_latents(tmp_path):
    folder = make_folder(tmp_path, 1)
    rgba = np.zeros((16, 24, 4), np.uint8)
    rgba[:, 12:, 3] = 255
    Image.fromarray(rgba).save(folder / "0.png")
    for to_disk in (False, True):
        batches, _ = cached(tmp_path, to_disk=to_disk, alpha_mask=True)
        assert batches[0]["alpha_masks"][0, 0, 0].tolist() == [0.0] * 8 + [1.0] * 8


def test_cached_masks_are_flipped_with_their_latents(tmp_path):
    folder = make_folder(tmp_path, 1)
    rgba = np.zeros((16, 24, 4), np.uint8)
    rgba[:, 12:] = [0, 0, 0, 255]  # black and opaque on the right, white and transparent on the left
    Image.fromarray(rgba).save(folder / "0.png")
    for to_disk in (False, True):
        batches, _ = cached(tmp_path, to_disk=to_disk, alpha_mask=True, flip_aug=True)
        sides = set()
        for epoch in range(8):
            batches.set_epoch(epoch)
            for latents, mask in zip(batches[0]["latents"], batches[0]["alpha_masks"]):
                dark = int(latents[0, 0].argmin())  # 0 or 1: the half that is black
                assert mask[0, 0].reshape(2, 8).mean(dim=1).tolist() == [1.0 - dark, float(dark)]
                sides.add(dark)
        assert sides == {0, 1}


def test_second_run_encodes_nothing(tmp_path):
    make_folder(tmp_path)
    assert cached(tmp_path)[1] == 3
    batches, encoded = cached(tmp_path)
    assert encoded == 0
    assert_equals_uncached(batches, tmp_path)


def test_memory_cache_leaves_no_files(tmp_path):
    folder = make_folder(tmp_path)
    before = sorted(folder.iterdir())
    cached(tmp_path, to_disk=False)
    assert sorted(folder.iterdir()) == before


def test_a_changed_image_is_noticed(tmp_path):
    folder = make_folder(tmp_path)
    cached(tmp_path)
    Image.new("RGB", (24, 16), "red").save(folder / "1.png")
    batches, encoded = cached(tmp_path)
    assert encoded == 1
    assert_equals_uncached(batches, tmp_path)
    stat = (folder / "2.png").stat()
    os.utime(folder / "2.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    assert cached(tmp_path)[1] == 1


def test_another_vae_resolution_or_filter_is_noticed(tmp_path):
    make_folder(tmp_path)
    cached(tmp_path)
    assert cached(tmp_path, vae_key="other")[1] == 3
    assert cached(tmp_path, vae_key="other", resolution="24,16")[1] == 3
    assert cached(tmp_path, vae_key="other")[1] == 0  # each size has its own file
    assert cached(tmp_path, vae_key="other", resize_interpolation="nearest")[1] == 3


def test_missing_flipped_latents_are_added(tmp_path):
    make_folder(tmp_path)
    cached(tmp_path)
    batches, encoded = cached(tmp_path, flip_aug=True)
    assert encoded == 6
    assert_equals_uncached(batches, tmp_path, flip_aug=True)
    assert cached(tmp_path)[1] == 0  # more than needed is fine


def test_a_changed_mask_is_noticed(tmp_path):
    make_folder(tmp_path / "data")
    (tmp_path / "masks").mkdir()
    for i in range(3):
        Image.new("L", (24, 16), 255).save(tmp_path / "masks" / f"{i}.png")
    options = {"conditioning_data_dir": str(tmp_path / "masks")}
    assert cached(tmp_path / "data", **options)[1] == 3
    assert cached(tmp_path / "data", **options)[1] == 0
    Image.new("RGB", (24, 16), (0, 0, 0)).save(tmp_path / "masks" / "0.png")
    batches, encoded = cached(tmp_path / "data", **options)
    assert encoded == 1
    by_key = {}
    for i in range(len(batches)):
        by_key.update(zip(batches[i]["image_keys"], batches[i]["alpha_masks"]))
    assert sorted(float(mask.mean()) for mask in by_key.values()) == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("damage", ["torn", "empty", "text", "other arrays"])
def test_damaged_entries_are_made_anew_and_said(tmp_path, caplog, damage):
    folder = make_folder(tmp_path)
    cached(tmp_path)
    path = sorted(folder.glob("*.npz"))[0]
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "other arrays":
        np.savez(path, something=np.zeros(3))
    else:
        path.write_bytes(b"" if damage == "empty" else b"hello")
    batches, encoded = cached(tmp_path)
    assert encoded == 1 and "is damaged and is made anew" in caplog.text and path.name in caplog.text
    assert_equals_uncached(batches, tmp_path)


def test_pickled_entries_are_not_loaded(tmp_path, caplog):
    folder = make_folder(tmp_path)
    cached(tmp_path)
    path = sorted(folder.glob("*.npz"))[0]
    np.savez(path, key=np.array([object()], dtype=object), latents=np.zeros(3))
    assert cached(tmp_path)[1] == 1 and "is damaged" in caplog.text


def test_cache_folder_keeps_the_images_apart(tmp_path):
    make_folder(tmp_path / "x")
    make_folder(tmp_path / "y")
    folder = tmp_path / "cache"
    first, _ = cached(tmp_path / "x", folder=str(folder))
    assert cached(tmp_path / "y", folder=str(folder))[1] == 3
    assert len(list(folder.iterdir())) == 6 and not list((tmp_path / "x" / "2_a").glob("*.npz"))
    assert_equals_uncached(first, tmp_path / "x")


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("images.latent_cache.os.fsync", full)
    with pytest.raises(ValueError, match="cannot be written .*No space left.*without _to_disk"):
        cached(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "1.png", "2.png"]


def test_only_rank_zero_writes(tmp_path):
    folder = make_folder(tmp_path)
    with pytest.raises(RuntimeError, match="3 latent cache entries are missing"):
        cached(tmp_path, write=False)
    assert not list(folder.glob("*.npz"))
    cached(tmp_path)
    batches, encoded = cached(tmp_path, write=False)
    assert encoded == 0
    assert_equals_uncached(batches, tmp_path)


def test_nan_latents_name_the_image(tmp_path):
    folder = make_folder(tmp_path)
    batches = build(tmp_path)
    with pytest.raises(ValueError, match="NaN for .*0.png: use --no_half_vae"):
        batches.cache_latents(lambda pixels: torch.full((len(pixels), 4, 2, 2), float("nan")), "vae", to_disk=True)
    assert not list(folder.glob("*.npz"))


def test_an_entry_that_vanishes_during_the_run_is_said(tmp_path):
    folder = make_folder(tmp_path)
    batches, _ = cached(tmp_path)
    for path in folder.glob("*.npz"):
        path.unlink()
    with pytest.raises(ValueError, match="changed during the run: start again"):
        batches[0]
