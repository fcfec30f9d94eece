"""``python -m boardbench.agent``: the same as ``boardbench-agent``."""

from boardbench.agent.cli import main

if __name__ == "__main__":
    main()
