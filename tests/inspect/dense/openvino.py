"""OpenVINO: XML."""

from __future__ import annotations

from collections.abc import Callable


def xml_of(piece: str, around: str = "<layers>{}</layers>") -> Callable[[int], bytes]:
    """The piece as often as there is room for it."""
    return lambda size: (
        f'<net name="x" version="11">{around.format(piece * max(1, size // len(piece)))}</net>'.encode()
    )


LAYER = (
    '<layer id="1" name="n" type="MatMul"><data element_type="f32" shape="1,1" offset="0" size="4"/>'
    '<input><port id="0"><dim>1</dim><dim>2</dim></port><port id="1"><dim>1</dim></port></input>'
    '<output><port id="2" precision="FP32"><dim>1</dim><dim>2</dim></port></output></layer>'
)


def xml_long_element(size: int) -> bytes:
    """An element that is as long as the file."""
    return b'<net version="11"><layers a="' + b"a" * size + b'"></layers></net>'


def xml_many_attributes(size: int) -> bytes:
    """Elements with as many attributes as an element may be long."""
    element = "<data " + " ".join(f'a{number}=""' for number in range(40_000)) + "/>"
    layer = f'<layer id="0" name="" type="">{element}</layer>'
    return xml_of(layer)(size)


def xml_comments_before_the_root(size: int) -> bytes:
    """Comments of which an expression could tell in any number of ways where each ends."""
    return b"<!---->" * (size // 7)


DENSE: dict[str, Callable[[int], bytes]] = {
    "openvino layers": xml_of(LAYER),
    "openvino bare layers": xml_of("<layer/>"),
    "openvino bare elements": xml_of("<a/>"),
    "openvino edges": xml_of("<edge/>", "<edges>{}</edges>"),
    "openvino dimensions": xml_of(
        "<dim>1</dim>", "<layers><layer><output><port>{}</port></output></layer></layers>"
    ),
    "openvino lines": xml_of(
        "\n", "<layers><layer><output><port><dim>{}</dim></port></output></layer></layers>"
    ),
    "openvino letters": xml_of(
        "&lt;", "<layers><layer><output><port><dim>{}</dim></port></output></layer></layers>"
    ),
    "openvino deep": xml_of("<a><a><a><a><a><a><a><a></a></a></a></a></a></a></a></a>"),
    "openvino long element": xml_long_element,
    "openvino many attributes": xml_many_attributes,
    "openvino comments": xml_of("<!---->"),
    "openvino comments before the root": xml_comments_before_the_root,
}
