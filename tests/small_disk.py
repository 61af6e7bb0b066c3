"""Disks of a few kilobytes, which fill up, and disks that cannot be written to; for root alone."""

import os
import subprocess

import pytest


class SmallDisk:
    """A tmpfs at `folder`. Raises pytest's skip where mounting is not allowed."""

    def __init__(self, folder, kilobytes):
        self.folder = folder
        folder.mkdir(parents=True)
        if os.name != "posix" or os.geteuid() != 0 or self._mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs"):
            pytest.skip("mounting a small disk needs root and a kernel that allows it")

    def _mount(self, *words):
        return subprocess.run(["mount", *words, str(self.folder)], capture_output=True).returncode

    def remount(self, options):
        """Give it other options: "size=64m", "ro"."""
        assert self._mount("-o", f"remount,{options}") == 0

    def close(self):
        subprocess.run(["umount", "-l", str(self.folder)], capture_output=True)


def kilobytes_of(folder):
    """What a folder's files take on a disk of pages of 4 kB, each content once."""
    seen = {(s.st_dev, s.st_ino): s.st_size for s in (path.stat() for path in folder.rglob("*") if path.is_file())}
    return sum(-(-size // 4096) * 4 for size in seen.values())
