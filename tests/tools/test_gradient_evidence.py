import math
import re
import sys

import pytest
import torch
from helpers import AUX, QUANT, calibrated, load_tool, make_batch, make_cfg, make_model
from tiny_data import train_overrides, write_dataset

from aqdet.analysis.gradients import Alignment


@pytest.fixture(scope="module")
def tool():
    return load_tool("experiments/gradient_evidence")


def test_tables_by_hand(tool):
    nan = math.nan
    found = [
        Alignment("backbone.fpn_output4", (0.5, 0.7), (0.1, 0.3), (0.9, 0.9), (nan, nan)),
        Alignment("backbone.bottom_up.res2.0.conv1", (0.2, 0.4), (0.4, 0.4), (0.0, 0.1), (nan, 0.5)),
        Alignment("backbone.top_block.p6", (0.4, 0.4), (0.5, 0.5), (0.6, 0.6), (1.0, 0.0)),
    ]
    lines = tool.make_table(found, summary=True).splitlines()[2:]
    assert lines == [
        "| res2 (1 layers) | 0.30 | 0.40 | 0.05 | 0.50 | 0 of 1 |",
        "| pyramid (2 layers) | 0.50 | 0.35 | 0.75 | 0.50 | 2 of 2 |",
        "| reached by added losses (2 layers) | 0.35 | 0.45 | 0.33 | 0.50 | 1 of 2 |",
    ]
    # By batch: (0.0 - 0.2 + 0.6 - 0.4) / 2 and (0.1 - 0.4 + 0.6 - 0.4) / 2.
    assert tool.gains(found) == pytest.approx([0.0, -0.05])
    assert "| fpn_output4 | 0.60 | 0.20 | 0.90 | - |" in tool.make_table(found, summary=False)


def test_a_checkpoint_is_compared_and_plotted(tool, tmp_path, monkeypatch, capsys):
    entry = write_dataset(tmp_path / "data", "tiny_gradients")
    overrides = [*train_overrides(entry, tmp_path), *QUANT, *AUX, "MODEL.FPN.RELU", "True"]
    cfg = make_cfg(*overrides)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    weights = tmp_path / "model_0000001.pth"
    model = calibrated(make_model(*QUANT, *AUX, "MODEL.FPN.RELU", "True"), make_batch())
    torch.save({"model": model.state_dict(), "iteration": 1}, weights)
    argv = ["x", "--config-file", str(tmp_path / "config.yaml"), "--weights", str(weights), "--batches", "2"]
    monkeypatch.setattr(sys, "argv", [*argv, "--output", str(tmp_path / "out"), "--section", "g"])
    monkeypatch.chdir(tmp_path)
    tool.main()
    shown = capsys.readouterr().out
    assert re.search(r"\| reached by added losses \(2\d layers\) \|", shown)
    assert "(standard error over batches, paired)" in shown
    assert " --batches 2 --section g`" in shown and "| pyramid (8 layers) |" in shown
    assert len((tmp_path / "out" / "gradients.md").read_text().splitlines()) == 2 + 28
    assert (tmp_path / "tools" / "experiments" / "plots" / "gradients.png").stat().st_size > 5000
    results = tmp_path / "RESULTS.md"
    assert "begin g" in results.read_text()
    results.write_text(results.read_text().replace("\n<!-- end g -->", "\n\nReading: by hand.\n<!-- end g -->"))
    tool.main()
    assert results.read_text().count("\n\nReading: by hand.\n<!-- end g -->") == 1
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*argv, "MODEL.AUX.ENABLED", "False"])
    with pytest.raises(SystemExit, match="error: there is no loss beside the detector's own"):
        tool.main()
