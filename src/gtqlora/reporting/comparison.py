"""Several edits in one drawing."""

from __future__ import annotations

from collections.abc import Sequence

from gtqlora.reporting.artefacts import Peer
from gtqlora.reporting.figures import Plot, Spec, axis_of, errors_of, layout_of, plain
from gtqlora.reporting.words import MANY, NONE, WAYS, mode, returned


def trade_off(peers: Sequence[Peer]) -> Plot:
    """Return each edit by its lookalike and harmful refusal; the aim is top left."""
    shares = [_share(peer) for peer in peers]
    # drawn in this order, the largest mark first, so that no mark hides a smaller one
    order = sorted(range(len(peers)), key=lambda i: -shares[i])  # the larger below, so that each can be seen
    edits = _edits([peers[i] for i in order], [shares[i] for i in order])
    original = _original(peers[0])
    names = [*(peers[i].label for i in order), "before"]
    places = zip([*edits["x"], *original["x"]], [*edits["y"], *original["y"]], names, strict=True)
    layout = layout_of(
        xaxis=axis_of("lookalike prompts refused", range=[-0.08, 1.1], tickformat=".0%"),
        yaxis=axis_of("harmful prompts refused", range=[-0.08, 1.12], tickformat=".0%"),
        annotations=_names(list(places)),
    )
    return Plot(
        "trade-off",
        f"Scatter of {len(peers)} edits: lookalike refusal against harmful refusal; the aim is the top left corner",
        {"data": [edits, original], "layout": layout},
        height=400,
    )


def _share(peer: Peer) -> float:
    """Return the share of repaired refusals that return under the original's routing; 0 where too few were repaired."""
    found = peer.verdict.mediation
    return found.direct.refuses.value if found.direct and found.repaired >= MANY else 0.0


def _edits(peers: Sequence[Peer], shares: Sequence[float]) -> Spec:
    x = [peer.verdict.table["lookalike"].refusal_after for peer in peers]
    y = [peer.verdict.table["harmful"].refusal_after for peer in peers]
    ways = [peer.verdict.mediation for peer in peers]
    return {
        "type": "scatter",
        "mode": "markers",
        "cliponaxis": False,
        "x": [interval.value for interval in x],
        "y": [interval.value for interval in y],
        "error_x": errors_of(x),
        "error_y": errors_of(y),
        "marker": {
            "size": [12 + 18 * share for share in shares],
            "color": list(shares),
            # a fixed scale, or one edit alone would always have the strongest colour
            "cmin": 0,
            "cmax": 1,
            "colorscale": [[0, "var(--share-low)"], [1, "var(--share-high)"]],
            "opacity": 0.9,
            "line": {"width": 1.5, "color": "var(--card)"},
        },
        "text": [plain(f"{peer.label}: {mode(peer.info)}") for peer in peers],
        "customdata": [plain(f"{returned(found)} return ({WAYS.get(found.routing, NONE)})") for found in ways],
        "hovertemplate": (
            "<b>%{text}</b><br>lookalike refused %{x:.1%}<br>harmful refused %{y:.1%}<br>%{customdata}<extra></extra>"
        ),
    }


def _original(peer: Peer) -> Spec:
    before = peer.verdict.table
    return {
        "type": "scatter",
        "mode": "markers",
        "cliponaxis": False,
        "x": [before["lookalike"].refusal_before.value],
        "y": [before["harmful"].refusal_before.value],
        "marker": {"symbol": "x-thin-open", "size": 12, "color": "var(--ink-soft)", "line": {"width": 2.5}},
        "hovertemplate": (
            "<b>before the edit</b><br>lookalike refused %{x:.1%}<br>harmful refused %{y:.1%}<extra></extra>"
        ),
    }


def _names(points: Sequence[tuple[float, float, str]]) -> list[Spec]:
    """Return one label for all points that lie on one another, toward the middle of the plot."""
    groups: list[tuple[float, float, list[str]]] = []
    for x, y, name in points:
        # 0.06 of the axis is about the height of a label: closer points would print over each other
        near = next((g for g in groups if abs(g[0] - x) < 0.06 and abs(g[1] - y) < 0.06), None)
        if near:
            near[2].append(name)
        else:
            groups.append((x, y, [name]))
    return [
        {
            "x": x,
            "y": y,
            "text": "<br>".join(plain(name) for name in names),
            # offsets of the label in pixels, toward the middle, where there is room
            "ax": 34 if x < 0.5 else 0,
            "ay": 20 + 12 * len(names) if y > 0.5 else -14 - 12 * len(names),
            "xanchor": "left" if x < 0.5 else "right",
            "align": "left" if x < 0.5 else "right",
            "arrowcolor": "var(--ink-soft)",
            "arrowwidth": 1,
            "arrowhead": 0,
            "standoff": 8,
            "font": {"color": "var(--ink)"},
        }
        for x, y, names in groups
    ]
