"""The duration of a video is that of its pictures, whatever else its file holds and wherever they start."""

import json
import unittest
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from omnivision.data.video import VideoDecodeError, VideoFile, open_video
from tests.data.test_catalog import Folder
from tests.data.test_decode import Truth, counted, make_video, pixels
from tests.tools.test_check_data import run as check_data

# Container: codecs of pictures and of sound.
CONTAINERS = {
    "mkv": ("libx264", "aac"),
    "webm": ("libvpx", "libopus"),
    "flv": ("libx264", "aac"),
    "asf": ("mpeg4", "mp2"),
    "nut": ("libx264", "aac"),
    "mpg": ("mpeg2video", "mp2"),
    "ts": ("libx264", "aac"),
    "ogg": ("libvpx", "libopus"),
    "avi": ("mpeg4", "mp2"),
    "mp4": ("libx264", "aac"),
}
RATE = 48000


def write(path: Path, pictures: tuple[int, int], sound: tuple[int, int] | None, second: int | None = None) -> Path:
    """A file with pictures and sound from ... to ... (s), 25 noisy frames a second; and a second video stream of so many s."""
    vision, hearing = CONTAINERS[path.suffix[1:]]
    rng = np.random.default_rng(0)
    packets: list[av.Packet] = []
    with av.open(str(path), "w") as container:
        spans = [pictures] if second is None else [pictures, (0, second)]
        quick = {"libx264": {"preset": "ultrafast", "bf": "2"}, "libvpx": {"deadline": "realtime", "cpu-used": "8"}}
        streams = [container.add_stream(vision, rate=25, options=quick.get(vision, {})) for _ in spans]
        for stream, (start, end) in zip(streams, spans, strict=True):
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 12
            for k in range(25 * start, 25 * end):
                noise = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
                frame = av.VideoFrame.from_ndarray(noise, "rgb24")
                frame.pts, frame.time_base = k, Fraction(1, 25)
                packets += stream.encode(frame)
            packets += stream.encode(None)
        if sound is not None:
            heard = container.add_stream(hearing, rate=RATE, layout="stereo")
            size, form = heard.codec_context.frame_size or 1024, heard.codec_context.format.name
            silence = np.zeros((2, size), np.float32) if form.endswith("p") else np.zeros((1, 2 * size), np.int16)
            for first in range(sound[0] * RATE, sound[1] * RATE, size):
                frame = av.AudioFrame.from_ndarray(silence, format=form, layout="stereo")
                frame.pts, frame.sample_rate, frame.time_base = first, RATE, Fraction(1, RATE)
                packets += heard.encode(frame)
            packets += heard.encode(None)
        container.mux(sorted(packets, key=lambda packet: packet.dts * packet.time_base))
    return path


class Durations(Folder):
    def test_duration_is_that_of_the_video_stream(self) -> None:
        for suffix in CONTAINERS:
            for name, pictures, sound in (
                ("alone", (0, 3), None),
                ("longer", (0, 3), (0, 9)),
                ("late", (5, 8), (0, 6)),
                ("late_alone", (5, 8), None),
            ):
                if suffix in ("ts", "ogg", "avi", "mp4") and name != "longer":
                    continue  # their headers give each stream a duration of its own
                path = write(self.folder / f"{name}.{suffix}", pictures, sound)
                with self.subTest(path.name), open_video(str(path)) as video:
                    self.assertAlmostEqual(video.duration, 3.0, delta=0.01)
                    truth = Truth(path)
                    for start in (Fraction(0), Fraction(26, 10)):
                        got = pixels(video.read(start, start + 1, 4))
                        self.assertTrue(np.array_equal(got, truth.read(start, start + 1, 4)))
                    self.assertGreater(len(np.unique(got, axis=0)), 1, "the last second moves")

    def test_other_video_streams_do_not_change_the_duration(self) -> None:
        for suffix in ("mkv", "mp4", "ts"):
            path = write(self.folder / f"two.{suffix}", (0, 3), None, second=9)
            with open_video(str(path)) as video:
                self.assertAlmostEqual(video.duration, 3.0, delta=0.01)
        Image.new("RGB", (32, 32)).save(self.folder / "cover.jpg")
        plain, covered = write(self.folder / "plain.mkv", (0, 3), None), self.folder / "covered.mkv"
        with av.open(str(plain)) as old, av.open(str(covered), "w") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            new.add_attachment("cover.jpg", "image/jpeg", (self.folder / "cover.jpg").read_bytes())
            for packet in old.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    new.mux(packet)
        with counted("_measure") as spy, open_video(str(covered)) as video:
            self.assertAlmostEqual(video.duration, 3.0, delta=0.01)
            self.assertEqual(spy.call_count, 0, "its only stream with times is that of the pictures")

    def test_packets_are_read_only_if_the_header_has_no_duration(self) -> None:
        for suffix, sound, times in (("mkv", None, 0), ("webm", None, 0), ("mp4", (0, 9), 0), ("mkv", (0, 9), 1)):
            path = write(self.folder / f"a.{suffix}", (0, 3), sound)
            with counted("_measure") as spy, open_video(str(path)) as video:
                for _ in range(3):
                    self.assertAlmostEqual(video.duration, 3.0, delta=0.01)
                    video.read(1.0, 2.0, 4)
                self.assertEqual(spy.call_count, times)

    def test_truncated_file_is_refused_and_a_complete_one_is_not(self) -> None:
        for suffix in ("mkv", "webm", "flv"):  # FFmpeg does not tell what the header of a truncated ASF file says
            for sound in (None, (0, 9)):
                data = write(self.folder / f"whole.{suffix}", (0, 3), sound).read_bytes()
                (self.folder / f"cut.{suffix}").write_bytes(data[: len(data) * 6 // 10])
                with self.subTest(f"{suffix}, {sound}"):
                    for how in ("read", "times", "duration"):
                        with open_video(str(self.folder / f"whole.{suffix}")) as video:
                            self.use(video, how)
                        if how == "duration" and sound is None and suffix in ("mkv", "webm"):
                            continue  # the header tells, and reading finds it
                        with self.assertRaisesRegex(VideoDecodeError, "truncated|damaged|Invalid"):
                            with open_video(str(self.folder / f"cut.{suffix}")) as video:
                                self.use(video, how)

    @staticmethod
    def use(video: VideoFile, how: str) -> None:
        if how == "read":
            video.read(0.0, 2.7, 16)
            video.read(max(0.0, video.duration - 1), video.duration, 4)
        elif how == "times":
            video.times()
        else:
            _ = video.duration


class CheckData(Folder):
    def test_durations_that_differ_from_the_frames_are_reported(self) -> None:
        write(self.folder / "whole.mkv", (0, 3), (0, 9))
        gaps = [*range(30), *range(400, 430)]  # a still picture of 15 s
        make_video(self.folder / "still.mp4", frames=60, pts=gaps)
        make_video(self.folder / "still.mkv", frames=60, pts=gaps)
        make_video(self.folder / "few.mp4", frames=1)
        names = ["whole.mkv", "still.mp4", "still.mkv", "few.mp4"]
        np.save(self.folder / "paths.npy", np.array(names))
        report = self.folder / "report.json"
        for options in ([], ["--quick"]):
            code, out = check_data(self.folder / "paths.npy", "--prefix", self.folder, "--json", report, *options)
            self.assertEqual(code, 0, out)
            differing = json.loads(report.read_text())["summary"]["differing_durations"]
            self.assertEqual(differing, names[1:3])
            self.assertRegex(out, r"still\.mp4: 60 frames at 25 per second, 17\.2 s")


if __name__ == "__main__":
    unittest.main()
