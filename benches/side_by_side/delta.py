"""A data directory of which 1 % of the pages were changed at random, made equal to the backup again."""

import random
import shutil

from .bench import POSTGRES_BIN
from .incremental import PAGE, files


def measure(bench):
    bench.ours.ensure()
    bench.peer.ensure()
    paths = {tool.name: bench.work / f"equal-{tool.name}" for tool in (bench.ours, bench.peer)}
    for tool in (bench.ours, bench.peer):
        # each tool's own copy: settings for recovery are its own
        tool.restore(bench.directory(paths[tool.name].name))
    turns = {name: iter(range(bench.repeat)) for name in paths}
    spoiled = []

    def side(tool):
        path = paths[tool.name]
        spoiled.append(spoil(path, next(turns[tool.name])))
        bench.settle()
        return tool.restore_delta(path)

    values = bench.in_turns({tool.name: lambda tool=tool: side(tool) for tool in (bench.ours, bench.peer)})
    ours, peer = values["pgcairn"], values["pgBackRest"]
    bench.report.compare("restore --delta, 1 % of pages changed", [ran.seconds for ran in ours],
                         [ran.seconds for ran in peer], "s", 2.0, faster=True)
    bench.report.compare("  processor time of it", [ran.processor_seconds for ran in ours],
                         [ran.processor_seconds for ran in peer], "s", None, faster=True)
    bench.report.at_most("  pages changed, of all", [spoiled[-1]], "%", digits=2)
    bench.run(POSTGRES_BIN / "pg_verifybackup", "-n", paths["pgcairn"])
    bench.say("  made equal by pgcairn: every file is what the backup's manifest says")
    for path in paths.values():
        shutil.rmtree(path)


def spoil(path, turn):
    """Overwrites 1 % of the pages of all relations, those of both tools the same ones; gives how many percent that was."""
    chance = random.Random(turn)
    changed = total = 0
    for file in files(path):
        pages = file.stat().st_size // PAGE
        total += pages
        with file.open("r+b") as data:
            for page in range(pages):
                if chance.random() < 0.01:
                    data.seek(page * PAGE)
                    data.write(chance.randbytes(PAGE))
                    changed += 1
    return 100 * changed / total
