"""A real SLURM of several nodes on this machine, for tests: a controller, and for each node a slurmd in its own namespaces.

    with Cluster(folder) as cluster: cluster.environment is what commands need to reach it

Everything lies in `folder`, all ports are on loopback, and `stop` ends what `start` started, by process id, with what has the
cluster's SLURM_CONF in its environment (the processes of jobs, but also a shell that was given it). As root on Debian:
apt-get install --no-install-recommends slurm-wlm munge.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
PATH = os.environ["PATH"] + ":/usr/local/sbin:/usr/sbin:/sbin"  # not all shells search where daemons are
CPUS, MEMORY_MB, GPUS = 8, 16000, 2  # that a node claims to have
GRACE_SECONDS = 20

CONFIGURATION = """\
ClusterName=omnivision
FirstJobId={first_job}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired; 5 is the least
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
AccountingStorageType=accounting_storage/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# Nodes may claim more than the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={memory_of_cpu}
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=5
MessageTimeout=5
TCPTimeout=2
KillWait=30
CompleteWait=0
UnkillableStepTimeout=30
MinJobAge=3600
MaxArraySize=101
PropagateResourceLimits=NONE
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# The signal that a job asked for comes when it is preempted, too
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace}
PartitionName=short Nodes=ALL MaxTime=60 PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no cluster here; None when there can."""
    if absent := [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]:
        return f"{', '.join(absent)} missing: apt-get install --no-install-recommends slurm-wlm munge"
    return None if os.geteuid() == 0 else "nodes in namespaces of their own need root"


class Cluster:
    """`nodes` are named node1, node2, ...; each has 8 CPUs, 16 GB and 2 GPUs, by its own word."""

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        self.folder, self.nodes = folder, [f"node{i + 1}" for i in range(nodes)]
        self.daemons: dict[str, subprocess.Popen] = {}
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_"))
        }
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    # ---- from outside ---------------------------------------------------------------------------------------------

    def ask(self, *command: str) -> str:
        """What a command of SLURM answers, or says it cannot."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
        return result.stdout + result.stderr

    def fact(self, job: str, name: str) -> str:
        """A fact of `scontrol show job`, such as JobState."""
        words = self.ask("scontrol", "show", "job", "--oneliner", job).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def kill_node(self, node: str) -> None:
        """Power off: everything on the node ends at once. SLURM finds out by itself."""
        first = self.daemons.pop(node)  # the node's first process: the kernel ends the others with it
        first.kill()
        first.wait()

    def hide(self, node: str, folder: Path) -> None:
        """Let a node see an empty folder in place of this one, as if it were on a disk of the login node's own."""
        self._mount(node, "-t", "tmpfs", "none", str(folder))

    def make_read_only(self, node: str, folder: Path) -> None:
        """Let a node only read a folder."""
        self._mount(node, "--bind", str(folder), str(folder))
        self._mount(node, "-o", "remount,bind,ro", str(folder))

    def _mount(self, node: str, *arguments: str) -> None:
        subprocess.run(["nsenter", f"--target={self._inside(node)}", "--mount", "mount", *arguments], check=True)

    def _inside(self, node: str) -> int:
        """A process of a node: slurmd, the grandchild of what was started."""
        child = subprocess.run(["pgrep", "--parent", str(self.daemons[node].pid)], capture_output=True, text=True)
        return int(child.stdout.split()[0])

    def start_node(self, node: str) -> None:
        # sh is the node's first process: it reaps orphans.
        inner = 'set -e; mount --bind "$0" /etc/hosts; hostname "$1"; slurmd -D -N "$1" & wait'
        space = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._start(node, *space, "sh", "-c", inner, str(self.folder / "hosts"), node)

    def wait_for_nodes(self) -> None:
        def ready() -> bool:
            states = self.ask("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()
            return len(states) == len(self.nodes) and set(states) <= {"idle", "mixed", "allocated"}

        wait("the nodes", ready, 30)

    # ---- start and stop -------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._write_configuration()
        key, socket_file = self.folder / "munge.key", self.folder / "munge.socket"
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_file}",
                    *(f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")))  # fmt: skip
        wait("munged", socket_file.exists)
        self._start("slurmctld", "slurmctld", "-D")
        wait("slurmctld", lambda: " is UP" in self.ask("scontrol", "ping"))
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes()

    def stop(self) -> None:
        if "slurmctld" in self.daemons:
            self.ask("scancel", "--me")
        for name, daemon in self.daemons.items():
            daemon.kill() if name in self.nodes else daemon.terminate()
        for daemon in self.daemons.values():
            daemon.wait(timeout=10)
        self.daemons.clear()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)

    def left(self) -> list[int]:
        """Dist that belong to this cluster: its daemons, and those of jobs, which have their submitter's environment."""
        mark, found = f"SLURM_CONF={self.folder}/slurm.conf".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                ours = mark in (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if ours and state not in "ZX":
                found.append(int(entry.name))
        return found

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, cwd=self.folder
            )

    def _write_configuration(self) -> None:
        folder, ports = self.folder, free_ports(len(self.nodes) + 1)
        for name in ("state", "dev", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # munged insists
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))
        for number in range(GPUS):  # a GPU is a device; the null device does
            (folder / "dev" / f"gpu{number}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/dev/gpu[0-{GPUS - 1}]\n")
        # slurmd loads a cgroup plugin though nothing uses it; this one loads on any machine
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = " ".join(["localhost", socket.gethostname(), *self.nodes])
        (folder / "hosts").write_text(f"127.0.0.1 {names}\n")
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory={MEMORY_MB} "
            f"Gres=gpu:{GPUS} Feature=small"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                first_job=int(time.time()) % 60_000_000 + 1,
                port=ports[0],
                folder=folder,
                memory_of_cpu=MEMORY_MB // CPUS,
                nodes="\n".join(nodes),
                grace=GRACE_SECONDS,
            )
        )


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


def wait(what: str, test: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until a test holds. Raises AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not test():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)
