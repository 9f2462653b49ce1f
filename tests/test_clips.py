"""Clip times and frame indices: the figures of the reference implementation, and what must always hold."""

import unittest
from fractions import Fraction

from omnivision.data.frames import subsample_indices
from omnivision.data.sampling import clip_window, random_clip_start, uniform_clip_starts


class RandomClips(unittest.TestCase):
    def test_reference_figures(self) -> None:
        for duration, u, start in [
            (10.0, 0.0, 0.0),
            (10.0, 0.25, 1.825),
            (3.0, 0.25, 0.07499999999999996),
            (2.7, 0.25, 0.0),
            (1.5, 0.0, 0.0),
            (1.5, 0.25, 0.0),
        ]:
            self.assertEqual(random_clip_start(duration, 2.7, u), start)

    def test_the_clip_stays_inside_the_video(self) -> None:
        for u in (0.0, 0.5, 1 - 2**-53):
            self.assertLessEqual(random_clip_start(7.3, 2.7, u) + 2.7, 7.3)


class UniformClips(unittest.TestCase):
    def test_reference_figures(self) -> None:
        for duration, published, ends in [
            (10.0, [0.0, 3.65], [0.0, 7.3]),
            (3.0, [0.0, 0.1499999999999999], [0.0, 0.2999999999999998]),
            (2.7, [0.0, 0.0], [0.0, 0.0]),
            (1.5, [0.0, 0.0], [0.0, 0.0]),
        ]:
            self.assertEqual(uniform_clip_starts(duration, 2.7, 2, "published"), published)
            self.assertEqual(uniform_clip_starts(duration, 2.7, 2), ends)

    def test_the_last_clip_ends_with_the_video_for_any_number_of_clips(self) -> None:
        for num in range(2, 50):
            starts = uniform_clip_starts(9.87, 2.7, num)
            self.assertEqual((len(starts), starts[0], starts[-1]), (num, 0.0, 9.87 - 2.7))
            self.assertEqual(starts, sorted(starts))

    def test_one_clip_starts_at_the_beginning(self) -> None:
        self.assertEqual(uniform_clip_starts(10.0, 2.7, 1), [0.0])

    def test_errors_name_what_was_given(self) -> None:
        with self.assertRaisesRegex(ValueError, "got 0"):
            uniform_clip_starts(10.0, 2.7, 0)
        with self.assertRaisesRegex(ValueError, "'middle'"):
            uniform_clip_starts(10.0, 2.7, 2, "middle")  # type: ignore[arg-type]


class Window(unittest.TestCase):
    def test_every_whole_frame_start_of_30_fps_holds_82_frames(self) -> None:
        for start in range(200):
            low, high = clip_window(float(start), 2.7)
            self.assertEqual(sum(low <= Fraction(k, 30) < high for k in range(start * 30, start * 30 + 100)), 82)


class Subsample(unittest.TestCase):
    def test_reference_figures(self) -> None:
        for num, total, indices in [
            (16, 81, [0, 5, 10, 16, 21, 26, 32, 37, 42, 48, 53, 58, 64, 69, 74, 80]),
            (16, 82, [0, 5, 10, 16, 21, 27, 32, 37, 43, 48, 54, 59, 64, 70, 75, 81]),
            (16, 10, [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9]),
            (16, 17, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16]),
            (16, 1, [0] * 16),
            (8, 30, [0, 4, 8, 12, 16, 20, 24, 29]),
            (16, 300, [0, 19, 39, 59, 79, 99, 119, 139, 159, 179, 199, 219, 239, 259, 279, 299]),
        ]:
            self.assertEqual(subsample_indices(total, num), indices)

    def test_exact_for_every_size(self) -> None:
        for total in range(1, 200):
            for num in (2, 3, 8, 16, 32):
                expected = [int(Fraction(i * (total - 1), num - 1)) for i in range(num)]
                self.assertEqual(subsample_indices(total, num), expected)
        self.assertEqual(subsample_indices(2**60 + 1, 3), [0, 2**59, 2**60])  # beyond what a double can hold
        self.assertEqual(subsample_indices(9, 1), [0])

    def test_nothing_to_choose_is_an_error(self) -> None:
        for total, num in [(0, 4), (4, 0)]:
            with self.assertRaisesRegex(ValueError, f"{total} and {num}"):
                subsample_indices(total, num)


if __name__ == "__main__":
    unittest.main()
