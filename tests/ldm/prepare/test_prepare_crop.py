"""Smart crops keep what they are asked to keep, and always have the shape asked for."""

import numpy as np
import pytest
from PIL import Image

from prepare import smart_crop
from prepare.smart_crop import crop_box


def flat(width, height):
    return np.full((height, width, 3), 128, np.uint8)


def with_noise(width, height, box):
    picture = flat(width, height)
    left, top, w, h = box
    picture[top : top + h, left : left + w] = np.random.default_rng(0).integers(0, 255, (h, w, 3))
    return picture


@pytest.mark.parametrize("shape", [(1, 1), (512, 768), (768, 512), (3, 1)])
@pytest.mark.parametrize("size", [(200, 100), (100, 200), (150, 150), (1, 7)])
def test_largest_box_of_the_shape_in_the_middle(shape, size):
    left, top, width, height = crop_box(flat(*size), shape, "centre")
    scale = min(size[0] / shape[0], size[1] / shape[1])
    assert abs(width - shape[0] * scale) < 1.01 and abs(height - shape[1] * scale) < 1.01
    assert abs(2 * left + width - size[0]) <= 1 and abs(2 * top + height - size[1]) <= 1


@pytest.mark.parametrize("method", ["edges", "entropy"])
@pytest.mark.parametrize("place", [(10, 20, 60, 60), (320, 20, 60, 60)])
def test_detail_is_kept(method, place):
    pytest.importorskip("skimage", reason="requirements-extras.txt is not installed")
    left, top, width, height = crop_box(with_noise(400, 100, place), (64, 64), method)
    assert (width, height) == (100, 100)
    assert left <= place[0] + 6 and place[0] + place[2] <= left + width + 6


@pytest.mark.parametrize("place", [(20, 10, 60, 60), (20, 320, 60, 60)])
def test_detail_is_kept_in_tall_pictures(place):
    pytest.importorskip("skimage", reason="requirements-extras.txt is not installed")
    left, top, width, height = crop_box(with_noise(100, 400, place), (64, 64), "entropy")
    assert top <= place[1] + 6 and place[1] + place[3] <= top + height + 6


def test_an_even_picture_is_cut_in_the_middle_by_entropy():
    pytest.importorskip("skimage", reason="requirements-extras.txt is not installed")
    left, top, *_ = crop_box(flat(300, 100), (1, 1), "entropy")
    assert abs(left - 100) <= 6 and top == 0


def test_faces_decide_and_several_are_kept_together():
    picture = flat(400, 100)
    assert crop_box(picture, (1, 1), "faces", lambda _: [(300, 30, 40, 40)])[0] == 270
    assert crop_box(picture, (1, 1), "faces", lambda _: [(370, 30, 30, 30)])[0] == 300  # inside the picture
    left = crop_box(picture, (1, 1), "faces", lambda _: [(100, 30, 20, 20), (160, 30, 30, 30)])[0]
    assert left == 95
    # Two that do not fit together: the larger one.
    assert crop_box(picture, (1, 1), "faces", lambda _: [(10, 30, 20, 20), (300, 30, 40, 40)])[0] == 270


def test_without_faces_the_middle_or_the_edges():
    pytest.importorskip("smartcrop", reason="requirements-extras.txt is not installed")
    picture = with_noise(400, 100, (320, 20, 60, 60))
    assert crop_box(picture, (1, 1), "faces", lambda _: [])[0] == 150
    assert crop_box(picture, (1, 1), "smart", lambda _: [])[0] > 250


def test_a_real_face_is_found():
    data = pytest.importorskip("skimage.data", reason="requirements-extras.txt is not installed")
    portrait = data.astronaut()  # a public-domain portrait that comes with scikit-image; the face is at (220, 110)
    left, top, width, height = max(smart_crop.face_finder()(portrait), key=lambda box: box[2])
    assert left < 220 < left + width and top < 110 < top + height and 60 < width < 160
    wide = np.concatenate([np.full((512, 900, 3), 200, np.uint8), portrait], axis=1)
    box = crop_box(wide, (1, 1), "faces")
    assert box[0] + 100 < 900 + 220 < box[0] + box[2] - 100


def test_unknown_method_and_bad_model_files(tmp_path):
    with pytest.raises(ValueError, match="'middle' must be one of centre, faces"):
        crop_box(flat(10, 20), (1, 1), "middle")
    with pytest.raises(FileNotFoundError, match="--face_model .*none.onnx"):
        smart_crop.face_finder(str(tmp_path / "none.onnx"))
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="bad.onnx cannot be read as a YuNet model"):
        smart_crop.face_finder(str(tmp_path / "bad.onnx"))


def test_command_line_lists_the_cuts_and_names_faces(tmp_path, capsys, monkeypatch):
    Image.fromarray(flat(200, 100)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("caption")
    assert smart_crop.main([str(tmp_path), "--size", "64", "--method", "centre"]) == 0
    assert "a.png\t50\t0\t100\t100" in capsys.readouterr().out
    monkeypatch.setattr(smart_crop, "face_finder", lambda model: lambda rgb: [(100, 20, 30, 40), (0, 0, 5, 5)])
    copies = tmp_path / "named"
    assert smart_crop.main([str(tmp_path), "--method", "faces", "--copy_with_faces", str(copies)]) == 0
    assert sorted(path.name for path in copies.iterdir()) == ["a_115_40_30_40.png", "a_115_40_30_40.txt"]
    assert smart_crop.main([str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
