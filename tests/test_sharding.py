"""Parameters, solver states and snapshots as DTensors, without hooks: two processes find what one finds."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from dtensor_steps import METHODS, SOLVERS, gradients


def test_sharded_meta_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    script, found = Path(__file__).with_name("dtensor_steps.py"), tmp_path / "found.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(script), str(found)], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout
    sharded, one = load_file(found), gradients()
    assert len(one) == 4 * len(METHODS) * len(SOLVERS)
    assert sharded.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-6, atol=1e-9, msg=name)
