"""Slurm from the distribution's packages: whether a cluster can run here, and the installation."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = ["slurm-wlm", "slurm-client", "munge", "iproute2", "util-linux", "procps"]
ACCOUNTING_PACKAGES = ["slurmdbd", "mariadb-server"]


def why_not() -> str | None:
    """Says in one sentence why a cluster cannot run here, or None when it can."""
    if os.geteuid() != 0:
        return "the simulated Slurm cluster needs root (it creates network and process namespaces)"
    for command in ("unshare", "nsenter", "ip"):
        if shutil.which(command) is None:
            return (
                f"the simulated Slurm cluster needs the command `{command}` (packages util-linux and "
                "iproute2)"
            )
    probe = subprocess.run(
        [
            "unshare",
            "--net",
            "--uts",
            "--ipc",
            "--mount",
            "--pid",
            "--fork",
            "sh",
            "-c",
            "mount -t proc proc /proc && mount -t sysfs sysfs /sys && ip link add gdrt0 type bridge",
        ],
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        return (
            "this machine does not allow the namespaces of the simulated Slurm cluster "
            f"({probe.stderr.strip().splitlines()[-1]})"
        )
    missing = [c for c in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(c) is None]
    if missing:
        return (
            f"Slurm is not installed ({', '.join(missing)} not found): `python {HERE.name}/cluster.py "
            "install` in tests/slurm installs it"
        )
    return None


def install(accounting: bool = False) -> None:
    """Installs Slurm from the distribution's packages, without letting them start services."""
    wanted = PACKAGES + (ACCOUNTING_PACKAGES if accounting else [])
    status = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Status}\n", *wanted], capture_output=True, text=True
    ).stdout
    missing = [p for p in wanted if f"{p} install ok installed" not in status]
    if not missing:
        return
    print(f"[slurm] installing {' '.join(missing)}", flush=True)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SystemExit(f"cannot install {' '.join(missing)}: that takes root and apt-get")
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")  # Debian's convention for "do not start services now"
        policy.chmod(0o755)
    try:
        env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        subprocess.run(["apt-get", "update", "-qq"], env=env, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
            env=env,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    finally:
        if ours:
            policy.unlink()
