"""Runs a script in two processes on the CPU, joined by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

PREAMBLE = """
    import copy, math, os, pickle, sys, torch, torch.distributed as dist
    from torch import nn
    from fused_sgd import FusedLARS, FusedSGD
    torch.set_num_threads(1)
    RANK = int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=RANK, world_size=2)
    OPTIONS = dict(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)

    def train(model, optimizer, steps, start=0):
        for step in range(start, start + steps):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 5)).pow(2).sum().backward()
            optimizer.step()
"""


def run_two(tmp_path: Path, code: str) -> None:
    script = tmp_path / "script.py"
    # Without the interpreter's own shutdown, in which gloo's threads now and then abort the process (torch 2.14.1).
    end = "\ndist.barrier()\nsys.stderr.flush()\nos._exit(0)\n"
    script.write_text(textwrap.dedent(PREAMBLE) + textwrap.dedent(code) + end)
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, tmp_path / "store", str(rank)], stderr=subprocess.PIPE, text=True, cwd="/", env=env
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
