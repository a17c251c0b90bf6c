"""One file per metric, with its formula and source."""
