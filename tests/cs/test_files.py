"""Text files as people write them: marks, line ends, other encodings; files that are replaced."""

import os

import pytest

from es_lora import files
from es_lora.files import read_text, split_lines


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_text(tmp_path, mark):
    (tmp_path / "a.txt").write_bytes(mark + "für dich\r\n".encode())
    assert read_text(tmp_path / "a.txt") == "für dich\r\n"


def test_what_is_not_utf_8_names_file_line_and_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ntwo\nfür".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt, line 3 is not UTF-8 text \(byte 9\); save it as UTF-8"):
        read_text(tmp_path / "a.txt")


def test_lines_end_at_lf_and_crlf_only():
    within = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
    assert split_lines(f"{within}\r\n\nlast") == [within, "", "last"]
    assert split_lines("one\n") == ["one"] and split_lines("") == [] and split_lines("\n") == [""]


def test_a_file_that_another_program_reads_is_replaced_once_it_lets_go(tmp_path, monkeypatch):
    """As Windows answers while a file is open."""
    replace, refused = os.replace, []

    def open_elsewhere(source, target):
        if len(refused) < 2:
            refused.append(target)
            raise PermissionError(13, "the file is in use", str(target))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", open_elsewhere)
    with pytest.raises(PermissionError):
        files.write_text_whole(tmp_path / "result.json", "one")  # elsewhere such a refusal is final
    monkeypatch.setattr(files, "WAITS_SEC", (0.0,) * 3)
    refused.clear()
    files.write_text_whole(tmp_path / "result.json", "two")
    assert len(refused) == 2 and (tmp_path / "result.json").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
