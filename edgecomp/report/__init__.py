"""Reports: what `edgecomp profile` measured and predicted, as one self-contained page and as Markdown."""
