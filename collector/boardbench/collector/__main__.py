"""``python -m boardbench.collector`` is ``boardbench-collector``."""

from boardbench.collector.cli import main

main(prog_name="boardbench-collector")
