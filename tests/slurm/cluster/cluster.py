"""A real Slurm cluster on one machine: Debian's daemons, each simulated machine in its own Linux namespaces.

    python tests/slurm/cluster/cluster.py install                      # apt packages (root, Debian or Ubuntu)
    python tests/slurm/cluster/cluster.py up --state DIR --nodes 2      # stays up until `down`
    python tests/slurm/cluster/cluster.py login --state DIR sinfo       # a command on the login machine
    python tests/slurm/cluster/cluster.py node --state DIR kill node2   # kill start cut heal resume
    slurmd-kill slurmd-start python tests/slurm/cluster/cluster.py down --state DIR

One machine is the head (login node, slurmctld, munge, with `accounting` also slurmdbd), the others run
slurmd. Every machine has its own network stack, address, host name, process table and local disk; the rest
of the file system is shared, as on a cluster. Nothing listens outside the namespaces, no systemd or
container runtime is needed, and several clusters can be up at once. CPUs, memory and GPUs of the nodes are
claims: GPUs are device files without hardware.

Tests use `Cluster` as a context manager: machines then die with the test process, whatever ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from slurm_accounting import start_accounting
from slurm_packages import install, why_not

HERE = Path(__file__).resolve().parent
NETWORK = "10.77.0"
COMMANDS = ["sbatch", "srun", "salloc", "squeue", "sinfo", "scancel", "scontrol", "sacct", "sacctmgr"]


@dataclass
class Shape:
    """What the cluster pretends to be. `gpus` device files of `gpu_type` per node.

    `accounting` adds sacct (slurmdbd).
    """

    nodes: int = 2
    cpus: int = 8
    memory_mb: int = 64000
    gpus: int = 4
    gpu_type: str = ""
    accounting: bool = False
    grace_s: int = 40  # what a preempted job has between the warning and the eviction
    slurmd_timeout_s: int = 20  # silence after which a node counts as dead
    kill_wait_s: int = 5  # between TERM and KILL at the time limit
    forget_s: int = 900  # until the controller forgets an ended job


class Cluster:
    """One cluster with its state in `state` (a folder whose parents everybody may enter.

    Munge insists on that).
    """

    def __init__(self, state: str | Path, shape: Shape | None = None, *, die_with_caller: bool = True):
        self.state, self.die_with_caller = Path(state).resolve(), die_with_caller
        self.shape = shape or Shape()
        self.network = NETWORK
        self.run_dir, self.etc, self.log = self.state / "run", self.state / "etc", self.state / "log"
        self.mark = f"GDRT_CLUSTER={self.state}"

    @classmethod
    def existing(cls, state: str | Path) -> Cluster:
        shape = json.loads((Path(state) / "shape.json").read_text())
        return cls(state, Shape(**shape), die_with_caller=False)

    # ---- life of the cluster
    # ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        try:
            return self.up()
        except BaseException:
            self.down()
            raise

    def __exit__(self, *_):
        self.down()

    def up(self) -> Cluster:
        for folder in (
            self.run_dir,
            self.etc,
            self.log,
            *(self.state / n for n in ("slurmctld", "spool", "local", "dev", "bin")),
        ):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.state, self.run_dir, self.etc):
            folder.chmod(0o755)
        (self.state / "shape.json").write_text(json.dumps(asdict(self.shape)))
        self._configure()
        self._start_machine("head")
        self._in_network("head", "ip", "link", "add", "br0", "type", "bridge")
        self._in_network("head", "ip", "addr", "add", f"{NETWORK}.1/24", "dev", "br0")
        self._in_network("head", "ip", "link", "set", "br0", "up")
        self.on(
            "head",
            "munged",
            f"--key-file={self.etc}/munge.key",
            f"--socket={self.run_dir}/munge.sock",
            "--force",
            f"--pid-file={self.run_dir}/munged.pid",
            f"--log-file={self.log}/munged.log",
            f"--seed-file={self.run_dir}/munged.seed",
        )
        if self.shape.accounting:
            start_accounting(self)
        self.on("head", "slurmctld")
        for number in range(1, self.shape.nodes + 1):
            self.start_node(f"node{number}")
        self.until(self._ready, 90, f"nodes not ready, see {self.log}")
        return self

    def down(self) -> None:
        """Kills the first process of every machine; the kernel ends everything inside."""
        for pid_file in self.run_dir.glob("*.machine"):
            pid = self._machine_pid(pid_file.stem)
            if pid:
                os.kill(pid, 9)
                self.until(
                    lambda pid=pid: not self._ours(pid),
                    10,
                    f"machine {pid_file.stem} (pid {pid}) does not end",
                )
            pid_file.unlink(missing_ok=True)

    # ---- commands
    # --------------------------------------------------------------------------------------------------------

    def on(
        self,
        machine: str,
        *command: str,
        user: str | None = None,
        check: bool = True,
        timeout: float = 120,
        env: dict[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> subprocess.CompletedProcess:
        """Runs a command on a machine (`head` is the login node) and returns its output as text."""
        done = subprocess.run(
            self.prefix(machine, user, cwd) + [str(c) for c in command],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{machine}: {' '.join(map(str, command))}: exit "
                f"{done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def prefix(self, machine: str, user: str | None = None, cwd: str | Path | None = None) -> list[str]:
        pid = self._machine_pid(machine)
        if not pid:
            raise RuntimeError(f"machine {machine} is down")
        enter = ["nsenter", "-t", str(pid), "-n", "-u", "-i", "-m", "-p", f"--wdns={cwd or Path.cwd()}"]
        return enter + (["setpriv", "--reuid", user, "--regid", "nogroup", "--clear-groups"] if user else [])

    def environment(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        name, _, value = self.mark.partition("=")
        env[name] = value
        env["SLURM_CONF"] = str(self.etc / "slurm.conf")
        return env | (extra or {})

    def login(self, *command: str, **options) -> subprocess.CompletedProcess:
        return self.on("head", *command, **options)

    def job(self, job_id: str | int) -> dict[str, str]:
        """The fields of `scontrol show job`; empty when Slurm does not know the job."""
        done = self.login("scontrol", "-o", "show", "job", str(job_id), check=False)
        return dict(f.split("=", 1) for f in done.stdout.split() if "=" in f) if done.returncode == 0 else {}

    # ---- machines and their faults
    # ---------------------------------------------------------------------------------------

    def start_node(self, node: str) -> None:
        self._start_machine(node)
        pid, number = self._machine_pid(node), int(node.removeprefix("node"))
        self._in_network(
            "head", "ip", "link", "del", f"v-{node}", check=False
        )  # left over from a former life
        self._in_network(
            "head",
            "ip",
            "link",
            "add",
            f"v-{node}",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(pid),
        )
        self._in_network("head", "ip", "link", "set", f"v-{node}", "master", "br0", "up")
        self._in_network(node, "ip", "addr", "add", f"{NETWORK}.{10 + number}/24", "dev", "eth0")
        self._in_network(node, "ip", "link", "set", "eth0", "up")
        self.start_slurmd(node, reboot=(self.run_dir / f"{node}.died").exists())

    def kill_node(self, node: str) -> None:
        """The power goes: every process of the node ends at once."""
        pid = self._machine_pid(node)
        os.kill(pid, 9)
        self.until(lambda: not self._ours(pid), 10, f"{node} does not end")
        (self.run_dir / f"{node}.machine").unlink(missing_ok=True)
        (self.run_dir / f"{node}.died").touch()

    def cut(self, node: str) -> None:
        """The network goes silent (no reset reaches the peers); the node's processes live on."""
        self._in_network("head", "ip", "link", "set", f"v-{node}", "down")

    def heal(self, node: str) -> None:
        self._in_network("head", "ip", "link", "set", f"v-{node}", "up")

    def resume(self, node: str) -> None:
        self.login("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    def kill_slurmd(self, node: str) -> None:
        for pid in self.on(node, "pgrep", "-x", "slurmd").stdout.split():  # pids of the node's own namespace
            self.on(node, "kill", "-9", pid)

    def start_slurmd(self, node: str, reboot: bool = False) -> None:
        # -b: the kernel's uptime does not change with a namespace, so say that the machine was restarted
        self.on(node, "slurmd", *(["-b"] if reboot else []), "-N", node)

    # ---- inside

    def _ours(self, pid: int) -> bool:
        try:
            return self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def _machine_pid(self, machine: str) -> int | None:
        pid_file = self.run_dir / f"{machine}.machine"
        pid = int(pid_file.read_text()) if pid_file.exists() else None
        return pid if pid and self._ours(pid) else None

    def _start_machine(self, name: str) -> None:
        if self._machine_pid(name):
            return
        pid_file = self.run_dir / f"{name}.machine"
        pid_file.unlink(missing_ok=True)
        tie = ["setpriv", "--pdeathsig", "KILL"] if self.die_with_caller else []
        with open(self.log / f"machine-{name}.log", "ab") as log:
            subprocess.Popen(
                [
                    *tie,
                    "unshare",
                    "--net",
                    "--uts",
                    "--ipc",
                    "--mount",
                    "--propagation",
                    "private",
                    "--pid",
                    "--fork",
                    "--kill-child",
                    str(HERE / "machine.sh"),
                    name,
                    str(self.state),
                    str(pid_file),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self.environment(),
            )
        self.until(
            lambda: self._machine_pid(name),
            15,
            f"machine {name} did not start, see {self.log}/machine-{name}.log",
        )

    def _in_network(self, machine: str, *command: str, check: bool = True) -> None:
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{self._machine_pid(machine)}/ns/net", *command],
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            raise RuntimeError(f"{machine}: {' '.join(command)}: {done.stderr.strip()}")

    @staticmethod
    def until(condition, seconds: float, complaint: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(complaint)
            time.sleep(0.05)

    def _ready(self) -> bool:
        lines = self.login("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).stdout.split("\n")
        states = dict(line.split() for line in lines if line.strip())
        return len(states) == self.shape.nodes and set(states.values()) <= {
            "idle",
            "mixed",
            "allocated",
            "completing",
        }

    def _configure(self) -> None:
        shape, names = self.shape, [f"node{i}" for i in range(1, self.shape.nodes + 1)]
        addresses = {name: f"{NETWORK}.{10 + i}" for i, name in enumerate(names, 1)}
        hosts = [("127.0.0.1", "localhost"), (f"{NETWORK}.1", "head")] + [
            (a, n) for n, a in addresses.items()
        ]
        (self.etc / "hosts").write_text("".join(f"{a} {n}\n" for a, n in hosts))
        key = self.etc / "munge.key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(1024))
        for number in range(shape.gpus):
            device = self.state / "dev" / f"gpu{number}"
            if not device.exists():
                os.mknod(
                    device, 0o20666, os.makedev(1, 3)
                )  # the null device: what matters is that the file is there
        kind = f"{shape.gpu_type}:" if shape.gpu_type else ""
        gres = f" Gres=gpu:{kind}{shape.gpus}" if shape.gpus else ""
        settings = {
            "STATE": self.state,
            "NETWORK": NETWORK,
            "SLURMD_TIMEOUT": shape.slurmd_timeout_s,
            "KILL_WAIT": shape.kill_wait_s,
            "GRACE": shape.grace_s,
            "FORGET": shape.forget_s,
        }
        text = (HERE / "slurm.conf.in").read_text()
        for name, value in settings.items():
            text = text.replace(f"@{name}@", str(value))
        for name in names:
            text += (
                f"NodeName={name} NodeAddr={addresses[name]} CPUs={shape.cpus} "
                f"RealMemory={shape.memory_mb}{gres} State=UNKNOWN\n"
            )
        text += (
            f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost={NETWORK}.1\n"
            f"AccountingStoragePass={self.run_dir}/munge.sock\n"
            if shape.accounting
            else "AccountingStorageType=accounting_storage/none\n"
        )
        (self.etc / "slurm.conf").write_text(text)
        typed = f"Type={shape.gpu_type} " if shape.gpu_type else ""
        (self.etc / "gres.conf").write_text(
            f"AutoDetect=off\nName=gpu {typed}File={self.state}/dev/gpu[0-{shape.gpus - 1}]\n"
            if shape.gpus
            else "AutoDetect=off\n"
        )
        # slurmd 22.05 loads a cgroup plugin even when nothing uses it, and detection fails without
        # /sys/fs/cgroup; v1 does not look
        (self.etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for (
            command
        ) in COMMANDS:  # for people: `PATH=DIR/bin:$PATH sbatch ...` from a shell outside the cluster
            shim = self.state / "bin" / command
            shim.write_text(
                # Jobs inherit the PATH
                f'#!/bin/sh\n[ -n "$SLURMD_NODENAME" ] && exec /usr/bin/{command} "$@"\n'
                f'exec "{sys.executable}" "{HERE}/cluster.py" login --state "{self.state}" '
                f'/usr/bin/{command} "$@"\n'
            )
            shim.chmod(0o755)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    at_install = actions.add_parser("install")
    at_install.add_argument("--accounting", action="store_true", help="also slurmdbd and mariadb")
    at_install.add_argument(
        "--if-possible", action="store_true", help="say why and go on where packages cannot be installed"
    )
    for name in ("up", "down", "login", "node"):
        sub = actions.add_parser(name)
        sub.add_argument("--state", required=True)
        if name == "up":
            for field, default in asdict(Shape()).items():
                flag = f"--{field.replace('_', '-')}"
                sub.add_argument(flag, action="store_true") if default is False else sub.add_argument(
                    flag, type=type(default), default=default
                )
        if name == "login":
            sub.add_argument("--user")
            sub.add_argument("command", nargs=argparse.REMAINDER)
        if name == "node":
            sub.add_argument(
                "deed", choices=["kill", "start", "cut", "heal", "resume", "slurmd-kill", "slurmd-start"]
            )
            sub.add_argument("name")
    args = parser.parse_args()
    if args.action == "install":
        try:
            install(args.accounting)
        except (SystemExit, OSError, subprocess.SubprocessError) as error:
            if not args.if_possible:
                raise
            print(f"[slurm] not installed: {error}; the tests that need it will be skipped", flush=True)
        return 0
    if args.action == "up":
        reason = why_not()
        if reason:
            print(reason, file=sys.stderr)
            return 2
        shape = Shape(**{name: getattr(args, name) for name in asdict(Shape())})
        cluster = Cluster(args.state, shape, die_with_caller=False).up()
        print(cluster.login("sinfo", "-N", "-o", "%N %T %c %m %G").stdout, end="")
        return 0
    cluster = Cluster.existing(args.state)
    if args.action == "down":
        cluster.down()
    elif args.action == "login":
        os.execvpe("nsenter", cluster.prefix("head", args.user) + args.command, cluster.environment())
    else:
        deeds = {
            "kill": cluster.kill_node,
            "start": cluster.start_node,
            "cut": cluster.cut,
            "heal": cluster.heal,
            "resume": cluster.resume,
            "slurmd-kill": cluster.kill_slurmd,
            "slurmd-start": cluster.start_slurmd,
        }
        deeds[args.deed](args.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
