"""An image classifier trained by the same trainer as the detectors."""

import json

import torch
from helpers import AUX, CLASSIFIER, QUANT, make_cfg
from tiny_data import write_image_folder

from aqdet.data import register_declared
from aqdet.engine import Trainer, build_checkpointer


def test_it_trains_evaluates_without_its_path_and_reloads(tmp_path):
    entry = write_image_folder(tmp_path / "data", "tiny_classes")
    cfg = make_cfg(
        *(*QUANT, *AUX, *CLASSIFIER, "DATALOADER.NUM_WORKERS", "0", "SEED", "1", "OUTPUT_DIR", str(tmp_path / "run")),
        *("DATASETS.TRAIN", "('tiny_classes',)", "DATASETS.TEST", "('tiny_classes',)"),
        *("INPUT.CLASSIFIER.CROP_SIZE", "32", "INPUT.MIN_SIZE_TEST", "40", "MODEL.QUANT.CALIBRATION.METHOD", "minmax"),
        *("SOLVER.IMS_PER_BATCH", "3", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", "1"),
    )
    cfg.DATASETS.IMAGE_FOLDERS = [entry]
    register_declared(cfg)
    (tmp_path / "run").mkdir()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    results = trainer._last_eval_results
    assert set(results["classification"]) == {"top1", "top5"} and results["classification"]["top5"] == 100
    assert json.loads((tmp_path / "run" / "inference" / "metrics.json").read_text()) == results["classification"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert {"loss_cls", "aux_loss_cls", "classification/top1"} <= set().union(*lines)
    cfg.MODEL.AUX.ENABLED = False
    shipped = Trainer.build_model(cfg)
    build_checkpointer(cfg, shipped).load(str(tmp_path / "run" / "model_final_stripped.pth"))
    assert Trainer.test(cfg, shipped)["classification"] == results["classification"]
    batch = [{"image": torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)}]
    model = trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(shipped.eval()(batch)[0]["scores"], model(batch)[0]["scores"])
