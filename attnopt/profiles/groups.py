"""Layers that can share attention maps, found as structure of the graph of measured errors.

Nodes are layers, an edge i - j (i < j) says that j can read the maps of i: the error of j's output, measured with heads
aligned, is at most `MAX_ERROR`. Similarity is noted on the edge, but decides nothing: every pair was measured, and maps
that are unlike can serve where a layer hardly depends on them. A group is a connected run of consecutive layers whose
first is the source of all others: maps must exist before they are read (order), and they should not be kept for long
(contiguity). Where layers of several kinds alternate, with and without a window or a shift, no map serves the other
kind, and consecutive means that no layer of the same kind lies between. Groups do not overlap.
"""

from __future__ import annotations

import networkx
from torch import Tensor

from attnopt.profiles.profile import SharingGroup

#: Largest NMSE of a consumer's output. At 0.1 an output keeps a cosine of about 0.95 to its own.
MAX_ERROR = 0.1


def sharing_graph(similarity: Tensor, error: Tensor, max_error: float = MAX_ERROR) -> networkx.Graph:
    """Layers, the next layer of the same kind, and an edge wherever the later can read the maps of the earlier.

    Args:
        similarity: [L, L], of [source, consumer].
        error: [L, L] measured, NaN where it was not: layers of another kind.
        max_error: the largest of an edge.
    """
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(similarity)))
    for i in range(len(similarity)):
        alike = [j for j in range(i + 1, len(similarity)) if not bool(error[i, j].isnan())]
        graph.nodes[i]["next"] = alike[0] if alike else None
        for j in alike:
            if float(error[i, j]) <= max_error:
                graph.add_edge(i, j, error=float(error[i, j]), similarity=float(similarity[i, j]))
    return graph


def sharing_groups(graph: networkx.Graph) -> tuple[SharingGroup, ...]:
    """Disjoint runs of consecutive layers of which the first is a neighbour of all others; largest savings first.

    Args:
        graph: as `sharing_graph` makes it, whose nodes know the next layer of their kind.

    Returns:
        groups of two layers or more, in layer order.
    """
    groups = []
    for component in networkx.connected_components(graph):
        for run in _runs(graph, sorted(component)):
            groups += _split(graph, run)
    return tuple(sorted(groups, key=lambda group: group.layers))


def _runs(graph: networkx.Graph, layers: list[int]) -> list[list[int]]:
    """Maximal runs of layers each of which is the next of its kind."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == graph.nodes[runs[-1][-1]]["next"]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def _split(graph: networkx.Graph, run: list[int]) -> list[SharingGroup]:
    """Cut a run into stars with the source first, so that most layers share and, of equals, the error is smallest.

    best[p] is the best that can be made of the layers from place p on: (sharing layers, -summed error, groups).
    """
    best: list[tuple[int, float, list[list[int]]]] = [(0, 0.0, []) for _ in range(len(run) + 1)]
    for place in range(len(run) - 1, -1, -1):
        best[place] = best[place + 1]
        error = 0.0
        for end in range(place + 1, len(run)):
            if not graph.has_edge(run[place], run[end]):
                break
            error += graph.edges[run[place], run[end]]["error"]
            rest = best[end + 1]
            found = (end - place + rest[0], rest[1] - error, [run[place : end + 1], *rest[2]])
            if found[:2] > best[place][:2]:
                best[place] = found
    result = []
    for layers in best[0][2]:
        edges = [graph.edges[layers[0], other] for other in layers[1:]]
        similarity, error = min(e["similarity"] for e in edges), max(e["error"] for e in edges)
        result.append(SharingGroup(tuple(layers), similarity, error))
    return result
