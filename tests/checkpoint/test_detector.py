import pytest
import torch
from helpers import AUX, QUANT, calibrated, make_batch, make_cfg, make_model

from aqdet.checkpoint import check_calibrated, load_detector
from aqdet.evaluation.predictor import Predictor
from aqdet.quantization import quantizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of a calibrated quantized detector with its path, of a new one and of a float one."""
    folder = tmp_path_factory.mktemp("weights")
    model = make_model(*QUANT, *AUX)
    torch.save({"model": model.state_dict()}, folder / "new.pth")
    torch.save({"model": calibrated(model, make_batch()).state_dict()}, folder / "whole.pth")
    torch.save({"model": make_model().state_dict()}, folder / "float.pth")
    return folder


def test_the_detector_alone_in_evaluation(folder):
    cfg = make_cfg(*QUANT, *AUX)
    model = load_detector(cfg, str(folder / "whole.pth"))
    stored = torch.load(folder / "whole.pth", weights_only=True)["model"]
    assert set(model.state_dict()) == {key for key in stored if not key.startswith("auxiliary.")}
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
    assert not model.training and cfg.MODEL.AUX.ENABLED, "the config is the caller's"


def test_a_float_detector_of_a_quantized_config(folder):
    cfg = make_cfg(*QUANT, "MODEL.DEVICE", "cuda")
    model = load_detector(cfg, str(folder / "float.pth"), quantized=False, device="cpu")
    assert not list(quantizers(model)) and next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    "overrides, name, words",
    [
        (QUANT, "none.pth", "none.pth' does not exist"),
        (QUANT, "new.pth", "quantizers are not calibrated, backbone."),
        (QUANT, "float.pth", r"MODEL.WEIGHTS '.*float.pth': \d+ quantizers .* or MODEL.QUANT.ENABLED False"),
        ((), "whole.pth", "MODEL.QUANT.ENABLED is False"),
    ],
)
def test_what_gives_no_detector_is_one_line(folder, overrides, name, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        load_detector(make_cfg(*overrides), str(folder / name))
    assert "\n" not in str(error.value)


def test_a_whole_detector_is_asked_for(folder, tmp_path):
    part = {k: v for k, v in torch.load(folder / "float.pth")["model"].items() if k.startswith("backbone.")}
    torch.save({"model": part, "aqdet": {"scope": ["backbone."]}}, tmp_path / "part.pth")
    assert load_detector(make_cfg(), str(tmp_path / "part.pth"))
    with pytest.raises(ValueError, match="part.pth' lacks 8 of its keys, head.cls_subnet.0.weight among them"):
        load_detector(make_cfg("MODEL.RETINANET.NORM", ""), str(tmp_path / "part.pth"), whole=True)
    with pytest.raises(ValueError, match="head.cls_score"):  # whatever ALLOW_KEYS says
        cfg = make_cfg("MODEL.RETINANET.NUM_CLASSES", "4", "CHECKPOINT.ALLOW_KEYS", "['head']")
        load_detector(cfg, str(folder / "float.pth"), whole=True)


def test_quantizers_that_are_off_need_no_range():
    model = make_model(*QUANT)
    for _, quantizer in quantizers(model):
        quantizer.enabled = False
    check_calibrated(model, "x")


def test_the_predictor_is_the_detector_on_a_resized_image(folder):
    cfg = make_cfg(*QUANT, "INPUT.MIN_SIZE_TEST", "64", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")
    predictor = Predictor(cfg, str(folder / "whole.pth"))
    image = make_batch()[0]["image"].permute(1, 2, 0).numpy()
    found = predictor(image)["instances"]
    model = load_detector(cfg, str(folder / "whole.pth"))
    with torch.no_grad():
        wanted = model([{"image": torch.from_numpy(image.transpose(2, 0, 1)).float(), "height": 64, "width": 64}])
    wanted = wanted[0]["instances"]
    assert len(found) and torch.equal(found.pred_boxes.tensor, wanted.pred_boxes.tensor)
    cfg.INPUT.FORMAT = "YUV-BT.601"
    with pytest.raises(ValueError, match="INPUT.FORMAT must be RGB or BGR, got 'YUV"):
        Predictor(cfg, str(folder / "whole.pth"))
