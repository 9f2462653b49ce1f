"""Errors of one rank, raised on all ranks."""

import unittest
from datetime import timedelta
from unittest import mock

from omnivision.distributed.process_group import Dist, RankInfo
from omnivision.utils.errors import EXIT_NON_FINITE, NonFiniteError, UserError


class Ranks(unittest.TestCase):
    def test_error_of_one_rank_is_raised_on_all_ranks(self):
        dist = Dist(RankInfo(), "cpu", None, timedelta(minutes=1))
        dist.rank = 1
        theirs = NonFiniteError("the loss is not finite")
        with mock.patch.object(dist, "all_gather_object", lambda own: [theirs, own]):
            with self.assertRaises(NonFiniteError) as caught:
                dist.run_on_main(lambda: self.fail("rank 1 runs it"))
        self.assertEqual(caught.exception.exit_code, EXIT_NON_FINITE)
        self.assertTrue(caught.exception.on_all_ranks)

    def test_failing_rank_keeps_the_cause_and_all_problems(self):
        dist = Dist(RankInfo(), "cpu", None, timedelta(minutes=1))

        def fail() -> None:
            raise UserError.from_problems(["one", "two"]) from OSError("full")

        for action in (dist.run_on_all, dist.run_on_main):
            with self.assertRaises(UserError) as caught:
                action(fail)
            self.assertEqual(caught.exception.problems, ["one", "two"])
            self.assertIsInstance(caught.exception.__cause__, OSError)
            self.assertTrue(caught.exception.on_all_ranks)
        self.assertEqual((dist.run_on_all(lambda: 3), dist.run_on_main(lambda: 4)), (3, 4))


if __name__ == "__main__":
    unittest.main()
