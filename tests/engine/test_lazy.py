"""The LazyConfig among our configs, with the steps of Detectron2's lazyconfig_train_net.py."""

import torch
from detectron2.config import LazyConfig, instantiate
from helpers import ROOT, make_batch

import aqdet
from aqdet.engine.solver import RelativeStep
from aqdet.quantization import quantizers

EXAMPLE = ROOT / "configs" / "LazyConfig" / "retinanet_R_18_FPN_1x_lsq_w4a4_aux.py"
SMALL = (
    "['MODEL.DEVICE',cpu,'MODEL.FPN.OUT_CHANNELS','16','MODEL.RETINANET.NUM_CONVS','1','MODEL.QUANT.CALIBRATION.METHOD',"
    "minmax,'MODEL.QUANT.CALIBRATION.NUM_BATCHES','1','MODEL.WEIGHTS','']"
)


def test_the_example_trains(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)  # its paths do not depend on the current folder
    cfg = LazyConfig.load(str(EXAMPLE))
    cfg = LazyConfig.apply_overrides(cfg, [f"config.overrides={SMALL}"])
    model = instantiate(cfg.model)
    assert model.auxiliary is not None and sum(1 for _ in quantizers(model)) > 80
    config = instantiate(cfg.config)
    batches = [make_batch()]
    prepared = aqdet.prepare(config, model, batches)
    # As lazyconfig_train_net.py builds it; aqdet.prepare has one as well.
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    assert isinstance(optimizer, RelativeStep)
    assert [len(g["params"]) for g in optimizer.param_groups] == [
        len(g["params"]) for g in prepared.optimizer.param_groups
    ]
    before = model.head.cls_score.weight.clone()
    with prepared.step(0):
        sum(model(batches[0]).values()).backward()
        optimizer.step()
    assert not torch.equal(model.head.cls_score.weight, before) and "asks for" not in caplog.text
    assert cfg.train.init_checkpoint == "" and cfg.dataloader.train.total_batch_size == 16
    instantiate(cfg.lr_multiplier)
