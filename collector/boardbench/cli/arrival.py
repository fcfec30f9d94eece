"""The wait for a board that was flashed: until it reports, or what to look at when it does not."""

from __future__ import annotations

import time

import click

from boardbench.cli.address import Address
from boardbench.cli.client import CollectorClient
from boardbench.cli.errors import CliError, ExitCode, Unreachable
from boardbench.v1 import collector_pb2

_WAIT_SECONDS = 900.0  # a first boot resizes the card, installs, and starts again; a slow card takes minutes
_LOOK_SECONDS = 2.0


class Arrival:
    """Knows which boards there were before, so that the one that comes is told from them."""

    def __init__(
        self, collector: Address, *, seconds: float = _WAIT_SECONDS, look_seconds: float = _LOOK_SECONDS
    ) -> None:
        """Asks the collector now. Raises Unreachable."""
        self._collector = collector
        self._seconds = seconds
        self._look_seconds = look_seconds
        with CollectorClient(collector) as client:
            self._before = {device.board.device_id: device for device in client.devices()}

    def wait(self, hostname: str = "", *, known: bool = False) -> ExitCode:
        """Returns when a board reports that was not there before, or not up; of this name, when one is given.

        ``known``: a board of this name may have been up all the time, and counts once it is heard of again.
        Raises CliError after a quarter of an hour, with what to look at; Unreachable where the collector does
        not answer by then.
        """
        click.echo(
            f"waiting for the board to report to {self._collector} (Ctrl-C ends the wait, and nothing else)",
            err=True,
        )
        deadline = time.monotonic() + self._seconds
        lost: Unreachable | None = None
        with CollectorClient(self._collector) as client:
            while time.monotonic() < deadline:
                try:
                    devices = client.devices()
                except Unreachable as error:
                    # The collector is started anew, or this computer was in another network for a moment.
                    if lost is None:
                        click.echo(f"{error}\nstill waiting", err=True)
                    lost, devices = error, []
                else:
                    lost = None
                for device in devices:
                    if device.up and hostname in ("", device.board.hostname) and self._is_news(device, known):
                        board = device.board
                        click.echo(f"{board.device_id} reports: {board.model or board.hostname}, {board.os}")
                        return ExitCode.DONE
                time.sleep(self._look_seconds)
        if lost is not None:
            raise lost
        raise CliError(
            f"no board has reported within {self._seconds / 60:.0f} minutes. Look whether: it has power and "
            "a network (a cable, or --wifi with the right password); boardbench/install.log on the card's "
            f'boot partition ends with "done"; the board reaches {self._collector} (is that this computer\'s '
            "address in the board's network, and does the collector listen there?); the token was not used "
            "before"
        )

    def _is_news(self, device: collector_pb2.Device, known: bool) -> bool:
        before = self._before.get(device.board.device_id)
        if before is None or not before.up:
            return True
        # A board that was there all the time is not the one that is switched on now.
        return known and device.last_seen_at.ToNanoseconds() > before.last_seen_at.ToNanoseconds()
