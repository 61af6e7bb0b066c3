"""Buckets against brute force, known sizes and the promises of a placement."""

import random

import pytest

from images.buckets import BucketSelector, aspect_ratio_error, bucket_sizes, covering_size


def slow_bucket_sizes(resolution, low, high, step):
    """All pairs of multiples of the step within the area that cannot grow in one direction (seen
    from either side)."""
    area = resolution[0] * resolution[1]
    found = set()
    for width in range(low, high + 1, step):
        heights = [h for h in range(step, high + 1, step) if width * h <= area]
        if heights and heights[-1] >= low:
            found |= {(width, heights[-1]), (heights[-1], width)}
    side = max(s for s in range(step, high + 1, step) if s * s <= area)
    return sorted(found | {(side, side)})


@pytest.mark.parametrize(
    "resolution, low, high, step",
    [((512, 512), 256, 1024, 64), ((768, 512), 256, 1024, 64), ((64, 64), 32, 128, 8), ((640, 640), 320, 1280, 32)],
)
def test_bucket_sizes_equal_brute_force(resolution, low, high, step):
    assert bucket_sizes(resolution, low, high, step) == slow_bucket_sizes(resolution, low, high, step)


def test_sizes_of_512_are_those_of_upstream():
    sizes = bucket_sizes((512, 512), 256, 1024, 64)
    assert [s for s in sizes if s[0] <= s[1]] == [
        (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512),
    ]  # fmt: skip
    assert len(sizes) == 17


@pytest.mark.parametrize(
    "size, bucket, resized",
    [
        ((512, 512), (512, 512), (512, 512)),
        ((1024, 1024), (512, 512), (512, 512)),
        ((3000, 2000), (640, 384), (640, 427)),  # ratio 1.5: 640/384 = 1.667 is nearer than 576/448 = 1.286
        ((2000, 3000), (384, 640), (427, 640)),  # ratio 0.667: 384/640 = 0.6 is nearer than 448/576 = 0.778
        ((100, 100), (512, 512), (512, 512)),  # enlarged
        ((384, 640), (384, 640), (384, 640)),
    ],
)
def test_known_placements(size, bucket, resized):
    placement = BucketSelector((512, 512), enable_bucket=True).place(size)
    assert (placement.bucket_px, placement.resized_px) == (bucket, resized)


@pytest.mark.parametrize("no_upscale", [False, True])
def test_promises_of_any_placement(no_upscale):
    rng = random.Random(0)
    selector = BucketSelector((512, 384), enable_bucket=True, no_upscale=no_upscale)
    for _ in range(2000):
        size = rng.randint(200, 4000), rng.randint(200, 4000)
        placement = selector.place(size)
        bucket, resized = placement.bucket_px, placement.resized_px
        assert bucket[0] * bucket[1] <= 512 * 384
        assert bucket[0] % 64 == 0 and bucket[1] % 64 == 0 and min(bucket) > 0
        assert min(placement.slack_px) >= 0
        # The shape is kept: the scales of both directions differ by rounding only.
        assert abs(resized[0] / size[0] - resized[1] / size[1]) <= 1 / min(size)
        if no_upscale:
            assert resized[0] <= size[0] and resized[1] <= size[1]
            # Above the area the scaling aims at a bucket edge; below it the picture keeps its size.
            assert resized == size or size[0] * size[1] > 512 * 384
        else:
            assert placement.slack_px[0] == 0 or placement.slack_px[1] == 0


def test_no_upscale_keeps_small_pictures_and_enlarges_only_what_has_no_step():
    selector = BucketSelector((512, 512), enable_bucket=True, no_upscale=True)
    small = selector.place((200, 150))
    assert (small.bucket_px, small.resized_px) == ((192, 128), (200, 150))
    assert small.centre_crop_px == (4, 11)
    tiny = selector.place((40, 40))
    assert tiny.bucket_px == (512, 512)


def test_without_buckets_every_picture_covers_the_resolution():
    selector = BucketSelector((64, 48))
    for size in [(10, 10), (64, 48), (500, 20), (20, 500)]:
        placement = selector.place(size)
        assert placement.bucket_px == (64, 48) and min(placement.slack_px) == 0


def test_limits_that_are_no_multiples_of_the_step_are_widened():
    selector = BucketSelector((512, 512), enable_bucket=True, min_px=300, max_px=1000, step_px=64)
    assert selector.sizes == bucket_sizes((512, 512), 256, 1024, 64)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"resolution_px": (500, 500)}, ["resolution 500,500", "multiple of 8"]),
        ({"resolution_px": (64, 64), "enable_bucket": True}, ["min_bucket_reso 256", "lower it"]),
        ({"resolution_px": (2048, 512), "enable_bucket": True}, ["max_bucket_reso 1024", "raise it"]),
        (
            {"resolution_px": (512, 512), "enable_bucket": True, "step_px": 20},
            ["bucket_reso_steps 20", "multiple of 8"],
        ),
        (
            {"resolution_px": (32, 32), "enable_bucket": True, "min_px": 64},
            ["bucket_reso_steps 64", "min_bucket_reso 64"],
        ),
    ],
)
def test_contradictions_name_the_value_and_the_fix(settings, words):
    with pytest.raises(ValueError) as caught:
        BucketSelector(**settings)
    assert all(word in str(caught.value) for word in words)


def test_cover_and_ratio_error():
    assert covering_size((300, 200), (64, 64)) == (96, 64)
    assert covering_size((200, 300), (64, 64)) == (64, 96)
    assert aspect_ratio_error((300, 200), (64, 64)) == pytest.approx(0.5)
