"""Runs the topics that are asked for, in order, and prints what they found."""

import importlib
import sys

from .bench import Bench, Failed

TOPICS = ["backup", "restore", "restore_s3", "delta", "first_query", "pgbench", "reads", "small_files", "incremental", "schedule", "verify", "archive",
          "moment", "encryption", "many_backups"]


def main(asked):
    unknown = [topic for topic in asked if topic not in TOPICS]
    if unknown:
        print(f"error: no topic {unknown[0]}; there are {', '.join(TOPICS)}", file=sys.stderr)
        return 2
    with Bench() as bench:
        try:
            for topic in asked or TOPICS:
                bench.say(f"\n{topic}")
                importlib.import_module(f".{topic}", __package__).measure(bench)
        except Failed as failed:
            print(f"error: {failed}", file=sys.stderr)
            return 1
        finally:
            bench.report.show(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
