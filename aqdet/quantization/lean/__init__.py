"""Kernels that compute the values of the plain operations for less memory and, on a CPU, less time.

- A convolution of quantized operands keeps the operands before quantization for backward, which are kept anyway, and
  quantizes them again there (:mod:`.conv`). On a CPU that has instructions for it, its forward multiplies integers
  (:mod:`.integer`).
- Instead of an activation, backward keeps what it can be computed from again: the convolution's output for the batch
  norm's, a byte for a quantized value (:mod:`.recipe`, :mod:`.norm`).
- An adaptor of the auxiliary path keeps the codes of what it reads and a byte for its ReLU, and convolves again in
  backward (:mod:`.adaptor`). So do the path's 1x1 convolutions and, beside the path, the one that reads the image
  (:mod:`.convolved`).
- Max pooling keeps two bytes of each output (:mod:`.pool`).
- Fake quantization keeps its input, its recipe or a byte an element (:mod:`.elementwise`).
- A quantizer that clips at zero also acts as the ReLU before it, and in a chain of layers it computes the norm before
  it, too (:mod:`.activation`).
- A synchronized norm weighs processes by their numbers of images, and no host waits to leave one out; all levels of a
  head exchange what they need of the others at once (:mod:`.moments`, :mod:`.norm`).
- Operands that the calls of a layer on several pyramid levels share are converted once (:mod:`.sharing`).
- Element-wise arithmetic runs on parts of a tensor that stay in a CPU's cache (:mod:`.parts`).

Nothing depends on this folder but one line of :mod:`aqdet.quantization`, which registers :data:`KERNELS`. Outputs and
gradients equal those of the plain operations, but for the rounding of sums whose terms are added in another order: of
a scale's gradient, of an integer convolution against a float one, and of a batch norm's statistics.
"""

from collections.abc import Callable
from typing import Any

from .activation import chain, chains, relu_before, stream
from .adaptor import adapt
from .conv import conv2d
from .elementwise import fake_quantize
from .pool import max_pool2d
from .sharing import shared_weights
from .weight import dorefa_weight

KERNELS: dict[str, Callable[..., Any]] = {
    "adapt": adapt,
    "chain": chain,
    "chains": chains,
    "conv2d": conv2d,
    "dorefa_weight": dorefa_weight,
    "fake_quantize": fake_quantize,
    "max_pool2d": max_pool2d,
    "relu_before": relu_before,
    "shared_weights": shared_weights,
    "stream": stream,
}
