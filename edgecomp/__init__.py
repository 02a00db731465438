"""edgecomp: compiles multimodal LLMs for edge devices, with a static budget of visual tokens inside the graph."""

__version__ = "0.1.0"
