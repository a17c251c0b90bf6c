"""What transformations share: facts lowered to nodes, weights of heads, repair on calibration text."""
