"""Incremental backups: after 1 % of the pages changed at random, and after nothing changed."""

import pathlib
import subprocess
import time
import zlib

PAGE = 8192


def measure(bench):
    ours, peer = bench.ours, bench.peer
    ours.first_backup()
    peer.backup()
    times, stored, ideal = {"ours": [], "peer": []}, {"ours": [], "peer": []}, []
    for turn in range(bench.repeat):
        before = pages(bench.cluster.path)
        change(bench.cluster, turn)
        ideal.append(compressed(bench.cluster.path, before) / 1e6)
        for side, tool in (("ours", ours), ("peer", peer)):
            ran, size = tool.backup("incr")
            times[side].append(ran.seconds)
            stored[side].append(size / 1e6)
    report = bench.report
    report.compare("incremental, 1 % of pages changed", times["ours"], times["peer"], "s", 2.0, faster=True)
    report.compare("  stored bytes of it", stored["ours"], stored["peer"], "MB", None, faster=True, digits=1)
    overhead = [size / least for size, least in zip(stored["ours"], ideal)]
    report.at_most("  the same, by the changed pages compressed", overhead, "x", 1.2,
                   other=f"{ideal[-1]:.1f} MB of pages")
    nothing(bench, ours)


def change(cluster, turn):
    """Updates a row on every hundredth page, chosen at random, in place: the rows are as long as before and not indexed."""
    cluster.psql(f"""
        SELECT setseed(0.{turn + 1});
        CREATE TEMP TABLE chosen AS SELECT DISTINCT ON ((ctid::text::point)[0]) ctid AS at FROM pgbench_accounts
            TABLESAMPLE SYSTEM (1) REPEATABLE ({turn});
        UPDATE pgbench_accounts SET abalance = abalance + 1 FROM chosen WHERE pgbench_accounts.ctid = chosen.at;
        CREATE TEMP TABLE texts AS SELECT DISTINCT ON ((ctid::text::point)[0]) ctid AS at FROM documents
            TABLESAMPLE SYSTEM (1) REPEATABLE ({turn});
        UPDATE documents SET package = reverse(package) FROM texts WHERE documents.ctid = texts.at;
        CHECKPOINT;""")


def pages(root):
    """A checksum of every page of every relation."""
    sums = {}
    for path in files(root):
        with path.open("rb") as file:
            sums[path] = [zlib.crc32(page) for page in iter(lambda file=file: file.read(PAGE), b"")]
    return sums


def compressed(root, before):
    """Bytes of all pages that differ from `before`, compressed as one stream."""
    zstd = subprocess.Popen(["zstd", "-3", "-q", "-c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    changed = []
    for path in files(root):
        known = before.get(path, [])
        with path.open("rb") as file:
            for number, page in enumerate(iter(lambda file=file: file.read(PAGE), b"")):
                if number >= len(known) or known[number] != zlib.crc32(page):
                    changed.append(page)
    out, _ = zstd.communicate(b"".join(changed))
    return len(out)


def files(root):
    return sorted(path for path in pathlib.Path(root, "base").rglob("*") if path.is_file() and path.name[0].isdigit())


def nothing(bench, ours):
    """Nothing changed: time for each 10,000 files, and no pack."""
    bench.cluster.psql("CREATE DATABASE many TEMPLATE template0; CHECKPOINT;")
    time.sleep(12)  # younger files are read again
    ours.backup("incr")
    time.sleep(12)
    ours.backup("incr")
    time.sleep(12)
    before = ours.packs()
    ran, _ = ours.backup("incr")
    count = sum(1 for path in bench.cluster.path.rglob("*") if path.is_file())
    bench.report.at_most("incremental, nothing changed", [ran.seconds], "s", other=f"{count} files")
    bench.report.at_most("  packs written", [ours.packs() - before], "", 0, digits=0)
    bench.cluster.psql("DROP DATABASE many;")
