"""Configs that do not suit the machine, and names that nothing is registered under."""

import pytest
import torch
from helpers import make_cfg

from aqdet.engine import check_names, fit_to_machine
from aqdet.engine.checks import NORMS


def test_what_the_machine_lacks_is_replaced_and_said(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    keys = [f"MODEL.{name}.NORM" for name in ("RESNETS", "FPN", "RETINANET", "AUX", "ROI_BOX_HEAD")]
    amp = ("SOLVER.AMP.ENABLED", "True")
    cfg = make_cfg("MODEL.DEVICE", "cuda", *amp, *(part for key in keys for part in (key, "SyncBN")))
    fit_to_machine(cfg)
    assert cfg.MODEL.DEVICE == "cpu" and "MODEL.DEVICE is cuda" in caplog.text
    assert not cfg.SOLVER.AMP.ENABLED and "SOLVER.AMP.ENABLED: mixed precision is for CUDA" in caplog.text
    for key in keys:
        assert cfg.MODEL[key.split(".")[1]].NORM == "BN" and f"{key}: SyncBN" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = make_cfg("MODEL.DEVICE", "cuda", "MODEL.FPN.NORM", "SyncBN", *amp)
    fit_to_machine(cfg)
    assert (cfg.MODEL.DEVICE, cfg.MODEL.FPN.NORM, cfg.SOLVER.AMP.ENABLED) == ("cuda", "SyncBN", True)


@pytest.mark.parametrize(
    "key, value, valid",
    [
        ("MODEL.META_ARCHITECTURE", "Retina", "QuantRetinaNet"),
        ("MODEL.BACKBONE.NAME", "resnet", "build_quant_retinanet_resnet_fpn_backbone"),
        ("MODEL.FPN.NORM", "bn", "SyncBN"),
        ("MODEL.AUX.NORM", "Batch", "SyncBN"),
        ("MODEL.DEVICE", "gpu", "cuda"),
    ],
)
def test_wrong_names_list_the_valid_ones(key, value, valid):
    with pytest.raises(ValueError) as error:
        check_names(make_cfg(key, value))
    message = str(error.value)
    assert message.startswith(f"{key} must be") and valid in message and message.endswith(f"got {value!r}")
    assert "\n" not in message


@pytest.mark.parametrize("key", ["QUANT", "AUX", "EXTRA_LOSS", "DISTILL"])
@pytest.mark.parametrize("architecture", ["RetinaNet", "GeneralizedRCNN"])
def test_an_architecture_that_would_ignore_our_keys_is_refused(key, architecture):
    cfg = make_cfg("MODEL.META_ARCHITECTURE", architecture, f"MODEL.{key}.ENABLED", "True")
    with pytest.raises(ValueError, match=f"MODEL.{key}.ENABLED.*{architecture}.*use one of .*QuantRetinaNet") as error:
        check_names(cfg)
    assert "\n" not in str(error.value)
    cfg.MODEL[key].ENABLED = False
    check_names(cfg)


@pytest.mark.parametrize("norm", ["", *NORMS])
def test_every_listed_norm_is_one(norm):
    check_names(make_cfg("MODEL.FPN.NORM", norm))
