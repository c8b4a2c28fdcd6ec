from pathlib import Path

from aqdet.report.evaluation_results import _read_metrics
from aqdet.report.run_folder import Run


def test_metrics_of_masks_stand_beside_those_of_boxes(tmp_path):
    (tmp_path / "metrics.json").write_text('{"AP": 40.5, "APs": null, "segm": {"AP": 30.25, "APl": null}}')
    run = Run(Path("run"), "run")
    expected = {"AP": 40.5, "APs": None, "segm AP": 30.25, "segm APl": None}
    assert _read_metrics(run, tmp_path) == expected
