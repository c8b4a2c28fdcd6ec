"""What is used of each range: by hand, and scales that are wrong by a factor are found."""

import copy

import numpy as np
import pytest
import torch
from programs import image, shared

from aqdet.export.description import pad_image
from aqdet.export.extract import extract
from aqdet.export.program import Grid
from aqdet.export.reference import run
from aqdet.export.usage import Usage, _usage, measure_usage, other_domain


def histogram(grid, *codes):
    return np.bincount(np.array(codes) - grid.quant_min, minlength=grid.quant_max - grid.quant_min + 1)


def test_usage_by_hand():
    u4, s4 = Grid(1.0, 0, 15), Grid(1.0, -8, 7)
    assert _usage("q", u4, histogram(u4, 0, 0, 3, 12, 15)) == Usage("q", 15, 1.0, 1 / 3)
    assert _usage("q", u4, histogram(u4, 0, 3)) == Usage("q", 15, 0.2, 0.0)
    assert _usage("q", s4, histogram(s4, 0, -8, 7, 2)) == Usage("q", 8, 1.0, 2 / 3)
    assert _usage("q", u4, histogram(u4, 0, 0)) == Usage("q", 15, 0.0, 0.0)


@pytest.mark.parametrize(
    "usage, words",
    [
        (Usage("q", 255, 0.65, 0.01), ""),
        (Usage("q", 3, 1 / 3, 0.0), ""),
        (Usage("q", 1, 1.0, 1.0), ""),  # one bit
        (Usage("q", 15, 0.0, 0.0), "layer q: every code is 0, its scale is too large"),
        (Usage("q", 255, 3 / 255, 0.0), "layer q: no code above 3 of 255 is used, its scale is too large"),
        (Usage("q", 15, 2 / 15, 0.0), ""),
        (Usage("q", 15, 1.0, 0.97), "layer q: 97% of its codes are clipped, its scale is too small"),
    ],
)
def test_faults(usage, words):
    assert usage.fault.startswith(words) and bool(usage.fault) == bool(words)


def test_a_range_that_is_hardly_used_is_told():
    assert Usage("q", 15, 2 / 15, 0.0).is_hardly_used and Usage("q", 255, 0.1, 0.0).is_hardly_used
    assert not Usage("q", 15, 0.4, 0.0).is_hardly_used and not Usage("q", 3, 1 / 3, 0.0).is_hardly_used


def test_images_of_another_kind_clip_more():
    before = [Usage("a", 15, 1.0, 0.01), Usage("b", 15, 1.0, 0.0), Usage("c", 15, 1.0, 0.3)]
    given = [Usage("a", 15, 1.0, 0.04), Usage("b", 15, 1.0, 0.03), Usage("c", 15, 1.0, 0.5)]
    assert other_domain(before, given) == ["b"]
    assert other_domain(before, before) == []


def test_counts_are_the_references():
    _, program = shared()
    images = [pad_image(program, i) for i in image(32, 32, 2)]
    usages = {usage.name: usage for usage in measure_usage(program, images)}
    values = [run(program, i[None]) for i in images]
    name, grid = "head.bbox_subnet.0.input_quantizer", program.grids()["head.bbox_subnet.0.input_quantizer@p3"]
    codes = np.concatenate([v.ravel() for value in values for key, v in value.items() if key.startswith(f"{name}@")])
    assert usages[name].used == np.abs(codes).max() / 15
    assert usages[name].clipped == pytest.approx((codes == grid.quant_max).sum() / (codes != 0).sum())
    assert len(usages) == len({o.output.split("@")[0] for o in program.operations if getattr(o, "grid", None)})


@pytest.mark.parametrize("factor", [100, 0.005])
@pytest.mark.parametrize("name", ["backbone.bottom_up.res3.0.conv2.input_quantizer", "backbone.p4_stream.quantizer"])
def test_a_scale_that_is_far_off_is_found(factor, name):
    model = copy.deepcopy(shared()[0])
    quantizer = model.get_submodule(name)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.mul_(factor)
    try:
        faults = [usage.fault for usage in measure_usage(extract(model), list(image(64, 64)))]
    except ValueError as error:  # a layer behind it would read zeros alone
        faults = [str(error)]
        assert factor < 1
    else:
        assert any(fault.startswith(f"layer {name}: ") for fault in faults)
    assert any(faults)
