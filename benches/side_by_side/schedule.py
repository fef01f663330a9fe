"""A month of backups under load: 1 full, 6 differential, 21 incremental; what each repository weighs in the end."""

from .cluster import Cluster
from .tools import Pgcairn, PgBackRest

KINDS = ["full"] + (["incr"] * 3 + ["diff"]) * 6 + ["incr"] * 3
# transactions between two backups
TRANSACTIONS = 2000


def measure(bench):
    bench.cluster.stop()
    cluster = Cluster.built(bench, "cluster-month", bench.gb / 4, port=5495)
    ours, peer = Pgcairn(bench, cluster, "pgcairn-repo-month"), PgBackRest(bench, cluster, "pgbackrest-repo-month")
    times = {"ours": 0.0, "peer": 0.0}
    for number, kind in enumerate(KINDS):
        if number > 0:
            cluster.pgbench("-n", "-c", 2, "-t", TRANSACTIONS // 2)
        for side, tool in (("ours", ours), ("peer", peer)):
            ran, _ = tool.backup(kind)
            times[side] += ran.seconds
    weights = [bench.tree_bytes(tool.repo / "chunk", tool.repo / "backup") / 1e6 for tool in (ours, peer)]
    what = "a month of 28 backups: repository without WAL"
    bench.report.compare(what, weights[:1], weights[1:], "MB", 2.0, faster=True, digits=1)
    bench.report.compare("  time of all its backups", [times["ours"]], [times["peer"]], "s", None, faster=True)
    cluster.stop()
    bench.cluster.start()
