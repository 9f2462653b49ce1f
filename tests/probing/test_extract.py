"""Features: equal to the model's own, for any number of processes, after an interruption, and for windows of long videos."""

import copy
import json
import tracemalloc
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import omnivision
from omnivision.checkpoint.inference_config import InferenceConfig
from omnivision.data.catalog import Dataset, Split
from omnivision.data.encode import write_video
from omnivision.data.loader import LoaderConfig
from omnivision.data.sampling import window_starts
from omnivision.probing import extract as extraction
from omnivision.probing.store import FeatureConfig, FeatureSplit, SplitRecord, open_split
from omnivision.tools.main import main
from omnivision.utils.errors import UserError, VideoDecodeError
from tests import stage_runs as stages
from tests import tiny_models as tiny

CONFIG = FeatureConfig(clip_duration=0.5)
MODEL = {"name": "tiny", "sha256": "0" * 64, "checkpoint": ""}


class Extract(tiny.WeightsCase):
    def setUp(self):
        super().setUp()
        self.model = tiny.classifier(3)
        self.paths = stages.write_videos(self.folder / "videos", 7)
        self.enterContext(mock.patch.object(extraction, "PART_SAMPLES", 3))

    def split(self, paths: list[str] | None = None, **more: object) -> Split:
        lists = self.folder / "lists"
        lists.mkdir(exist_ok=True)
        paths = paths or self.paths
        np.save(lists / "paths.npy", np.array(paths))
        np.save(lists / "labels.npy", np.arange(len(paths)) % 3)
        val = {"paths": str(lists / "paths.npy"), "labels": str(lists / "labels.npy"), **more}
        return Split(Dataset(name="set", num_classes=3, val=val), "val")  # type: ignore[arg-type]

    def extract(self, out: str, split: Split, config: FeatureConfig = CONFIG, **more: int) -> FeatureSplit:
        embed = extraction.Embedder(self.model.trunk, torch.device("cpu"), config)
        extraction.extract(embed, split, self.folder / out, MODEL, LoaderConfig(), **more)
        return open_split(self.folder / out, "set", "val")

    def load(self) -> "omnivision.tools.video_model.VideoModel":
        path = self.save_run(self.model, inference=InferenceConfig(clip_duration=0.5).model_dump())
        return omnivision.load(path)

    def test_rows_are_what_embed_returns(self):
        found = self.extract("out", self.split())
        model = self.load()
        for row, path in enumerate(found.paths):
            np.testing.assert_allclose(found.features[row], model.embed(path), rtol=1e-5, atol=1e-6)
        self.assertEqual(found.labels.tolist(), [0, 1, 2, 0, 1, 2, 0])
        self.assertEqual(list(found.paths), self.paths)

    def test_the_head_maps_features_to_the_models_scores(self):
        model = self.load()
        head = self.model.heads[0][0]
        scores = head(torch.from_numpy(model.embed(self.paths[0])))
        np.testing.assert_allclose(scores.detach(), model.scores(self.paths[0]), rtol=1e-5, atol=1e-5)

    def test_two_processes_give_the_bytes_of_one(self):
        split = self.split()
        self.extract("one", split)
        embed = extraction.Embedder(self.model.trunk, torch.device("cpu"), CONFIG)
        for rank in (1, 0):
            extraction.extract(embed, split, self.folder / "two", MODEL, LoaderConfig(), rank, 2)
        self.assert_same_files("one", "two")

    def assert_same_files(self, one: str, other: str) -> None:
        files = sorted(file.relative_to(self.folder / one) for file in (self.folder / one).rglob("*") if file.is_file())
        theirs = sorted(
            file.relative_to(self.folder / other) for file in (self.folder / other).rglob("*") if file.is_file()
        )
        self.assertEqual(files, theirs)
        for file in files:
            self.assertEqual((self.folder / one / file).read_bytes(), (self.folder / other / file).read_bytes(), file)

    def test_an_interrupted_extraction_continues(self):
        split, embed = self.split(), extraction.Embedder(self.model.trunk, torch.device("cpu"), CONFIG)
        self.extract("whole", split)

        def interrupt(parts, _):
            yield next(iter(parts))
            raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt):
            extraction.extract(embed, split, self.folder / "cut", MODEL, LoaderConfig(), track=interrupt)
        with self.assertRaisesRegex(UserError, "not complete"):
            open_split(self.folder / "cut", "set", "val")
        done = []
        extraction.extract(
            embed, split, self.folder / "cut", MODEL, LoaderConfig(), track=lambda p, total: done.append(total) or p
        )
        self.assertEqual(done, [2])  # of three parts
        self.assert_same_files("whole", "cut")

    def test_a_damaged_part_is_computed_again(self):
        part = self.folder / "out" / "set" / "val" / "parts" / "000001.npz"
        part.parent.mkdir(parents=True)
        part.write_bytes(b"damage")
        with self.assertRaisesRegex(UserError, "000001.npz was damaged"):
            self.extract("out", self.split())
        self.assertEqual(len(self.extract("out", self.split())), 7)

    def test_nothing_readable_is_tried_again(self):
        contents = {path: Path(path).read_bytes() for path in self.paths}
        for path in self.paths:
            Path(path).write_bytes(b"")
        with self.assertRaisesRegex(UserError, "None of the 7 videos"):
            self.extract("out", self.split())
        for path, content in contents.items():
            Path(path).write_bytes(content)
        self.assertEqual(len(self.extract("out", self.split())), 7)

    def test_another_process_that_completes_the_split_first(self):
        original, split = extraction.embed_parts, self.split()

        def embed_parts(embed, dataset, parts, loader):
            for number, part in enumerate(original(embed, dataset, parts, loader)):
                if number == 1:  # after this process has written a part
                    with mock.patch.object(extraction, "embed_parts", original):
                        self.extract("out", split)
                yield part

        with mock.patch.object(extraction, "embed_parts", embed_parts):
            self.assertEqual(len(self.extract("out", split)), 7)

    def test_features_that_do_not_fit_into_float16(self):
        self.model.trunk.norm.weight.data.fill_(1e6)
        with self.assertRaisesRegex(UserError, "--dtype float32"):
            self.extract("out", self.split(), CONFIG.model_copy(update={"dtype": "float16"}))

    def test_other_models_views_and_lists_are_refused(self):
        split, embed = self.split(), extraction.Embedder(self.model.trunk, torch.device("cpu"), CONFIG)
        self.extract("out", split)
        for name, arguments in {
            "sha256": (embed, split, {**MODEL, "sha256": "1" * 64}),
            "clips": (
                extraction.Embedder(self.model.trunk, embed.device, FeatureConfig(clip_duration=0.5, clips=1)),
                split,
                MODEL,
            ),
            "paths": (embed, self.split(self.paths[:5]), MODEL),
        }.items():
            with self.subTest(name), self.assertRaisesRegex(UserError, f"{name}: .* -> "):
                extraction.extract(*arguments[:2], self.folder / "out", arguments[2], LoaderConfig())

    def test_layers_and_time(self):
        for layers, keep_time, shape in ((2, False, (2, 48)), (1, True, (2, 48)), (2, True, (2, 2, 48))):
            with self.subTest(layers=layers, keep_time=keep_time):
                config = CONFIG.model_copy(update={"layers": layers, "keep_time": keep_time})
                found = self.extract(f"out_{layers}_{keep_time}", self.split(), config)
                self.assertEqual(found.features.shape[1:], shape)
        pooled = extraction.pool_tokens(self.model.trunk, torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8))
        torch.testing.assert_close(pooled, self.model.features(torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8)))

    def test_unreadable_videos_have_no_row(self):
        Path(self.paths[1]).write_bytes(b"not a video")
        found = self.extract("out", self.split())
        self.assertEqual(found.index.tolist(), [0, 2, 3, 4, 5, 6])
        self.assertEqual(found.labels.tolist(), [0, 2, 0, 1, 2, 0])
        record = json.loads((self.folder / "out" / "features.json").read_text())["splits"]["set/val"]
        self.assertEqual(len(record["unreadable"]), 1)
        for path in self.paths:
            Path(path).write_bytes(b"not a video")
        with self.assertRaisesRegex(UserError, "None of the 7 videos"):
            self.extract("none", self.split())

    def test_a_header_changed_by_hand_is_refused(self):
        self.extract("out", self.split())
        file = self.folder / "out" / "features.json"
        header = json.loads(file.read_text())
        for path in (("model", "sha256"), ("config", "clip_duration"), ("splits", "set/val", "samples")):
            changed = copy.deepcopy(header)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            del inner[path[-1]]
            file.write_text(json.dumps(changed))
            with self.assertRaisesRegex(UserError, f"{path[-1]}.*Extract the features again"):
                self.extract("out", self.split())

    def test_windows(self):
        long = str(self.folder / "long.mp4")
        frames = np.random.default_rng(0).integers(0, 255, (200, 48, 64, 3), dtype=np.uint8)
        write_video(long, frames, fps=25)
        short = self.folder / "short.mp4"
        write_video(short, frames[:5], fps=25)
        config = FeatureConfig(clips=1, crops=1, clip_duration=0.5, stride=0.2)
        with mock.patch.object(extraction, "BATCH_CLIPS", 8):
            found = self.extract("out", self.split([self.paths[0], str(short), long]), config)
        starts = [window_starts(duration, 0.5, 0.2) for duration in (0.8, 8.0)]
        self.assertEqual(found.index.tolist(), [0] * len(starts[0]) + [2] * len(starts[1]))
        np.testing.assert_allclose(found.times[:, 0], np.concatenate(starts))
        np.testing.assert_allclose(found.times[:, 1] - found.times[:, 0], 0.5)
        model = self.load()
        views = model.views(long, 1, 1, start=starts[1][20])
        row = len(starts[0]) + 20
        expected = extraction.pool_tokens(model.trunk, views)[0].detach()
        np.testing.assert_allclose(found.features[row], expected, rtol=1e-5, atol=1e-5)

    def test_windows_of_segments_have_times_in_the_video(self):
        long = str(self.folder / "long.mp4")
        write_video(long, np.random.default_rng(0).integers(0, 255, (100, 48, 64, 3), dtype=np.uint8), fps=25)
        np.save(self.folder / "segments.npy", np.array([[2.0, 3.5]]))
        split = self.split([long], segments=str(self.folder / "segments.npy"))
        found = self.extract("out", split, FeatureConfig(clips=1, crops=1, clip_duration=0.5, stride=0.5))
        np.testing.assert_allclose(found.times, [[2.0, 2.5], [2.5, 3.0], [3.0, 3.5]])

    def test_parts_without_a_readable_window_stay_empty(self):
        short = self.folder / "short.mp4"
        write_video(short, np.zeros((5, 48, 64, 3), dtype=np.uint8), fps=25)
        split = self.split(
            [self.paths[0], *[str(short)] * 8, self.paths[1]]
        )  # four parts; the second and the third have none
        config = FeatureConfig(clips=1, crops=1, clip_duration=0.5, stride=0.5)
        embed = extraction.Embedder(self.model.trunk, torch.device("cpu"), config)
        dataset = extraction.build_dataset(split, self.model.trunk, config, None)
        parts = dict(extraction.embed_parts(embed, dataset, [0, 1, 2, 3], LoaderConfig()))
        self.assertEqual([set(part.index.tolist()) for part in parts.values()], [{0}, set(), set(), {9}])
        self.assertEqual([len(part.unreadable) for part in parts.values()], [1, 1, 1, 0])  # one reason for equal paths

    def test_joining_parts_needs_no_more_memory_for_more_videos(self):
        parts, size, width = 100, 64, 512  # 13 MB of features
        split = self.split([f"/videos/{number:05}.mp4" for number in range(parts * size)])
        files = [extraction.part_file(self.folder, part) for part in range(parts)]
        files[0].parent.mkdir()
        for part, file in enumerate(files):
            index = np.arange(part * size, (part + 1) * size)
            rows = np.full((size, width), part, np.float32)
            np.savez(file, features=rows, index=index, times=np.full((size, 2), np.nan), unreadable=np.array([], str))
        tracemalloc.start()
        record = extraction.join_parts(split, files, self.folder, SplitRecord(samples=len(split), data={}))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertEqual(record.rows, parts * size)
        self.assertLess(peak, 2e6)
        features = np.load(self.folder / "features.npy", mmap_mode="r")
        self.assertTrue((features[:, 0] == np.arange(parts * size) // size).all())

    def test_features_that_are_not_finite(self):
        self.extract("out", self.split())
        array = np.load(self.folder / "out" / "set" / "val" / "features.npy", mmap_mode="r+")
        array[3, 5] = np.nan
        with self.assertRaisesRegex(UserError, "not finite"):
            open_split(self.folder / "out", "set", "val")

    def test_command(self):
        checkpoint = self.save_run(
            self.model, "run/checkpoints/best.pt", inference=InferenceConfig(clip_duration=0.5).model_dump()
        )
        out = self.folder / "features"
        command = ["features", str(checkpoint), *self.paths, "--out", str(out), "--workers", "0"]
        self.assertEqual(main(command), 0)
        self.assertEqual(main(command), 0)
        found = open_split(out, "videos", "val")
        self.assertEqual(len(found), 7)
        self.assertEqual(main([*command, "--crops", "1"]), 1)
        self.assertEqual(main(["features", str(checkpoint), "ucf102", "--out", str(out)]), 1)
        self.assertEqual(main([*command, "--layers", "3"]), 1)
        self.assertEqual(main([*command, "--stride", "1"]), 1)


class WindowStarts(unittest.TestCase):
    def test_the_last_window_ends_with_the_video(self):
        self.assertEqual(window_starts(3.0, 1.0, 0.5), [0, 0.5, 1.0, 1.5, 2.0])
        self.assertEqual(window_starts(3.2, 1.0, 1.0), [0, 1.0, 2.0, 2.2])
        self.assertEqual(window_starts(1.0, 1.0, 1.0), [0])
        with self.assertRaises(VideoDecodeError):
            window_starts(0.9, 1.0, 1.0)


if __name__ == "__main__":
    unittest.main()
