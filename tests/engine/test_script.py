"""A script or notebook without functions: its trainer exists until the interpreter exits."""

import subprocess
import sys

from helpers import QUANT, make_cfg, process_environment
from tiny_data import train_overrides, write_dataset

SCRIPT = """
import sys
from aqdet import load_config
from aqdet.data import register_declared
from aqdet.engine import Trainer

cfg = load_config(sys.argv[1])
register_declared(cfg)
trainer = Trainer(cfg)
trainer.resume_or_load(False)
trainer.train()
print("the last line")
"""


def test_a_script_with_a_trainer_and_workers_ends_and_makes_its_folder(tmp_path):
    entry = write_dataset(tmp_path / "data", "tiny_script")
    overrides = [*train_overrides(entry, tmp_path / "new" / "out", max_iter=2), *QUANT]
    cfg = make_cfg(*overrides, "DATALOADER.NUM_WORKERS", "2", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=process_environment(), timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the last line"
    assert (tmp_path / "new" / "out" / "model_final_stripped.pth").is_file()
