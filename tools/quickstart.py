#!/usr/bin/env python
"""Trains three detectors on the embedded dataset and compares them in a table and a picture."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqdet.utils.arguments import folder_to_write

if TYPE_CHECKING:
    import numpy as np
    from jobs import Job

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "fp_bn": "full precision with BN",
    "lsq_w4a4": "4-bit",
    "lsq_w4a4_aux": "4-bit with auxiliary path",
}
ITERATIONS = 200
"""Of each run from the start: half of what the configs have, so that all of it takes minutes."""
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
COLOURS = ((60, 60, 230), (60, 180, 60), (230, 120, 40), (40, 190, 220), (200, 60, 200), (150, 150, 40))
MIN_SCORE = 0.5
NUM_PICTURES = 5


def make_jobs(output: str, short: bool) -> dict[str, Job]:
    """A full-precision start, then three runs of equal length from it.

    One start for all three: run by itself, the config with the auxiliary path starts from full precision with the path.
    """
    from jobs import Job

    from aqdet.config import load_config

    jobs = {}
    for key in ("start", *VARIANTS):
        config = ROOT / "configs" / "quickstart" / f"retinanet_r18_{'fp_bn' if key == 'start' else key}.yaml"
        overrides: list[str] = ["SEED", "1"]
        if key == "start":
            solver = load_config(config).SOLVER
        else:
            solver = load_config(config.with_name("retinanet_r18_lsq_w4a4.yaml")).SOLVER
            overrides += ["MODEL.WEIGHTS", os.path.join(output, "start", "model_final.pth")]
        iterations = 4 if short else solver.MAX_ITER if key == "start" else ITERATIONS
        overrides += ["SOLVER.BASE_LR", str(solver.BASE_LR), "SOLVER.MAX_ITER", str(iterations)]
        path = os.path.relpath(config)
        sources = () if key == "start" else (jobs["start"],)
        jobs[key] = Job(key, path, tuple(overrides), os.path.join(output, key), iterations, sources)
    return jobs


def describe(key: str, job: Job) -> dict[str, Any]:
    """Metrics of a job, with parameters and packed weight bytes of the detector as shipped."""
    from detectron2.modeling import build_model

    from aqdet.analysis.plan import make_plan, total
    from aqdet.config import load_config

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
    """The image, enlarged, with a box for each object in its class's colour."""
    import cv2
    import numpy as np

    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    for box, index in zip(boxes, classes, strict=True):
        x0, y0, x1, y1 = (int(v) for v in (np.asarray(box) * scale).round())
        cv2.rectangle(canvas, (x0, y0), (x1, y1), COLOURS[index], 2)
    return canvas


def make_picture(jobs: dict[str, Job], path: str) -> None:
    """Rows of images: ground truth and what each detector finds with a score of at least 0.5."""
    import cv2
    import numpy as np
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from aqdet.config import load_config
    from aqdet.evaluation.predictor import Predictor

    records = DatasetCatalog.get("aqdet_shapes_val")[:NUM_PICTURES]
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
    for index, name in enumerate(MetadataCatalog.get("aqdet_shapes_val").thing_classes):
        left = 8 + index * table.shape[1] // len(COLOURS)
        cv2.rectangle(legend, (left, 10), (left + 16, 24), COLOURS[index], -1)
        cv2.putText(legend, name, (left + 24, 23), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    aside = path.replace(".png", ".part.png")
    cv2.imwrite(aside, np.vstack([titles, table, legend]))
    os.replace(aside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=folder_to_write, default="output/quickstart", help="folder of all files (default: %(default)s)"
    )
    parser.add_argument("--short", action="store_true", help="a few iterations only, to see that it runs")
    args = parser.parse_args()
    # Late, so that --help opens at once.
    import torch
    from jobs import markdown_table, run_jobs

    from aqdet.config import load_config
    from aqdet.data import register_declared

    start = time.monotonic()
    try:
        jobs = make_jobs(args.output, args.short)
        register_declared(load_config(jobs["start"].config))
        run_jobs(list(jobs.values()), os.path.relpath(ROOT / "tools" / "train_net.py"))
        results = [describe(key, jobs[key]) for key in VARIANTS]
        picture = os.path.join(args.output, "detections.png")
        make_picture(jobs, picture)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to continue")
    cells = [
        [r["detector"], *("-" if r[m] is None else f"{r[m]:.1f}" for m in METRICS)]
        + [f"{r['parameters']:,}", f"{r['weight bytes']:,}"]
        for r in results
    ]
    table = markdown_table(["detector", *METRICS, "parameters", "weight bytes"], cells)
    for name, text in (("results.md", table + "\n"), ("results.json", json.dumps(results, indent=1))):
        aside = os.path.join(args.output, name + ".part")
        Path(aside).write_text(text)
        os.replace(aside, os.path.join(args.output, name))
    print(f"\nEmbedded dataset, seed 1, {torch.get_num_threads()} threads; one seed is no comparison.\n\n{table}\n")
    print(f"Picture: {picture}\nTable: {args.output}/results.md and results.json")
    print(f"Detectors and logs: {args.output}/{{start,{','.join(VARIANTS)}}}")
    print(f"This run took {(time.monotonic() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
