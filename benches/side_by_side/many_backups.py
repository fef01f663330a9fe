"""A repository of 1,000 backups: peak memory of what reads all their manifests."""

import os

from .cluster import Cluster
from .tools import Pgcairn

BACKUPS = int(os.environ.get("BENCH_BACKUPS", "1000"))
# backups from one full to the next
SET = 10
TABLES = 3000


def measure(bench):
    cluster = Cluster.built(bench, "cluster-many", 0, many_tables, 5494)
    ours = Pgcairn(bench, cluster, "pgcairn-repo-many")
    cluster.archive_with(ours.archive_command)
    while count(ours) < BACKUPS:
        number = count(ours)
        cluster.psql(f"UPDATE pgbench_accounts SET abalance = {number} WHERE aid % 10007 = {number};\nCHECKPOINT;")
        ours("backup", "--type", "full" if number % SET == 0 else "incr", "--process-max", 2, *ours.server)
    for what, words in [
        ("verify --quick", ["verify", "--quick"]),
        ("verify", ["verify", "--process-max", 2]),
        ("expire of nine tenths of them", ["expire", f"--repo-retention-full={BACKUPS // SET // 10}"]),
    ]:
        bench.settle(cold=True)
        ran = ours(*words)
        bench.report.at_most(f"{what}, {BACKUPS} backups of {files(cluster)} files", [ran.seconds], "s")
        bench.report.at_most("  its peak memory", [ran.rss_max_mb], "MB", 300, digits=0)
    cluster.stop()


def count(ours):
    return sum(1 for path in (ours.repo / "backup/bench").iterdir() if path.is_dir())


def files(cluster):
    return sum(1 for path in cluster.path.rglob("*") if path.is_file())


def many_tables(cluster, _gb):
    cluster.pgbench("-i", "-q", "-s", "5")
    cluster.psql("".join(f"CREATE TABLE small{number} (i int PRIMARY KEY, t text);\n" for number in range(TABLES)))
