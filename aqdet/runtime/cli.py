"""Draws what an exported detector finds in images, folders of images and videos."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from .detector import Detector
from .draw import draw
from .image import read_image

IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
UNREADABLE = 1
USER_ERROR = 2
_SECONDS_BETWEEN_LINES = 5.0
_DEFAULT_THRESHOLD = 0.5
_DEFAULT_FPS = 25.0


@dataclasses.dataclass(frozen=True)
class Job:
    """A file to read and the one to write."""

    source: Path
    target: Path

    @property
    def is_video(self) -> bool:
        return self.source.suffix.lower() in VIDEO_ENDINGS


class Lines:
    """Progress in plain lines, where tqdm is not installed."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._start = self._printed = time.monotonic()

    def update(self, steps: int = 1) -> None:
        """Counts steps; a line now and then."""
        self._done += steps
        now = time.monotonic()
        if now - self._printed < _SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        left = max(self._total - self._done, 0) * (now - self._start) / self._done
        print(f"{self._done} of {self._total}, ETA {int(left) // 60}:{int(left) % 60:02d} min", file=sys.stderr)

    def close(self) -> None:
        """Nothing is held."""


def make_progress(total: int) -> Any:
    """tqdm's bar if it is installed, else :class:`Lines`."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return Lines(total)
    return tqdm(total=total, unit="image", file=sys.stderr)


def plan_jobs(inputs: Sequence[str], output: str) -> tuple[list[Job], int]:
    """What to read and where to write it.

    ``output`` is a file if there is one input file and it has the ending of an image or a video, else a
    folder, which keeps the structure of input folders. Videos become ``.mp4``.

    Returns:
        the jobs, and the number of files in input folders that are neither image nor video.

    Raises:
        FileNotFoundError: if an input does not exist.
        ValueError: if there is nothing to do, two inputs would be written to one file, or a result would
            replace an input or be one the next time.
    """
    target, jobs, others = Path(output), [], 0
    known = IMAGE_ENDINGS + VIDEO_ENDINGS
    for given in map(Path, inputs):
        if given.is_dir():
            if target.resolve().is_relative_to(given.resolve()):
                raise ValueError(f"--output {target} lies in the input {given}: choose a place outside it")
            files = sorted(path for path in given.rglob("*") if path.is_file())
            media = [path for path in files if path.suffix.lower() in known]
            others += len(files) - len(media)
            jobs += [_make_job(path, target / path.relative_to(given)) for path in media]
        elif given.is_file():
            jobs.append(_make_job(given, target / given.name))
        else:
            raise FileNotFoundError(f"{given} does not exist")
    if not jobs:
        raise ValueError(f"no image or video in {', '.join(inputs)} (endings: {' '.join(known)})")
    if len(jobs) == 1 and Path(inputs[0]).is_file() and target.suffix.lower() in known and not target.is_dir():
        jobs = [Job(jobs[0].source, target)]
        if jobs[0].is_video != (target.suffix.lower() in VIDEO_ENDINGS):
            raise ValueError(f"--output {target}: {jobs[0].source} is {'a video' if jobs[0].is_video else 'an image'}")
    _check_targets(jobs)
    return jobs, others


def _make_job(source: Path, target: Path) -> Job:
    ending = source.suffix.lower()
    if ending in VIDEO_ENDINGS:
        return Job(source, target.with_suffix(".mp4"))
    return Job(source, target if ending in IMAGE_ENDINGS else target.with_suffix(".png"))


def _check_targets(jobs: Sequence[Job]) -> None:
    count = collections.Counter(job.target.resolve() for job in jobs)
    sources = {(stat.st_dev, stat.st_ino): job.source for job in jobs for stat in [job.source.stat()]}
    for job in jobs:
        if count[job.target.resolve()] > 1:
            raise ValueError(f"several inputs would be written to {job.target}, {job.source} among them: rename one")
        if job.target.exists():
            stat = job.target.stat()
            if (stat.st_dev, stat.st_ino) in sources:
                raise ValueError(f"--output would replace the input {job.target}: choose another place")


def draw_image(job: Job, annotate: Callable[[np.ndarray], np.ndarray]) -> None:
    """Reads an image and writes the annotated one aside, then in place.

    Raises:
        ValueError: if the image cannot be read.
    """
    image = annotate(read_image(job.source))
    encoded, data = cv2.imencode(job.target.suffix, image)
    if not encoded:
        raise OSError(f"{job.target}: OpenCV cannot write {job.target.suffix}")
    aside = job.target.with_name(job.target.name + ".part")
    aside.write_bytes(data.tobytes())
    os.replace(aside, job.target)


def draw_video(job: Job, annotate: Callable[[np.ndarray], np.ndarray]) -> int:
    """Reads a video and writes the annotated one, without sound, aside, then in place.

    Returns:
        the number of frames.

    Raises:
        ValueError: if the video cannot be read.
    """
    capture = cv2.VideoCapture(str(job.source))
    there, frame = capture.read()
    if not there:
        raise ValueError(f"{job.source}: not a video that OpenCV can read")
    aside = job.target.with_name(f"{job.target.stem}.part{job.target.suffix}")
    fps = capture.get(cv2.CAP_PROP_FPS) or _DEFAULT_FPS
    codec = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(aside), codec, fps, (frame.shape[1], frame.shape[0]))
    if not writer.isOpened():
        raise OSError(f"{job.target}: OpenCV cannot write this video: name an .mp4 file")
    frames = 0
    try:
        while there:
            writer.write(annotate(frame))
            frames += 1
            there, frame = capture.read()
    except BaseException:
        writer.release()
        aside.unlink()
        raise
    finally:
        capture.release()
    writer.release()
    os.replace(aside, job.target)
    return frames


def count_frames(job: Job) -> int:
    """Frames that a video's header states, 1 for an image."""
    if not job.is_video:
        return 1
    capture = cv2.VideoCapture(str(job.source))
    frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    capture.release()
    return max(frames, 1)


def run(detector: Detector, jobs: Sequence[Job], threshold: float) -> list[str]:
    """Does all jobs; prints progress and a summary.

    Args:
        detector: to run.
        jobs: what to read and write.
        threshold: score from which a box is drawn.

    Returns:
        a line for each file that could not be read.
    """
    for job in jobs:
        job.target.parent.mkdir(parents=True, exist_ok=True)
    frames_of = [count_frames(job) for job in jobs]
    unreadable, notes, drawn, highest = [], [], 0, 0.0

    def annotate(image: np.ndarray) -> np.ndarray:
        nonlocal drawn, highest
        found = detector(image)
        highest = max([highest, *found.scores.tolist()])
        found = found.select(found.scores >= threshold)
        drawn += len(found)
        progress.update(1)
        return draw(image, found, detector.classes)

    with contextlib.closing(make_progress(sum(frames_of))) as progress:
        for job, expected in zip(jobs, frames_of, strict=True):
            try:
                if not job.is_video:
                    draw_image(job, annotate)
                elif (frames := draw_video(job, annotate)) < expected:
                    notes.append(f"{job.source}: read {frames} of the {expected} frames that its header states")
            except ValueError as error:
                unreadable.append(str(error))
                progress.update(expected)
    print(f"{len(jobs) - len(unreadable)} of {len(jobs)} files, {drawn} objects with a score of at least {threshold:g}")
    if not drawn and len(unreadable) < len(jobs):
        print(f"nothing was drawn: the highest score was {highest:.3f}, see --threshold")
    for note in notes:
        print(f"note: {note}")
    return unreadable


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 1 if a file could not be read, with 2 if the request cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m aqdet.runtime", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="exported detector")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, video, or folder (with its subfolders)")
    parser.add_argument("--output", required=True, help="file for one image or video (.mp4), folder for several")
    parser.add_argument("--threshold", type=float, help=f"lowest score to draw, default {_DEFAULT_THRESHOLD}")
    parser.add_argument("--threads", type=int, help="of the network; ONNX Runtime chooses if absent")
    args = parser.parse_args(arguments)
    try:
        detector = Detector(args.folder, threads=args.threads)
        lowest = detector.description.score_threshold
        threshold = max(_DEFAULT_THRESHOLD, lowest) if args.threshold is None else args.threshold
        if not lowest <= threshold <= 1:
            raise ValueError(
                f"--threshold must be from {lowest:g}, below which {args.folder} finds nothing, to 1, got {threshold:g}"
            )
        jobs, others = plan_jobs(args.inputs, args.output)
        if others:
            print(f"{others} files that are neither image nor video are passed over")
        unreadable = run(detector, jobs, threshold)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    if len(unreadable) < len(jobs):
        print(f"written to {args.output}")
    if unreadable:
        print(f"error: {len(unreadable)} files could not be read:", *unreadable, sep="\n  ", file=sys.stderr)
        sys.exit(UNREADABLE)
