"""tools/setup_env.sh where it refuses, before anything is installed."""

import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT


def test_the_current_environment_says_why_detectron2_fails(tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("raise ImportError('libcudart is missing')\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path), "AQDET_USE_CURRENT_ENV": "1"}
    command = ["bash", str(ROOT / "tools" / "setup_env.sh")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.endswith("cannot import detectron2: ImportError: libcudart is missing")
