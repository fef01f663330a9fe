"""Reading everything to find damage, beside a restore of the same backup."""

import shutil


def measure(bench):
    bench.ours.first_backup()
    values = bench.in_turns({"verify": lambda: verified(bench), "restore": lambda: restored(bench)})
    # both pass the same database; a restore also writes it
    bench.report.compare("verify, beside our restore", values["verify"], values["restore"], "s", 1.0, faster=True)


def verified(bench):
    bench.settle(cold=True)
    return bench.ours("verify", "--process-max", 2).seconds


def restored(bench):
    path = bench.directory("restored")
    bench.settle(cold=True)
    ran = bench.ours.restore(path)
    shutil.rmtree(path)
    return ran.seconds
