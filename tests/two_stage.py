"""Small two-stage detectors and batches for the tests."""

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.structures import Keypoints, PolygonMasks
from helpers import make_batch

from aqdet.config import load_config

RCNN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
MASK = ("MODEL.MASK_ON", "True")
KEYPOINTS = ("MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "2")
KEYPOINTS += ("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8, 8)")
TAPS = "MODEL.AUX.TAPS"
OURS = ("MODEL.META_ARCHITECTURE", "QuantGeneralizedRCNN", "MODEL.BACKBONE.NAME", "build_quant_resnet_fpn_backbone")
SMALL = (
    "MODEL.DEVICE cpu MODEL.WEIGHTS '' MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 "
    "MODEL.RESNETS.NORM BN MODEL.FPN.NORM BN MODEL.FPN.OUT_CHANNELS 16 MODEL.BACKBONE.FREEZE_AT 0 "
    "MODEL.ANCHOR_GENERATOR.SIZES [[8],[16],[32],[64],[128]] MODEL.RPN.PRE_NMS_TOPK_TRAIN 100 "
    "MODEL.RPN.POST_NMS_TOPK_TRAIN 50 MODEL.RPN.PRE_NMS_TOPK_TEST 100 MODEL.RPN.POST_NMS_TOPK_TEST 50 "
    "MODEL.ROI_HEADS.NUM_CLASSES 3 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 32 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 "
    "MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_BOX_HEAD.CONV_DIM 8 MODEL.ROI_MASK_HEAD.CONV_DIM 8 "
    "MODEL.ROI_MASK_HEAD.NUM_CONV 2"
).split()
SMALL[SMALL.index("''")] = ""


def rcnn_cfg(*overrides, theirs=False):
    return load_config(RCNN, [*SMALL, *(() if theirs else OURS), *overrides])


def rcnn(*overrides, theirs=False, seed=0):
    torch.manual_seed(seed)
    return build_model(rcnn_cfg(*overrides, theirs=theirs))


def with_shapes(batch, num_keypoints=2):
    """Adds a polygon, the box cut at a corner, and keypoints on a diagonal to every object of a batch."""
    for record in batch:
        instances = record["instances"]
        boxes = instances.gt_boxes.tensor
        polygons = [[np.array([x0, y0, x1, y0, x1, y1, (x0 + x1) / 2, y1])] for x0, y0, x1, y1 in boxes.numpy()]
        instances.gt_masks = PolygonMasks(polygons)
        shares = torch.linspace(0.25, 0.75, num_keypoints).view(1, -1, 1)
        points = boxes[:, None, :2] * (1 - shares) + boxes[:, None, 2:] * shares
        points = torch.cat([points, torch.full((len(boxes), num_keypoints, 1), 2.0)], dim=2)
        instances.gt_keypoints = Keypoints(points)
    return batch


def shaped_batch(num_images=2, size=64, empty=(), num_keypoints=2):
    batch = with_shapes(make_batch(num_images, size, empty), num_keypoints)
    for index in empty:  # as Detectron2's mapper has them
        batch[index]["instances"].remove("gt_masks")
        batch[index]["instances"].remove("gt_keypoints")
    return batch
