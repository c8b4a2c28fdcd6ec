"""A detector on images and videos: what to read, where to write, and the loop between."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from tqdm import tqdm

from ..data import register_declared
from ..evaluation.predictor import Predictor
from .collect import UNREADABLE

logger = logging.getLogger(__name__)

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
DEFAULT_RATE = 25.0  # Frames a second of a video that does not say.
WINDOW = "aqdet"
_ESCAPE = 27


@dataclasses.dataclass(frozen=True)
class Source:
    """One file to run on, and where its picture goes relative to the output folder."""

    path: Path
    target: Path

    @property
    def is_video(self) -> bool:
        """By the ending of its name."""
        return self.path.suffix.lower() in VIDEO_ENDINGS


@dataclasses.dataclass
class Summary:
    """What a run of the demo did; ``unreadable`` has a line for each input that could not be read whole."""

    images: int = 0
    videos: int = 0
    frames: int = 0
    detections: int = 0
    unreadable: list[str] = dataclasses.field(default_factory=list)


def find_sources(inputs: Sequence[str], output: str | None = None) -> list[Source]:
    """Files behind paths, folders (with what is below them) and glob patterns, each once.

    Args:
        inputs: paths, folders and patterns.
        output: where pictures are written; one in a folder that is read, with the pictures of an earlier run, is
            passed over.

    Raises:
        ValueError: in one line, if an input leads to no image or video, or two would be written to one file.
    """
    sources: dict[Path, Source] = {}
    written = Path(output).resolve() if output else None
    for text in inputs:
        path = Path(os.path.expanduser(text))
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in (*IMAGE_ENDINGS, *VIDEO_ENDINGS)]
            if written is not None and path.resolve() in written.parents:
                found = [p for p in found if not p.resolve().is_relative_to(written)]
            pairs = [(p, p.relative_to(path)) for p in found if p.is_file()]
        else:
            matches = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path)))]
            pairs = [(p, Path(p.name)) for p in matches if p.is_file()]
        if not pairs:
            raise ValueError(f"--input {text!r}: no such file, no match, or a folder without images and videos")
        for found_path, target in pairs:
            source = Source(found_path, target)
            sources.setdefault(found_path.resolve(), dataclasses.replace(source, target=written_name(source)))
    taken: dict[Path, Path] = {}
    for source in sources.values():
        other = taken.setdefault(source.target, source.path)
        if other != source.path:
            raise ValueError(
                f"--input: {str(other)!r} and {str(source.path)!r} would both be written to {str(source.target)!r}: "
                "run the demo for each, with an --output of its own"
            )
    return list(sources.values())


def written_name(source: Source) -> Path:
    """The target with an ending that can be written: .jpg and .png stay, other images become .png, videos .mp4."""
    if source.is_video:
        return source.target.with_suffix(".mp4")
    return (
        source.target
        if source.target.suffix.lower() in (".jpg", ".jpeg", ".png")
        else source.target.with_suffix(".png")
    )


def output_paths(sources: Sequence[Source], output: str) -> list[Path]:
    """Where each source is written: below a folder, or, for a single source, a file with an ending for it.

    Raises:
        ValueError: in one line, if an input would be overwritten or several inputs have a file as output.
    """
    is_file = Path(output).suffix.lower() in (".jpg", ".jpeg", ".png", ".mp4") and not os.path.isdir(output)
    if is_file and len(sources) > 1:
        raise ValueError(f"--output {output!r} is one file, for {len(sources)} inputs: name a folder")
    if is_file and sources[0].is_video != output.lower().endswith(".mp4"):
        raise ValueError(f"--output {output!r}: images are written as .jpg or .png, videos as .mp4")
    paths = [Path(output)] if is_file else [Path(output) / source.target for source in sources]
    read = {source.path.resolve() for source in sources}
    for path in paths:
        if path.resolve() in read:
            raise ValueError(f"--output {output!r} would overwrite the input {str(path)!r}: name another folder")
    return paths


class Demo:
    """A detector that draws what it finds.

    Args:
        cfg: config; ``MODEL.WEIGHTS`` is what is run, without its auxiliary path.
        min_score: of the detections that are drawn.

    Raises:
        ValueError, FileNotFoundError: in one line, if the weights are missing, not safe or do not fit.
    """

    def __init__(self, cfg: CfgNode, min_score: float) -> None:
        weights = cfg.MODEL.WEIGHTS
        if not weights:
            raise ValueError("MODEL.WEIGHTS is empty: name the checkpoint to run, --opts MODEL.WEIGHTS model_final.pth")
        if cfg.MODEL.META_ARCHITECTURE == "QuantClassifier":
            raise ValueError("MODEL.META_ARCHITECTURE is QuantClassifier: the demo draws boxes, which it has none of")
        self._metadata = _metadata(cfg)
        self._predictor = Predictor(cfg, weights)
        self._min_score = min_score

    def detect(self, image: np.ndarray) -> Instances:
        """Detections in an image ``(H, W, 3)`` uint8 in BGR order, those with the score asked for, on the CPU."""
        found = self._predictor(image)["instances"].to("cpu")
        return found[found.scores >= self._min_score]

    def on_image(self, image: np.ndarray) -> tuple[np.ndarray, int]:
        """The image with what was found in it, ``(H, W, 3)`` uint8 BGR, and the number of detections."""
        found = self.detect(image)
        drawn = Visualizer(image[:, :, ::-1], self._metadata).draw_instance_predictions(found)
        return drawn.get_image()[:, :, ::-1], len(found)

    def on_video(self, video: cv2.VideoCapture) -> Iterator[tuple[np.ndarray, int]]:
        """As :meth:`on_image`, for each frame until none comes; colours follow the objects."""
        visualizer = VideoVisualizer(self._metadata)
        while True:
            is_frame, frame = video.read()
            if not is_frame:
                return
            found = self.detect(frame)
            drawn = visualizer.draw_instance_predictions(frame[:, :, ::-1], found)
            yield drawn.get_image()[:, :, ::-1], len(found)


def _metadata(cfg: CfgNode) -> Any:
    """Class names of the first test set; its data need not be on this machine."""
    try:
        register_declared(cfg, train=False)
    except ValueError as error:
        logger.warning("Class names are not known, their numbers are drawn: %s", error)
        return MetadataCatalog.get("__unused")
    return MetadataCatalog.get(cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "__unused")


def run_on_files(demo: Demo, sources: Sequence[Source], outputs: Sequence[Path] | None) -> Summary:
    """Runs on files with a progress bar; what cannot be read is counted and the rest goes on.

    Args:
        demo: the detector.
        sources: what to read.
        outputs: where to write, one for each source; None to show a window until Escape is pressed.
    """
    summary = Summary()
    with tqdm(total=len(sources), unit="file", file=sys.stderr) as bar:
        for index, source in enumerate(sources):
            target = outputs[index] if outputs is not None else None
            if target is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
            go_on = (_do_video if source.is_video else _do_image)(demo, source.path, target, summary)
            bar.update()
            if not go_on:
                break
    return summary


def _do_image(demo: Demo, path: Path, target: Path | None, summary: Summary) -> bool:
    try:
        image = read_image(str(path), format="BGR")
    except UNREADABLE as error:
        summary.unreadable.append(f"{path}: {' '.join(str(error).split())}")
        return True
    start = time.perf_counter()
    drawn, count = demo.on_image(image)
    logger.info("%s: %d detections in %.2f s", path, count, time.perf_counter() - start)
    summary.images += 1
    summary.detections += count
    if target is None:
        return _show(drawn, wait=0)
    aside = target.with_name(f"{target.stem}.part{target.suffix}")
    if not cv2.imwrite(str(aside), drawn):
        raise OSError(f"{target} cannot be written")
    os.replace(aside, target)
    return True


def _do_video(demo: Demo, path: Path | int, target: Path | None, summary: Summary) -> bool:
    # One that does not open has no frames, and 0 for every property.
    video = cv2.VideoCapture(path if isinstance(path, int) else str(path))
    expected = max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
    rate = video.get(cv2.CAP_PROP_FPS) or DEFAULT_RATE
    frames = 0
    go_on = True
    writer: cv2.VideoWriter | None = None
    with contextlib.ExitStack() as stack:
        stack.callback(video.release)
        bar = tqdm(total=expected or None, unit="frame", desc=str(path), file=sys.stderr, leave=False)
        stack.enter_context(bar)
        for drawn, count in demo.on_video(video):
            frames += 1
            summary.detections += count
            if target is not None:
                writer = writer or stack.enter_context(_writing(target, rate, drawn.shape))
                writer.write(drawn)
            elif not _show(drawn, wait=1):
                go_on = False
                break
            bar.update()
    if frames == 0:
        summary.unreadable.append(f"{path}: no frame of it can be decoded")
        return True
    summary.videos += 1
    summary.frames += frames
    if go_on and frames < expected:
        summary.unreadable.append(f"{path}: {frames} frames can be decoded of {expected} that it announces")
    return go_on


@contextlib.contextmanager
def _writing(target: Path, rate: float, shape: tuple[int, ...]) -> Iterator[cv2.VideoWriter]:
    """An MP4 of frames of ``shape`` at ``rate`` a second: in place when it is complete, else gone."""
    aside = target.with_name(f"{target.stem}.part{target.suffix}")
    writer = cv2.VideoWriter(str(aside), cv2.VideoWriter_fourcc(*"mp4v"), rate, (shape[1], shape[0]))  # type: ignore
    if not writer.isOpened():
        raise OSError(f"{target} cannot be written as MP4")
    try:
        yield writer
    except BaseException:
        writer.release()
        aside.unlink(missing_ok=True)
        raise
    writer.release()
    os.replace(aside, target)


def _show(image: np.ndarray, wait: int) -> bool:
    """Shows it in a window, for ``wait`` ms or until a key; whether to go on, that is, Escape was not pressed."""
    cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
    cv2.imshow(WINDOW, image)
    return cv2.waitKey(wait) != _ESCAPE


def run_on_webcam(demo: Demo) -> Summary:
    """Shows the first camera until Escape is pressed."""
    summary = Summary()
    _do_video(demo, 0, None, summary)
    return summary


def has_display() -> bool:
    """Whether a window can be opened."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
