"""Copy-out into an empty directory: time with and without the repository in the kernel's cache; the result is judged."""

import shutil

from .bench import POSTGRES_BIN
from .cluster import Cluster


def measure(bench):
    bench.ours.ensure()
    bench.peer.ensure()
    for cold, state, goal in [(True, "cold", 1.5), (False, "warm", 1.5)]:
        sides = {tool.name: lambda tool=tool, cold=cold: restored(bench, tool, cold) for tool in (bench.ours, bench.peer)}
        values = bench.in_turns(sides)
        ours, peer = values["pgcairn"], values["pgBackRest"]
        bench.report.compare(f"restore, 2 processes, repository {state}", [ran.seconds for ran in ours],
                             [ran.seconds for ran in peer], "s", goal, faster=True)
        bench.report.compare("  processor time of it", [ran.processor_seconds for ran in ours],
                             [ran.processor_seconds for ran in peer], "s", None, faster=True)
    for tool in (bench.ours, bench.peer):
        judge(bench, tool)


def restored(bench, tool, cold):
    path = bench.directory("restored")
    bench.settle(cold)
    ran = tool.restore(path)
    shutil.rmtree(path)
    return ran


def judge(bench, tool):
    """Checks the files against their manifest where there is one, then recovers, stops, and checks every page."""
    path = bench.directory("restored")
    tool.restore(path)
    if (path / "backup_manifest").exists():
        bench.run(POSTGRES_BIN / "pg_verifybackup", "-n", "-i", "pgcairn.restore", path)
    copy = Cluster(bench, path, port=5498)
    copy.start("-c port=5498 -c archive_mode=off")
    rows = copy.psql("SELECT count(*) FROM pgbench_accounts")
    copy.stop()
    bench.run(POSTGRES_BIN / "pg_checksums", "--check", "-D", path)
    bench.say(f"  restored by {tool.name}: starts, has {rows} accounts, every page's checksum is right")
    copy.remove()
