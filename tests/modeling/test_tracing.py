"""What Detectron2's own tools do with a quantized detector: tracing, FLOP counts, COCOEvaluator."""

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.export import TracingAdapter
from detectron2.utils.analysis import FlopCountAnalysis
from helpers import FCOS, QUANT, calibrated, make_batch, make_cfg, make_model
from tiny_data import write_dataset

from aqdet.data import register_declared
from aqdet.quantization.functional import fake_quantize, replace_ste
from aqdet.quantization.kernels import use_kernels

SCORE = ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")


def instances_of(model, inputs):
    return [{"instances": model(inputs)[0]["instances"]}]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        FCOS,
        ("MODEL.QUANT.INPUT.QUANTIZER", "pact", "MODEL.QUANT.WEIGHT.QUANTIZER", "dorefa"),
        ("MODEL.QUANT.INPUT.QUANTIZER", "lsqplus", "MODEL.QUANT.RESIDUAL_QUANTIZER", "lsqplus"),
        ("MODEL.QUANT.INPUT.QUANTIZER", "n2uq"),
        ("MODEL.QUANT.WEIGHT.QUANTIZER", "lsqodd", "MODEL.QUANT.WEIGHT.CENTERED", "True"),
        ("MODEL.QUANT.INPUT.QUANTIZER", "lqnet", "MODEL.QUANT.WEIGHT.QUANTIZER", "lqnet"),
    ],
)
def test_a_trace_computes_the_same_on_images_of_other_sizes(overrides):
    model = calibrated(make_model(*QUANT, *SCORE, *overrides), make_batch()).eval()
    inputs = [{"image": make_batch()[0]["image"].float()}]
    adapter = TracingAdapter(model, inputs, inference_func=instances_of).eval()
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    others = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(2)).float()
    for image in (inputs[0]["image"], others):
        with torch.no_grad(), use_kernels("plain"):
            wanted = model([{"image": image}])[0]["instances"]
            boxes, *rest, size = traced(image)
        assert len(wanted) and torch.equal(boxes, wanted.pred_boxes.tensor)
        assert any(torch.equal(values, wanted.scores) for values in rest)
        assert tuple(size.tolist()) == tuple(image.shape[1:])


def test_a_trace_is_saved_and_loaded(tmp_path):
    model = calibrated(make_model(*QUANT, *SCORE), make_batch()).eval()
    inputs = [{"image": make_batch()[0]["image"].float()}]
    adapter = TracingAdapter(model, inputs, inference_func=instances_of).eval()
    torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False).save(str(tmp_path / "a.pt"))
    with torch.no_grad(), use_kernels("plain"):
        boxes = torch.jit.load(str(tmp_path / "a.pt"))(*adapter.flattened_inputs)[0]
        assert torch.equal(boxes, model(inputs)[0]["instances"].pred_boxes.tensor)


def test_quantization_has_no_flops_of_its_own():
    inputs = [{"image": make_batch()[0]["image"].float()}]
    ours = FlopCountAnalysis(calibrated(make_model(*QUANT), make_batch()).eval(), inputs)
    theirs = FlopCountAnalysis(make_model(theirs=True).eval(), inputs)
    assert ours.total() == theirs.total() > 1e8
    ours, theirs = ours.by_module(), theirs.by_module()
    names = [f"model.backbone.bottom_up.{name}" for name in ("stem", "res3", "res5.1.conv2")] + [
        "model.backbone.fpn_output4"
    ]
    assert [ours[name] for name in names] == [theirs[name] for name in names] and all(ours[name] for name in names)


def test_gradients_are_as_ever_outside_of_a_trace():
    x = torch.tensor([0.4, 1.5, 9.0], requires_grad=True)
    (replace_ste(x, x.detach().round()) + fake_quantize(x, torch.tensor(1.0), 0, 3)).sum().backward()
    assert x.grad.tolist() == [2, 2, 1]


def test_detectron2s_coco_evaluator(tmp_path):
    entry = write_dataset(tmp_path / "data", "tiny_evaluator")
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(entry["name"], None)
    register_declared(make_cfg("DATASETS.DECLARED", str([entry]), "DATASETS.TEST", str((entry["name"],))))
    model = calibrated(make_model(*QUANT, *SCORE), make_batch()).eval()
    evaluator = COCOEvaluator(entry["name"], tasks=("bbox",), distributed=False, output_dir=str(tmp_path))
    evaluator.reset()
    batch = make_batch()
    for index, image in enumerate(batch):
        with torch.no_grad():
            evaluator.process([{**image, "image_id": index + 1}], model([image]))
    assert evaluator.evaluate()["bbox"]["AP"] >= 0
