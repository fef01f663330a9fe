"""Reading through a mount whose disk cache is warm while the kernel's cache of the mount is dropped, against ext4."""

import json
import pathlib

from .tools import Mount, memory_peak_mb

RANDOM = ["--rw=randread", "--bs=8k", "--io_size=256m"]
SEQUENTIAL = ["--rw=read", "--bs=1m"]


def measure(bench):
    bench.ours.ensure()
    mount = Mount(bench.ours, "mounted")
    name = bench.cluster.psql("SELECT pg_relation_filepath('pgbench_accounts')")
    ours, native = mount.path / name, bench.cluster.path / name
    for _ in range(2):
        read_all(ours)
    random = bench.in_turns({"ours": lambda: fio(bench, ours, RANDOM)["iops"],
                             "native": lambda: fio(bench, native, RANDOM)["iops"]})
    bench.report.at_least("8 KiB random reads, 1 reader, warm disk cache", random["ours"], "IOPS", 20_000, random["native"])
    sequential = bench.in_turns({"ours": lambda: fio(bench, ours, SEQUENTIAL)["bw_bytes"] / 1e6,
                                 "native": lambda: fio(bench, native, SEQUENTIAL)["bw_bytes"] / 1e6})
    bench.report.at_least("sequential read, warm disk cache", sequential["ours"], "MB/s", 600, sequential["native"])
    peak = memory_peak_mb(mount.status()["pid"])
    bench.report.at_most("peak memory of the mount after that, cache 64 MB", [peak], "MB", 64 + 150, digits=0)
    mount.unmount()


def fio(bench, file, job):
    """One reader; fio drops the kernel's cache of the file before it starts, and reads no block twice."""
    bench.settle()
    ran = bench.run("fio", "--name=read", f"--filename={file}", "--readonly", "--ioengine=psync", "--invalidate=1",
                    "--output-format=json", *job, user="root")
    return json.loads(ran.output[ran.output.index("{"):])["jobs"][0]["read"]


def read_all(file):
    with pathlib.Path(file).open("rb") as data:
        while data.read(1 << 20):
            pass
