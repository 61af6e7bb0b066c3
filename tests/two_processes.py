"""Two processes of one gloo group on this machine, as torchrun starts them."""

import os
import socket
import subprocess
import sys


def in_two_processes(*programs, **environment):
    """What each rank ended with: (exit code, what it said on stderr). programs: the words after
    `python`, one list a rank. environment: variables beside the group's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    runs = []
    for rank, words in enumerate(programs):
        own = {**os.environ, "OMP_NUM_THREADS": "1", **environment, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        runs.append(subprocess.Popen([sys.executable, *words], env=own, stderr=subprocess.PIPE, text=True))
    said = [run.communicate(timeout=300)[1] for run in runs]
    return [(run.returncode, text) for run, text in zip(runs, said)]
