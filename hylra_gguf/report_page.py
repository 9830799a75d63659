"""How `report` reads: the same sections as Markdown for the terminal and as one HTML page without scripts or outside resources.

Takes the dict of report.py; names from files are shown as text only, whatever they hold.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html import escape
from typing import Any, Dict, List, Optional

MODE_NAMES = {"F": "full", "S": "select", "R": "reuse"}
MATRIX_TITLES = {
    "recall": "Recall: attention mass of a layer on the cells of another",
    "overlap": "Overlap: cells that two layers have in common",
    "overlap_free": "Overlap without the forced sink and recent cells",
}
LAYER_TITLES = {
    "sensitivity": ("Sensitivity: error when a layer sees only its own top-k", "sensitivity (RNMSE)"),
    "sparsity": ("Sparsity: cells that hold 90 % of the attention mass", "share of the cells"),
    "importance": ("Importance: how far attention turns the layer's input", "1 - cos(x, x + attention)"),
}
CSS = """
body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:780px;margin:0 auto;padding:12px;overflow-wrap:anywhere}
h1{font-size:1.4em}h2{font-size:1.15em;margin:1.8em 0 .3em}p{margin:.4em 0}
img{max-width:100%;height:auto;display:block;margin:8px 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85em;font-variant-numeric:tabular-nums}
th,td{padding:2px 8px 2px 0;text-align:left;vertical-align:top;border-bottom:1px solid #e5e5e5}
.wide td,.wide th{padding:1px 3px;font-size:.75em;overflow-wrap:normal}
summary{cursor:pointer;color:#0055aa}
"""
# a browser then loads nothing even if a name found a way out of its quotes
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    title: str
    note: str = ""
    head: List[str] = field(default_factory=list)
    rows: List[List[str]] = field(default_factory=list)
    figures: List[str] = field(default_factory=list)
    is_matrix: bool = False


# -- sections ---------------------------------------------------------------------------------------------------------


def sections(data: Dict[str, Any]) -> List[Section]:
    found = [about(data), layers(data)]
    if data.get("frontier"):
        found.append(frontier(data))
    if data.get("halves"):
        found.append(halves(data))
    found += [heads(data, name) for name in data.get("heads", {})]
    return found + [matrix(data, name) for name in data["matrices"]]


def about(data: Dict[str, Any]) -> Section:
    plan = data["plan"]
    rows = [[name, text] for name, text in data["about"].items()]
    rows.append(["layer map", " ".join(plan["layer_map"][at:at + 10] for at in range(0, len(plan["layer_map"]), 10))])
    if plan["mean"] is not None:
        rows.append([f"{data['similarity']} of reuse layers", f"smallest {number(plan['smallest'])}, mean {number(plan['mean'])}"])
    if data["left_out"]:
        rows.append(["left out", f"this {data['kind']} does not hold: {', '.join(data['left_out'])}"])
    return Section("Report", "", ["HyLRA", clean(data["file"])], rows)


def layers(data: Dict[str, Any]) -> Section:
    """What every layer does, with what was measured about it"""
    edges = {edge["layer"]: edge for edge in data["plan"]["edges"]}
    pairs = list(dict.fromkeys(name for edge in edges.values() for name in edge if name not in ("layer", "source", "top_k")))
    columns = layer_columns(data)
    rows = []
    for layer, mode in enumerate(data["plan"]["layer_map"]):
        edge = edges.get(layer, {})
        rows.append([str(layer), MODE_NAMES[mode], str(edge.get("source", "")), str(edge.get("top_k", "")),
                     *(number(edge[name]) if name in edge else "" for name in pairs),
                     *(number(values[layer]) for values in columns.values())])
    note = f"recall and overlap of a reuse layer are those with its source, at {data['pairs_at']}" if pairs else ""
    return Section("Layers", note, ["layer", "does", "source", "top_k", *map(column, pairs), *columns], rows,
                   ["layer-map", *data["layers"]])


def layer_columns(data: Dict[str, Any]) -> Dict[str, List[Optional[float]]]:
    found = {}
    for name, of_name in data["layers"].items():
        if name == "sensitivity":
            found.update({f"sensitivity at {k}": of_k["mean"] for k, of_k in of_name.items()})
        else:
            found[name] = of_name["mean"]
    return found


def frontier(data: Dict[str, Any]) -> Section:
    rows = [[f"{row['theta']:g}", str(row["dense"] - row["select"]), str(row["select"]), str(row["reuse"]), number(row["min_recall"]),
             number(row["mean_recall"])] for row in data["frontier"]]
    note = f"the plan of each theta on {data['similarity']} at {data['pairs_at']}; layers that cannot take part are not counted"
    return Section("Frontier", note, ["theta", "full", "select", "reuse", "smallest recall", "mean recall"], rows, ["frontier"])


def halves(data: Dict[str, Any]) -> Section:
    found = {name: of_name for name, of_name in data["halves"].items() if name != "pairs"}
    rows = [[name, str(len(of_name["fit"])), number(of_name["correlation"]),
             number(of_name["mean_difference"], 4), number(of_name["largest_difference"], 4)] for name, of_name in found.items()]
    return Section("Held-out against fit", f"means over the two halves of the samples; recall and overlap of pairs of different layers at "
                   f"{data['pairs_at']}, the others of layers at top_k {data['top_k']}",
                   ["", "values", "correlation", "mean difference", "largest difference"], rows, [f"halves-{name}" for name in found])


def heads(data: Dict[str, Any], name: str) -> Section:
    by_head = data["heads"][name]
    rows = [[str(layer), *(number(value) for value in of_layer)] for layer, of_layer in enumerate(by_head)]
    note = f"at top_k {data['top_k']}" if name == "sensitivity" else "share of the cells that holds 90 % of the mass"
    return Section(f"{name.capitalize()} of KV heads", f"{note}; every head with its own list",
                   ["layer", *(f"head {head}" for head in range(len(by_head[0])))], rows, [f"{name}-heads"])


def matrix(data: Dict[str, Any], name: str) -> Section:
    found, modes = data["matrices"][name], data["plan"]["layer_map"]
    rows = [[f"{layer} {modes[layer]}", *("" if value is None else f"{100 * value:.0f}" for value in row)]
            for layer, row in enumerate(found)]
    return Section(MATRIX_TITLES.get(name, name), f"at {data['pairs_at']}, in percent; rows are sources, columns later layers",
                   ["", *map(str, range(len(found)))], rows, [name.replace("_", "-")], True)


# -- values -----------------------------------------------------------------------------------------------------------


def number(value: Optional[float], digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def column(name: str) -> str:
    return "overlap, free cells" if name == "overlap_free" else name


def correlation(of_name: Dict[str, Any]) -> str:
    return "no correlation: a half does not vary" if of_name["correlation"] is None else f"correlation {of_name['correlation']:.3f}"


def clean(text: str) -> str:
    """A foreign file's control characters must not reach the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


# -- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(data: Dict[str, Any]) -> str:
    parts = []
    for section in sections(data):
        title = [] if section.title == "Report" else [f"## {section.title}", ""]
        note = [section.note, ""] if section.note else []
        parts.append("\n".join([*title, *note, *(percent_block(section) if section.is_matrix else table(section))]))
    return "\n\n".join(parts)


def table(section: Section) -> List[str]:
    cells = [[clean(cell).replace("|", "\\|") for cell in row] for row in [section.head, *section.rows]]
    widths = [max(3, *map(len, column)) for column in list(zip(*cells))[:-1]] + [3]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]]


def percent_block(section: Section) -> List[str]:
    """Narrow enough for 30 layers in a terminal"""
    lines = [f"{row[0]:>5} " + " ".join(f"{cell:>3}" for cell in row[1:]) for row in [section.head, *section.rows]]
    return ["```", *(line.rstrip() for line in lines), "```"]


# -- HTML -------------------------------------------------------------------------------------------------------------


def html(data: Dict[str, Any], drawn: Dict[str, bytes]) -> str:
    """drawn: PNGs by the names that the sections ask for"""
    name = escape(clean(data["file"]).rsplit("/", 1)[-1])
    body = "\n".join(html_section(section, drawn) for section in sections(data))
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>HyLRA: {name}</title><style>{CSS}</style></head>\n"
            f"<body><h1>HyLRA: {name}</h1>\n{body}\n</body></html>\n")


def html_section(section: Section, drawn: Dict[str, bytes]) -> str:
    title = "" if section.title == "Report" else f"<h2>{escape(section.title)}</h2>\n"
    note = f"<p>{escape(section.note)}</p>\n" if section.note else ""
    images = "".join(image(name, drawn[name]) for name in section.figures if name in drawn)
    numbers = html_table(section)
    return f"{title}{note}{images}" + (f"<details><summary>numbers</summary>{numbers}</details>" if images else numbers)


def image(name: str, png: bytes) -> str:
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">\n'


def html_table(section: Section) -> str:
    head = "".join(f"<th>{escape(clean(cell))}</th>" for cell in section.head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(clean(cell))}</td>" for cell in row) + "</tr>\n" for row in section.rows)
    kind = ' class="wide"' if section.is_matrix else ""
    return f'<div class="scroll"><table{kind}><tr>{head}</tr>\n{rows}</table></div>'
