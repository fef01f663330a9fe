"""A cluster of 200,000 small files, in memory: peak memory of its backups, and how long one takes to mount."""

import os
import random
import shutil

from .cluster import Cluster
from .tools import Mount, Pgcairn, memory_peak_mb

FILES = 200_000


def measure(bench):
    cluster = built(bench, memory_disk(bench))
    ours = Pgcairn(bench, cluster, "pgcairn-repo-files")
    ran, _ = ours.backup()
    bench.report.at_most(f"backup of {FILES} files", [ran.seconds], "s")
    bench.report.at_most("  its peak memory", [ran.rss_max_mb], "MB", 300, digits=0)
    seconds = []
    for _ in range(bench.repeat):
        bench.settle(cold=True)
        mount = Mount(ours, "mounted-files")
        seconds.append(mount.seconds)
        listed = sum(1 for _ in (mount.path / "base/1").iterdir())
        peak = memory_peak_mb(mount.status()["pid"])
        mount.unmount()
    bench.report.at_most(f"  its mount ({listed} in one directory)", seconds, "s", 2)
    bench.report.at_most("  peak memory of that mount, cache 64 MB", [peak], "MB", 64 + 150, digits=0)
    write(cluster, FILES // 100, seed=4)
    for what, options in [(f"incremental of {FILES} files, {FILES // 100} of them changed", []), ("  the same, every file read", ["--checksum"])]:
        ran = ours("backup", "--type", "incr", "--process-max", 2, *options, *ours.server)
        bench.report.at_most(what, [ran.seconds], "s")
        bench.report.at_most("  its peak memory", [ran.rss_max_mb], "MB", 300, digits=0)
    cluster.stop()


def built(bench, place):
    """The cluster, running."""
    return Cluster.built(bench, f"{place}/cluster", 0, many_files, 5495)


def memory_disk(bench):
    """A file system in memory: a disk would need minutes to delete them all."""
    path = bench.work / "files"
    path.mkdir(exist_ok=True)
    if not os.path.ismount(path):
        bench.run("mount", "-t", "tmpfs", "-o", "size=6g,mode=755", "tmpfs", path, user="root")
        shutil.chown(path, "postgres", "postgres")
    bench.undo.callback(lambda: bench.run("umount", path, user="root"))
    return path.name


def many_files(cluster, _gb):
    """Files of one page, each of its own content."""
    cluster.stop()
    write(cluster, FILES, seed=3)
    cluster.bench.run("chown", "-R", "postgres:", cluster.path, user="root")


def write(cluster, count, seed):
    chance = random.Random(seed)
    for number in range(count):
        page = chance.randbytes(64) * 4 + bytes(8192 - 256)
        (cluster.path / f"base/1/small{number}").write_bytes(page)
