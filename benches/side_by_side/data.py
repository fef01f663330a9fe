"""Realistic contents: pgbench's tables, real text, events with JSON, bytes that do not compress. The same in every run."""

import functools
import random
import subprocess

MB = 1 << 20

TABLES = """
CREATE TABLE documents (id bigint, package text, body text);
CREATE TABLE random_bytes (id bigint, payload bytea);
CREATE TABLE events AS
    SELECT i AS id, md5(i::text)::uuid AS event, timestamptz '2024-01-01' + i * interval '1.7 s' AS at,
        jsonb_build_object('user', (i * 7919) % 100003, 'action', (ARRAY['view', 'buy', 'search', 'leave'])[1 + i % 4],
            'amount', round((sin(i) * 1000)::numeric, 2), 'session', md5((i / 17)::text)) AS detail
    FROM generate_series(1, {events}::bigint) AS i;
"""

INDEXES = """
ALTER TABLE documents ADD PRIMARY KEY (id);
CREATE INDEX ON documents (package);
ALTER TABLE random_bytes ADD PRIMARY KEY (id);
ALTER TABLE events ADD PRIMARY KEY (id);
CREATE INDEX ON events (at);
VACUUM ANALYZE;
"""


def fill(cluster, gb):
    """Fills a database of about `gb` GB: 45 % pgbench, 30 % text, 15 % random bytes, 10 % events."""
    cluster.pgbench("-i", "-q", "-s", int(gb * 32))
    cluster.psql(TABLES.format(events=int(gb * 500_000)))
    copy(cluster, "documents", documents(int(gb * 250 * MB)))
    copy(cluster, "random_bytes", random_rows(int(gb * 140 * MB)))
    cluster.psql(INDEXES)
    # pages as a server leaves them, not as a load does
    cluster.pgbench("-N", "-c", 2, "-T", 5)


def copy(cluster, table, rows):
    command = cluster.client("psql", "-XAtq", "-c", f"COPY {table} FROM STDIN")
    psql = subprocess.Popen(command, stdin=subprocess.PIPE)
    for row in rows:
        psql.stdin.write(row)
    psql.stdin.close()
    if psql.wait() != 0:
        raise RuntimeError(f"cannot fill {table}")


def documents(limit):
    """Entries of Debian's lists of packages in random order. One that comes again is not the same: it has lost some of its
    lines, so that neither pages nor slots repeat."""
    entries, chance = debian_entries(), random.Random(1)
    written, number = 0, 0
    while written < limit:
        number += 1
        lines = chance.choice(entries)
        lines = [line for line in lines if chance.random() < 0.9] or lines
        text = "\\n".join(lines)
        row = f"{number}\t{lines[0][:60]}\t{text}\n".encode()
        written += len(row)
        yield row


def random_rows(limit):
    chance = random.Random(2)
    for number in range(1, limit // 1000 + 1):
        yield f"{number}\t\\\\x{chance.randbytes(1000).hex()}\n".encode()


@functools.cache
def debian_entries():
    lists = subprocess.run(
        "/usr/lib/apt/apt-helper cat-file /var/lib/apt/lists/*_Packages*", shell=True, capture_output=True, check=False
    ).stdout.decode(errors="replace")
    if len(lists) < MB:
        with open("/var/lib/dpkg/available", encoding="utf-8", errors="replace") as available:
            lists += available.read()
    if len(lists) < MB:
        with open("/var/lib/dpkg/status", encoding="utf-8", errors="replace") as status:
            lists += status.read()
    clean = lists.replace("\\", "\\\\").replace("\t", " ").replace("\r", "")
    return [entry.split("\n") for entry in clean.split("\n\n") if entry]
