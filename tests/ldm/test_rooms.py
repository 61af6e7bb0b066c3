"""Rooms are layers without a circle, and no name of the tree hides an installed package."""

from rooms import ROOT, circles, crowded, room_imports, taken_names, upward

TREE = ROOT / "lora-ldm"


def test_no_circle_between_rooms():
    assert circles(room_imports(TREE)) == []


def test_a_layer_imports_only_from_those_below_it():
    assert upward(TREE) == []


def test_no_folder_or_module_has_the_name_of_an_installed_top_level_package():
    assert taken_names(TREE) == set()


def test_no_room_is_crowded():
    assert crowded(TREE) == {}


def test_a_circle_and_a_step_upward_would_be_found(tmp_path):
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"], ["c", "b", "c"]]
    tree = tmp_path / "lora-ldm"
    for name, line in (("base/x.py", "from training import loop"), ("training/loop.py", "def f():\n    import base.x")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(line + "\n")
    assert upward(tree) == [("base", "training")] and len(circles(room_imports(tree))) == 2
