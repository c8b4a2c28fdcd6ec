#!/usr/bin/env python
"""Trains three detectors on the embedded dataset and compares them in a table and a picture."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqdet.utils.arguments import folder_to_write
from aqdet.utils.console import run_console
from aqdet.utils.files import replacing, write_json, write_text

if TYPE_CHECKING:
    import numpy as np
    from jobs import Job

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "fp_bn_continued": "full precision",
    "lsq_w4a4": "4-bit",
    "lsq_w4a4_aux": "4-bit with auxiliary path",
}
START, START_CONFIG = "start", "fp_bn_aux"
START_ITERATIONS, ITERATIONS = 600, 300
"""Lengths of the start and of each run from it."""
NARROW = {"MODEL.RESNETS.STEM_OUT_CHANNELS": 16, "MODEL.RESNETS.RES2_OUT_CHANNELS": 16, "MODEL.FPN.OUT_CHANNELS": 32}
"""A quarter of ResNet-18's channels and half of the configs' pyramid, which train three times as fast."""
WARMUP_ITERS = 20
TEST = "quickstart_test"
DRAWN, SHORT_DRAWN = ("aqdet_shapes_test", 0.35), ("aqdet_shapes_val", 0.1)
"""Drawn images of which a share is ``TEST``. The 200 of val would be too few for differences of 1 AP."""
SECONDS = {START: 0.39, "fp_bn_continued": 0.15, "lsq_w4a4": 0.24, "lsq_w4a4_aux": 0.31}
"""Seconds of processor time of an iteration, of both cores for the start, which has them alone.

They are those of two cores without VNNI and nothing else running (an Intel Xeon with ``ONEDNN_MAX_CPU_ISA=AVX2
ATEN_CPU_CAPABILITY=avx2``, 2026-12-01), where the whole took 5.3 minutes. The ETA needs the ratios alone.
"""
OVERHEAD = {START: 16.0, "fp_bn_continued": 28.0, "lsq_w4a4": 49.0, "lsq_w4a4_aux": 46.0}
"""Seconds of processor time of start-up, calibration and evaluation together, on the same cores."""
MEANING = """\
One seed, {start} + {run} iterations, a ResNet-18 of a quarter of its width. Over three seeds 4 bits lost 0.9 to 1.5 AP
to full precision, and the auxiliary path won back 0.0 to 0.4: a training so short does not tell whether it helps.
RESULTS.md has longer ones of the whole ResNet-18, three seeds each: full precision 58.3, 4 bits 57.5, 4 bits with the
path 57.7. All three start from a detector that was trained with the path, here and there; without it, full precision
reached 57.5 and 4 bits 56.5."""
"""The meaning of the table. The ranges are of seeds 1 to 3 (RESULTS.md, "What does the quickstart show?")."""
COLOURS = ((60, 60, 230), (60, 180, 60), (230, 120, 40), (40, 190, 220), (200, 60, 200), (150, 150, 40))
MIN_SCORE = 0.5
NUM_PICTURES = 5


def make_jobs(output: str, short: bool) -> dict[str, Job]:
    """Makes the jobs: a full-precision start with the auxiliary path, then three runs of equal length from it.

    All three share the start, so that the table shows what the runs differ in. It has the path, as the configs have it
    (1903.11236); a run without the path leaves the path's parameters out. The longest run comes first: two of them go
    side by side on two cores.
    """
    from jobs import Job

    jobs: dict[str, Job] = {}
    for key in (START, *reversed(VARIANTS)):
        is_start = key == START
        config = ROOT / "configs" / "quickstart" / f"retinanet_r18_{START_CONFIG if is_start else key}.yaml"
        iterations = 4 if short else START_ITERATIONS if is_start else ITERATIONS
        settings: dict[str, object] = {"SEED": 1, "SOLVER.MAX_ITER": iterations, "SOLVER.CHECKPOINT_PERIOD": 50}
        settings["SOLVER.WARMUP_ITERS"] = WARMUP_ITERS
        settings |= NARROW
        if is_start:
            settings["DATASETS.TEST"] = ()  # it is no row of the table
        else:
            settings["MODEL.WEIGHTS"] = os.path.join(output, START, "model_final.pth")
            settings["DATASETS.DECLARED"] = [declare_test(*(SHORT_DRAWN if short else DRAWN))]
            settings["DATASETS.TEST"] = (TEST,)
        jobs[key] = Job(
            name=VARIANTS.get(key, "full-precision start"),
            config=os.path.relpath(config),
            overrides=tuple(str(word) for setting in settings.items() for word in setting),
            output_dir=os.path.join(output, key),
            iterations=iterations,
            sources=() if is_start else (jobs[START],),
            cost=SECONDS[key],
            overhead=OVERHEAD[key],
        )
    return jobs


def declare_test(drawn: str, share: float) -> dict[str, object]:
    """Returns the declaration of ``TEST``, a share of the drawn images of that name."""
    from detectron2.data import MetadataCatalog

    import aqdet.data.embedded.register  # noqa: F401

    images = MetadataCatalog.get(drawn)
    return {"name": TEST, "json": images.json_file, "image_root": images.image_root, "split": share}


def describe(key: str, job: Job) -> dict[str, Any]:
    """Returns the metrics of a job, with parameters and packed weight bytes of the detector as shipped."""
    from detectron2.modeling import build_model

    from aqdet.analysis.plan import make_plan, total
    from aqdet.config import load_config
    from aqdet.evaluation.coco import METRICS

    cfg = load_config(job.config, job.overrides)
    rows = make_plan(build_model(cfg), (192, 192))
    shipped = total(rows, "float", "quantized")
    return {
        "detector": VARIANTS[key],
        **{metric: job.metrics()[metric] for metric in METRICS},
        "parameters": shipped.parameters,
        "weight bytes": shipped.weight_bytes,
    }


def draw(image: np.ndarray, boxes: np.ndarray, classes: list[int], scale: int = 2) -> np.ndarray:
    """Returns the image, enlarged, with a box for each object in the colour of its class."""
    import cv2
    import numpy as np

    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    for box, index in zip(boxes, classes, strict=True):
        x0, y0, x1, y1 = (int(v) for v in (np.asarray(box) * scale).round())
        cv2.rectangle(canvas, (x0, y0), (x1, y1), COLOURS[index], 2)
    return canvas


def make_picture(jobs: dict[str, Job], path: str) -> None:
    """Writes rows of images: the ground truth, and what each detector finds with a score of at least 0.5."""
    import cv2
    import numpy as np
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from aqdet.config import load_config
    from aqdet.evaluation.predictor import Predictor

    records = DatasetCatalog.get(TEST)[:NUM_PICTURES]
    predictors = [
        Predictor(
            load_config(jobs[key].config, jobs[key].overrides),
            os.path.join(jobs[key].output_dir, "model_final_stripped.pth"),
        )
        for key in VARIANTS
    ]
    rows = []
    for record in records:
        image = cv2.imread(record["file_name"])
        assert image is not None  # the check of the dataset has decoded it
        truth = [(o["bbox"], o["category_id"]) for o in record["annotations"]]
        boxes = np.array([[x, y, x + w, y + h] for (x, y, w, h), _ in truth]).reshape(-1, 4)
        cells = [draw(image, boxes, [index for _, index in truth])]
        for detect in predictors:
            found = detect(image)["instances"]
            found = found[found.scores >= MIN_SCORE].to("cpu")
            cells.append(draw(image, found.pred_boxes.tensor.numpy(), found.pred_classes.tolist()))
        rows.append(np.hstack([cv2.copyMakeBorder(c, 4, 4, 4, 4, cv2.BORDER_CONSTANT) for c in cells]))
    table = np.vstack(rows)
    titles = np.full((34, table.shape[1], 3), 255, np.uint8)
    legend = titles.copy()
    width = table.shape[1] // 4
    for column, title in enumerate(("ground truth", *VARIANTS.values())):
        cv2.putText(titles, title, (column * width + 8, 23), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    for index, name in enumerate(MetadataCatalog.get(TEST).thing_classes):
        left = 8 + index * table.shape[1] // len(COLOURS)
        cv2.rectangle(legend, (left, 10), (left + 16, 24), COLOURS[index], -1)
        cv2.putText(legend, name, (left + 24, 23), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    with replacing(path, keep_ending=True) as aside:
        cv2.imwrite(str(aside), np.vstack([titles, table, legend]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=folder_to_write, default="output/quickstart", help="folder of all files (default: %(default)s)"
    )
    parser.add_argument("--short", action="store_true", help="a few iterations only, to see that it runs")
    args = parser.parse_args()
    # Late, so that --help opens at once.
    from detectron2.data import DatasetCatalog
    from jobs import run_jobs
    from machine import Machine
    from tabulate import tabulate

    from aqdet.config import load_config
    from aqdet.data import register_declared
    from aqdet.evaluation.coco import METRICS

    start = time.monotonic()
    try:
        jobs = make_jobs(args.output, args.short)
        print("Drawing the test images, if this is the first time", flush=True)
        DatasetCatalog.get((SHORT_DRAWN if args.short else DRAWN)[0])
        register_declared(load_config(jobs["lsq_w4a4"].config, jobs["lsq_w4a4"].overrides))
        cores = os.cpu_count() or 1
        run_jobs(list(jobs.values()), os.path.relpath(ROOT / "tools" / "train_net.py"), at_once=min(cores, 3))
        results = [describe(key, jobs[key]) for key in VARIANTS]
        picture = os.path.join(args.output, "detections.png")
        make_picture(jobs, picture)
        rows = [
            [r["detector"], *("-" if r[m] is None else f"{r[m]:.1f}" for m in METRICS)]
            + [f"{r['parameters']:,}", f"{r['weight bytes']:,}"]
            for r in results
        ]
        header = ["detector", *METRICS, "parameters", "weight bytes"]
        table = tabulate(rows, header, tablefmt="github", disable_numparse=True)
        write_text(os.path.join(args.output, "results.md"), table + "\n")
        write_json(os.path.join(args.output, "results.json"), results)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to continue")
    print(f"\nEmbedded dataset, seed 1, {Machine.here()}.\n\n{table}\n")
    full, low = (results[list(VARIANTS).index(key)]["weight bytes"] for key in ("fp_bn_continued", "lsq_w4a4"))
    print(f"The 4-bit detectors take 1/{full / low:.1f} of the bytes of full precision.")
    print(f"{MEANING.format(start=jobs[START].iterations, run=jobs['fp_bn_continued'].iterations)}\n")
    print(f"Picture: {picture}\nTable: {args.output}/results.md and results.json")
    print(f"Detectors and logs: {args.output}/{{start,{','.join(VARIANTS)}}}")
    run = os.path.join(args.output, "lsq_w4a4_aux")
    shipped = os.path.join(args.output, "shipped")
    print(
        f"To ship it: {os.path.relpath(sys.executable)} tools/export_model.py --config-file {run}/config.yaml "
        f"--weights {run}/model_final_stripped.pth --output {shipped} --dataset aqdet_shapes_val"
    )
    print(f"This run took {(time.monotonic() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    run_console(main)
