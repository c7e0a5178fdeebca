"""The accounting of a simulated cluster: mariadb and slurmdbd on its head."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster import Cluster


def start_accounting(cluster: Cluster) -> None:
    """Starts mariadb and slurmdbd on the head and adds what sacctmgr needs to know."""
    data, socket = cluster.state / "mysql", cluster.run_dir / "mysql.sock"
    data.mkdir(exist_ok=True)
    shutil.chown(data, "mysql")
    cluster.run_dir.chmod(0o1777)
    if not (data / "mysql").exists():
        cluster.on(
            "head",
            "mariadb-install-db",
            "--no-defaults",
            "--user=mysql",
            f"--datadir={data}",
            "--skip-test-db",
            "--auth-root-authentication-method=normal",
            timeout=180,
        )
    with open(cluster.log / "mariadbd.log", "ab") as log:
        subprocess.Popen(
            cluster.prefix("head")
            + [
                "mariadbd",
                "--no-defaults",
                "--user=mysql",
                f"--datadir={data}",
                f"--socket={socket}",
                "--bind-address=127.0.0.1",
                "--innodb-buffer-pool-size=64M",
                "--innodb-flush-log-at-trx-commit=0",
                "--innodb-lock-wait-timeout=900",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=cluster.environment(),
            start_new_session=True,
        )
    admin = ["mariadb-admin", "--no-defaults", f"--socket={socket}", "-uroot", "ping"]
    cluster.until(
        lambda: cluster.on("head", *admin, check=False).returncode == 0,
        60,
        f"mariadb did not start, see {cluster.log}/mariadbd.log",
    )
    sql = "create database if not exists slurm_acct_db;"
    for host in ("%", "localhost"):
        sql += (
            f"create user if not exists 'slurm'@'{host}' identified by 'simulated';"
            f"grant all on slurm_acct_db.* to 'slurm'@'{host}';"
        )
    cluster.on("head", "mariadb", "--no-defaults", f"--socket={socket}", "-uroot", "-e", sql)
    conf = cluster.etc / "slurmdbd.conf"
    conf.write_text(
        f"AuthType=auth/munge\nAuthInfo=socket={cluster.run_dir}/munge.sock\n"
        f"DbdHost=head\nDbdAddr={cluster.network}.1\n"
        f"SlurmUser=root\nLogFile={cluster.log}/slurmdbd.log\nPidFile={cluster.run_dir}/slurmdbd.pid\n"
        "StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\n"
        "StoragePort=3306\nStorageUser=slurm\n"
        "StoragePass=simulated\nStorageLoc=slurm_acct_db\n"
    )
    conf.chmod(0o600)
    cluster.on("head", "slurmdbd")
    show = ["timeout", "3", "sacctmgr", "-n", "show", "cluster"]
    cluster.until(
        lambda: cluster.on("head", *show, check=False).returncode == 0,
        60,
        f"slurmdbd did not start, see {cluster.log}/slurmdbd.log",
    )
    for what in (["cluster", "simulated"], ["account", "default"], ["user", "root", "account=default"]):
        cluster.on("head", "sacctmgr", "-i", "-Q", "add", *what, check=False)
