"""Jobs that are ended before their time: each comes back by itself, or ends as promised, and loses nothing."""

import os
import re
import signal
import time
from pathlib import Path

import numpy as np

from tests import runs
from tests.slurm.cluster import GRACE_SECONDS, wait
from tests.slurm.on_cluster import SUBMITTED, OnCluster, history, told_time

EPOCHS = 10
STEPS = 15 * EPOCHS


class Interrupted(OnCluster):
    """The same run again and again, interrupted in different ways; its weights must be those of the uninterrupted one."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.data = runs.write_split(cls.folder, runs.real_videos() * 40)  # 120 samples
        cls.long = [*cls.data, f"epochs={EPOCHS}", "trainer.checkpoint.save_every_steps=20"]

    def command(self, name: str, *settings: str) -> list[str]:
        return runs.command(self.folder / name, *self.long, *settings)

    def started(self, name: str, *settings: str, step: int = 10) -> tuple[str, Path]:
        job = self.submit(*self.command(name, *settings))
        self.wait_for_step(self.folder / name, step)
        return job, self.folder / name

    def assert_ended_as_if_never_interrupted(self, job: str, run: Path) -> None:
        self.wait_for_state(job, "COMPLETED", seconds=150)
        summary = runs.read_summary(run)
        self.assertEqual((summary["status"], summary["steps"]), ("finished", STEPS))
        self.assertGreaterEqual(summary["job"]["restarts"], 1)
        self.assert_steps_once(run, STEPS)
        self.assert_same_weights(run, self.folder / "whole")

    def assert_saved_and_requeued(self, run: Path, saying: str) -> None:
        end, again = history(run, "end")[0], history(run, "resumed")[1]
        self.assertRegex(end["reason"], saying)
        self.assertIn(
            f"step {again['step']} is saved", end["reason"], "it goes on from the very step that it ended with"
        )
        self.assertEqual(end["status"], "requeued")

    def test_1_time_limit_and_requeue_and_preemption_and_a_dead_node(self):
        """Four runs at once, on a node each; the dead node's goes on beside another one."""
        began = time.time()
        dead, dead_run = self.started("dead", step=45)
        node = self.cluster.fact(dead, "NodeList")
        killed = time.time()
        self.cluster.kill_node(node)

        others = [name for name in self.cluster.nodes if name != node]
        timed = self.submit(*self.command("timed", f"submitit.nodelist={others[0]}", "submitit.signal_delay_s=45"))
        timed_run, preempted_run, requeued_run = (self.folder / name for name in ("timed", "preempted", "requeued"))
        self.wait_for_step(timed_run, 10)
        self.cluster.ask("scontrol", "update", f"JobId={timed}", "TimeLimit=1")  # a minute: SLURM knows no shorter time
        [slow] = self.tasks_of(timed)
        os.kill(slow, signal.SIGSTOP)  # on a fast machine it would be done before its time is over
        preempted = self.submit(*self.command("preempted", f"submitit.nodelist={others[1]}"))
        self.wait_for_step(preempted_run, 10)
        came = time.time()
        urgent = ["--partition=urgent", f"--nodelist={others[1]}", "--exclusive", "--output=/dev/null"]
        self.cluster.ask("sbatch", *urgent, "--wrap=sleep 1")
        wait("the job to leave", lambda: history(preempted_run, "end"), GRACE_SECONDS + 10)
        told_time("preemption, until the job had saved and left", came)
        self.assertLess(time.time() - came, GRACE_SECONDS, "within the grace time")
        requeued = self.submit(*self.command("requeued", f"submitit.nodelist={others[2]}"))
        self.wait_for_step(requeued_run, 10)
        self.cluster.ask("scontrol", "requeue", requeued)
        # Before it signals, SLURM wakes what has stopped.
        wait("the end of its time", lambda: history(timed_run, "end"), 60)
        self.cluster.ask("scontrol", "update", f"JobId={timed}", "TimeLimit=60")
        self.here(*self.command("whole"))

        self.assert_ended_as_if_never_interrupted(requeued, requeued_run)
        self.assert_saved_and_requeued(requeued_run, "ended by SIGTERM; .*; SLURM has requeued job")

        self.assert_ended_as_if_never_interrupted(preempted, preempted_run)
        self.assert_saved_and_requeued(preempted_run, r"\(preempted\); job .* is requeued")

        self.assert_ended_as_if_never_interrupted(timed, timed_run)
        self.assert_saved_and_requeued(timed_run, r"ended by SIGUSR2; .* \(signalled .*\); job .* is requeued")
        left, back = history(timed_run, "end")[0]["time"], history(timed_run, "resumed")[1]["time"]
        told_time("time limit, from saved until it went on", left, back)

        self.assert_ended_as_if_never_interrupted(dead, dead_run)
        self.assertGreaterEqual(history(dead_run, "resumed")[1]["step"], 40, "from the newest checkpoint")
        self.assertNotIn(node, {line["nodes"] for line in history(dead_run, "start")[1:]})
        told_time("a node's death, until its job went on", killed, history(dead_run, "resumed")[1]["time"])
        told_time("all four", began)
        self.cluster.start_node(node)
        self.cluster.wait_for_nodes()

    def test_3_scancel_saves_and_ends(self):
        self.clock()  # test_4 asks for it; it takes a minute
        short = ["epochs=8", "num_workers=1"]
        job, run = self.started("cancelled", *short)
        cancelled = time.time()
        self.cluster.ask("scancel", job)
        self.wait_for_state(job, "CANCELLED")
        told_time("scancel, until the job was gone", cancelled)
        summary = runs.read_summary(run)
        self.assertEqual(summary["status"], "interrupted")
        self.assertRegex(
            summary["exit_reason"], rf"ended by SIGTERM; step {summary['steps']} is saved; job {job} was cancelled"
        )
        self.assertIn("ended by SIGTERM", summary["last_lines"][-1])
        self.assertEqual(len(history(run, "start")), 1)
        again = self.submit(*self.command("cancelled", *short))
        self.wait_for_state(again, "COMPLETED")
        self.assert_steps_once(run, 120)
        self.assertEqual(history(run, "resumed")[1]["step"], summary["steps"])
        self.cluster.ask("scontrol", "requeue", again)  # by mistake
        wait("it to be requeued", lambda: self.cluster.fact(again, "Restarts") == "1")
        before = (run / "checkpoints/checkpoint.pt").stat().st_mtime_ns
        self.wait_for_state(again, "COMPLETED")
        self.assertEqual(len(history(run, "start")), 2, "a finished run ends at once")
        self.assertEqual((run / "checkpoints/checkpoint.pt").stat().st_mtime_ns, before)

    def test_4_limits(self):
        """Of how often a job may come back, of coming back without a step, and of time, by the run's own clock."""
        bounded, bounded_run = self.started("bounded", "submitit.max_requeues=0")
        self.cluster.ask("scancel", "--signal=USR2", bounded)
        clock, clock_run = self.clock()
        stuck, stuck_run = self.started("stuck", *self.endless(), "trainer.checkpoint.save_every_steps=null", step=1)
        for restarts in range(3):
            for task in self.tasks_of(stuck):
                os.kill(task, 6)  # as NCCL does when another process is gone
            wait("it to come back", lambda n=restarts: len(history(stuck_run, "start")) == n + 2, 60)
            if restarts < 2:
                self.wait_for_start(stuck_run, restarts + 1)
        self.wait_for_state(stuck, "FAILED")
        summary = runs.read_summary(stuck_run)
        self.assertEqual(summary["status"], "failed")
        self.assertRegex(summary["exit_reason"], f"At step 0, job {stuck} was restarted 3 times without progress")
        self.assertRegex(history(stuck_run, "end")[0]["reason"], "exit code 134, SIGABRT.*is requeued")
        self.assertIn("Fatal Python error: Aborted", (stuck_run / f"submitit_logs/{stuck}_0_log.err").read_text())
        wait("it to leave", lambda: history(clock_run, "end"), 70)
        self.assertRegex(
            history(clock_run, "end")[0]["reason"], r"by time limit; step \d+ is saved \(time limit reached\)"
        )
        self.assertEqual(history(clock_run, "end")[0]["status"], "requeued")
        self.cluster.ask("scancel", clock)
        self.wait_for_state(bounded, "FAILED")
        summary = runs.read_summary(bounded_run)
        self.assertEqual(summary["status"], "interrupted")
        self.assertRegex(
            summary["exit_reason"], f"step {summary['steps']} is saved .*is not requeued: submitit.max_requeues is 0"
        )

    def test_5_what_ends_a_job_for_good_is_written_down(self):
        """A killed process; and a job that waits for it is cancelled, with the reason."""
        killed, run = self.started("killed", "launcher.gpus_per_node=2", "launcher.num_nodes=1", *self.endless())
        waiting = self.submit(*self.command("waiting", f"submitit.dependency=afterok:{killed}"))
        later = self.submit(*self.command("later", f"submitit.dependency=afterok:{waiting}"))
        began = time.time()
        os.kill(self.tasks_of(killed)[0], 9)
        self.wait_for_state(killed, "FAILED")
        told_time("a killed process, until the job was over", began)
        self.assertRegex(runs.read_summary(run)["exit_reason"], "exit code 137, SIGKILL")
        for job, name in ((waiting, "waiting"), (later, "later")):
            self.wait_for_state(job, "CANCELLED")
            summary = runs.read_summary(self.folder / name)
            self.assertEqual(summary["status"], "cancelled")
            self.assertRegex(summary["exit_reason"], "^its dependency failed: job .* failed: .*SIGKILL")
        listed = self.shell("omnivision", "runs", ".").stdout
        self.assertRegex(listed, "waiting: cancelled: its dependency failed")

    def test_6_several_processes_and_elements_of_arrays(self):
        points = "launcher.experiment_log_dir='" + str(self.folder) + "/point_${trainer.seed_value}'"
        sweep = [*self.command("point"), points, "-m", "trainer.seed_value=1,2", "epochs=8", *SUBMITTED]
        submission = self.shell(*sweep)
        [array] = set(re.findall(r"job_id=(\d+)_", submission.stdout))
        for name in ("point_1", "point_2"):
            self.wait_for_step(self.folder / name, 5)
        self.cluster.ask("scancel", "--signal=USR2", f"{array}_1")  # the last one's own number is that of the array
        two = self.submit(*self.command("two", "launcher.num_nodes=2", "epochs=8"))
        self.wait_for_step(self.folder / "two", 5)
        self.cluster.ask("scancel", "--signal=USR2", two)
        # As soon as it is on its node, before it listens; with threads of libraries, which could take signals to themselves.
        early = self.submit(*self.command("early"), OMP_NUM_THREADS="2")
        wait("it to start", (self.folder / f"early/submitit_logs/{early}_environment.json").exists)
        began = time.time()
        self.cluster.ask("scancel", early)
        self.wait_for_state(early, "CANCELLED")
        wait("its processes to be gone", lambda: not self.tasks_of(early), 10)
        told_time("scancel before it listens, until the job was gone", began)
        for job in (f"{array}_0", f"{array}_1", two):
            self.wait_for_state(job, "COMPLETED")
        starts = {name: len(history(self.folder / name, "start")) for name in ("point_1", "point_2", "two")}
        self.assertEqual(starts, {"point_1": 1, "point_2": 2, "two": 2})
        for name in starts:
            # On two nodes a step takes twice as many.
            self.assert_steps_once(self.folder / name, 7 * 8 if name == "two" else 15 * 8)
            self.assertEqual(runs.read_summary(self.folder / name)["status"], "finished")
        self.assertEqual(self.cluster.fact(early, "Restarts"), "0", "it was cancelled")
        wait("it to say so", lambda: history(self.folder / "early", "end"))
        summary = runs.read_summary(self.folder / "early")
        self.assertEqual(summary["status"], "interrupted")
        self.assertRegex(summary["exit_reason"], f"job {early} was cancelled")

    # ---- parts ----------------------------------------------------------------------------------------------------

    def endless(self) -> list[str]:
        """Films enough for an epoch that is not over soon; written once, since a run that has them mapped may be under way."""
        many = self.folder / "many.npy"
        if not many.exists():
            np.save(many, np.array(runs.real_videos() * 4000))
        return [f"++datasets.k150.train.paths={many}", "++datasets.k150.train.labels=null"]

    def clock(self) -> tuple[str, Path]:
        """A job that SLURM's own signal reaches too late: the run knows how long it needs to leave."""
        run = self.folder / "clock"
        if not run.exists():
            late = ["submitit.timeout_hour=0.0167", "++submitit.additional_parameters.signal=CONT@1"]
            type(self)._clock = self.submit(*self.command("clock", *self.endless(), *late))
        return self._clock, run

    def tasks_of(self, job: str) -> list[int]:
        """The processes that a job's tasks are, by rank."""
        found = []
        for pid in self.cluster.left():
            pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
            env = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            program, *arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            is_task = "omnivision.launch.slurm_task" in arguments and Path(program).name != "srun"
            if env.get("SLURM_JOB_ID") == job and is_task:
                found.append((int(env["SLURM_PROCID"]), pid))
        return [pid for _, pid in sorted(found)]

    def wait_for_start(self, run: Path, restarts: int) -> None:
        wait("it to have resumed", lambda: any(line["restarts"] == restarts for line in history(run, "resumed")), 60)
