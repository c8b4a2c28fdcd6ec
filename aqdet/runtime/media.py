"""The loop between pictures and a detector: reads, detects in batches, draws, writes or shows, and keeps records."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..utils.files import replacing
from ..utils.progress import progress_bar
from .image import read_image
from .sources import PictureSource

DEFAULT_RATE = 25.0  # Frames a second of a video that does not state them.
WINDOW = "aqdet"
_ESCAPE = 27
Draw = Callable[[np.ndarray, Any], np.ndarray]
_Read = tuple[PictureSource, Path | None, np.ndarray]


class Model(Protocol):
    """The interface of a detector that the loop runs.

    Its detections have a length and ``scores``, and can be indexed by a mask, as :class:`~aqdet.runtime.Detections`
    and Detectron2's ``Instances``.
    """

    def detect(self, images: Sequence[np.ndarray]) -> Sequence[Any]:
        """Finds objects in images, each ``(H, W, 3)`` uint8 in BGR order."""
        ...

    def drawer(self, is_video: bool) -> Draw:
        """Returns a function that draws detections: of an image and its detections, it returns the drawn image."""
        ...


class Records(Protocol):
    """The interface of records of detections, for example in a file."""

    def add(self, source: PictureSource, frame: int | None, image: np.ndarray, found: Any) -> None:
        """Adds the detections of an image, or of one frame of a video, counted from 0."""
        ...


@dataclasses.dataclass
class Summary:
    """The counts of a run.

    Attributes:
        images, videos, frames: Numbers of images, videos and frames that were read; streams count as videos.
        detections: The number of detections with a score of at least the threshold.
        highest: The highest score of all detections, whether above the threshold or below.
        unreadable: A line for each source that could not be read.
        notes: Other lines for the user.
        stopped: Whether the user ended the run, by Escape or by Ctrl-C in a live stream.
    """

    images: int = 0
    videos: int = 0
    frames: int = 0
    detections: int = 0
    highest: float = 0.0
    unreadable: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    stopped: bool = False


class MediaLoop:
    """Runs a detector over sources; it notes a source that cannot be read, and goes on with the others.

    Args:
        model: The detector.
        threshold: The lowest score of a detection that is drawn and counted.
        show: Whether to show each picture in a window; Escape stops.
        records: They receive every detection, also those below the threshold.
        batch: The number of images, or frames of a video, that the detector gets at once.
    """

    def __init__(
        self,
        model: Model,
        *,
        threshold: float,
        show: bool = False,
        records: Sequence[Records] = (),
        batch: int = 1,
    ) -> None:
        self._model = model
        self._threshold = threshold
        self._show = show
        self._records = records
        self._batch = batch
        self._summary = Summary()
        self._bar: Any = None

    def run(self, sources: Sequence[PictureSource], outputs: Sequence[Path] | None = None) -> Summary:
        """Processes all sources, with progress on standard error.

        Args:
            sources: The sources to read.
            outputs: The file for the drawn picture of each source; None to write none.

        Raises:
            OSError: If a picture cannot be written.
            ValueError: If OpenCV is needed and not installed.
        """
        if outputs is not None:
            for path in outputs:
                path.parent.mkdir(parents=True, exist_ok=True)
        frames = [_count_frames(source) for source in sources]
        total = None if None in frames else sum(count or 0 for count in frames)
        targets: list[Path | None] = [None] * len(sources) if outputs is None else list(outputs)
        pairs = list(zip(sources, targets, frames, strict=True))
        with progress_bar(total=total, unit="image") as self._bar:
            for is_image, group in itertools.groupby(pairs, key=lambda pair: pair[0].kind == "image"):
                if is_image:
                    self._do_images([(source, target) for source, target, _ in group])
                else:
                    for source, target, expected in group:
                        if not self._summary.stopped:
                            self._do_video(source, target, expected)
                if self._summary.stopped:
                    break
        return self._summary

    def _do_images(self, pairs: Sequence[tuple[PictureSource, Path | None]]) -> None:
        draw = self._model.drawer(is_video=False)
        for start in range(0, len(pairs), self._batch):
            images = []
            for source, target in pairs[start : start + self._batch]:
                try:
                    images.append((source, target, read_image(source.name)))
                except ValueError as error:
                    self._summary.unreadable.append(str(error))
                    self._bar.update()
            for (source, target, image), detections in self._found(images):
                self._summary.images += 1
                drawn = self._use(source, None, image, detections, draw if target or self._show else None)
                if target is not None and drawn is not None:
                    with replacing(target, keep_ending=True) as aside:
                        Image.fromarray(np.ascontiguousarray(drawn[:, :, ::-1])).save(aside, quality=95)
                if drawn is not None and not self._go_on(drawn, wait=0):
                    return

    def _found(self, images: Sequence[_Read]) -> Iterator[tuple[_Read, Any]]:
        """Yields images with their detections, and notes the ones in which a detector cannot detect."""
        try:
            found = self._detect([image for _, _, image in images])
        except ValueError as error:
            if len(images) > 1:
                for one in images:
                    yield from self._found([one])
                return
            self._summary.unreadable.append(f"{images[0][0].name}: {error}")
            self._bar.update()
            return
        yield from zip(images, found, strict=True)

    def _do_video(self, source: PictureSource, target: Path | None, expected: int | None) -> None:
        cv2 = import_opencv()
        draw = self._model.drawer(is_video=True) if target is not None or self._show else None
        capture = cv2.VideoCapture(int(source.name) if source.name.isdecimal() else source.name)
        rate = capture.get(cv2.CAP_PROP_FPS) or DEFAULT_RATE
        live = source.kind == "stream"
        frames = 0
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(_live_frames(capture) if live else _all_frames(capture))
            writer: Any = None
            last = -1
            try:
                for chunk in _chunks(reader, 1 if live else self._batch):
                    found = self._detect([frame for _, frame in chunk])
                    for (index, frame), detections in zip(chunk, found, strict=True):
                        frames += 1
                        drawn = self._use(source, index, frame, detections, draw)
                        if drawn is None:
                            continue
                        if target is not None:
                            writer = writer or stack.enter_context(_writing(target, rate, drawn.shape))
                            for _ in range(index - last):  # frames of a live stream are shown when they come
                                writer.write(drawn)
                        last = index
                        if not self._go_on(drawn, wait=1):
                            break
                    if self._summary.stopped:
                        break
            except KeyboardInterrupt:
                if not live:
                    raise
                self._summary.stopped = True
        if frames == 0:
            name = f"camera {source.name}" if source.name.isdecimal() else source.name
            self._summary.unreadable.append(f"{name}: not a video or stream that OpenCV can read")
            self._bar.update(expected or 0)
            return
        self._summary.videos += 1
        self._summary.frames += frames
        if expected is not None and frames < expected and not self._summary.stopped:
            self._summary.notes.append(
                f"{source.name}: read {frames} of the {expected} frames that its header announces"
            )

    def _detect(self, images: Sequence[np.ndarray]) -> Sequence[Any]:
        return self._model.detect(images) if images else []

    def _use(
        self, source: PictureSource, frame: int | None, image: np.ndarray, found: Any, draw: Draw | None
    ) -> np.ndarray | None:
        """Counts and records detections, and returns the drawn image if one is wanted."""
        summary = self._summary
        summary.highest = max([summary.highest, *(float(score) for score in found.scores)])
        for records in self._records:
            records.add(source, frame, image, found)
        kept = found[found.scores >= self._threshold]
        summary.detections += len(kept)
        self._bar.update()
        return draw(image, kept) if draw is not None else None

    def _go_on(self, drawn: np.ndarray, wait: int) -> bool:
        """Shows a picture, if asked for, for ``wait`` ms or until a key; returns False if Escape was pressed."""
        if self._show:
            cv2 = import_opencv()
            cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
            cv2.imshow(WINDOW, drawn)
            self._summary.stopped = cv2.waitKey(wait) == _ESCAPE
        return not self._summary.stopped


def import_opencv() -> Any:
    """Imports OpenCV, which only videos, streams and windows need.

    Raises:
        ValueError: In one line, if it is not installed.
    """
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ValueError("videos, streams and windows need OpenCV: pip install 'aqdet[video]'") from error
    return cv2


def has_display() -> bool:
    """Returns whether a window can be opened."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _count_frames(source: PictureSource) -> int | None:
    """Returns the number of frames that a video's header states, 1 for an image, None if it is not known."""
    if source.kind == "image":
        return 1
    cv2 = import_opencv()
    if source.kind == "stream":
        return None
    capture = cv2.VideoCapture(source.name)
    frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    capture.release()
    return max(frames, 0)


Frames = Iterator[tuple[int, np.ndarray]]


@contextlib.contextmanager
def _all_frames(capture: Any) -> Iterator[Frames]:
    """Yields the frames of a video with their numbers."""

    def read() -> Frames:
        for index in itertools.count():
            is_frame, frame = capture.read()
            if not is_frame:
                return
            yield index, frame

    try:
        yield read()
    finally:
        capture.release()


@contextlib.contextmanager
def _live_frames(capture: Any) -> Iterator[Frames]:
    """Yields the newest frames of a live stream with their numbers.

    A thread reads all frames, so that a slow detector gets the newest one, and not one that has waited in a queue.
    """
    changed = threading.Condition()
    newest: tuple[int, np.ndarray] | None = None
    ended = stop = False

    def receive() -> None:
        nonlocal newest, ended
        for index in itertools.count():
            is_frame, frame = capture.read()
            with changed:
                if is_frame:
                    newest = index, frame
                ended = not is_frame
                changed.notify()
                if ended or stop:
                    break
        capture.release()

    def read() -> Frames:
        nonlocal newest
        while True:
            with changed:
                while newest is None and not ended:
                    changed.wait(0.1)  # on some systems Ctrl-C does not end a wait without a limit
                frame, newest = newest, None
            if frame is None:
                return
            yield frame

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    try:
        yield read()
    finally:
        stop = True
        thread.join(timeout=5)


def _chunks(frames: Frames, size: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    while chunk := list(itertools.islice(frames, size)):
        yield chunk


@contextlib.contextmanager
def _writing(target: Path, rate: float, shape: tuple[int, ...]) -> Iterator[Any]:
    """Writes an MP4 of frames of ``shape`` at ``rate`` a second; after an error, nothing is left of it."""
    cv2 = import_opencv()
    with replacing(target, keep_ending=True) as aside:
        writer = cv2.VideoWriter(str(aside), cv2.VideoWriter.fourcc(*"mp4v"), rate, (shape[1], shape[0]))
        if not writer.isOpened():
            raise OSError(f"{target}: OpenCV cannot write this video")
        try:
            yield writer
        finally:
            writer.release()
