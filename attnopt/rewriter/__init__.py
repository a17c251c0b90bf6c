"""The compiler core: graph, sites, weights, passes, verifier. It knows no method and no target by name."""
