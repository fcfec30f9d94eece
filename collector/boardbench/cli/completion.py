"""``boardbench completion``: the script that teaches a shell the commands, options and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from boardbench.cli.errors import ExitCode

_EXAMPLES = """\b
Examples:
  bash   boardbench completion bash > ~/.local/share/bash-completion/completions/boardbench
  zsh    boardbench completion zsh > "${fpath[1]}/_boardbench"
  fish   boardbench completion fish > ~/.config/fish/completions/boardbench.fish
"""


@click.command(epilog=_EXAMPLES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> ExitCode:
    """Print the completion script of a shell."""
    found = get_completion_class(shell)
    assert found is not None, f"click completes {shell}"
    root = context.find_root()
    click.echo(found(root.command, {}, "boardbench", "_BOARDBENCH_COMPLETE").source())
    return ExitCode.DONE
