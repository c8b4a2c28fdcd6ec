"""The 4-bit RetinaNet with its auxiliary path as a LazyConfig, for scripts like Detectron2's lazyconfig_train_net.py.

``config`` is the YAML config with overrides, and may be changed as any other node, e.g.
``config.overrides=[MODEL.QUANT.WEIGHT.NUM_BITS,2]``. After it has built the model, the script calls
``aqdet.prepare(instantiate(cfg.config), model, batches)``, which loads the weights, calibrates and gives the optimizer.
"""

import os

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config
from detectron2.modeling import build_model

from aqdet.config import load_config
from aqdet.engine.lazy import optimizer_of, parameters_of

config = L(load_config)(
    path=os.path.join(
        os.path.dirname(__file__), os.pardir, "COCO-Detection", "retinanet_R_18_FPN_1x_lsq_w4a4_aux.yaml"
    ),
    overrides=[],
)
model = L(build_model)(cfg="${config}")
optimizer = L(optimizer_of)(cfg="${config}", params=L(parameters_of)(model=None))

dataloader = get_config("common/data/coco.py").dataloader
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x
train = get_config("common/train.py").train
dataloader.train.mapper.use_instance_mask = False
train.amp.enabled = False
train.init_checkpoint = ""  # MODEL.WEIGHTS of the config, which aqdet.prepare loads
