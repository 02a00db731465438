"""HTML reports: one self-contained page from what `edgecomp profile` measured."""
