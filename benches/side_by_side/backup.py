"""A full backup into a local repository: time, stored bytes, peak memory."""


def measure(bench):
    sides = {"ours": bench.ours.first_backup, "peer": bench.peer.backup}
    values = bench.in_turns(sides)
    seconds = {side: [ran.seconds for ran, _ in runs] for side, runs in values.items()}
    work = {side: [ran.processor_seconds for ran, _ in runs] for side, runs in values.items()}
    stored = {side: [stored / 1e6 for _, stored in runs] for side, runs in values.items()}
    memory = {side: [ran.rss_max_mb for ran, _ in runs] for side, runs in values.items()}
    report = bench.report
    report.compare("full backup, 2 processes", seconds["ours"], seconds["peer"], "s", 1.2, faster=True)
    report.compare("  processor time of it", work["ours"], work["peer"], "s", None, faster=True)
    report.compare("stored bytes of a full backup", stored["ours"], stored["peer"], "MB", 1.0, faster=True, digits=1)
    report.at_most("peak memory of the backup", memory["ours"], "MB", 300, digits=0,
                   other=f"{max(memory['peer']):.0f} MB (largest process)")
