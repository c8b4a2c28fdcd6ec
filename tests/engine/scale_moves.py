"""How far a training moves what quantizers learn."""

from detectron2.engine import HookBase
from tiny_data import NARROW

from aqdet.quantization import quantizers


def scales_overrides(optimizer, bits, size):
    """``KEY VALUE ...`` of a small quantized detector with batch norms, trained on images of ``size`` pixels."""
    return (
        *(*NARROW, "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.FPN.RELU", "True"),
        *("MODEL.QUANT.ENABLED", "True", "SOLVER.OPTIMIZER", optimizer),
        *("MODEL.QUANT.WEIGHT.NUM_BITS", str(bits), "MODEL.QUANT.INPUT.NUM_BITS", str(bits)),
        *("INPUT.MIN_SIZE_TRAIN", f"({size},)", "INPUT.MIN_SIZE_TEST", str(size), "SOLVER.BASE_LR", "0.002"),
        *("SOLVER.IMS_PER_BATCH", "4"),  # P7 is a pixel an image: of two values, the scale can be exact
        *("MODEL.QUANT.CALIBRATION.METHOD", "mse", "TEST.EVAL_PERIOD", "0", "SOLVER.CHECKPOINT_PERIOD", "1000"),
    )


class ScaleMoves(HookBase):
    """Notes by which factors each learned scale or alpha has changed at any iteration of a training.

    ``found`` has, by name, the method, the bits, the role, and the smallest and largest factor over elements and
    iterations.
    """

    def before_step(self):
        if self.trainer.iter == self.trainer.start_iter:
            learning = [(name, q, next(q.parameters(), None)) for name, q in quantizers(self.trainer.model)]
            self._learned = [(name, q.spec, p, p.detach().clone()) for name, q, p in learning if p is not None]
            self.found = {name: (spec.quantizer, spec.num_bits, spec.role, 1, 1) for name, spec, *_ in self._learned}

    def after_step(self):
        for name, _, parameter, start in self._learned:
            factors = parameter.detach() / start
            *spec, low, high = self.found[name]
            self.found[name] = (*spec, min(low, factors.min().item()), max(high, factors.max().item()))
