"""Reports of a small training made here, and of folders that lack something."""

import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import report as tool
import torch
from helpers import AUX, QUANT, make_model
from markupsafe import escape
from pycocotools import mask as coco_mask
from tiny_data import train_cfg, write_dataset

from aqdet.engine import Trainer
from aqdet.quantization import quantizers
from aqdet.report import load_runs, make_report
from aqdet.report.views.pictures import outline

FLOAT = ("MODEL.FPN.RELU", "True", "INPUT.MAX_SIZE_TEST", "64")
QUANTIZED = (*QUANT, *AUX, *FLOAT)
HOSTILE = '<script>alert("x")</script>'
CLASSES = ("disc", HOSTILE, "ring")


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), "tiny_report", classes=CLASSES)


@pytest.fixture(scope="module")
def trained(entry, tmp_path_factory):
    """Folder of a quantized training of two iterations, as the command leaves it."""
    root = tmp_path_factory.mktemp("runs")
    torch.save({"model": make_model("MODEL.FPN.RELU", "True").state_dict()}, root / "float.pth")
    output = root / "low"
    cfg = train_cfg(entry, output, *QUANTIZED, "MODEL.WEIGHTS", str(root / "float.pth"), max_iter=2)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    (output / "config.yaml").write_text(cfg.dump())
    (output / "log.txt").write_text(
        "INFO: Command line arguments: Namespace(config_file='low.yaml', opts=['SEED', '1'])\n"
        "INFO: Starting training from iteration 0\n"
    )
    return output


def set_results(folder, detections, ap=None):
    """Detections (image id, category id, box, score) as the results of a run, and its AP."""
    results = [dict(zip(("image_id", "category_id", "bbox", "score"), d, strict=True)) for d in detections]
    (folder / "inference").mkdir(exist_ok=True)
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(results))
    (folder / "inference" / "metrics.json").write_text(json.dumps({"AP": ap, "AP50": 12.5, "APs": None}))


@pytest.fixture
def runs(trained, entry, tmp_path):
    """Folders of a float run that found something, and of the quantized one."""
    full = tmp_path / "full"
    cfg = train_cfg(entry, full, *FLOAT)
    (full / "config.yaml").write_text(cfg.dump())
    (full / "metrics.json").write_text(
        "".join(json.dumps({"iteration": i, "total_loss": 2.0 - i / 9, "bbox/AP": 10.0 * i}) + "\n" for i in (1, 2, 3))
    )
    # One object of eight, and a false detection: AP 50.5 / 4 of one class and 0 of the other.
    ap = 100 * 26 / 101 / 2
    set_results(full, [(1, 1, [4, 5, 36, 33], 0.9), (2, 1, [0, 0, 9, 9], 0.8)], ap)
    low = tmp_path / "low"
    shutil.copytree(trained, low)
    return full, low


class Page(HTMLParser):
    """What a page refers to, its scripts, and whether its tags close in order."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.tags = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [v for k, v in attributes if k in ("href", "src", "xlink:href") and not v.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report_of(*folders, **options):
    found = load_runs([str(folder) for folder in folders])
    return found, make_report(found, **options)


def test_two_runs(runs):
    found, text = report_of(*runs, num_pictures=1, num_images=1)
    page = Page(text)
    # Complete in itself, and nothing of the data runs.
    assert page.references and all(r.startswith("data:image/jpeg;base64,") for r in page.references)
    assert "script" not in page.tags and str(escape(HOSTILE)) in text
    assert re.findall(r'<section id="(.*?)">', text) == [
        "results", "training", "precision-and-recall", "pictures", "layers", "plan", "config",
    ]  # fmt: skip
    assert found[0].notes == [
        "neither done.json nor log.txt tells the command",
        "no histograms: the detector is in full precision and has no quantizers",
    ]
    assert all(str(escape(note)) in text for note in found[0].notes) and found[1].notes == []
    # The table of results, to the decimal; the low run found nothing.
    assert '<td>AP, IoU 0.50 to 0.95</td><td class="best">12.9</td><td>0.0 <small>-12.9</small></td>' in text
    assert '<td>AP50, IoU 0.50</td><td class="best">12.5</td><td>0.0 <small>-12.5</small></td>' in text
    # Draws of four images, one of which has the object that was found.
    assert re.search(
        r"<td>AP, 90 % of draws of the images</td><td>0\.0 to \d+\.\d</td><td>0\.0 to 0\.0 <small>-\d+\.\d to \+0\.0<",
        text,
    )
    assert "Draws: as many images as the set has, drawn with replacement 300 times" in text
    assert "--config-file low.yaml SEED 1" in text
    # Curves: of AP, of the only loss of the float run, and of what the quantized one has too.
    assert "<figcaption>AP on the test set</figcaption>" in text and "<figcaption>aux_loss_cls</figcaption>" in text
    assert "<figcaption>disc (4 objects), IoU 0.5</figcaption>" in text and "ring (" not in text
    # The worst image and the best: image 1 has one of two objects.
    assert re.findall(r"<h4>(\d\.png: F1 \S+)</h4>", text) == ["1.png: F1 0.00", "0.png: F1 0.33"]
    assert "1 found, 0 false, 1 missed; F1 0.67" in text and "0 found, 0 false, 2 missed; F1 0.00" in text


def test_another_limit_of_detections_than_cocos_is_said_and_kept(runs):
    full, low = runs
    path = full / "inference" / "metrics.json"
    noted = json.loads(path.read_text())
    assert "Detections of an image that count" not in report_of(full, num_pictures=0, num_images=0)[1]
    path.write_text(json.dumps({**noted, "max_dets_per_image": 1}))
    found, text = report_of(full, low, num_pictures=0, num_images=0)
    assert "Detections of an image that count, the best first: 1 (full), 100 (low)." in text
    assert "max_dets_per_image" not in text and not [note for note in found[0].notes if "different" in note]


def test_post_training_quantization_is_said(runs):
    low = runs[1]
    config = (low / "config.yaml").read_text().replace("MAX_ITER: 2", "MAX_ITER: 0")
    assert "MAX_ITER: 0" in config
    assert "2 of 2 iterations" in report_of(low, num_pictures=0, num_images=0)[1]
    (low / "config.yaml").write_text(config)
    (low / "metrics.json").write_text('{"iteration": 0, "bbox/AP": 1.0}')
    text = report_of(low, num_pictures=0, num_images=0)[1]
    assert "post-training quantization: calibrated, no iteration trained" in text and "of 0 iterations" not in text


def test_results_are_those_of_the_evaluation_s_config(runs, entry, tmp_path):
    """An evaluation of other data, which leaves the config of the training as it is."""
    full = runs[0]
    other = write_dataset(tmp_path / "other", "elsewhere", classes=CLASSES)
    cfg = train_cfg(other, full, *FLOAT)
    (full / "inference" / "config.yaml").write_text(cfg.dump())
    noted = {"weights": "some<b>.pth", "date": "2026-01-02 03:04:05"}
    (full / "inference" / "evaluation.json").write_text(json.dumps(noted))
    _, text = report_of(full, num_pictures=1, num_images=0)
    assert "<h3>elsewhere</h3>" in text and "<h3>tiny_report</h3>" not in text
    assert "results of some&lt;b&gt;.pth, 2026-01-02 03:04:05" in text
    (full / "inference" / "evaluation.json").write_text('{"iterations": 1200}')
    assert "results of iteration 1,200" in report_of(full, num_pictures=0, num_images=0)[1]


def test_masks_are_drawn_and_their_ap_is_in_the_table(runs, tmp_path):
    full, _ = runs
    mask = np.zeros((64, 64), dtype=np.uint8, order="F")
    mask[10:20, 4:40], mask[13:16, 10:20] = 1, 0  # with a hole
    rle = coco_mask.encode(mask)
    rle = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    results = json.loads((full / "inference/coco_instances_results.json").read_text())
    (full / "inference/coco_instances_results.json").write_text(
        json.dumps([{**result, "segmentation": rle} for result in results])
    )
    metrics = {"AP": 10.0, "AP-ring": 9.0, "segm": {"AP": 31.5, "AP-ring": 30.25}}
    (full / "inference/metrics.json").write_text(json.dumps(metrics))
    text = make_report(load_runs([full]))
    Page(text)
    assert text.count('class="mask"') >= 2 and "fill-rule: evenodd" in text
    for label, value in (("masks: AP, IoU 0.50 to 0.95", "31.5"), ("masks: AP, class ring", "30.2")):
        assert label in text and value in text


@pytest.mark.parametrize("as_text", [True, False])
def test_the_outline_of_a_mask_covers_the_mask(as_text):
    rng = np.random.default_rng(0)
    mask = cv2.resize(rng.random((6, 8)).astype(np.float32), (80, 60), interpolation=cv2.INTER_CUBIC) > 0.5
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    if not as_text:
        changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.reshape(-1), [2]])))
        rle["counts"] = np.diff(np.concatenate([[0], changes])).tolist()
    parts = [
        np.array([point.split() for point in part[1:].split("L")], dtype=float) for part in outline(rle).split("Z")[:-1]
    ]
    drawn = np.zeros((60 * 8, 80 * 8), dtype=np.uint8)  # eight times as large, so that edges count little
    cv2.fillPoly(drawn, [np.round(part * 8).astype(np.int32) for part in parts], 1)
    inside = drawn[4::8, 4::8] == 1
    assert np.mean(inside != mask) < 0.01 and 0.2 < mask.mean() < 0.8
    assert outline(None) == outline([]) == "" and outline([[1, 2, 3.25, 4, 5, 6]]) == "M1.0 2.0L3.2 4.0L5.0 6.0Z"


def test_metrics_with_nan_are_read(runs):
    (runs[0] / "inference" / "metrics.json").write_text('{"AP": 12.9, "APs": NaN, "APl": Infinity}')
    found, text = report_of(runs[0], num_pictures=0, num_images=0)
    assert "<td>APs, area up to 32² px</td><td>-</td>" in text and "<td>APl, area from 96² px</td><td>-</td>" in text
    assert not any("cannot be read" in note for note in found[0].notes)


def test_histograms_of_every_quantizer_and_the_plan(runs):
    _, text = report_of(runs[1], num_pictures=0, num_images=1)
    names = [name for name, _ in quantizers(make_model(*QUANT, "MODEL.FPN.RELU", "True"))]
    for name in names:
        assert f'<td class="path">{name}</td>' in text
    assert text.count('<path class="bars"') == len(names) and f"Table of {len(names)} quantizers" in text
    assert "of 1 test images" in text and "backbone.bottom_up.res2.0.conv1</td>" in text
    assert '<section id="pictures">' not in text


def test_several_quantized_runs_are_compared(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    cfg = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(cfg.replace("RULES: []", "RULES: [['head.cls_score', {'ENABLED': False}]]"))
    found, text = report_of(runs[1], other, num_pictures=0, num_images=0)
    # Its checkpoint has quantizers where the config has none.
    assert any("no histograms: checkpoint" in note and "unexpected head.cls_score" in note for note in found[1].notes)
    assert '<td class="path">MODEL.QUANT.RULES</td><td class="code">[]</td><td class="code differs">' in text
    assert text.count('<td class="left differs">') == 2 and "Marked: what differs" in text


def without(folder, *names):
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "names, words",
    [
        (["inference"], "not evaluated: "),
        (["inference/metrics.json"], "not evaluated: "),
        (["inference/coco_instances_results.json"], "no curves and pictures of detection: "),
        (["metrics.json"], "metrics.json is missing: no curves of loss and AP"),
        (["config.yaml"], "config.yaml is missing: "),
        (["model_final.pth", "model_final_stripped.pth", "last_checkpoint"], "there is no checkpoint in the folder"),
    ],
)
def test_a_missing_file_is_said_and_the_rest_is_there(runs, names, words, caplog):
    folder = runs["model_final.pth" in names]
    without(folder, *names)
    found, text = report_of(folder, num_pictures=1, num_images=1)
    assert any(words in note for note in found[0].notes) and words in caplog.text
    assert str(escape(next(note for note in found[0].notes if words in note))) in text
    Page(text)


def test_results_of_another_evaluation_are_noted(runs):
    set_results(runs[0], [(1, 1, [4, 5, 36, 33], 0.9)], 77.0)
    found, _ = report_of(runs[0], num_pictures=0)
    assert any("has AP 12.871 but metrics.json says 77.000" in note for note in found[0].notes)


def test_damaged_files_are_noted(runs):
    (runs[1] / "inference" / "metrics.json").write_text("[1]")
    (runs[1] / "inference" / "coco_instances_results.json").write_text("{")
    (runs[1] / "model_final_stripped.pth").write_bytes(b"no checkpoint")
    found, text = report_of(runs[1])
    for words in ("metrics.json cannot be read", "no detections of this dataset", "is refused"):
        assert any(words in note for note in found[0].notes)
    Page(text)


def test_an_image_that_is_none_is_noted(runs, entry):
    path = Path(entry["image_root"]) / "2.png"
    content = path.read_bytes()
    path.write_bytes(b"no image")
    try:
        found, text = report_of(runs[0], num_pictures=4)
    finally:
        path.write_bytes(content)
    assert any(f"no picture: {path} cannot be read" in note for note in found[0].notes)
    assert f"<p>{path} cannot be read.</p>" in text and text.count("<use ") == 6


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "{}/secret.png"])
def test_an_image_outside_of_the_root_is_not_read(runs, entry, tmp_path, name):
    folder = Path(entry["image_root"])
    shutil.copy(folder / "0.png", folder.parent / "secret.png")
    content = json.loads(Path(entry["json"]).read_text())
    content["images"][0]["file_name"] = name.format(folder.parent)
    (tmp_path / "outside.json").write_text(json.dumps(content))
    text = (runs[0] / "config.yaml").read_text().replace(entry["json"], str(tmp_path / "outside.json"))
    (runs[0] / "config.yaml").write_text(text.replace("tiny_report", f"outside_{tmp_path.name}"))
    found, page = report_of(runs[0], num_pictures=4)
    assert any("the test data cannot be used: " in note and "image-outside" in note for note in found[0].notes)
    assert "data:image/jpeg" not in page and "script" not in Page(page).tags


def test_data_that_is_elsewhere(runs, entry):
    text = (runs[0] / "config.yaml").read_text().replace(entry["json"], "nowhere.json").replace("tiny_report", "moved")
    (runs[0] / "config.yaml").write_text(text)
    found, page = report_of(runs[0])
    assert any("the test data cannot be used: DATASETS.DECLARED[0].json: no file" in note for note in found[0].notes)
    assert "12.9" in page and '<section id="pictures">' not in page


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs the tool in an empty folder; its exit code or message, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool.logging, "basicConfig", lambda **kwargs: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        try:
            tool.main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


def test_the_command(command, runs, tmp_path):
    code, printed = command(runs[0], "--output", "new/page.html", "--pictures", 1, "--images", 1)
    assert code == 0 and printed.startswith("new/page.html: ")
    Page((tmp_path / "new" / "page.html").read_text())
    assert os.listdir(tmp_path / "new") == ["page.html"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["."], "error: '.' is no output folder of a training: it has none of config.yaml"),
        (["none"], "error: 'none' is no folder"),
        (["full", "full"], "error: the same output folder comes twice"),
        (["full", "--opts", "NO.SUCH", "1"], "error: override: Non-existent key: NO.SUCH"),
    ],
)
def test_wrong_input_is_one_line(command, runs, arguments, words):
    code, _ = command(*arguments)
    assert words in code and "\n" not in code
