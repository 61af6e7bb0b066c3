"""Batches: complete, reproducible from (seed, epoch, index), and right in every field."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from images.batches import build_datasets


def make_folder(folder, count, size=(24, 16), caption="a, b, c, d"):
    folder.mkdir(parents=True)
    for i in range(count):
        x = np.arange(size[0])[None, :, None] * 5
        array = np.broadcast_to(x, (size[1], size[0], 3)).astype(np.uint8) + np.uint8(i)
        Image.fromarray(array).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{caption}, n{i}")
    return folder


def arguments(root, **values):
    settings = {"train_data_dir": str(root), "resolution": "16", "caption_extension": ".txt", "seed": 3}
    return SimpleNamespace(**{**settings, "train_batch_size": 2, **values})


def buckets(**values):
    return {"enable_bucket": True, "min_bucket_reso": 8, "max_bucket_reso": 32, "bucket_reso_steps": 8, **values}


def equal(first, second):
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name


def epoch_keys(batches, epoch):
    batches.set_epoch(epoch)
    return [key for i in range(len(batches)) for key in batches[i]["image_keys"]]


def test_an_epoch_holds_every_image_as_often_as_it_repeats(tmp_path):
    make_folder(tmp_path / "3_a", 5)
    make_folder(tmp_path / "1_b", 2, size=(16, 24))
    batches, validation = build_datasets(arguments(tmp_path, **buckets()))
    assert validation is None
    assert len(batches) == 8 + 1  # 15 and 2 images in two buckets, batches of 2
    for epoch in range(3):
        keys = epoch_keys(batches, epoch)
        assert len(keys) == 17
        assert all(keys.count(str(tmp_path / "3_a" / f"{i}.png")) == 3 for i in range(5))
        assert all(keys.count(str(tmp_path / "1_b" / f"{i}.png")) == 1 for i in range(2))


def test_the_order_depends_on_seed_and_epoch_only(tmp_path):
    make_folder(tmp_path / "2_a", 6)
    first, _ = build_datasets(arguments(tmp_path))
    again, _ = build_datasets(arguments(tmp_path))
    other, _ = build_datasets(arguments(tmp_path, seed=4))
    orders = [epoch_keys(first, epoch) for epoch in range(3)]
    assert epoch_keys(again, 2) == orders[2] and epoch_keys(again, 0) == orders[0]
    assert orders[0] != orders[1] != orders[2] and epoch_keys(other, 0) != orders[0]


def test_any_batch_can_be_had_alone(tmp_path):
    make_folder(tmp_path / "2_a", 6)
    varied = {"shuffle_caption": True, "flip_aug": True, "random_crop": True, "color_aug": True}
    varied.update(caption_dropout_rate=0.2, caption_tag_dropout_rate=0.2, token_warmup_step=20.0)
    first, _ = build_datasets(arguments(tmp_path, **varied))
    first.set_epoch(1)
    whole = [first[i] for i in range(len(first))]
    again, _ = build_datasets(arguments(tmp_path, **varied))
    torch.manual_seed(99)
    np.random.seed(99)
    again.set_epoch(1)
    for i in reversed(range(len(first))):
        equal(whole[i], again[i])


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_the_same_batches(tmp_path, persistent):
    make_folder(tmp_path / "2_a", 5)
    batches, _ = build_datasets(arguments(tmp_path, flip_aug=True, shuffle_caption=True))
    options = {"batch_size": None, "shuffle": False, "num_workers": 1, "persistent_workers": persistent}
    loader = torch.utils.data.DataLoader(batches, **options)
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        for i, batch in enumerate(loader):
            equal(batches[i], batch)
        assert i + 1 == len(batches)


def test_batch_fields(tmp_path):
    make_folder(tmp_path / "1_a", 1)
    batches, _ = build_datasets(arguments(tmp_path))
    batch = batches[0]
    assert batch["latents"] is None and batch["alpha_masks"] is None
    assert batch["images"].shape == (1, 3, 16, 16) and batch["images"].dtype == torch.float32
    expected = (4 + np.arange(16)) * 5 / 127.5 - 1  # cut in the middle of 24 columns
    np.testing.assert_allclose(batch["images"][0, 1, 7].numpy(), expected, atol=1e-6)
    assert batch["captions"] == ["a, b, c, d, n0"] and batch["loss_weights"].tolist() == [1.0]
    assert batch["original_sizes_hw"].tolist() == [[16, 24]] and batch["target_sizes_hw"].tolist() == [[16, 16]]
    assert batch["crop_top_lefts"].tolist() == [[0, 4]]
    assert batch["image_keys"] == [str(tmp_path / "1_a" / "0.png")]
    with pytest.raises(IndexError):
        batches[1]


def test_flip_mirrors_about_half_of_the_images(tmp_path):
    make_folder(tmp_path / "50_a", 4)
    batches, _ = build_datasets(arguments(tmp_path, flip_aug=True))
    rows = torch.cat([batches[i]["images"][:, 0, 0] for i in range(len(batches))])
    rising = (rows[:, 0] < rows[:, -1]).float().mean()
    assert 0.4 < rising < 0.6
    slopes = rows.diff(dim=1)
    assert ((slopes > 0).all(dim=1) | (slopes < 0).all(dim=1)).all()


def test_regularisation_images_have_their_weight_and_are_as_many(tmp_path):
    make_folder(tmp_path / "train" / "3_a", 4)
    make_folder(tmp_path / "reg" / "1_b", 5)
    root = tmp_path / "train"
    batches, _ = build_datasets(arguments(root, reg_data_dir=str(tmp_path / "reg"), prior_loss_weight=0.25))
    weights = []
    for i in range(len(batches)):
        batch = batches[i]
        for key, weight in zip(batch["image_keys"], batch["loss_weights"].tolist()):
            assert weight == (0.25 if "/reg/" in key else 1.0)
            weights.append(weight)
    assert weights.count(0.25) == weights.count(1.0) == 12


def test_token_warmup_follows_optimizer_steps(tmp_path):
    make_folder(tmp_path / "4_a", 2)
    warmup = {"token_warmup_step": 4.0, "token_warmup_min": 1, "gradient_accumulation_steps": 2}
    batches, _ = build_datasets(arguments(tmp_path, train_batch_size=1, **warmup), num_processes=2)
    assert len(batches) == 8 and batches.steps_per_epoch == 2
    counts = [len(batches[i]["captions"][0].split(", ")) for i in range(8)]
    batches.set_epoch(1)
    counts += [len(batches[i]["captions"][0].split(", ")) for i in range(8)]
    assert counts == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    args = arguments(tmp_path, train_batch_size=1, token_warmup_step=0.5, max_train_epochs=2)
    assert build_datasets(args)[0].total_steps == 16


def test_masks_of_a_mixed_batch(tmp_path):
    make_folder(tmp_path / "1_a", 2)
    rgba = np.zeros((16, 24, 4), np.uint8)
    rgba[:, 12:, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "1_a" / "0.png")
    batches, _ = build_datasets(arguments(tmp_path, alpha_mask=True))
    batch = batches[0]
    masks = dict(zip([key[-5:] for key in batch["image_keys"]], batch["alpha_masks"]))
    assert batch["alpha_masks"].shape == (2, 1, 16, 16)
    assert masks["0.png"][0, 0].tolist() == [0.0] * 8 + [1.0] * 8 and masks["1.png"].min() == 1


def test_masks_are_flipped_with_their_images(tmp_path):
    folder = make_folder(tmp_path / "20_a", 1)
    mask = np.zeros((16, 24, 3), np.uint8)
    mask[:, :12] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "0.png")
    options = {"conditioning_data_dir": str(tmp_path / "masks"), "masked_loss": True, "flip_aug": True}
    batches, _ = build_datasets(arguments(folder.parent, **options))
    seen = set()
    for i in range(len(batches)):
        batch = batches[i]
        for image, one in zip(batch["images"], batch["alpha_masks"]):
            is_flipped = bool(image[0, 0, 0] > image[0, 0, -1])
            assert one[0, 0].tolist() == ([0.0] * 8 + [1.0] * 8 if is_flipped else [1.0] * 8 + [0.0] * 8)
            seen.add(is_flipped)
    assert seen == {True, False}


def test_validation_is_held_out_and_does_not_vary(tmp_path):
    make_folder(tmp_path / "a", 8)
    make_folder(tmp_path / "b", 4)
    (tmp_path / "data.toml").write_text(f"""
[general]
shuffle_caption = true
flip_aug = true
caption_dropout_rate = 0.5
caption_extension = ".txt"
[[datasets]]
resolution = 16
batch_size = 3
validation_split = 0.25
  [[datasets.subsets]]
  image_dir = "{tmp_path / "a"}"
  num_repeats = 4
  [[datasets.subsets]]
  image_dir = "{tmp_path / "b"}"
  validation_split = 0.0
""")
    args = SimpleNamespace(dataset_config=tmp_path / "data.toml", seed=1)
    train, validation = build_datasets(args)
    held_out, kept = epoch_keys(validation, 0), epoch_keys(train, 0)
    assert len(held_out) == 2 and not set(held_out) & set(kept) and len(set(held_out) | set(kept)) == 12
    assert all("/a/" in key for key in held_out)
    batch = validation[0]
    validation.set_epoch(5)
    equal(batch, validation[0])
    assert all(caption.startswith("a, b, c, d, n") for caption in batch["captions"])


def test_several_datasets_have_their_own_resolution_and_batch_size(tmp_path):
    make_folder(tmp_path / "a", 6)
    make_folder(tmp_path / "b", 6)
    (tmp_path / "data.toml").write_text(f"""
[[datasets]]
resolution = 16
batch_size = 4
subsets = [{{image_dir = "{tmp_path / "a"}"}}]
[[datasets]]
resolution = [32, 24]
batch_size = 3
subsets = [{{image_dir = "{tmp_path / "b"}", class_tokens = "dog"}}]
""")
    batches, _ = build_datasets(SimpleNamespace(dataset_config=tmp_path / "data.toml", seed=0))
    shapes = sorted(tuple(batches[i]["images"].shape) for i in range(len(batches)))
    assert shapes == [(2, 3, 16, 16), (3, 3, 24, 32), (3, 3, 24, 32), (4, 3, 16, 16)]
    facts = json.loads(batches.metadata()["ss_datasets"])
    assert [fact["resolution"] for fact in facts] == [[16, 16], [32, 24]]
    assert facts[1]["subsets"][0]["class_tokens"] == "dog" and facts[1]["subsets"][0]["image_dir"] == "b"


def test_damaged_images_stop_the_run_or_are_left_out(tmp_path, caplog):
    make_folder(tmp_path / "1_a", 4)
    (tmp_path / "1_a" / "1.png").write_bytes(b"not a picture")
    (tmp_path / "1_a" / "2.png").write_bytes((tmp_path / "1_a" / "3.png").read_bytes()[:50])
    with pytest.raises(ValueError) as caught:
        build_datasets(arguments(tmp_path))
    for words in ("2 of 4 images are damaged", "1.png", "2.png", "--skip_bad_images"):
        assert words in str(caught.value)
    batches, _ = build_datasets(arguments(tmp_path, skip_bad_images=True))
    assert len(epoch_keys(batches, 0)) == 2
    assert "2 of 4 images are damaged and left out" in caplog.text and "1.png" in caplog.text


def test_nothing_left_to_train_on(tmp_path):
    folder = make_folder(tmp_path / "1_a", 1)
    (folder / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no training images"):
        build_datasets(arguments(tmp_path, skip_bad_images=True))
    make_folder(tmp_path / "1_b", 2)
    with pytest.raises(ValueError, match="held out by validation_split"):
        build_datasets(arguments(tmp_path, skip_bad_images=True, validation_split=1.0))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"cache_latents": True, "color_aug": True}, ["--cache_latents", "color_aug", "flip_aug works"]),
        ({"cache_latents_to_disk": True, "random_crop": True}, ["--cache_latents_to_disk", "random_crop"]),
        ({"masked_loss": True}, ["--masked_loss has no masks", "--alpha_mask"]),
        ({"resolution": "20"}, ["resolution 20,20", "multiple of 8"]),
        ({"enable_bucket": True}, ["min_bucket_reso 256", "lower it"]),
    ],
)
def test_contradicting_settings(tmp_path, values, words):
    make_folder(tmp_path / "1_a", 1)
    with pytest.raises(ValueError) as caught:
        build_datasets(arguments(tmp_path, **values))
    assert all(word in str(caught.value) for word in words)


def test_settings_without_effect_are_said(tmp_path, caplog):
    make_folder(tmp_path / "1_a", 2)
    build_datasets(arguments(tmp_path, bucket_no_upscale=True, face_crop_aug_range="1.0,2.0"))
    assert "bucket_no_upscale has no effect" in caplog.text
    assert "2 of 2 images have no face in their file names" in caplog.text


def test_problems_of_several_folders_come_together(tmp_path):
    for name in ("1_a", "2_b"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError) as caught:
        build_datasets(arguments(tmp_path))
    assert "1_a holds no images" in str(caught.value) and "2_b holds no images" in str(caught.value)


def test_metadata_of_plain_folders(tmp_path):
    make_folder(tmp_path / "train" / "3_a", 2)
    make_folder(tmp_path / "train" / "1_b", 1, size=(16, 24))
    make_folder(tmp_path / "reg" / "1_r", 9, caption="R")
    args = arguments(tmp_path / "train", reg_data_dir=str(tmp_path / "reg"), keep_tokens=1, **buckets())
    facts = build_datasets(args)[0].metadata()
    assert facts["ss_num_train_images"] == 7 and facts["ss_num_reg_images"] == 7
    assert json.loads(facts["ss_dataset_dirs"]) == {
        "1_b": {"n_repeats": 1, "img_count": 1}, "3_a": {"n_repeats": 3, "img_count": 2}
    }  # fmt: skip
    assert json.loads(facts["ss_reg_dataset_dirs"])["1_r"]["img_count"] == 7
    assert json.loads(facts["ss_tag_frequency"])["3_a"] == {"a": 2, "b": 2, "c": 2, "d": 2, "n0": 1, "n1": 1}
    assert json.loads(facts["ss_tag_frequency"])["1_r"]["r"] == 7
    info = json.loads(facts["ss_bucket_info"])
    assert sorted(bucket["count"] for bucket in info["buckets"].values()) == [1, 13]
    assert facts["ss_keep_tokens"] == 1 and facts["ss_resolution"] == "(16, 16)" and facts["ss_enable_bucket"] is True
    assert "ss_datasets" not in facts
