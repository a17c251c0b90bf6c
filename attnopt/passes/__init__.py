"""Transformations and analyses of programs. `registry` lists them; none is imported before it is used."""
