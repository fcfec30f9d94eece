"""The recipes of the images, read as a builder reads them: nothing in them is built here."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RECIPES = sorted((REPOSITORY / "deploy/container").glob("*.Containerfile"))

# docs.docker.com/reference/dockerfile: what an image can be made with, of which these use a few.
KNOWN = {
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "ONBUILD",
    "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip


@dataclass
class Stage:
    """What follows a FROM."""

    image: str
    name: str = ""
    orders: list[tuple[str, str]] = field(default_factory=list)

    def of(self, kind: str) -> list[str]:
        return [rest for word, rest in self.orders if word == kind]


def read(recipe: Path) -> tuple[list[Stage], dict[str, str]]:
    """The stages, with lines that go on put together, and the arguments' defaults."""
    lines = [line for line in recipe.read_text().splitlines() if line.strip() and not line.startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    stages: list[Stage] = []
    arguments: dict[str, str] = {}
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        assert word in KNOWN, f"{recipe.name}: {line!r}"
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            stages.append(Stage(image.strip(), name.strip()))
        else:
            stages[-1].orders.append((word, rest.strip()))
        if word == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value
    return stages, arguments


def extras() -> dict[str, list[str]]:
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return {**project["optional-dependencies"], "": list(project["scripts"])}


def test_there_are_two_recipes() -> None:
    assert [path.name for path in RECIPES] == ["agent.Containerfile", "collector.Containerfile"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_builds_from_what_is_there(recipe: Path) -> None:
    stages, arguments = read(recipe)
    build, final = stages
    assert build.image == final.image
    # A version and not what is newest on the day; one of Docker's own, which are there for amd64 and arm64.
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-(bookworm|trixie)", build.image)
    assert build.name == "build"
    copied = [word for rest in build.of("COPY") for word in rest.split()[:-1]]
    for name in copied:
        assert (REPOSITORY / name).exists(), name
    # What the wheel is built from is there (pyproject.toml, tool.hatch.build).
    assert {"pyproject.toml", "README.md", "LICENSE", "agent", "collector", "protos"} <= set(copied)
    (install,) = (rest for rest in build.of("RUN") if "pip install" in rest)
    (wanted,) = re.findall(r"\.\[([^\]]+)\]", install)
    names = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], wanted).split(",")
    assert set(names) <= set(extras()), names
    # Nothing that only holds on one architecture.
    assert not re.search(r"x86_64|amd64|aarch64|arm64", "\n".join(map(str, (build.orders, final.orders))))
    assert final.of("COPY") == ["--from=build /opt/boardbench /opt/boardbench"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_an_image_holds_little_and_runs_as_nobody_special(recipe: Path) -> None:
    _, final = read(recipe)[0]
    assert not final.of("ADD")
    for order in final.of("RUN"):
        if "apt-get install" in order:
            assert "--no-install-recommends" in order and "rm -rf /var/lib/apt/lists/*" in order
            assert order.index("apt-get update") < order.index("apt-get install")
        shlex.split(order)
    kinds = [word for word, _ in final.orders]
    assert kinds.index("USER") < kinds.index("ENTRYPOINT") and final.of("USER") == ["boardbench"]
    (volume,) = final.of("VOLUME")
    assert f"--home-dir {volume} --create-home" in "\n".join(final.of("RUN")), "the user may write there"
    assert not any(
        re.search(r"(?i)token|password|secret|key", rest) for rest in final.of("ENV") + final.of("ARG")
    )
    (entry,) = final.of("ENTRYPOINT")
    program = entry.strip("[]").split(",")[0].strip(' "')
    # As a list: signals reach the program, and not a shell.
    assert entry.startswith("[") and program in extras()[""]
    assert "PYTHONUNBUFFERED=1" in "\n".join(final.of("ENV"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_how_it_is_built_for_several_architectures(recipe: Path) -> None:
    head = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any("buildx build --platform linux/amd64,linux/arm64" in line for line in head)


def test_the_ports_are_those_of_the_programs() -> None:
    from boardbench.cli.address import AGENT_PORT, COLLECTOR_PORT

    ports = {path.name.partition(".")[0]: read(path)[0][-1].of("EXPOSE")[0].split() for path in RECIPES}
    assert ports["agent"] == [str(AGENT_PORT)]
    assert ports["collector"][0] == str(COLLECTOR_PORT)
