"""What encryption costs: the same full backup and restore, into and from a plain and an encrypted repository."""

import shutil

from .tools import Pgcairn


def measure(bench):
    passphrase = bench.work / "passphrase"
    passphrase.write_text("a passphrase of the benchmark\n")
    shutil.chown(passphrase, "postgres", "postgres")
    passphrase.chmod(0o600)
    hidden = Pgcairn(bench, bench.cluster, "pgcairn-repo-encrypted", options=["--repo-cipher-pass-file", passphrase],
                     creation=["--encrypt"])
    sides = {"encrypted": lambda: times(hidden), "plain": lambda: times(bench.ours)}
    values = bench.in_turns(sides)
    for number, (what, goal) in enumerate([("full backup", 0.85), ("restore", None)]):
        encrypted, plain = ([turn[number] for turn in values[side]] for side in ("encrypted", "plain"))
        bench.report.compare(f"{what}, encrypted (against a plain one of ours)", encrypted, plain, "s", goal, faster=True)


def times(tool):
    """Seconds of a full backup into an empty repository, and of its restore."""
    ran, _ = tool.first_backup()
    path = tool.bench.directory("restored")
    tool.bench.settle()
    restored = tool.restore(path)
    shutil.rmtree(path)
    return ran.seconds, restored.seconds
